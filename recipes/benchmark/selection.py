"""Selection quality on a real model and text: how much attention mass each rule misses.

The model runs densely; at sampled late rows of every layer the exact attention is compared with
what each rule would have kept. All rules see the same rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_sparse.attention import select
from lit_sparse.attention.options import Options
from lit_sparse.attention.plan import Plan, make_plan
from lit_sparse.attention.scores import SCORERS
from lit_sparse.attention.select import default_tile
from lit_sparse.budget import Budget
from lit_sparse.recipes.benchmark.pieces import check_length, validation_pieces
from lit_sparse.recipes.benchmark.report import BadArgument, number
from lit_sparse.recipes.benchmark.steps import SEED, causal_pairs, executed_pairs

LATE = (0.0, 0.1, 0.25)
TILES = (16, 32, 64)

GROUPS = (
    ("rule", ("selection", "scorer", "late", "tile")),
    ("share of the causal pairs", ("kept", "executed")),
    ("at the sampled rows", ("missed mass", "far recall")),
)

NOTE = (
    "working set: the rule of this package. per query: a list of the same size for each row, "
    "chosen by the row itself: causal, but without a tile to execute. leaky: a tile's list chosen "
    "by all its rows, later ones included: NOT causal, a yardstick only. executed: blocks whole, "
    "masked parts included. missed mass: softmax mass of dropped keys under dense attention. far "
    "recall: share of (row, head) whose strongest block outside sink and local window is kept. "
    "Means over documents, layers, heads and rows."
)


@dataclass(frozen=True)
class Rule:
    """How lists are chosen: "working set", "per query" or "leaky"; see `NOTE`."""

    kind: str
    score: str
    late: float
    tile: int


@dataclass
class Tally:
    """What one rule did in one layer, summed over documents."""

    missed: float = 0.0
    rows: int = 0
    found: int = 0
    far: int = 0
    density: list[float] = field(default_factory=list)
    executed: list[float] = field(default_factory=list)


def rules(budget: Budget, tile: int) -> list[Rule]:
    """All rules that are compared, each once: scorers, shares of late slots, tiles, yardsticks."""
    working = [Rule("working set", score, budget.late, tile) for score in SCORERS]
    working += [Rule("working set", "mass", late, tile) for late in LATE]
    working += [Rule("working set", "mass", budget.late, size) for size in TILES]
    yardsticks = [Rule("per query", "mass", 0.0, tile), Rule("leaky", "mass", 0.0, tile)]
    return list(dict.fromkeys(working + yardsticks))


def block_masses(q: Tensor, k: Tensor, rows: Tensor, options: Options, block: int) -> Tensor:
    """Exact softmax mass of every key block under dense causal attention; a learned sink has the
    rest.

    Args:
        q: [T, Hq, D], k: [T, Hkv, D], one document; rows: int64 [R].

    Returns:
        [Hkv, G, R, blocks]
    """
    length, heads = k.shape[:2]
    hidden = torch.arange(length) > rows[:, None]
    masses = []
    for head, own in enumerate(q[rows].unflatten(1, (heads, -1)).unbind(1)):
        logits = options.cap(options.scale * torch.einsum("rgd,td->grt", own, k[:, head]))
        logits.masked_fill_(hidden, float("-inf"))
        total = logits.logsumexp(-1, keepdim=True)
        if options.sinks is not None:
            total = total.logaddexp(options.sinks.unflatten(0, (heads, -1))[head, :, None, None])
        weights = (logits - total).exp_()
        weights = torch.nn.functional.pad(weights, (0, -length % block))
        masses.append(weights.unflatten(-1, (-1, block)).sum(-1))
    return torch.stack(masses)


def far_blocks(plan: Plan, budget: Budget) -> tuple[Tensor, Tensor]:
    """First and end, int64 [tiles], of the blocks behind the sink and before the local window.

    In tiles that drop nothing too, where the plan does not tell them apart.
    """
    start = torch.from_numpy(plan.start)
    keys = budget(start + plan.tile)
    window = (budget.local * (keys - budget.sink).clamp(min=0) - 1e-9).ceil().long()
    window = window.clamp(min=plan.tile + plan.block)
    end = (start - window).clamp(min=0) // plan.block
    return end.clamp(max=-(-budget.sink // plan.block)), end


class Quality:
    """An observer of a densely running model (`lit_sparse.models.observe`) that tallies all rules.

    Args:
        rules: what to compare.
        budget: the law; each rule has its own `late`.
        block: keys of a block.
    """

    def __init__(self, rules: Iterable[Rule], budget: Budget, block: int) -> None:
        self.rules, self.budget, self.block = list(rules), budget, block
        self.rows = torch.zeros(0, dtype=torch.int64)
        """Rows of the document that runs next."""
        self.tallies: dict[tuple[Rule, int], Tally] = {}

    @torch.no_grad()
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
        q, k = q.float(), k.float()
        masses = block_masses(q, k, self.rows, options, self.block)
        for rule in self.rules:
            budget = replace(self.budget, late=rule.late)
            tally = self.tallies.setdefault((rule, layer), Tally())
            kept, plan = self._kept(rule, budget, q, k, options.scale, tally)
            _count(tally, masses, kept[:, None], far_blocks(plan, budget), self.rows // rule.tile)

    def _kept(
        self, rule: Rule, budget: Budget, q: Tensor, k: Tensor, scale: float, tally: Tally
    ) -> tuple[Tensor, Plan]:
        """bool [Hkv, R, blocks]: which blocks the sampled rows see."""
        bounds = (0, len(q))
        if rule.kind != "working set":
            plan = make_plan(bounds, bounds, budget, self.block, rule.tile)
            return _yardstick(q, k, self.rows, plan, scale, leaky=rule.kind == "leaky"), plan
        selection = select(
            q, k, budget, bounds, scale=scale, block=self.block, tile=rule.tile, score=rule.score
        )
        tally.density.append(selection.density)
        tally.executed.append(executed_pairs(selection) / causal_pairs(selection))
        # A row sees all of a kept block up to itself, so the block's first key stands for it.
        return selection.rows_mask(self.rows, len(k))[..., :: self.block], selection.plan

    def results(self) -> list[dict[str, Any]]:
        """One entry a rule, in the order of the rules; None where there is nothing to average."""
        entries = []
        for rule in self.rules:
            tallies = {at: tally for (own, at), tally in self.tallies.items() if own == rule}
            layers = [tallies[at] for at in sorted(tallies)]
            entries.append(
                {
                    "selection": rule.kind,
                    "score": rule.score,
                    "late": rule.late,
                    "tile": rule.tile,
                    "density": _mean([x for layer in layers for x in layer.density]),
                    "executed_density": _mean([x for layer in layers for x in layer.executed]),
                    "missed_mass": _share(layers, "missed", "rows"),
                    "far_recall": _share(layers, "found", "far"),
                    "missed_mass_by_layer": [_share([x], "missed", "rows") for x in layers],
                    "far_recall_by_layer": [_share([x], "found", "far") for x in layers],
                    "rows_and_heads": sum(x.rows for x in layers),
                    "rows_and_heads_with_far_blocks": sum(x.far for x in layers),
                }
            )
        return entries


def _count(
    tally: Tally, masses: Tensor, kept: Tensor, far: tuple[Tensor, Tensor], tile: Tensor
) -> None:
    """masses [Hkv, G, R, blocks], kept bool [Hkv, 1, R, blocks], tile of each row [R]."""
    missed = masses.masked_fill(kept, 0.0).sum(-1)
    tally.missed += missed.double().sum().item()
    tally.rows += missed.numel()
    first, end = (bound[tile, None] for bound in far)
    block = torch.arange(masses.shape[-1])
    strongest = masses.masked_fill((block < first) | (block >= end), -1.0).argmax(-1, keepdim=True)
    found = kept.expand_as(masses).gather(-1, strongest)[..., 0]
    exists = (first < end)[:, 0].expand_as(found)
    tally.found += int((found & exists).sum())
    tally.far += int(exists.sum())


def _yardstick(q: Tensor, k: Tensor, rows: Tensor, plan: Plan, scale: float, leaky: bool) -> Tensor:
    """bool [Hkv, R, blocks]: lists as long as the plan's, chosen by the row or its whole tile."""
    length, heads, dim = k.shape
    blocks = -(-length // plan.block)
    whole = length // plan.block
    means = k[: whole * plan.block].view(whole, plan.block, heads, dim).mean(1).transpose(0, 1)
    kept = torch.zeros(heads, len(rows), blocks, dtype=torch.bool)
    number = torch.arange(blocks)
    for i, row in enumerate(rows.tolist()):
        tile = row // plan.tile
        sink, base, _, late, _ = plan.counts[tile].tolist()
        local, complete = int(plan.first_local[tile]), int(plan.complete[tile])
        asking = slice(row, row + 1)
        if leaky:
            asking = slice(tile * plan.tile, (tile + 1) * plan.tile)
        own = q[asking].unflatten(1, (heads, -1)).transpose(0, 1)
        hidden = torch.zeros(own.shape[1], complete, dtype=torch.bool)
        scores = SCORERS["mass"].rows(own, means[:, :complete], hidden, scale).sum(1)
        candidates = scores[:, sink:local]
        best = candidates.topk(min(base + late, candidates.shape[1])).indices + sink
        kept[:, i] = (number < sink) | (number >= local)
        kept[:, i].scatter_(-1, best, True)
        kept[:, i] &= number * plan.block <= row
    return kept


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _share(tallies: list[Tally], part: str, whole: str) -> float | None:
    total = sum(getattr(tally, whole) for tally in tallies)
    return sum(getattr(tally, part) for tally in tallies) / total if total else None


def cells(entry: dict[str, Any]) -> list[str]:
    """The row of `GROUPS` for an entry of `Quality.results`."""
    yardstick = entry["selection"] != "working set"
    return [
        entry["selection"],
        entry["score"],
        "-" if yardstick else f"{entry['late']:g}",
        str(entry["tile"]),
        number(entry["density"], 3),
        number(entry["executed_density"], 3),
        number(entry["missed_mass"], 4),
        number(entry["far_recall"], 3),
    ]


@dataclass(frozen=True)
class Task:
    """What to measure; see the options of `lit-sparse benchmark --what selection`."""

    model: Path
    data: str
    length: int
    documents: int
    rows: int
    budget: Budget
    block: int
    tile: int | None
    dtype: str


def run(task: Task, progress: Callable[[str], None]) -> dict[str, Any]:
    """Measure all rules; "rules" of the result holds `Quality.results()`.

    Raises:
        BadArgument: the model, the text or the length do not go together.
    """
    from lit_sparse.models import dense_attention, law_layers, observe

    model = _model(task)
    layers = law_layers(model)
    config = model.config.get_text_config()
    groups = config.num_attention_heads // config.num_key_value_heads
    tile = task.tile or default_tile(groups)
    check_length(model, task.length)
    documents, names = validation_pieces(model, task.model, task.data, task.length, task.documents)
    quality = Quality(rules(task.budget, tile), task.budget, task.block)
    generator = torch.Generator().manual_seed(SEED)
    late_half = task.length // 2
    with torch.no_grad(), dense_attention(model), observe(model, quality, layers):
        for number_, tokens in enumerate(documents, start=1):
            progress(f"document {number_} of {len(documents)} ...")
            drawn = torch.randperm(task.length - late_half, generator=generator)[: task.rows]
            quality.rows = drawn.sort().values + late_half
            try:
                # The base model: nobody reads the logits.
                model.base_model(input_ids=tokens[None], use_cache=False)
            except NotImplementedError as error:
                raise BadArgument(f"--model {task.model}: {error}") from error
    return {
        "model": str(task.model),
        "data": task.data,
        "documents": names,
        "length": task.length,
        "rows": len(quality.rows),
        "layers": len(layers),
        "heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "dtype": task.dtype,
        "rules": quality.results(),
    }


def _model(task: Task) -> Any:
    from lit_sparse.models import build_model, law_layers, sparsify, windows_everywhere

    try:
        model = build_model(pretrained=task.model, dtype=task.dtype).eval()
        if not law_layers(model):
            raise ValueError(windows_everywhere(model))
        sparsify(model, task.budget, block=task.block, tile=task.tile)
    except (ValueError, NotImplementedError) as error:
        raise BadArgument(f"--model {task.model}: {error}") from error
    return model
