"""The one directory of a run: events, checkpoints, config, report, exported model."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

_MARKS = ("config.yaml", "checkpoints", "events.out.tfevents.*")
"""What a run leaves behind; a directory with any of these holds one."""


@dataclass
class Run:
    """Where a run lives: `root/name`.

    Args:
        name: None: the name of the first config.
        root: parent of all runs.
        overwrite: delete a run of the same name instead of refusing to start.
    """

    name: str | None = None
    root: str = "runs"
    overwrite: bool = False

    @property
    def path(self) -> Path:
        return Path(self.root) / (self.name or "run")

    def prepare(self, resume: bool) -> None:
        """Make the directory ready to be written.

        Raises:
            ValueError: it holds another run, or cannot be written; nothing was changed then.
        """
        path = self.path
        holds_run = path.is_dir() and any(any(path.glob(mark)) for mark in _MARKS)
        if path.exists() and not path.is_dir():
            raise ValueError(
                f"run.name: {path} is a file, not a directory; choose another --run.name"
            )
        if holds_run and not resume and not self.overwrite:
            raise ValueError(
                f"run.name: {path} already holds a run; continue it with --ckpt_path last, "
                "choose another "
                "--run.name, or delete it with --run.overwrite true"
            )
        existing = next(p for p in (path, *path.absolute().parents) if p.exists())
        if not os.access(existing, os.W_OK | os.X_OK):
            raise ValueError(
                f"run.root: {path} cannot be written ({existing} is not writable); choose "
                "another --run.root"
            )
        if holds_run and not resume:
            shutil.rmtree(path)
        path.mkdir(parents=True, exist_ok=True)

    def checkpoint(self, wanted: str) -> str:
        """The checkpoint file to continue from: a path, or "last" for the newest of this run.

        Raises:
            ValueError: there is none. Starting over silently would lose the run.
        """
        if wanted != "last":
            if not Path(wanted).exists():
                raise ValueError(f"ckpt_path: there is no checkpoint {wanted}")
            return wanted
        found = sorted((self.path / "checkpoints").glob("*.ckpt"), key=lambda p: p.stat().st_mtime)
        if not found:
            raise ValueError(
                f"ckpt_path: last, but {self.path / 'checkpoints'} holds no checkpoint"
            )
        return str(found[-1])
