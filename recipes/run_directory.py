"""The one directory of a run: events, checkpoints, config, report, exported model."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, TextIO

import yaml
from pytorch_lightning.utilities import rank_zero_only, rank_zero_warn

from lit_sparse.distributed.checkpoint import check_sharding
from lit_sparse.files import remove
from lit_sparse.recipes.changes import changes
from lit_sparse.training.checkpoint import (
    checkpoint_step,
    checkpoints,
    damage,
    newest_whole,
    own_state,
    rewind_events,
)

CONFIG = "config.yaml"
_MARKS = (CONFIG, "checkpoints", "events.out.tfevents.*")
"""What a run leaves behind; a directory with any of these holds one."""


@dataclass
class Run:
    """Where a run lives: `root/name`, and how it is continued.

    Args:
        name: None: the name of the first config.
        root: parent of all runs.
        overwrite: delete a run of the same name instead of refusing to start.
        allow_changes: continue although the config, the data or the number of ranks changed in a
            way that makes it another run. Shards of DeepSpeed are for the same ranks in any case.
        rewind: continue from a checkpoint that is not the newest; the newer ones are moved to
            `checkpoints/abandoned`.
    """

    name: str | None = None
    root: str = "runs"
    overwrite: bool = False
    allow_changes: bool = False
    rewind: bool = False
    _ours: bool = field(default=False, init=False, repr=False)
    _lock: TextIO | None = field(default=None, init=False, repr=False)

    @property
    def path(self) -> Path:
        return Path(self.root) / (self.name or "run")

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def _holds_run(self) -> bool:
        return self.path.is_dir() and any(any(self.path.glob(mark)) for mark in _MARKS)

    def check_place(self, resume: bool) -> None:
        """ValueError where the directory holds another run, is none, or cannot be written.

        For every rank: nothing of a run is written before all ranks have met, and one that fails
        alone would leave the others waiting for it.
        """
        path = self.path
        if path.exists() and not path.is_dir():
            raise ValueError(
                f"run.name: {path} is a file, not a directory; choose another --run.name"
            )
        if self._holds_run and not resume and not self.overwrite:
            raise ValueError(
                f"run.name: {path} already holds a run; continue it with --ckpt_path last, "
                "choose another --run.name, or delete it with --run.overwrite true"
            )
        there = next(place for place in (path, *path.parents) if place.exists())
        try:
            with TemporaryFile(dir=there):
                pass
        except OSError as error:
            raise ValueError(
                f"run.root: {path} cannot be written ({error.strerror}); choose another --run.root"
            ) from error

    def prepare(self, resume: bool) -> None:
        """Make the directory ready to be written, after `check_place`.

        Raises:
            ValueError: another process trains in it; nothing was changed then.
        """
        path, holds_run = self.path, self._holds_run
        fresh = not path.exists()
        path.mkdir(parents=True, exist_ok=True)
        self._take()
        if holds_run and not resume:
            self._release()
            shutil.rmtree(path)
            path.mkdir()
            self._take()
        self._ours = fresh or (holds_run and not resume)

    def _take(self) -> None:
        """Let no other process train in the directory until this one ends, however it ends."""
        self._lock = open(self.path / ".lock", "w")  # noqa: SIM115 - held while the process lives
        try:
            # A lock of this kind is not inherited: data workers may outlive a killed process.
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise ValueError(
                f"run.name: another process trains in {self.path}; stop it first, or choose "
                "another --run.name"
            ) from error
        except OSError:  # a file system without locks
            pass

    def _release(self) -> None:
        if self._lock is not None:  # NFS does not remove a directory with an open file
            self._lock.close()

    def discard(self) -> None:
        """Take back what `prepare` made, for a run that ended before its first step."""
        if self._ours and not checkpoints(self.checkpoints):
            self._release()
            shutil.rmtree(self.path, ignore_errors=True)

    def checkpoint(self, wanted: str) -> str:
        """The checkpoint to continue from: a path, or "last" for the newest of this run that
        is whole.

        Raises:
            ValueError: there is none. Starting over silently would lose the run.
        """
        if wanted != "last":
            if not Path(wanted).exists():
                raise ValueError(f"ckpt_path: there is no checkpoint {wanted}")
            if wrong := damage(Path(wanted)):
                raise ValueError(f"ckpt_path: {wanted} is damaged: {wrong}")
            return wanted
        found = newest_whole(self.checkpoints)
        if found is None:
            held = "whole checkpoint" if checkpoints(self.checkpoints) else "checkpoint"
            raise ValueError(
                f"ckpt_path: last, but {self.checkpoints} holds no {held}; without --ckpt_path, "
                "and with --run.overwrite true, the run starts over"
            )
        return str(found)

    # -- going on --

    def check_resume(
        self,
        checkpoint: Path,
        config: Mapping[str, Any],
        ranks: int,
        data: str | None,
        sharding: Mapping[str, int] | None = None,
    ) -> None:
        """Compare a run with how it is to go on, and print the differences. Changes no file.

        Args:
            checkpoint: where it goes on from.
            config: the effective config, as in config.yaml.
            ranks: processes that train.
            data: fingerprint of the data, None if it is not known.
            sharding: of the strategy, see `lit_sparse.distributed.checkpoint.description`; no flag
                allows another one than the checkpoint's.

        Raises:
            ValueError: the continuation would not be exact, or would abandon newer checkpoints,
                and no flag says that this is wanted.
        """
        check_sharding(checkpoint, sharding)
        newer = self._newer(checkpoint)
        whole = [path for path in newer if damage(path) is None]
        if whole and not self.rewind:
            names = ", ".join(path.name for path in whole)
            raise ValueError(
                f"ckpt_path: {checkpoint} is not the newest checkpoint of {self.path} ({names}); "
                "continue with --ckpt_path last, or give up what came after with --run.rewind true"
            )
        state = own_state(checkpoint)
        if "ranks" not in state:
            rank_zero_warn(
                f"{checkpoint} was not written by lit-sparse between two steps: what follows may "
                "differ from the run that was stopped"
            )
        harmful, harmless = self._differences(checkpoint, config)
        for what, old, new in (
            ("number of ranks", state.get("ranks"), ranks),
            ("rows (content of data.path, packing, stages)", state.get("data"), data),
        ):
            if None not in (old, new) and old != new:
                harmful.append(f"{what}: {old} -> {new}")
        if harmless:
            _say("\n  ".join(["changed, and taken over:", *harmless]))
        if harmful and not self.allow_changes:
            raise ValueError(
                "\n  ".join(
                    [
                        f"{checkpoint} cannot go on exactly, because this changed:",
                        *harmful,
                        "put it back, or go on as another run with --run.allow_changes true",
                    ]
                )
            )
        if harmful:
            _say("\n  ".join(["changed, no exact continuation:", *harmful]))

    def rewind_to(self, checkpoint: Path) -> None:
        """Leave nothing in the directory that the run did after the checkpoint."""
        for path in self._newer(checkpoint):
            abandoned = self.checkpoints / "abandoned"
            abandoned.mkdir(exist_ok=True)
            remove(abandoned / path.name)
            path.replace(abandoned / path.name)
        if self._holds(checkpoint) and (events := own_state(checkpoint).get("events")) is not None:
            rewind_events(self.path, events)

    def _holds(self, checkpoint: Path) -> bool:
        return checkpoint.resolve().parent == self.checkpoints.resolve()

    def _newer(self, checkpoint: Path) -> list[Path]:
        """Checkpoints of this run after the given one; all of them if that is another run's."""
        found = checkpoints(self.checkpoints)
        step = checkpoint_step(checkpoint) if self._holds(checkpoint) else None
        return [p for p in found if step is None or (checkpoint_step(p) or 0) > step]

    def _differences(
        self, checkpoint: Path, config: Mapping[str, Any]
    ) -> tuple[list[str], list[str]]:
        saved = checkpoint.resolve().parent.parent / CONFIG
        if not saved.is_file():
            rank_zero_warn(f"{saved} is missing: whether the config changed is not known")
            return [], []
        found = changes(yaml.safe_load(saved.read_text()) or {}, config)
        return (
            [str(change) for change in found if not change.harmless],
            [str(change) for change in found if change.harmless],
        )


@rank_zero_only
def _say(text: str) -> None:
    print(text, flush=True)
