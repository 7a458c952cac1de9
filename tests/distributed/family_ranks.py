"""Models of several families on two gloo ranks: they share a row, and they share the weights.

`python family_ranks.py OUT` forks the ranks. Rank 0 writes OUT, a torch file: ("rows", model_type)
-> loss and gradients of one process and of the ranks together, ("weights", model_type) -> weights
and buffers of the model that was saved and of the one that was loaded in shards.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import nn

from lit_sparse import Budget
from lit_sparse.distributed import Ranks
from lit_sparse.distributed.loading import load_pretrained
from lit_sparse.distributed.ulysses import attach, shard_sequence
from lit_sparse.models import sparsify

sys.path.append(str(Path(__file__).parents[1]))
sys.path.append(str(Path(__file__).parents[1] / "models"))
from families import VARIANTS, build
from forking import fork

SHARING = ("gemma2", "gpt_oss")
LOADED = ("gemma3_text", "gpt_oss")
STAGE_3 = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
LENGTHS = (90, 38)


def row() -> dict[str, torch.Tensor]:
    length, draw = sum(LENGTHS), torch.Generator().manual_seed(0)
    ids = torch.randint(1, 97, (1, length), generator=draw)
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    return {"input_ids": ids, "position_ids": positions, "labels": ids}


def step(model: Any, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Loss, summed over tokens, and gradients of one row or a part of it."""
    model.zero_grad()
    labels = batch.pop("labels")
    logits = model(**batch, use_cache=False).logits
    loss = nn.functional.cross_entropy(logits[0], labels[0], reduction="sum")
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters()}}


def share_a_row(kind: str) -> dict[str, dict[str, torch.Tensor]]:
    changes = {"num_key_value_heads": 2}  # one a rank
    model = build(kind, **{**dict(VARIANTS)[kind], **changes})
    sparsify(model, Budget.fixed(40, sink=8, late=0.3), block=8, tile=8)
    alone = {name: x.clone() for name, x in step(model, row()).items()}
    world = torch.distributed.group.WORLD
    ranks = Ranks(sequence_rank=int(os.environ["RANK"]), sequence_size=2, group=world)
    attach(model, ranks)
    shared = step(model, shard_sequence(row(), ranks))
    for value in shared.values():
        torch.distributed.all_reduce(value)
    return {"alone": alone, "shared": shared}


def load_in_shards(kind: str, directory: Path) -> dict[str, dict[str, torch.Tensor]]:
    model = build(kind, **dict(VARIANTS)[kind])
    if os.environ["RANK"] == "0":
        model.save_pretrained(directory)
    torch.distributed.barrier()
    loaded = load_pretrained(directory, STAGE_3)
    parameters = dict(loaded.named_parameters())
    assert all(p.numel() < p.ds_numel for p in parameters.values())
    with deepspeed.zero.GatheredParameters(parameters.values()):
        values = {name: p.detach().clone() for name, p in parameters.items()}
    return {
        "saved": {**dict(model.named_parameters()), **dict(model.named_buffers())},
        "loaded": {**values, **dict(loaded.named_buffers())},
    }


def run() -> None:
    # Kernels for inference, which it would compile now.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo")
    found = {("rows", kind): share_a_row(kind) for kind in SHARING}
    for kind in LOADED:
        found["weights", kind] = load_in_shards(kind, Path(sys.argv[1]).with_name(kind))
    if os.environ["RANK"] == "0":
        torch.save(found, sys.argv[1])


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    fork(2, run)
