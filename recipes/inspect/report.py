"""The findings of `lit-sparse inspect` in words and tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lit_sparse.recipes.benchmark.report import named_layers, render_table, short, tokens, wrap
from lit_sparse.recipes.inspect.measure import Findings, Layer, Task

SAYS_NOTHING = 3.0
"""A bound so many times above the measured logits says nothing about them."""

NOT_CENTRED = 0.1
"""A larger share of the inputs' power in their mean breaks the bound's assumption."""

NOTE = (
    "R / B^2: ||W_Q W_K^T||_F / sqrt(head_dim) at distance 0, before QK-norm where there is one; "
    "RoPE changes it with the distance of two tokens, by the factors behind it (root mean square, "
    "largest). inputs: entries of what "
    "enters W_Q and W_K. largest logit: absolute; bound: R sqrt(2 ln(2 pairs / delta)) at the "
    "worst distance, with B the largest entry and rows in root mean square, biases included; "
    "estimate: the same of the RMS, far under the measured where inputs align with the weights; "
    "ratio: bound / measured. range: largest - smallest logit of a head's median row, in nats. "
    "reach: heads whose range is what the budget requires at that context. The others miss more in "
    "half of their rows, whichever keys are kept, unless their range grows; those that reach it "
    "may miss more all the same: it is necessary, not sufficient. Medians over heads where nothing "
    "else is said. (Reconstructed; the claims are of arXiv 2404.02690.)"
)


def lines(findings: Sequence[Findings], task: Task, heads: bool) -> list[str]:
    """All that is printed; `heads`: a line for each head instead of each layer."""
    printed = []
    for found in findings:
        rows = [cells for layer in found.layers for cells in _rows(layer, heads)]
        printed += [*wrap(_title(found, task)), "", *render_table(_groups(found), rows), ""]
        for sentence in sentences(found, task):
            printed += wrap(sentence)
        printed.append("")
    if len(findings) > 1:
        printed += [*_side_by_side(findings), ""]
    return [*printed, *wrap(NOTE)]


def _title(found: Findings, task: Task) -> str:
    first = found.layers[0]
    what = "random tokens" if found.texts is None else f"text of {task.data}"
    count = task.documents if found.texts is None else len(found.texts)
    norms = first.norms
    biased = bool(norms.query_bias.any() or norms.key_bias.any())
    parts = [" with biases"] * biased + [" with QK-norm"] * (norms.ceiling is not None)
    return (
        f"{found.model}: {found.kind}, {len(found.layers)} layers of {len(first.range)} query "
        f"heads{' and'.join(parts)}; {count} x {found.length} {what}, {task.rows} rows of the "
        "later half of each"
    )


def _groups(found: Findings) -> list[tuple[str, tuple[str, ...]]]:
    return [
        ("", ("layer",)),
        ("R / B^2", ("min", "median", "max")),
        ("RoPE, x", ("rms", "max")),
        ("inputs", ("RMS", "B")),
        ("largest logit", ("measured", "estimate", "bound", "ratio")),
        ("range", ("min", "median", "max")),
        ("heads that reach", tuple(tokens(n) for n in found.lengths)),
    ]


def _rows(layer: Layer, heads: bool) -> list[list[str]]:
    """One row of the layer, or one of each head."""
    if not heads:
        return [_cells(layer, str(layer.layer), slice(None))]
    return [
        _cells(layer, f"{layer.layer}.{head}", slice(head, head + 1))
        for head in range(len(layer.range))
    ]


def _cells(layer: Layer, name: str, part: slice) -> list[str]:
    at_zero = layer.norms.weight[part, 0]
    # Weights of zero have no ratio.
    mean = layer.norms.mean_weight[part] / at_zero
    largest = layer.norms.weight[part].amax(-1) / at_zero
    reached, count = layer.reached[part].sum(0).tolist(), len(at_zero)
    return [
        name,
        *(_digits(f(at_zero)) for f in _SPREAD),
        _digits(mean.median().item()),
        _digits(largest.max().item()),
        _digits(layer.input_rms),
        _digits(layer.input_largest),
        short(layer.largest[part].max().item()),
        short(layer.estimate[part].median().item()),
        short(layer.bound[part].median().item()),
        short(layer.ratio[part].median().item()),
        *(short(f(layer.range[part])) for f in _SPREAD),
        *(f"{heads}/{count}" for heads in reached),
    ]


_SPREAD: tuple[Callable[[Tensor], float], ...] = (
    lambda x: x.min().item(),
    lambda x: x.median().item(),
    lambda x: x.max().item(),
)


def sentences(found: Findings, task: Task) -> list[str]:
    """What the numbers mean, plainly."""
    said = [_of_the_bound(found)]
    if found.texts is None:
        said.append("Measured on random tokens: --data STORE gives the logits of text.")
    breaking = [x.layer for x in found.layers if x.input_mean_share > NOT_CENTRED]
    if breaking and found.layers[0].norms.ceiling is None:
        most = max(x.input_mean_share for x in found.layers)
        said.append(
            f"The inputs of {named_layers(breaking)} are not of mean 0, as the bound assumes: "
            f"up to {most:.0%} of their power is the same in every token."
        )
    return [*said, *_of_the_budget(found, task)]


def _of_the_bound(found: Findings) -> str:
    ratio = torch.cat([layer.ratio for layer in found.layers])
    loose, broken = int((ratio > SAYS_NOTHING).sum()), int((ratio < 1).sum())
    ceiling = found.layers[0].norms.ceiling is not None
    what = "The ceiling that QK-norm sets" if ceiling else "The bound"
    said = (
        f"{what} is {short(ratio.median().item())} times the largest measured logit (median head)"
    )
    if loose:
        said += (
            f", over {SAYS_NOTHING:g} times in {loose} of {len(ratio)} heads: it says nothing there"
        )
    if broken:
        said += f"; {broken} heads pass it: their rows or inputs are not what it assumes"
    return said + "."


def _of_the_budget(found: Findings, task: Task) -> list[str]:
    budgets = dict.fromkeys(layer.budget for layer in found.layers)
    whose = "the model's law" if found.own_law else 'preset "balanced", as the config has no law'
    said = []
    for budget in budgets:
        own = [layer for layer in found.layers if layer.budget == budget]
        which = "" if len(budgets) == 1 else f" in {named_layers([x.layer for x in own])}"
        if not own[0].required.any():
            said.append(f"{budget} ({whose}){which} requires no range of logits.")
            continue
        pairs = zip(found.lengths, own[0].required.tolist(), strict=True)
        required = ", ".join(f"{nats:.1f} at {tokens(n)}" for n, nats in pairs)
        said.append(
            f"{budget} ({whose}){which} can miss at most {100 * task.missed:g} % of the mass only "
            f"where logits range over {required} nats."
        )
    return [*said, *_infeasible(found)]


def _infeasible(found: Findings) -> list[str]:
    """Contexts at which a whole layer falls short, together where the same layers do."""
    short_of: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for i, n in enumerate(found.lengths):
        barred = tuple(x.layer for x in found.layers if not x.possible[:, i].any())
        without = tuple(x.layer for x in found.layers if not x.reached[:, i].any())
        none = tuple(layer for layer in without if layer not in barred)
        for why, layers in (
            ("QK-norm lets no row of {} reach it", barred),
            ("the measured range of no head of {} reaches it", none),
        ):
            if layers:
                short_of.setdefault((why, layers), []).append(tokens(n))
    return [
        f"Infeasible at {', '.join(where)}: {why.format(named_layers(layers))}."
        for (why, layers), where in short_of.items()
    ]


def _side_by_side(findings: Sequence[Findings]) -> list[str]:
    """Layer by layer, the models in the order given."""
    groups: list[tuple[str, tuple[str, ...]]] = [("", ("layer",))]
    groups += [
        (f"[{i}] {label(found)}", ("R/B^2", "logit", "ratio", "range"))
        for i, found in enumerate(findings, start=1)
    ]
    rows = []
    for number in range(max(len(found.layers) for found in findings)):
        cells = [str(number)]
        for found in findings:
            if number < len(found.layers):
                cells += _short_cells(found.layers[number])
            else:
                cells += ["-"] * 4
        rows.append(cells)
    names = [f"[{i}] {found.model}" for i, found in enumerate(findings, start=1)]
    return [
        *wrap(
            f"Side by side, {', '.join(names)}: largest R / B^2 and logit, median ratio and range"
        ),
        "",
        *render_table(groups, rows),
    ]


def _short_cells(layer: Layer) -> list[str]:
    return [
        _digits(layer.norms.weight[:, 0].max().item()),
        short(layer.largest.max().item()),
        short(layer.ratio.median().item()),
        short(layer.range.median().item()),
    ]


def label(found: Findings) -> str:
    """Of a model, shorter than its path: a run's directory is always named alike."""
    return "/".join(found.model.absolute().parts[-2:])


def _digits(value: float) -> str:
    """A cell of about three digits."""
    return f"{value:.3g}"
