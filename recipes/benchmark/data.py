"""How fast data comes: tokenising, deciding the rows, loading them, and the memory of each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from lit_sparse.data.stores.workers import usable_cores
from lit_sparse.recipes.benchmark.load import OtherLoad

SEED = 0
TURNS = 3
"""Timed runs of each way to tokenise; the fastest counts."""
VOCABULARY = 8000
"""Tokens of the byte-level BPE that is trained for the measurement."""

_CHILD = "lit_sparse.recipes.benchmark.data_task"

Progress = Callable[[str], None]
Report = dict[str, Any]


def run(megabytes: int, documents: int, processes: int, progress: Progress) -> Report:
    """All measurements.

    Args:
        megabytes: of JSONL text to tokenise, made of the standard library's source.
        documents: synthetic lengths that the row index is built over.
        processes: that tokenise for `pack`; the bare tokenizer has a thread for every core.
        progress: told what is measured.
    """
    load = OtherLoad()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        report: Report = {
            "tokenise": _tokenise(folder, megabytes, processes, progress),
            "rows": [
                _rows(folder, documents, method, progress) for method in ("best_fit", "concat")
            ],
            "memory": _memory(folder, progress),
            "loader": _loader(folder, progress),
        }
    return {**report, "other_load_cores": load.cores()}


def lines(report: Report) -> list[str]:
    """The report as text."""
    tokenise, loader = report["tokenise"], report["loader"]
    text = [
        f"Tokenising {tokenise['megabytes']:.0f} MB of JSONL ({tokenise['documents']:,} documents) "
        f"by a byte-level BPE of {VOCABULARY} tokens, {tokenise['cores']} cores, best of {TURNS}:",
        *(
            f"  {name:35}{tokenise['mb_s'][way]:6.2f} MB/s "
            f"{tokenise['tokens_s'][way]:12,.0f} tokens/s"
            for way, name in (
                ("pack", "lit-sparse pack, from file to store"),
                ("bare", "encode_batch, text in memory"),
                ("fast", "encode_batch_fast, text in memory"),
            )
        ),
        f"  ratio to encode_batch {tokenise['ratio']:.2f}, to encode_batch_fast "
        f"{tokenise['ratio_fast']:.2f}",
        "",
        f"Row index over {report['rows'][0]['documents']:,} documents "
        f"({report['rows'][0]['tokens'] / 1e9:.2f} billion tokens), one epoch:",
    ]
    for rows in report["rows"]:
        text.append(
            f"  {rows['packing']:9} {rows['rows']:,} rows of {rows['row_tokens']:,}: "
            f"{rows['seconds']:.1f} s, peak memory {rows['peak_mib']:,.0f} MiB, "
            f"{rows['cut']:,} documents cut that would have fitted, {rows['filler']:.2%} filler"
        )
    text += ["", "Packing short documents (bytes), peak memory of the process:"]
    for entry in report["memory"]:
        text.append(f"  {entry['documents']:>9,} documents  {entry['peak_mib']:,.0f} MiB")
    text += [
        "",
        f"Loading the quickstart's rows: {loader['tokens_s']:,.0f} tokens/s; its model trains "
        f"{loader['model_tokens_s']:,.0f} tokens/s here: {loader['ratio']:,.0f} times",
    ]
    return text


# -- tokenising --


def _tokenise(folder: Path, megabytes: int, processes: int, progress: Progress) -> Report:
    source = folder / "text.jsonl"
    progress(f"making {megabytes} MB of text")
    documents = _make_text(source, megabytes << 20)
    tokenizer = folder / "tokenizer"
    _train_tokenizer(source, tokenizer)
    times: dict[str, list[float]] = {"pack": [], "bare": [], "fast": []}
    tokens = 0
    # In turns, each in a process of its own: nothing is warm for the next.
    for turn in range(TURNS):
        for way in times:
            progress(f"tokenising: {way}, run {turn + 1} of {TURNS}")
            out = folder / f"store{turn}"
            task = {"way": way, "source": str(source), "tokenizer": str(tokenizer)}
            result = _child({**task, "out": str(out), "processes": processes}, usable_cores())
            times[way].append(result["seconds"])
            if way == "pack":
                tokens = result["tokens"]
    seconds = {way: min(runs) for way, runs in times.items()}
    size = source.stat().st_size / 1e6
    return {
        "megabytes": size,
        "documents": documents,
        "tokens": tokens,
        "processes": processes,
        "cores": usable_cores(),
        "seconds": times,
        "mb_s": {way: size / taken for way, taken in seconds.items()},
        "tokens_s": {way: tokens / taken for way, taken in seconds.items()},
        "ratio": seconds["bare"] / seconds["pack"],
        "ratio_fast": seconds["fast"] / seconds["pack"],
    }


def _make_text(path: Path, size: int) -> int:
    """JSON lines of the standard library's source, files in turn, cut at random lengths."""
    library = Path(sysconfig.get_path("stdlib"))
    texts = [path.read_text(errors="replace") for path in sorted(library.glob("*.py"))]
    rng = np.random.default_rng(SEED)
    written = documents = 0
    with path.open("w") as file:
        while written < size:
            for text in texts:
                at = 0
                while at < len(text) and written < size:
                    piece = text[at : at + int(rng.lognormal(8.0, 1.2)) + 1]
                    at += len(piece)
                    written += file.write(json.dumps({"text": piece}) + "\n")
                    documents += 1
    return documents


def _train_tokenizer(source: Path, out: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    with source.open() as file:
        sample = [json.loads(line)["text"] for line, _ in zip(file, range(2000), strict=False)]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<|end|>"], show_progress=False
    )
    bpe.train_from_iterator(sample, trainer)
    PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>").save_pretrained(out)


# -- what runs in a process of its own --


def _child(task: Report, threads: int = 1) -> Report:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "RAYON_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "true",
    }
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", _CHILD, json.dumps(task)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"the measurement failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


# -- rows, memory, loading --


def _rows(folder: Path, documents: int, packing: str, progress: Progress) -> Report:
    progress(f"rows: {packing}")
    task = {"way": "rows", "documents": documents, "packing": packing, "row_tokens": 131072}
    return {**task, **_child({**task, "out": str(folder / f"rows_{packing}")})}


def _memory(folder: Path, progress: Progress) -> list[Report]:
    found = []
    for documents in (100_000, 1_000_000):
        progress(f"packing {documents:,} short documents")
        source = folder / f"short{documents}.jsonl"
        with source.open("w") as file:
            for number in range(documents):
                file.write(f'{{"text": "document {number} says {number % 97} words"}}\n')
        task = {"way": "pack", "source": str(source), "tokenizer": "bytes", "processes": 1}
        result = _child({**task, "out": str(folder / f"short{documents}")})
        found.append({"documents": documents, **result})
    return found


def _loader(folder: Path, progress: Progress) -> Report:
    import yaml

    from lit_sparse.data import PackedTextDataModule
    from lit_sparse.recipes.shipped_configs import find_config
    from lit_sparse.training import Curriculum, Stage

    progress("loading the quickstart's rows")
    config = yaml.safe_load(Path(find_config("quickstart")).read_text())
    curriculum = Curriculum([Stage(**stage) for stage in config["curriculum"]["stages"]])
    data = PackedTextDataModule(
        **config["data"], curriculum=curriculum, cache_dir=str(folder / "cache")
    )
    data.setup()
    begin = time.perf_counter()
    tokens = sum(batch["input_ids"].numel() for batch in data.train_dataloader())
    rate = tokens / (time.perf_counter() - begin)
    progress("training the quickstart's model for a few steps")
    model_rate = _model_rate(config, data)
    return {"tokens_s": rate, "model_tokens_s": model_rate, "ratio": rate / model_rate}


def _model_rate(config: Report, data: Any) -> float:
    """Tokens/s of forward, backward and optimizer step of the quickstart's model."""
    from lit_sparse import Budget, sparsify
    from lit_sparse.models import build_model
    from lit_sparse.models.head import language_head
    from lit_sparse.training.loss import chunked_cross_entropy

    torch.manual_seed(SEED)
    model: Any = build_model(architecture=config["model"]["architecture"])
    attention = config["sparse_attention"]
    sparsify(model, Budget(**attention["budget"]), block=attention["block"], tile=attention["tile"])
    optimizer = torch.optim.AdamW(model.parameters())
    rates = []
    for number, batch in enumerate(data.train_dataloader()):
        begin = time.perf_counter()
        hidden = model.base_model(
            input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
        ).last_hidden_state
        loss = chunked_cross_entropy(hidden, language_head(model), batch["labels"])
        (loss / batch["step_tokens"]).backward()
        optimizer.step()
        optimizer.zero_grad()
        rates.append(batch["input_ids"].numel() / (time.perf_counter() - begin))
        if number == 5:
            break
    return median(rates[1:])
