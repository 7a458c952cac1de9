"""Checkpoints of a run: written whole or not at all, and checked before they are believed."""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO
from pytorch_lightning.utilities import rank_zero_only, rank_zero_warn

from lit_sparse.distributed import checkpoint as sharded
from lit_sparse.files import remove, write_whole
from lit_sparse.models import architecture_keys, other_architecture

_NAME = re.compile(r"step=(\d+)\.ckpt")
_UNFINISHED = ".*.tmp"


def checkpoint_name(step: int) -> str:
    """Name of the checkpoint after `step` optimizer steps, a file or a directory."""
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
    """What is wrong with a checkpoint, or None. Reads all of it: entries and files have checksums.

    Of a sharded one, the first rank alone reads all, the others look at the sizes.
    """
    try:
        if path.is_dir():
            first = getattr(rank_zero_only, "rank", 0) == 0
            if wrong := sharded.damage(path, contents=first):
                return wrong
        else:
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


def own_state(path: Path) -> dict[str, Any]:
    """What lit-sparse adds to a checkpoint: `lit_sparse.distributed.checkpoint.description`, and
    what `RunCheckpoint` needs to go on exactly. {} in one that somebody else wrote. Tensors stay in
    the file.
    """
    if path.is_dir():
        state = sharded.run_state(path)
    else:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return state.get("lit_sparse", {})


def check_architecture(path: Path, models: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of other models, before weights are read.

    Args:
        path: the checkpoint.
        models: attribute path in the module -> transformers config.

    Raises:
        ValueError: a model of the checkpoint has another architecture; says what differs.
    """
    from transformers import AutoConfig

    saved = own_state(path).get("models", {})
    for name in saved.keys() & models.keys():
        found, wanted = AutoConfig.for_model(**saved[name]), models[name]
        if differing := other_architecture(found, wanted, architecture_keys(wanted)):
            raise ValueError(
                f"ckpt_path: {path} is a checkpoint of another architecture than the config's: "
                f"{differing}"
            )


def remove_unfinished(directory: Path) -> None:
    """Delete what a process that was killed while it wrote or removed has left."""
    for path in directory.glob(_UNFINISHED):
        remove(path)


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
        if Path(path).is_dir():
            sharded.check_sharding(Path(path), None)
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
