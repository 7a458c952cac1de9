"""What callbacks do on two real ranks, gloo processes of Lightning's DDP.

`python two_ranks.py OUT` imports everything once and forks two ranks for each of `CASES`.
OUT/CASE/RANK.json gets what the rank found.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from monitored import Module, Recorder, batches, gap_metrics, make_trainer, sparse
from pytorch_lightning import LightningModule
from transformers import LlamaConfig, LlamaForCausalLM

from lit_sparse import Budget, sparsify
from lit_sparse.callbacks import BudgetController, FiniteGuard
from lit_sparse.models import alpha_factor

sys.path.append(str(Path(__file__).parents[1]))
from forking import fork

RANKS = {"strategy": "ddp", "devices": 2}


def measure(rank: int) -> dict[str, Any]:
    """A DenseGapMonitor validates, then trains."""
    module = Module()
    monitor = Recorder(every_n_steps=1, rows=9, min_context=8, compare_every=1)
    trainer = make_trainer([monitor, sparse()], **RANKS)
    trainer.validate(module, batches(4), verbose=False)
    before = gap_metrics(trainer)
    trainer = make_trainer([monitor, sparse()], **RANKS)
    few = Recorder(every_n_steps=2, rows=2, min_context=8)  # one of each rank
    trainer.callbacks.append(few)
    trainer.fit(module, batches(4), batches(4))
    return {
        "validated": before,
        "trained": gap_metrics(trainer),
        "context": [sample.layers[1].context.tolist() for sample in monitor.samples],
        "tau": [sample.stack("tau").tolist() for sample in monitor.samples],
        "few": [few.samples[0].layers[0].context.tolist(), few.samples[0].similarity[0].tolist()],
        "cosine": [sample.similarity[0].tolist() for sample in monitor.samples],
    }


class Unequal(LightningModule):
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


def control(rank: int) -> dict[str, Any]:
    """A BudgetController trains."""
    controller = BudgetController(0.3, every_n_steps=1, rows=16, min_context=200, patience=2)
    trainer = make_trainer([controller], max_steps=5, use_distributed_sampler=False, **RANKS)
    module = Unequal()
    trainer.fit(module, range(5))
    return module.found


class Blocks(LightningModule):
    """Three layers; on rank 1, at step 1, what the last one gets is infinite."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(3))

    def training_step(self, batch, batch_idx):
        x = self.layers[1](self.layers[0](batch))
        if (self.global_rank, self.global_step) == (1, 1):
            x = x + torch.inf
        return self.layers[2](x).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def guard(rank: int, on_alert: str) -> dict[str, Any]:
    """A FiniteGuard trains."""
    guard = FiniteGuard(on_alert=on_alert)
    trainer = make_trainer([guard], max_steps=4, use_distributed_sampler=False, **RANKS)
    module, error = Blocks(), ""
    try:
        trainer.fit(module, torch.utils.data.DataLoader(torch.randn(8, 4), batch_size=2))
    except FloatingPointError as found:
        error = str(found)
    return {
        "error": error,
        "step": trainer.global_step,
        "weights": torch.nn.utils.parameters_to_vector(module.parameters()).tolist(),
        "places": guard.state_dict()["alarm"]["raised"],
    }


CASES: dict[str, Callable[[int], dict[str, Any]]] = {
    "measure": measure,
    "control": control,
    "guard_raise": lambda rank: guard(rank, "raise"),
    "guard_warn": lambda rank: guard(rank, "warn"),
}


def main(out: Path) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    for case, run in CASES.items():
        folder = out / case
        folder.mkdir()

        def on_rank(folder: Path = folder, run: Callable[[int], dict[str, Any]] = run) -> None:
            rank = int(os.environ["RANK"])
            (folder / f"{rank}.json").write_text(json.dumps(run(rank)))

        fork(2, on_rank)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
