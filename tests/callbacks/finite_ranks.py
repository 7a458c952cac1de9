"""Two gloo ranks of Lightning's DDP; rank 1 alone meets an infinite activation at step 1.

`python finite_ranks.py OUT MODE...`, MODE an `on_alert` of FiniteGuard, imports everything once and
forks the ranks. OUT/MODE/RANK.json gets what each rank ended with.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import traceback
import warnings
from pathlib import Path

import torch
from pytorch_lightning import LightningModule, Trainer

from lit_sparse.callbacks import FiniteGuard


class Blocks(LightningModule):
    """A list of three layers; `bad`: (rank, step) -> layer whose output is infinite there."""

    def __init__(self, bad: dict[tuple[int, int], int]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(3))
        self.bad = bad

    def training_step(self, batch, batch_idx):
        x = batch
        for i, layer in enumerate(self.layers):
            if self.bad.get((self.global_rank, self.global_step)) == i:
                x = x + torch.inf
            x = layer(x)
        return x.square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def train(out: Path, rank: int, mode: str) -> None:
    module = Blocks({(1, 1): 2})
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_steps=4,
        callbacks=[FiniteGuard(on_alert=mode)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=out,
    )
    rows = torch.utils.data.DataLoader(torch.randn(8, 4), batch_size=2)
    error = ""
    try:
        trainer.fit(module, rows)
    except FloatingPointError as found:
        error = str(found)
    result = {
        "error": error,
        "step": trainer.global_step,
        "weights": torch.nn.utils.parameters_to_vector(module.parameters()).tolist(),
        "places": trainer.callbacks[0].state_dict()["alarm"]["raised"],
    }
    (out / f"{rank}.json").write_text(json.dumps(result))


def main(out: Path, modes: list[str]) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    for mode in modes:
        folder = out / mode
        folder.mkdir()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        children = []
        for rank in range(2):
            child = os.fork()
            if child == 0:
                ranks = {"LOCAL_RANK": rank, "RANK": rank, "NODE_RANK": 0, "WORLD_SIZE": 2}
                os.environ |= {key: str(value) for key, value in ranks.items()}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
                try:
                    train(folder, rank, mode)
                except BaseException:
                    traceback.print_exc()
                    os._exit(1)
                os._exit(0)
            children.append(child)
        if any(os.waitpid(child, 0)[1] for child in children):
            sys.exit(f"a rank of {mode} failed")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
