"""Trains under a BudgetController on two real ranks and writes down what each of them decided.

`python controller_ranks.py OUT` forks the ranks, gloo processes of Lightning's DDP; OUT/RANK.json
gets the factors in force and the missed mass at each step.
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
from transformers import LlamaConfig, LlamaForCausalLM

from lit_sparse import Budget, sparsify
from lit_sparse.callbacks import BudgetController
from lit_sparse.models import alpha_factor


class Module(LightningModule):
    """Rank 1 sees rows twice as long, which miss more."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        sizes = {"vocab_size": 257, "hidden_size": 32, "intermediate_size": 64}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 1}
        law = Budget(alpha=5, exponent=0.5, floor=16, sink=16, local=0.0)
        model = LlamaForCausalLM(LlamaConfig(**sizes, **heads))
        self.model = sparsify(model, law, block=16, tile=16)
        self.found: dict[str, list[float]] = {"factors": [], "missed": []}

    def training_step(self, batch, batch_idx):
        ids = torch.randint(257, (1, 256 * (1 + self.global_rank)))
        return self.model(input_ids=ids, labels=ids).loss

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.found["factors"].append(alpha_factor(self.model))
        missed = self.trainer.callback_metrics["controller/missed_mass_p95"]
        self.found["missed"].append(float(missed))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def train(out: Path, rank: int) -> None:
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_steps=5,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[BudgetController(0.3, every_n_steps=1, rows=16, min_context=200, patience=2)],
        default_root_dir=out,
    )
    module = Module()
    trainer.fit(module, range(5))
    (out / f"{rank}.json").write_text(json.dumps(module.found))


def main(out: Path) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in (0, 1):
        child = os.fork()
        if child == 0:
            ranks = {"LOCAL_RANK": rank, "RANK": rank, "NODE_RANK": 0, "WORLD_SIZE": 2}
            os.environ |= {key: str(value) for key, value in ranks.items()}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            try:
                train(out, rank)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        children.append(child)
    if any(os.waitpid(child, 0)[1] for child in children):
        sys.exit("a rank failed")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
