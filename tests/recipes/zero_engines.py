"""Real DeepSpeed engines on two gloo ranks, measured.

Run as a script with cases as JSON ({stage, half, accumulate, offload_optimizer,
offload_parameters, frozen: half of the layers}), it prints the size of the model and for each case
the most bytes that were alive in the last backward before an optimizer step, of everything that the
engine has.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import socket
import sys
from typing import Any

import torch
from torch import nn
from torch.multiprocessing import spawn

from lit_sparse.recipes.estimate.live import LiveBytes

RANKS, LAYERS, WIDTH = 2, 24, 300
ZERO = {
    "reduce_bucket_size": 200_000,
    "allgather_bucket_size": 200_000,
    "stage3_prefetch_bucket_size": 300_000,
    "stage3_max_live_parameters": 700_000,
    "stage3_max_reuse_distance": 700_000,
    "stage3_param_persistence_threshold": 0,
}


def _measure(case: dict[str, Any]) -> int:
    import deepspeed

    from lit_sparse.distributed.options import deepspeed_config

    config = deepspeed_config(
        case["stage"],
        case["offload_optimizer"],
        case["offload_parameters"],
        None,
        {"zero_optimization": dict(ZERO)},
    )
    config["gradient_accumulation_steps"] = case["accumulate"]
    if case["half"]:
        config["bf16"] = {"enabled": True}
    gc.collect()
    with LiveBytes() as live:
        model = nn.Sequential(*[nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)])
        if case.get("frozen"):
            model[: LAYERS // 2].requires_grad_(False)
        trained = [p for p in model.parameters() if p.requires_grad]
        engine, *_ = deepspeed.initialize(
            config=config,
            model=model,
            model_parameters=trained,
            optimizer=torch.optim.AdamW(trained),
            dist_init_required=False,
        )
        dtype = torch.bfloat16 if case["half"] else torch.float32
        for _ in range(2):  # the second step has the optimizer's states
            for _ in range(case["accumulate"]):
                live.forget_peak()
                loss = engine(torch.ones(1, WIDTH, dtype=dtype)).float().sum()
                engine.backward(loss)
                peak = live.peak.total()
                engine.step()
    engine.destroy()
    return peak


def _rank(rank: int, port: int, cases: list[dict[str, Any]]) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank)}
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    import deepspeed

    deepspeed.utils.logging.logger.setLevel(logging.ERROR)
    deepspeed.init_distributed("gloo")
    found = [_measure(case) for case in cases]
    if rank == 0:
        size = LAYERS * WIDTH * WIDTH
        answer = {"parameters": size, "largest": WIDTH * WIDTH, "zero": ZERO, "peaks": found}
        print(json.dumps(answer))


if __name__ == "__main__":
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn(_rank, args=(port, json.loads(sys.argv[1])), nprocs=RANKS)
