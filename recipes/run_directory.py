"""The one directory of a run: events, checkpoints, config, report, exported model."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryFile

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
    _ours: bool = field(default=False, init=False, repr=False)

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
                "choose another --run.name, or delete it with --run.overwrite true"
            )
        fresh = not path.exists()
        try:
            path.mkdir(parents=True, exist_ok=True)
            with TemporaryFile(dir=path):
                pass
        except OSError as error:
            raise ValueError(
                f"run.root: {path} cannot be written ({error.strerror}); choose another --run.root"
            ) from error
        if holds_run and not resume:
            shutil.rmtree(path)
            path.mkdir()
        self._ours = fresh or (holds_run and not resume)

    def discard(self) -> None:
        """Take back what `prepare` made, for a run that ended before its first step."""
        if self._ours:
            shutil.rmtree(self.path, ignore_errors=True)

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
