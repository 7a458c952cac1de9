"""What a calibration says and writes: a table and sentences, a config fragment, all numbers."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
import yaml
from torch import Tensor

from lit_sparse.budget import Budget
from lit_sparse.calibration import ChosenLaw, Feasibility, HeadFits, Needs, Verdict
from lit_sparse.models import Law
from lit_sparse.recipes.benchmark.report import named_layers, render_table, wrap, write_json
from lit_sparse.recipes.calibrate.check import Check, sparse_layers
from lit_sparse.recipes.calibrate.texts import Texts

BUDGET, NUMBERS = "budget.yaml", "calibration.json"

QUANTILES = (0.5, 0.9)
"""Of the needs of rows, in the file of numbers."""

IDLE = 0.9
"""Share of the causal pairs from which a law saves nothing."""

VERDICTS: tuple[Verdict, ...] = get_args(Verdict)


@dataclass(frozen=True)
class Result:
    """All that a calibration found."""

    machine: dict[str, Any]
    """Where and how it ran; see `benchmark.report.environment`."""
    settings: dict[str, Any]
    """Model, data, lengths, documents, rows, seed."""
    texts: Texts
    needs: Needs
    fits: HeadFits
    fitted: ChosenLaw
    """Before the check."""
    chosen: ChosenLaw
    law: Law
    """The chosen law with block, tile and scorer."""
    feasible: Feasibility
    check: Check

    @property
    def dense(self) -> list[int]:
        """Layers that stay dense."""
        layers = self.fits.layers
        return sorted(set(layers) - set(sparse_layers(self.chosen, layers)))

    @property
    def budgets(self) -> dict[Budget, list[int]]:
        """Each budget once, with the layers that obey it."""
        layers: dict[Budget, list[int]] = {}
        for layer in self.fits.layers:
            layers.setdefault(self.chosen.of(layer), []).append(layer)
        return layers

    @property
    def rows(self) -> dict[int, Tensor]:
        """Length -> which rows of `needs` are of its documents, bool [N]."""
        document = self.needs.document
        fitted = self.texts.fitted.items()
        return {n: torch.isin(document, torch.tensor(chosen)) for n, chosen in fitted}

    def sentences(self) -> list[str]:
        """What a user should know about the law, the gravest first."""
        found = list(self.fitted.warnings)
        final = self.check.final
        if final is not None and final.density >= IDLE:
            found.append(
                f"The law drops next to nothing at {self.check.length} tokens: the layers that are "
                f"not dense keep {100 * final.density:.0f} % of the causal pairs. Sparse attention "
                "saves nothing at these lengths."
            )
        return found + self.feasible.sentences


# -- on the terminal --


def lines(result: Result) -> list[str]:
    """The report: how many heads follow which form, a row for each layer, the law, the check."""
    fits, check = result.fits, result.check
    counts = Counter(verdict for layer in fits.verdict for verdict in layer)
    heads = fits.exponent.numel()
    said = ", ".join(f"{counts[v]} {_MEANING[v]}" for v in VERDICTS if counts[v])
    out = wrap(
        f"Needs of {heads} heads at {fits.shortest} to {fits.longest} tokens, from "
        f"{fits.documents} documents: {said}."
    )
    out += [
        "",
        *render_table(GROUPS, [_cells(result, place) for place in range(len(fits.layers))]),
    ]
    out += wrap(NOTE.format(n=round(fits.n_ref), quantile=round(100 * fits.quantile)))
    out += ["", "The law:"]
    for budget, layers in result.budgets.items():
        keys = ", ".join(f"{budget(n)} at {n}" for n in _lengths(result))
        law = "every key" if budget == Budget.dense() else f"{budget}: {keys} tokens"
        first, *more = wrap(f"{named_layers(layers)}: {law}")
        out += [f"  {first}", *(f"    {line}" for line in more)]
    out += [line for sentence in result.sentences() for line in wrap(f"! {sentence}")]
    out += ["", *check_lines(check)]
    return out


GROUPS = (
    ("", ("layer",)),
    ("exponent", ("C", "interval", "entropy")),
    ("keys at n_ref", ("median", "90 %")),
    ("heads", ("power", "constant", "proportional", "none")),
    ("law", ("alpha", "C")),
    ("check", ("missed p95",)),
)

NOTE = (
    "n_ref is {n} tokens. C and its 95 % interval are of the upper-quartile head; entropy is the "
    "median slope of ln exp(H), a second view of C. Keys are what {quantile} % of the rows of the "
    "median head, or of 90 % of the heads, are content with: whole blocks, always-kept ones "
    "included. none: no power law fits."
)

_MEANING = {
    "power": "grow as a power of the context",
    "constant": "need the same at every length",
    "proportional": "need keys in proportion to the context",
    "no power law": "follow no power law",
}


def _cells(result: Result, place: int) -> list[str]:
    """Of the layer at a place among the measured ones."""
    fits, layer = result.fits, result.fits.layers[place]
    budget, exponent = result.chosen.of(layer), fits.exponent[place]
    upper = float(torch.quantile(exponent, 0.75))
    head = int((exponent - upper).abs().argmin())
    low, high = float(fits.exponent_low[place, head]), float(fits.exponent_high[place, head])
    counts = Counter(fits.verdict[place])
    dense = budget == Budget.dense()
    final = result.check.final
    return [
        str(layer),
        f"{upper:.2f}",
        f"{low:.2f} to {high:.2f}",
        f"{float(fits.support_exponent[place].median()):.2f}",
        f"{float(fits.k_ref[place].median()):.0f}",
        f"{float(torch.quantile(fits.k_ref[place], 0.9)):.0f}",
        *(str(counts[verdict]) for verdict in VERDICTS),
        "dense" if dense else f"{budget.alpha:.3g}",
        "-" if dense else f"{budget.exponent:g}",
        "-" if dense or final is None else f"{final.missed_p95_by_layer[layer]:.3f}",
    ]


def check_lines(check: Check) -> list[str]:
    """The check on held-out documents, attempt by attempt, and the tasks."""
    out = [f"Check at {check.length} tokens, on held-out documents:"]
    for attempt in check.attempts:
        out += [
            f"  alpha times {attempt.factor:.3g}: missed mass p95 {attempt.missed_p95:.3f} (mean "
            f"{attempt.missed_mean:.3f}), output error p95 {attempt.output_error_p95:.3f} (mean "
            f"{attempt.output_error_mean:.3f}),",
            f"    loss {attempt.loss:.4f} against {check.dense_loss:.4f} dense "
            f"({attempt.loss - check.dense_loss:+.4f} nats per token), kept "
            f"{100 * attempt.density:.1f} % of the causal pairs",
        ]
    for name, answers in check.tasks.items():
        said = [
            f"{how} {a.accuracy.mean:.0%} right, {a.loss:.3f} nats" for how, a in answers.items()
        ]
        out += [f"  {name}: {'; '.join(said)}"]
    out += [line for name, why in check.left_out.items() for line in wrap(f"  no {name}: {why}")]
    return [*out, "", *wrap(verdict(check))]


def verdict(check: Check) -> str:
    """Whether the target is met, in a sentence."""
    last = check.final
    if last is None:
        return "Every layer stays dense: no mass is missed."
    if not check.met:
        return (
            f"TARGET MISSED: 95 % of the rows miss up to {last.missed_p95:.3f} of their mass, "
            f"{check.target:g} is allowed, also with alpha times {last.factor:.3g}. The budget is "
            "written all the same; allow more --steps, or a lower --target-mass."
        )
    said = (
        f"Target met: 95 % of the rows miss at most {last.missed_p95:.3f} of their mass, "
        f"{check.target:g} is allowed"
    )
    if last.factor == 1:
        return f"{said}."
    return (
        f"{said}; that took alpha times {last.factor:.3g}: the fit counts the best blocks, which "
        "the selection has to guess."
    )


def _lengths(result: Result) -> list[int]:
    return [*result.settings["lengths"], result.check.length]


# -- files --


def write_budget(path: Path, result: Result) -> None:
    """The fragment of a config that `lit-sparse fit --config NAME --config PATH` takes."""
    settings = result.settings
    comments = [
        f"The budget of {settings['model']}, calibrated on {settings['data']}.",
        f"Made by: {result.machine['command']}",
        f"Use it:  lit-sparse fit --config NAME --config {path}",
        f"At {', '.join(map(str, settings['lengths']))} tokens, {result.fits.documents} documents; "
        f"checked at {result.check.length} on {settings['check_documents']} others.",
        verdict(result.check),
        *result.sentences(),
    ]
    head = [f"# {line}" for comment in comments for line in _wrapped(comment)]
    law = result.law
    budgets = {layer: own.to_dict() for layer, own in law.layers.items()}
    fragment = {**law.to_dict(), "layers": budgets}
    # One line for each budget.
    body = yaml.safe_dump(
        {"sparse_attention": fragment}, sort_keys=False, default_flow_style=None, width=1000
    )
    path.write_text("\n".join([*head, body]), encoding="utf-8")


def _wrapped(text: str) -> list[str]:
    # A command line is not broken: it is there to be copied.
    return [text] if text.startswith(("Made by", "Use it")) else wrap(text)


def write_numbers(path: Path, result: Result) -> None:
    """Everything that was measured and decided."""
    fits, chosen, texts = result.fits, result.chosen, result.texts
    write_json(
        path,
        {
            "machine": result.machine,
            "settings": result.settings,
            "documents": {n: texts.names(chosen) for n, chosen in texts.fitted.items()},
            "held_out": texts.names(texts.held_out),
            "verdicts": fits.verdict,
            "fits": _plain(vars(fits)),
            "law": result.law.to_dict(),
            "law_before_the_check": result.fitted.to_dict(),
            "keys": {
                str(n): [chosen.of(layer)(n) for layer in fits.layers] for n in _lengths(result)
            },
            "dense_layers": result.dense,
            "sentences": result.sentences(),
            "logit_range": _plain(vars(result.feasible)),
            "check": result.check.to_dict(),
            "needs": {
                str(length): {
                    which: {
                        # Layer by layer: torch.quantile refuses more than 2^24 values.
                        f"p{round(100 * q)}": [
                            torch.quantile(layer, q, dim=0).tolist() for layer in found.unbind(1)
                        ]
                        for q in QUANTILES
                    }
                    for which in ("keys", "block_keys")
                    for found in [getattr(result.needs, which)[rows].float()]
                }
                for length, rows in result.rows.items()
            },
        },
    )


def _plain(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: v.tolist() if isinstance(v, Tensor) else v for name, v in fields.items()}
