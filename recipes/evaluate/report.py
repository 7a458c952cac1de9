"""The findings of `lit-sparse evaluate` in tables, and in full for JSON."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from lit_sparse.budget import Budget
from lit_sparse.evaluation import (
    DENSE,
    SPARSE,
    Answers,
    Evaluation,
    PositionLoss,
    mean_of,
)
from lit_sparse.evaluation.perplexity import late_start
from lit_sparse.models import law_layers
from lit_sparse.recipes.benchmark.report import named_layers, number, render_table, wrap
from lit_sparse.recipes.evaluate.subject import Subject

NOTE = (
    "loss: nats per token; of a position: of the tokens with so many before them. right: prompts "
    "whose every answer token is the first choice, given those before it; tokens: share of the "
    "answers' tokens; nats: per answer token. +: sparse - dense, of the same texts. (95 %): "
    "confidence intervals over documents (bootstrap) and prompts (Wilson)."
)

Group = tuple[str, tuple[str, ...]]
T = TypeVar("T")


@dataclass(frozen=True)
class Result:
    """One model. `data`: where the documents are from; `dtype`: of the weights."""

    subject: Subject
    data: str
    dtype: str
    found: Evaluation

    @property
    def sides(self) -> list[str]:
        """How it was measured: dense, and sparse where it has a law."""
        found: list[Mapping[int, Mapping[str, Any]]] = [self.found.losses]
        found += self.found.answers.values()
        return next((list(sides) for at in found for sides in at.values()), [DENSE])

    def to_dict(self) -> dict[str, Any]:
        subject, found = self.subject, self.found
        return {
            "model": str(subject.path),
            "model_type": subject.model.config.model_type,
            "dtype": self.dtype,
            "law": None if subject.source is None else subject.law.to_dict(),
            "law_from": subject.source,
            "lengths": subject.lengths,
            "held_out_documents": len(subject.documents),
            "density": found.density,
            "loss": {n: self._loss(n, sides) for n, sides in found.losses.items()},
            "tasks": {
                task: {n: _asked(sides) for n, sides in at.items()}
                for task, at in found.answers.items()
            },
            "left_out": [asdict(what) for what in found.left_out],
        }

    def _loss(self, length: int, sides: dict[str, PositionLoss]) -> dict[str, Any]:
        """All means by position, with their intervals, and of each document."""
        parts = {f"{a}-{b - 1}": (a, b) for a, b in next(iter(sides.values())).parts}
        parts |= {"all": (0, length), "last_quarter": (late_start(length), length)}
        values = {
            name: {s: x.of_texts(*part) for s, x in sides.items()} for name, part in parts.items()
        }
        for own in values.values():
            if SPARSE in own:
                own["difference"] = own[SPARSE] - own[DENSE]
        return {
            name: {s: {**asdict(mean_of(x)), "by_document": x.tolist()} for s, x in own.items()}
            for name, own in values.items()
        }


def _asked(sides: dict[str, Answers]) -> dict[str, Any]:
    depths = next(iter(sides.values())).depths
    return {"prompts": len(depths), "depths": depths.tolist()} | {
        side: {
            "right": asdict(answers.accuracy),
            "token_accuracy": answers.token_accuracy,
            "nats_per_token": answers.loss,
            "by_prompt": answers.right.tolist(),
            "generated": None if answers.generated is None else answers.generated.tolist(),
        }
        for side, answers in sides.items()
    }


def lines(results: Sequence[Result]) -> list[str]:
    """All that is printed: each model, and several side by side."""
    printed = []
    for result in results:
        printed += [*wrap(_title(result)), ""]
        for table in (_losses(result), _positions(result), _answers(result)):
            if table:
                printed += [*table, ""]
        for sentence in _sentences(result):
            printed += wrap(sentence)
        printed.append("")
    if len(results) > 1:
        printed += [*_side_by_side(results), ""]
    return [*printed, *wrap(NOTE)]


def _title(result: Result) -> str:
    subject = result.subject
    law = "dense"
    if subject.source is not None:
        law = f"{subject.law.budget} ({subject.source}), block {subject.law.block}"
        dense = [n for n in law_layers(subject.model) if subject.law.of(n) == Budget.dense()]
        others = [n for n in subject.law.layers if n not in dense]
        if dense:
            law += f", {named_layers(dense)} dense"
        if others:
            law += f", {named_layers(others)} with budgets of their own"
    return (
        f"{subject.path}: {subject.model.config.model_type}, {result.dtype}; {law}. Text: "
        f"{len(subject.documents)} held-out documents of {result.data}"
    )


def _losses(result: Result) -> list[str]:
    """A row for each length."""
    rows = []
    for length, sides in result.found.losses.items():
        documents = len(next(iter(sides.values())).nats)
        late = (late_start(length), length)
        means = [*_means(sides, (0, length)), *_means(sides, late)]
        rows.append([str(length), str(documents), *means, *_kept(result, length)])
    if not rows:
        return []
    columns = _loss_columns(result)
    groups: list[Group] = [("loss", ("length", "documents")), ("all positions", columns)]
    groups.append(("last quarter", columns))
    return render_table([*groups, *_kept_columns(result)], rows)


def _positions(result: Result) -> list[str]:
    """A row for each range of positions in the longest texts."""
    if not result.found.losses:
        return []
    length, sides = max(result.found.losses.items())
    parts = next(iter(sides.values())).parts
    rows = [[f"{start}-{end - 1}", *_means(sides, (start, end))] for start, end in parts]
    title = f"loss by position in {length} tokens"
    return render_table([("", ("position",)), (title, _loss_columns(result))], rows)


def _loss_columns(result: Result) -> tuple[str, ...]:
    if SPARSE in result.sides:
        return ("dense", "sparse", "+ (95 %)")
    return ("dense", "(95 %)")


def _means(sides: dict[str, PositionLoss], part: tuple[int, int]) -> list[str]:
    """Cells of `_loss_columns`."""
    values = {side: losses.of_texts(*part) for side, losses in sides.items()}
    cells = [number(float(x.mean()), 3) for x in values.values()]
    if SPARSE not in values:
        found = mean_of(values[DENSE])
        return [*cells, f"{found.low:.3f} to {found.high:.3f}"]
    gap = mean_of(values[SPARSE] - values[DENSE])
    return [*cells, f"{gap.mean:+.4f} ({gap.low:+.4f} to {gap.high:+.4f})"]


def _kept_columns(result: Result) -> list[Group]:
    return [("law", ("keys", "kept"))] if SPARSE in result.sides else []


def _kept(result: Result, length: int) -> list[str]:
    """Cells of `_kept_columns`: k(n) of the last token, share of the causal pairs."""
    if SPARSE not in result.sides:
        return []
    return [str(result.subject.law.budget(length)), f"{100 * result.found.density[length]:.0f} %"]


def _answers(result: Result) -> list[str]:
    """A row for each task and length."""
    generates = any(
        answers.generated is not None
        for at in result.found.answers.values()
        for sides in at.values()
        for answers in sides.values()
    )
    columns = ("right", "(95 %)", "tokens", "nats", *(["generated"] if generates else []))
    rows = []
    for task, at in result.found.answers.items():
        for i, (length, sides) in enumerate(at.items()):
            prompts = len(next(iter(sides.values())).depths)
            cells = [cell for answers in sides.values() for cell in _answer_cells(answers)]
            rows.append(["" if i else task, str(length), str(prompts), *cells])
    if not rows:
        return []
    groups: list[Group] = [("", ("task",)), ("", ("length", "prompts"))]
    return render_table([*groups, *((side, columns) for side in result.sides)], rows)


def _answer_cells(answers: Answers) -> list[str]:
    share = answers.accuracy
    cells = [
        f"{share.mean:.0%}",
        f"{100 * share.low:.0f}-{100 * share.high:.0f}",
        f"{answers.token_accuracy:.0%}",
        number(answers.loss, 2),
    ]
    return cells if answers.generated is None else [*cells, f"{answers.generated.mean():.0%}"]


def _sentences(result: Result) -> list[str]:
    said = []
    if result.subject.source is None:
        said.append(
            "Dense only: the model's config has no law (sparse_attention), and no --budget is given"
            "; a preset is one, such as balanced."
        )
    whole = [str(n) for n, density in sorted(result.found.density.items()) if density == 1]
    if whole:
        said.append(f"At {', '.join(whole)} tokens the law keeps every key: sparse is dense there.")
    reasons: dict[tuple[str, str], list[str]] = {}
    for what in result.found.left_out:
        at = reasons.setdefault((what.task, what.why), [])
        at += [] if what.length is None else [str(what.length)]
    for (task, why), at in reasons.items():
        where = f" at {', '.join(at)}" if at else ""
        said.append(f"Left out: {task}{where}: {why}.")
    return said


def _side_by_side(results: Sequence[Result]) -> list[str]:
    """The late loss at each length and the share right of each task, all models in a row."""
    names = [f"[{i}] {result.subject.name}" for i, result in enumerate(results, start=1)]
    groups: list[Group] = [("", ("task",)), ("", ("length",))]
    groups += [(name, tuple(result.sides)) for name, result in zip(names, results, strict=True)]
    lengths = sorted({n for result in results for n in result.subject.lengths})
    tasks = list(dict.fromkeys(task for result in results for task in result.found.answers))
    rows = []
    for n in lengths:
        late = [result.found.losses.get(n, {}) for result in results]
        rows.append(["late loss", str(n), *_cells(results, late, _late_cell)])
    for task in tasks:
        for n in lengths:
            answers = [result.found.answers.get(task, {}).get(n, {}) for result in results]
            rows.append([task, str(n), *_cells(results, answers, _right_cell)])
    return render_table(groups, [row for row in rows if set(row[2:]) != {"-"}])


def _cells(
    results: Sequence[Result], measured: Sequence[Mapping[str, T]], cell: Callable[[T], str]
) -> list[str]:
    """A cell for each side of each model, "-" where it was not measured."""
    return [
        cell(sides[side]) if side in sides else "-"
        for result, sides in zip(results, measured, strict=True)
        for side in result.sides
    ]


def _late_cell(losses: PositionLoss) -> str:
    return number(float(losses.late.mean()), 3)


def _right_cell(answers: Answers) -> str:
    return f"{answers.accuracy.mean:.0%}"
