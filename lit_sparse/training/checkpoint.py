"""Checkpoint files: written whole or not at all, and checked before they are believed."""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO
from pytorch_lightning.utilities import rank_zero_warn

_NAME = re.compile(r"step=(\d+)\.ckpt")
_UNFINISHED = ".*.tmp"


def checkpoint_name(step: int) -> str:
    """File name of the checkpoint after `step` optimizer steps."""
    return f"step={step}.ckpt"


def checkpoint_step(path: Path) -> int | None:
    """Optimizer steps done in a checkpoint, by its name; None for names that are not ours."""
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else None


def checkpoints(directory: Path) -> list[Path]:
    """Checkpoints of a directory, oldest step first. Times of files do not count: copies change
    them.
    """
    steps = {path: checkpoint_step(path) for path in directory.glob("*.ckpt")}
    return [path for step, path in sorted((s, p) for p, s in steps.items() if s is not None)]


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint file, or None. Reads all of it: entries have checksums."""
    if path.is_dir():  # sharded checkpoints are directories of the strategy's own format
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            if broken := archive.testzip():
                return f"the checksum of {broken} does not match"
        own_state(path)  # the list of entries has no checksum, and PyTorch reads more of it
    except Exception as error:  # whatever a reader makes of arbitrary bytes
        return str(error).partition("\n")[0] or type(error).__name__
    return None


def newest_whole(directory: Path) -> Path | None:
    """The newest checkpoint that is not damaged, or None; a warning names those that are."""
    passed: list[str] = []
    for path in reversed(checkpoints(directory)):
        if (wrong := damage(path)) is None:
            if passed:
                rank_zero_warn(f"damaged: {'; '.join(passed)}. Using {path} instead.")
            return path
        passed.append(f"{path} ({wrong})")
    if passed:
        rank_zero_warn(f"damaged: {'; '.join(passed)}. There is no other checkpoint.")
    return None


def own_state(path: Path) -> dict[str, Any] | None:
    """What `RunCheckpoint` adds to a checkpoint; None in one that somebody else wrote, or that is
    a directory. Tensors stay in the file.
    """
    if path.is_dir():
        return None
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True).get("lit_sparse")


def remove_unfinished(directory: Path) -> None:
    """Delete what a process that was killed while it wrote has left."""
    for path in directory.glob(_UNFINISHED):
        path.unlink(missing_ok=True)


def write_whole(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Write a file so that, whenever the process or the machine stops, `path` is the old or the
    new one.

    A temporary file in the same directory (a rename is atomic only inside a file system) reaches
    the disk before it gets the name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(unfinished, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint files, written whole and loaded without unpickling arbitrary types.

    Lightning writes through a temporary file in the system's temporary directory, which is
    often another file system: there its rename is a copy.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
        else:
            write_whole(Path(path), lambda file: torch.save(checkpoint, file))

    def load_checkpoint(
        self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        return super().load_checkpoint(path, map_location, weights_only is not False)


# -- what a run has shown so far --

_EVENTS = "events.out.tfevents.*"


def event_sizes(run: Path) -> dict[str, int]:
    """Bytes of each TensorBoard event file of a run directory, by its path in there."""
    return {str(p.relative_to(run)): p.stat().st_size for p in sorted(run.rglob(_EVENTS))}


def rewind_events(run: Path, sizes: Mapping[str, int]) -> None:
    """Cut the event files of a run directory back to what they were when `sizes` was taken.

    What a run has shown after the checkpoint that it continues from is shown again by its
    continuation: kept, every curve would fold back.
    """
    for name, size in event_sizes(run).items():
        if name not in sizes:
            (run / name).unlink()
        elif size > sizes[name]:
            os.truncate(run / name, sizes[name])
