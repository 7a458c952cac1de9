"""What a trained model predicts when it generates, against how it was trained: held-out text after
a prompt, read at once by its law, at once densely, and token by token from a cache.

A cached step chooses its keys by itself, where a row of training shares a list with its tile: finer
than training, and so another model to some degree. How much it matters is measured here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_sparse.recipes.benchmark.pieces import check_length, validation_pieces
from lit_sparse.recipes.benchmark.report import BadArgument, number

GROUPS = (
    ("the model", ("attention",)),
    ("a token", ("loss", "bits", "to sparse")),
    ("against sparse, at once", ("KL", "same best token")),
)

NOTE = (
    "sparse, at once: the forward of training. dense: what the directory is in plain transformers. "
    "sparse, cached: the prompt at once, then a token at a time, as generate() does. loss: mean "
    "cross-entropy in nats of the tokens after the prompt, the same ones in every row; bits: the "
    "same in bits, bits per byte where a token is a byte. KL: of the row's distribution from that "
    "of sparse, at once, in nats."
)


@dataclass(frozen=True)
class Task:
    """What to measure; see the options of `lit-sparse benchmark --what generation`."""

    model: Path
    data: str
    length: int
    prompt: int
    documents: int
    dtype: str


@torch.no_grad()
def run(task: Task, progress: Callable[[str], None]) -> dict[str, Any]:
    """Measure all ways; "rows" of the result holds one entry each, in the order of the table.

    Raises:
        BadArgument: the model has no law, or model, text and length do not go together.
    """
    model = _model(task)
    check_length(model, task.length)
    texts, names = validation_pieces(model, task.model, task.data, task.length, task.documents)
    sums: dict[str, Tensor] = {}
    for i, text in enumerate(texts, start=1):
        progress(f"document {i} of {len(texts)} ...")
        trained = _at_once(model, text, task.prompt)
        for name, way in WAYS.items():
            predicted = way(model, text, task.prompt) if way else trained
            found = _compare(predicted, trained, text[task.prompt :])
            sums[name] = sums.get(name, torch.zeros_like(found)) + found
    tokens = len(texts) * (task.length - task.prompt)
    keys = ("loss", "kl", "agreement")
    return {
        "model": str(task.model),
        "data": task.data,
        "documents": names,
        "length": task.length,
        "prompt": task.prompt,
        "tokens": tokens,
        "dtype": task.dtype,
        "rows": [
            {"attention": name, **dict(zip(keys, (found / tokens).tolist(), strict=True))}
            for name, found in sums.items()
        ],
    }


def cells(entry: dict[str, Any], trained: dict[str, Any]) -> list[str]:
    """The row of `GROUPS` for an entry; `trained` is the first one."""
    same = entry is trained
    return [
        entry["attention"],
        number(entry["loss"], 4),
        number(entry["loss"] / torch.log(torch.tensor(2.0)).item(), 4),
        "-" if same else f"{entry['loss'] - trained['loss']:+.4f}",
        "-" if same else number(entry["kl"], 4),
        "-" if same else f"{entry['agreement']:.1%}",
    ]


def _at_once(model: Any, text: Tensor, prompt: int) -> Tensor:
    """Log-probabilities [length - prompt, vocabulary] of the tokens after the prompt."""
    kept = len(text) - prompt + 1
    logits = model(text[None], use_cache=False, logits_to_keep=kept).logits
    return logits[0, :-1].float().log_softmax(-1)


def _densely(model: Any, text: Tensor, prompt: int) -> Tensor:
    from lit_sparse.models import dense_attention

    with dense_attention(model):
        return _at_once(model, text, prompt)


def _cached(model: Any, text: Tensor, prompt: int) -> Tensor:
    out = model(text[None, :prompt], use_cache=True, logits_to_keep=1)
    logits = [out.logits[0]]
    for token in text[prompt:-1]:
        out = model(token.view(1, 1), use_cache=True, past_key_values=out.past_key_values)
        logits.append(out.logits[0])
    return torch.cat(logits).float().log_softmax(-1)


WAYS: dict[str, Callable[[Any, Tensor, int], Tensor] | None] = {
    "sparse, at once": None,
    "dense": _densely,
    "sparse, cached": _cached,
}


def _compare(predicted: Tensor, trained: Tensor, targets: Tensor) -> Tensor:
    """Sums over the tokens: loss, KL(predicted from trained), agreement of the best token."""
    loss = -predicted.gather(1, targets[:, None]).double().sum()
    kl = (trained.exp() * (trained - predicted)).double().sum()
    same = (predicted.argmax(1) == trained.argmax(1)).double().sum()
    return torch.stack([loss, kl, same])


def _model(task: Task) -> Any:
    from lit_sparse.models import build_model, sparsify

    try:
        return sparsify(build_model(pretrained=task.model, dtype=task.dtype).eval())
    except (ValueError, NotImplementedError) as error:
        raise BadArgument(f"--model {task.model}: {error}") from error
