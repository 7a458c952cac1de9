"""Files and directories that are there whole or not at all, and the sums to check them by."""

from __future__ import annotations

import io
import os
import shutil
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

_CHUNK = 1 << 24
"""Bytes read at a time."""


def write_whole(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Write a file so that, whenever the process or the machine stops, `path` is the old or the
    new one.

    A temporary file in the same directory (a rename is atomic only inside a file system) reaches
    the disk before it gets the name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write_synced(unfinished, write)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    sync(path.parent)


def publish(unfinished: Path, path: Path) -> None:
    """Give a directory whose files are on the disk its name, in the place of what had it.

    Whenever the process or the machine stops, `path` is not half of it.
    """
    for directory in (unfinished, *(p for p in unfinished.rglob("*") if p.is_dir())):
        sync(directory)
    remove(path)
    unfinished.rename(path)
    sync(path.parent)


def remove(path: Path) -> None:
    """Delete a file or a directory, if it is there; a directory loses its name first."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    leaving = path
    if not path.name.startswith("."):
        leaving = path.with_name(f".{path.name}.removed.tmp")
        shutil.rmtree(leaving, ignore_errors=True)
        path.rename(leaving)
    shutil.rmtree(leaving)


@dataclass(frozen=True)
class Sum:
    """What a file must be to be the one that was written."""

    size: int
    """Bytes."""
    crc32: int


class _Summing(io.BufferedWriter):
    """Sums what is written from start to end."""

    size = crc32 = 0

    def write(self, data: Any) -> int:
        self.size += memoryview(data).nbytes
        self.crc32 = zlib.crc32(data, self.crc32)
        return super().write(data)


def write_synced(path: Path, write: Callable[[BinaryIO], Any]) -> Sum:
    """Write a file from start to end, all the way to the disk; an OSError names the file."""
    try:
        with _Summing(io.FileIO(path, "wb")) as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
            return Sum(file.size, file.crc32)
    except (OSError, RuntimeError) as error:
        # PyTorch's writer puts an error of its own before that of the disk.
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError) or cause.errno is None:
            raise
        raise OSError(cause.errno, cause.strerror, str(path)) from error


def sum_of(path: Path) -> Sum:
    """The sum of a file; reads all of it."""
    size = crc32 = 0
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            size, crc32 = size + len(chunk), zlib.crc32(chunk, crc32)
    return Sum(size, crc32)


def sync(path: Path) -> None:
    """Wait until a file, or the list of names in a directory, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
