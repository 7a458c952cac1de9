"""Ranks as forks of one process, which has imported everything: they start in no time."""

from __future__ import annotations

import gc
import os
import socket
import sys
import traceback
from collections.abc import Callable
from typing import Any


def import_for_ranks() -> None:
    """Import what DeepSpeed, peft and transformers would import in each rank."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from transformers import LlamaForCausalLM, Qwen3ForCausalLM  # noqa: F401

    gc.freeze()  # a child that collects garbage would walk, and copy, all that was imported


def fork(world: int, run: Callable[[], Any]) -> None:
    """Run a function on `world` ranks, which find each other by environment variables as torchrun
    sets them; exits where one fails.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(world):
        child = os.fork()
        if child == 0:
            ranks = {"LOCAL_RANK": rank, "RANK": rank, "NODE_RANK": 0, "WORLD_SIZE": world}
            os.environ |= {key: str(value) for key, value in ranks.items()}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            try:
                run()
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        children.append(child)
    ends = [os.waitpid(child, 0)[1] for child in children]
    if any(ends):
        sys.exit("a rank failed")
