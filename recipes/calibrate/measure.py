"""The dense run: what sampled late rows of every layer and head need."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_sparse.attention.need import RowNeed, rows_need
from lit_sparse.attention.select import default_tile
from lit_sparse.budget import Budget
from lit_sparse.calibration import Needs
from lit_sparse.data import Tokenizer
from lit_sparse.models import (
    Law,
    RopeOrigin,
    build_model,
    law_layers,
    observe,
    sparsify,
    windows_everywhere,
)
from lit_sparse.models.state import CONFIG_KEY
from lit_sparse.recipes.benchmark.report import BadArgument
from lit_sparse.recipes.calibrate.texts import Texts

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Subject:
    """What is calibrated, and what it reads.

    Args:
        path: where the model came from.
        model: sparsified; dense until it is given a law.
        selecting: block, tile, scorer, sink of its selection.
        texts: the documents.
        tokenizer: of the texts.
    """

    path: Path
    model: Any
    selecting: Law
    texts: Texts
    tokenizer: Tokenizer

    def forward(self, tokens: Tensor) -> Tensor:
        """Last hidden states [1, T, D] of tokens [1, T].

        Raises:
            BadArgument: the model has something that sparse attention lacks.
        """
        try:
            # The base model: logits of a long document are never materialised whole.
            return self.model.base_model(input_ids=tokens.to(self.model.device), use_cache=False)[0]
        except NotImplementedError as error:
            raise BadArgument(f"--model {self.path}: {error}") from error

    @property
    def layers(self) -> list[int]:
        """Numbers of those that obey a law."""
        return law_layers(self.model)


def load(
    path: Path, dtype: str, device: str, block: int | None, tile: int | None, sink: int | None
) -> tuple[Any, Law]:
    """A model that runs densely, and how its layers will select: its own law's, where it has one.

    Raises:
        BadArgument: it cannot be loaded or made sparse.
    """
    try:
        model = build_model(pretrained=path, dtype=dtype).eval()
        stored = getattr(model.config, CONFIG_KEY, None)
        law = Law(Budget()) if stored is None else Law.from_dict(stored)
        budget = law.budget if sink is None else replace(law.budget, sink=sink)
        law = Law(budget, {}, block or law.block, tile or law.tile, law.score)
        if not law_layers(model):
            raise ValueError(windows_everywhere(model))
        sparsify(model, Budget.dense(), block=law.block, tile=law.tile, score=law.score)
    except (ValueError, NotImplementedError) as error:
        raise BadArgument(f"--model {path}: {error}") from error
    return model.to(device), law


def longest_context(model: Any) -> int:
    """Tokens that the model's positions reach."""
    return RopeOrigin.of(model).context


def default_lengths(context: int) -> list[int]:
    """Four doublings, so that twice the longest is the model's context."""
    return [context // 16, context // 8, context // 4, context // 2]


def local_window(model: Any, law: Law) -> int:
    """Nearest tokens that every budget keeps."""
    config = model.config.get_text_config()
    groups = config.num_attention_heads // config.num_key_value_heads
    return (law.tile or default_tile(groups)) + law.block


def late_start(length: int) -> int:
    """First row of the last quarter of a document: from there a row sees about all of it."""
    return 3 * length // 4


def late_rows(length: int, count: int, generator: torch.Generator) -> Tensor:
    """`count` rows of the last quarter of a document (all, if there are fewer), ascending.

    The last row is one of them, so that documents of other lengths have other contexts for certain.
    """
    first, last = late_start(length), length - 1
    others = torch.randperm(last - first, generator=generator)[: count - 1].sort().values + first
    return torch.cat([others, torch.tensor([last])])


@torch.no_grad()
def measure(subject: Subject, missed: float, rows: int, seed: int, progress: Progress) -> Needs:
    """Run every document densely, once, and measure what late rows need.

    Args:
        subject: its model dense.
        missed: share of the mass that may be missed.
        rows: sampled in each document, the same in all layers.
        seed: of the rows.
        progress: told what is done next.

    Raises:
        BadArgument: the model cannot be measured.
    """
    selecting, texts = subject.selecting, subject.texts
    block, sink = selecting.block, selecting.budget.sink
    local = local_window(subject.model, selecting)
    generator = torch.Generator().manual_seed(seed)
    layers: dict[int, RowNeed] = {}
    drawn = torch.empty(0, dtype=torch.int64)

    def observer(layer: int, q: Tensor, k: Tensor, *others: Any) -> None:
        *_, options, _ = others
        need = rows_need(
            q, k, drawn, missed=missed, block=block, sink=sink, local=local, options=options
        )
        if not bool(need.logit_range.isfinite().all()):
            raise BadArgument(
                f"--model {subject.path}: layer {layer} has logits that are not finite"
            )
        layers[layer] = need

    measured: list[tuple[int, list[RowNeed]]] = []
    total = sum(map(len, texts.fitted.values()))
    with observe(subject.model, observer, subject.layers):
        for length, documents in texts.fitted.items():
            for document in documents:
                progress(f"document {len(measured) + 1} of {total}, {length} tokens, dense")
                drawn = late_rows(length, rows, generator)
                subject.forward(texts.read(document, length))
                measured.append((document, [layers[layer] for layer in sorted(layers)]))
    return Needs.gather(
        measured, missed=missed, block=block, sink=sink, local=local, layers=subject.layers
    )
