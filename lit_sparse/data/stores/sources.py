"""What can be packed: text files, folders, JSON lines, Parquet, Hugging Face datasets on disk."""

from __future__ import annotations

import json
import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

from lit_sparse.data.stores.manifest import MANIFEST, PLAN, UNFINISHED

_TEXT = """
.txt .text .md .markdown .rst .org .tex .bib .html .htm .xml .css .csv .tsv .yaml .yml .toml .ini
.cfg .py .pyi .pyx .c .h .cc .cpp .cxx .hpp .cu .cuh .js .jsx .ts .tsx .java .kt .go .rs .rb .php
.pl .lua .sh .sql .r .jl .scala .swift .m .hs .ml .lean .v
"""
TEXT_EXTENSIONS = frozenset(_TEXT.split())
"""Files of a folder that are one document each."""
JSONL, PARQUET = ".jsonl", ".parquet"
"""Files that hold one document a line, or a row."""

_DATASET, _DATASETS = "state.json", "dataset_dict.json"


@dataclass(frozen=True)
class Reading:
    """How documents are read.

    Args:
        field: key or column of the text, or of the messages.
        chat: whether a document is a list of messages.
        split: of a dataset that has several.
    """

    field: str = "text"
    chat: bool = False
    split: str | None = None


@dataclass(frozen=True)
class Entry:
    """A file or a dataset of an input.

    Args:
        kind: "text", "jsonl", "parquet" or "dataset".
        path: where it lies.
        name: its path relative to the input: documents are called after it.
        size: bytes, on disk.
        changed: time of its last change, nanoseconds.
    """

    kind: str
    path: str
    name: str
    size: int
    changed: int


class Input:
    """One input: "stdlib", a file, or a folder, which is read recursively.

    Hidden files and folders, `__pycache__` and token stores in it are left out.

    Raises:
        ValueError: there is no such path, or it is a token store.
    """

    def __init__(self, path: str | Path, reading: Reading) -> None:
        self.path, self.reading = str(path), reading
        self._root = Path(path)
        if path == "stdlib":
            self._root = Path(sysconfig.get_path("stdlib"))
        elif not self.path or not self._root.exists():
            raise ValueError(
                f"INPUT {self.path!r} does not exist; give a folder, a file, or 'stdlib' (Python's "
                "own source)"
            )
        elif _is_store(self._root):
            raise ValueError(
                f"INPUT {self.path!r} is a token store already; train from it with "
                "--data.path, or pack the text that it was made from"
            )

    @cached_property
    def entries(self) -> list[Entry]:
        """All files and datasets, in the order of their names."""
        if self._root.is_file():
            return [_entry(self._root, _printable(self._root.name))]
        if _is_dataset(self._root):
            return [self._dataset(self._root, "")]
        if self.path == "stdlib":
            found = self._walk({".py"}, {"site-packages", "dist-packages", "test", "tests"})
        else:
            found = self._walk(TEXT_EXTENSIONS | {JSONL, PARQUET}, set())
        return sorted(found, key=lambda entry: entry.name)

    def fingerprint(self) -> dict[str, Any]:
        """Identity of the input by names, sizes and times of change; no content is read."""
        digest = sha256()
        for entry in self.entries:
            digest.update(f"{entry.name}\0{entry.size}\0{entry.changed}\n".encode())
        return {
            "path": self.path if self.path == "stdlib" else str(self._root.resolve()),
            "files": len(self.entries),
            "bytes": sum(entry.size for entry in self.entries),
            "digest": digest.hexdigest(),
        }

    def _walk(self, extensions: set[str] | frozenset[str], apart: set[str]) -> Iterator[Entry]:
        for folder, subfolders, files in os.walk(self._root):
            here = Path(folder)
            below = []
            for name in subfolders:
                apart_here = name in apart or name == "__pycache__" or name.startswith(".")
                if apart_here or _is_store(here / name):
                    continue
                if _is_dataset(here / name):
                    yield self._dataset(here / name, self._relative(here / name))
                else:
                    below.append(name)
            subfolders[:] = below
            for name in files:
                if Path(name).suffix.lower() in extensions and not name.startswith("."):
                    yield _entry(here / name, self._relative(here / name))

    def _relative(self, path: Path) -> str:
        return _printable(path.relative_to(self._root).as_posix())

    def _dataset(self, folder: Path, name: str) -> Entry:
        if (folder / _DATASETS).is_file():
            splits = json.loads((folder / _DATASETS).read_text())["splits"]
            if self.reading.split not in splits:
                given = self.reading.split
                hint = f", but no {given!r}" if given else "; choose one: --split or its folder"
                raise ValueError(f"INPUT {folder} has the splits {', '.join(splits)}{hint}")
            folder = folder / str(self.reading.split)
        stats = [path.stat() for path in folder.iterdir() if path.is_file()]
        size, changed = sum(s.st_size for s in stats), max(s.st_mtime_ns for s in stats)
        return Entry("dataset", str(folder), name or _printable(folder.name), size, changed)


def inputs_fingerprint(
    inputs: Sequence[str | Path], split: str | None = None
) -> list[dict[str, Any]]:
    """Identity of inputs by the paths, sizes and times of change of their files; cheap.

    Raises:
        ValueError: an input does not exist or is a token store.
    """
    return [Input(path, Reading(split=split)).fingerprint() for path in inputs]


def _entry(path: Path, name: str) -> Entry:
    try:
        stat = path.stat()
        size, changed = stat.st_size, stat.st_mtime_ns
    except OSError:
        size = changed = 0  # reading it fails, too, and is counted
    kind = {JSONL: "jsonl", PARQUET: "parquet"}.get(path.suffix.lower(), "text")
    return Entry(kind, str(path), name, size, changed)


def _printable(name: str) -> str:
    """A file's name may hold bytes that are not UTF-8; Arrow and a terminal want text."""
    return os.fsencode(name).decode(errors="backslashreplace")


def _is_dataset(folder: Path) -> bool:
    return (folder / _DATASET).is_file() or (folder / _DATASETS).is_file()


def _is_store(folder: Path) -> bool:
    unfinished = folder.name.endswith(UNFINISHED) and (folder / PLAN).is_dir()
    return unfinished or (folder / MANIFEST).is_file()
