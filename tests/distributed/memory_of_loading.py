"""What two ranks have in memory while SparseLM loads a pretrained model in shards.

`python memory_of_loading.py OUT` writes the model there, forks the ranks, and each leaves
OUT/RANK.json: bytes of the model, of its largest tensor, and of the memory that loading took at its
peak and at its end.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import warnings
from pathlib import Path

import torch
from pytorch_lightning import Trainer

from lit_sparse.distributed import DeepSpeedSparseStrategy
from lit_sparse.models import build_model
from lit_sparse.training import SparseLM

sys.path.append(str(Path(__file__).parents[1]))
from forking import fork

ARCHITECTURE = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 24,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "bos_token_id": None,
    "eos_token_id": None,
}


def anonymous() -> int:
    """Bytes of this process that no file backs: pages of a mapped file can be dropped any time."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no RssAnon")


class Loaded(Exception):
    """There is no need to train."""


class Measured(SparseLM):
    def configure_model(self) -> None:
        start, done = anonymous(), threading.Event()
        self.peak = 0

        def watch() -> None:
            while not done.wait(0.001):
                self.peak = max(self.peak, anonymous() - start)

        watcher = threading.Thread(target=watch)
        watcher.start()
        super().configure_model()
        done.set()
        watcher.join()
        self.end = anonymous() - start
        raise Loaded


def load(out: Path) -> None:
    strategy = DeepSpeedSparseStrategy(stage=3)
    trainer = Trainer(accelerator="cpu", devices=2, strategy=strategy, logger=False)
    module = Measured(pretrained=str(out / "model"))
    batches = torch.utils.data.DataLoader(torch.zeros(1))
    try:
        trainer.fit(module, batches)
    except Loaded:
        sizes = [p.ds_numel * p.element_size() for p in module.model.parameters()]
        found = {"model": sum(sizes), "largest": max(sizes), "peak": module.peak, "end": module.end}
        (out / f"{trainer.global_rank}.json").write_text(json.dumps(found))
        os._exit(0)


def write(out: Path) -> None:
    build_model(architecture=ARCHITECTURE).save_pretrained(out / "model", max_shard_size="100MB")


def main(out: Path) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    fork(1, lambda: write(out))  # a process that had the model would have its memory to spare
    fork(2, lambda: load(out))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
