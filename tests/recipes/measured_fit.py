"""Real training, measured in a process of its own.

Run as a script with the arguments of several `lit-sparse fit` as JSON, it prints for each the bytes
of weights, gradients and optimizer states, and what the first forward and backward have allocated.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import json
import re
import sys
from pathlib import Path
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer

from lit_sparse.recipes.estimate.live import LiveBytes

FOUND: list[dict[str, int]] = []


class Probe(Callback):
    """Measures the first two steps."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step == 0:
            self.found: dict[str, int] = {}
            self.live, self.resident = LiveBytes(), _resident()
            self.live.__enter__()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, _: Any) -> None:
        if trainer.global_step == 0:
            self.found["kept"] = self.live.now.total()
            self.found["kept_resident"] = _resident() - self.resident

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step == 0:
            self.live.__exit__(None, None, None)
            self.found["peak"] = self.live.peak.total()
            return
        parameters = list(pl_module.parameters())
        states = trainer.optimizers[0].state.values()
        moments = [state[name] for state in states for name in ("exp_avg", "exp_avg_sq")]
        self.found |= {
            "parameters": sum(p.numel() for p in parameters),
            "weights": sum(p.nbytes for p in parameters),
            "gradients": sum(p.grad.nbytes for p in parameters if p.grad is not None),
            "optimizer": sum(moment.nbytes for moment in moments),
        }
        FOUND.append(self.found)


def _resident() -> int:
    """Bytes of this process in memory, without what its allocator could give back."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    found = re.search(r"^VmRSS:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def main(runs: list[list[str]]) -> None:
    from lit_sparse.cli import main as lit_sparse

    for arguments in runs:
        with contextlib.redirect_stdout(io.StringIO()):
            status = lit_sparse(["fit", *arguments, "--trainer.callbacks", "measured_fit.Probe"])
        assert status == 0
    print(json.dumps(FOUND))


if __name__ == "__main__":
    # Lightning finds the callback by its import path: there must be one copy of it.
    import measured_fit

    measured_fit.main(json.loads(sys.argv[1]))
