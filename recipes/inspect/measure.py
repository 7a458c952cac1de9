"""What one model's weights say of its logits, and what its logits are, by layer and head."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_sparse import theory
from lit_sparse.attention.options import Options
from lit_sparse.attention.probe import probe_rows, sample_rows
from lit_sparse.budget import Budget
from lit_sparse.models import (
    attention_layers,
    build_model,
    dense_attention,
    law_layers,
    law_of,
    observe,
    sparsify,
    windows_everywhere,
)
from lit_sparse.models.export.serving import context_of
from lit_sparse.models.norms import LogitNorms, distances, logit_norms, query_projection
from lit_sparse.models.state import CONFIG_KEY
from lit_sparse.recipes.benchmark.pieces import check_length, validation_pieces
from lit_sparse.recipes.benchmark.report import BadArgument
from lit_sparse.recipes.benchmark.steps import SEED

LENGTHS = (8192, 32768, 131072, 1048576)
"""Contexts, in tokens, whose required range is reported."""

DEFAULT_LENGTH = 4096


@dataclass(frozen=True)
class Task:
    """What to measure; see the options of `lit-sparse inspect`. A length of None: `DEFAULT_LENGTH`,
    or what the model was made for if that is less.
    """

    data: str | None
    length: int | None
    documents: int
    rows: int
    missed: float
    delta: float
    dtype: str
    device: str


@dataclass(frozen=True)
class Layer:
    """One layer of H query heads; logits with the softmax scale, in nats."""

    layer: int
    budget: Budget
    input_largest: float
    """B: the largest entry of what enters W_Q and W_K, the layer's normalised input."""
    input_rms: float
    input_mean_share: float
    """Share of the input's power that every token has in common; bounds assume 0."""
    norms: LogitNorms
    bound: Tensor
    """[H]: the predicted largest logit M of B, or the ceiling of QK-norm."""
    estimate: Tensor
    """[H]: the same of the input's root mean square; NaN with QK-norm."""
    largest: Tensor
    """[H]: the largest measured logit."""
    range: Tensor
    """[H]: largest - smallest logit of the median row."""
    required: Tensor
    """[lengths]: range without which the budget misses more than it may."""

    @property
    def ratio(self) -> Tensor:
        """bound / largest measured, [H]."""
        return self.bound / self.largest

    @property
    def reached(self) -> Tensor:
        """bool [H, lengths]: whether the median row has the required range."""
        return self.range[:, None] >= self.required

    @property
    def possible(self) -> Tensor:
        """bool [H, lengths]: whether QK-norm lets any row have it."""
        if self.norms.ceiling is None:
            return torch.ones_like(self.reached)
        return 2 * self.norms.ceiling[:, None] >= self.required

    def to_dict(self) -> dict[str, Any]:
        """For JSON; lists are by head, those of `reached` by head and length."""
        found = {
            "layer": self.layer,
            "budget": self.budget.to_dict(),
            "input_largest": self.input_largest,
            "input_rms": self.input_rms,
            "input_mean_share": self.input_mean_share,
            "norm": self.norms.weight[:, 0],
            "norm_mean_over_distances": self.norms.mean_weight,
            "norm_largest_over_distances": self.norms.weight.amax(-1),
            "query_bias_norm": self.norms.query_bias[:, 0],
            "key_bias_norm": self.norms.key_bias[:, 0],
            "qk_norm_ceiling": self.norms.ceiling,
            "bound": self.bound,
            "estimate": self.estimate,
            "largest_logit": self.largest,
            "bound_over_measured": self.ratio,
            "range": self.range,
            "required_range": self.required,
            "reached": self.reached,
            "possible": self.possible,
        }
        return {
            key: value.tolist() if isinstance(value, Tensor) else value
            for key, value in found.items()
        }


@dataclass(frozen=True)
class Findings:
    """One model."""

    model: Path
    kind: str
    """Its `model_type`."""
    texts: list[str] | None
    """Where the measured tokens stand; None: they were random."""
    length: int
    """Tokens of each text."""
    lengths: tuple[int, ...]
    """Contexts of the required ranges: `length`, then those of `LENGTHS` that are longer."""
    own_law: bool
    """Whether the budget is that of the model's config, or a preset."""
    layers: list[Layer]

    def to_dict(self) -> dict[str, Any]:
        return {
            "model": str(self.model),
            "model_type": self.kind,
            "texts": self.texts,
            "length": self.length,
            "lengths": list(self.lengths),
            "own_law": self.own_law,
            "layers": [layer.to_dict() for layer in self.layers],
        }


def inspect_model(directory: Path, task: Task, progress: Callable[[str], None]) -> Findings:
    """Run a model densely on a few texts, and hold its logits against its weights.

    Raises:
        BadArgument: the directory holds no model that can be measured, or the text, the length and
            the model do not go together.
    """
    model, own_law = _load(directory, task)
    length = task.length or min(DEFAULT_LENGTH, context_of(model.config.to_dict()))
    check_length(model, length)
    texts, names = _texts(model, directory, task, length)
    inputs = {layer: Inputs() for layer in law_layers(model)}
    logits = _Logits(task.rows, length // 2)
    watch = observe(model, logits, inputs)
    with torch.no_grad(), dense_attention(model), watch, watch_inputs(model, inputs):
        for number, tokens in enumerate(texts, start=1):
            progress(f"{directory}: text {number} of {len(texts)} ...")
            logits.text = number
            # The base model: nobody reads the logits of the vocabulary.
            model.base_model(input_ids=tokens[None].to(task.device), use_cache=False)

    lengths = (length, *(n for n in LENGTHS if n > length))
    law, pairs = law_of(model), task.rows * length * len(texts)
    layers = []
    for number, norms in logit_norms(model, distances(length)).items():
        seen, budget = inputs[number], law.of(number)
        largest, span = logits.largest(number), logits.median_range(number)
        if not (largest.isfinite() & span.isfinite()).all():
            raise BadArgument(f"--model {directory}: layer {number} has logits that are not finite")
        estimate = norms.largest_logit(seen.rms, pairs, task.delta)
        layer = Layer(
            number,
            budget,
            seen.largest,
            seen.rms,
            seen.mean_share,
            norms,
            norms.largest_logit(seen.largest, pairs, task.delta),
            estimate if norms.ceiling is None else torch.full_like(estimate, torch.nan),
            largest,
            span,
            theory.required_logit_range(
                torch.tensor(lengths), budget(torch.tensor(lengths)), task.missed
            ),
        )
        layers.append(layer)
    return Findings(directory, model.config.model_type, names, length, lengths, own_law, layers)


def _texts(
    model: Any, directory: Path, task: Task, length: int
) -> tuple[list[Tensor], list[str] | None]:
    """int64 [length] each, and where they stand; random ones stand nowhere."""
    if task.data is not None:
        return validation_pieces(model, directory, task.data, length, task.documents)
    drawn = torch.Generator().manual_seed(SEED)
    known = model.get_input_embeddings().num_embeddings
    return list(torch.randint(known, (task.documents, length), generator=drawn)), None


def _load(directory: Path, task: Task) -> tuple[Any, bool]:
    """The sparsified model, and whether the law is its own."""
    try:
        model: Any = build_model(pretrained=directory, dtype=task.dtype)
        own_law = getattr(model.config, CONFIG_KEY, None) is not None
        if not attention_layers(model):
            raise ValueError("the model has no attention layer")
        if not law_layers(model):
            raise ValueError(windows_everywhere(model))
        sparsify(model, None if own_law else Budget.preset("balanced"))
        return model.eval().to(task.device), own_law
    except (ValueError, NotImplementedError, OSError) as error:
        what = str(error).removeprefix("model.pretrained: ")
        raise BadArgument(f"--model {directory}: {what}") from error


@dataclass
class Inputs:
    """Of all tokens that a layer's projections saw."""

    largest: float = 0.0
    squares: float = 0.0
    total: Tensor = field(default_factory=lambda: torch.zeros(()))
    tokens: int = 0

    def add(self, x: Tensor) -> None:
        """x [batch, tokens, d_model]"""
        x = x.flatten(0, -2).double()
        self.largest = max(self.largest, x.abs().max().item())
        self.squares += x.square().sum().item()
        self.total = self.total.to(x) + x.sum(0)
        self.tokens += len(x)

    @property
    def rms(self) -> float:
        """Root mean square of the entries."""
        return (self.squares / (self.tokens * self.total.numel())) ** 0.5

    @property
    def mean_share(self) -> float:
        """Share of the power that every token has in common."""
        return self.total.square().sum().item() / (self.tokens * self.squares)


@contextmanager
def watch_inputs(model: Any, inputs: Mapping[int, Inputs]) -> Iterator[None]:
    """Inside, what enters the query projection of these layers, the same as what enters the others,
    is added to the layer's.
    """
    hooks = [
        query_projection(module).register_forward_pre_hook(
            lambda _, args, own=inputs[layer]: own.add(args[0])
        )
        for layer, module in attention_layers(model)
        if layer in inputs
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _Logits:
    """An observer that keeps the largest logit and the range of late rows, [rows, H] a text."""

    def __init__(self, rows: int, min_context: int) -> None:
        self.rows, self.min_context = rows, min_context
        self.text = 0
        self._seen: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def __call__(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        selection: Any,
        options: Options,
        documents: Any,
    ) -> None:
        generator = torch.Generator().manual_seed(SEED + self.text)
        rows = sample_rows(selection.plan, self.rows, generator, self.min_context)
        found = probe_rows(q, k, v, selection, rows, options, out=out, lse=lse)
        pair = found.logit_max.double().cpu(), found.logit_range.double().cpu()
        self._seen.setdefault(layer, []).append(pair)

    def largest(self, layer: int) -> Tensor:
        return torch.cat([largest for largest, _ in self._seen[layer]]).amax(0)

    def median_range(self, layer: int) -> Tensor:
        return torch.cat([span for _, span in self._seen[layer]]).median(0).values
