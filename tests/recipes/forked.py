"""Real training processes that start in a fraction of a second: this one has imported everything.

Run as a script it reads one JSON job a line from its standard input and forks. The child, in a
session of its own, is the `lit-sparse` command. The answers are the child's process id and, when
the child has ended, its exit status (minus the signal that killed it).
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any


class Forked:
    """The other end: starts the script, sends it jobs."""

    def __init__(self) -> None:
        self._server = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
        )

    def start(self, arguments: list[str], directory: Path, die_in_write: int | None = None) -> int:
        """Start a command in a directory; its output goes to the file `log` there.

        Args:
            die_in_write: SIGKILL itself when it writes the checkpoint of this number, from 0.

        Returns:
            process id.
        """
        job = {"arguments": arguments, "directory": str(directory), "die_in_write": die_in_write}
        self._server.stdin.write(json.dumps(job) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())

    def wait(self) -> int:
        """Exit status of the command that was started last."""
        return json.loads(self._server.stdout.readline())

    def run(self, arguments: list[str], directory: Path, **options: Any) -> int:
        self.start(arguments, directory, **options)
        return self.wait()

    def close(self) -> None:
        self._server.kill()
        self._server.wait()


def _serve() -> None:
    import matplotlib.figure  # noqa: F401
    import torch.utils.tensorboard  # noqa: F401
    from transformers import LlamaForCausalLM  # noqa: F401

    import lit_sparse.recipes.fit  # noqa: F401

    gc.freeze()  # a child that collects garbage would walk, and copy, all that was imported
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            _child(**json.loads(line))
        print(pid, file=answers, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), file=answers, flush=True)


def _child(arguments: list[str], directory: str, die_in_write: int | None) -> None:
    from lit_sparse.cli import main

    os.setsid()
    os.chdir(directory)
    with open("log", "ab", buffering=0) as log, open(os.devnull) as nothing:
        for stream, number in ((nothing, 0), (log, 1), (log, 2)):
            os.dup2(stream.fileno(), number)
    if die_in_write is not None:
        _die_in_write(die_in_write)
    status: Any = 1
    try:
        status = main(arguments)
    except SystemExit as stop:
        status = stop.code
    except BaseException:
        traceback.print_exc()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(ValueError):
            stream.flush()
    os._exit(status or 0)


def _die_in_write(number: int) -> None:
    """Die when the checkpoint's bytes are half on their way: unnamed, and not all on the disk."""
    import torch

    save, written = torch.save, []

    def half(checkpoint: Any, file: Any) -> None:
        save(checkpoint, file)
        if len(written) == number:
            file.truncate(file.tell() // 2)
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        written.append(file.name)

    torch.save = half


if __name__ == "__main__":
    _serve()
