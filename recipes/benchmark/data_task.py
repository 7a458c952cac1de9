"""One measurement of `lit-sparse benchmark --what data`, in a process of its own.

The processes that `pack` starts import this module again, so it imports nothing large.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

SEED = 0

Report = dict[str, Any]


def _do_pack(task: Report) -> Report:
    from lit_sparse.data import load_tokenizer, pack

    tokenizer = load_tokenizer(task["tokenizer"])
    begin = time.perf_counter()
    store = pack([task["source"]], tokenizer, Path(task["out"]), processes=task["processes"])
    return {"seconds": time.perf_counter() - begin, "tokens": store.tokens}


def _do_bare(task: Report) -> Report:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(Path(task["tokenizer"]) / "tokenizer.json"))
    with Path(task["source"]).open() as file:
        texts = [json.loads(line)["text"] for line in file]
    encode = tokenizer.encode_batch_fast if task["way"] == "fast" else tokenizer.encode_batch
    begin = time.perf_counter()
    for first in range(0, len(texts), 1024):
        batch = texts[first : first + 1024]
        # Tokenised is what has its ids: the library makes the lists when they are asked for.
        [encoding.ids for encoding in encode(batch, add_special_tokens=False)]
    return {"seconds": time.perf_counter() - begin}


def _do_rows(task: Report) -> Report:
    from lit_sparse.data.rows.epochs import Demand
    from lit_sparse.data.rows.index import RowIndex, build_rows

    lengths = np.random.default_rng(SEED).lognormal(6.0, 1.4, task["documents"])
    lengths = np.clip(lengths, 1, 1_000_000).astype(np.int64)
    tokens, row_tokens = int(lengths.sum()), task["row_tokens"]
    rows = tokens // row_tokens
    begin = time.perf_counter()
    build_rows(
        Path(task["out"]),
        lengths,
        np.arange(len(lengths)),
        [Demand(row_tokens, rows)],
        row_tokens,
        packing=task["packing"],
        seed=SEED,
    )
    seconds = time.perf_counter() - begin
    (stage,) = RowIndex.open(task["out"]).summary["stages"]
    return {
        "seconds": seconds,
        "tokens": tokens,
        "rows": rows,
        "row_tokens": row_tokens,
        "cut": stage["documents_cut"],
        "filler": stage["filler_tokens"] / (rows * row_tokens),
    }


_WAYS = {"pack": _do_pack, "bare": _do_bare, "fast": _do_bare, "rows": _do_rows}


if __name__ == "__main__":
    _task = json.loads(sys.argv[1])
    _result = _WAYS[_task["way"]](_task)
    _peak = max(
        resource.getrusage(who).ru_maxrss
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    print(json.dumps({**_result, "peak_mib": _peak / 1024}))
