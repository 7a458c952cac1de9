"""Does attention collapse show in a downstream task, and what mends it? (open question 3 of arXiv
2404.02690)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from lit_sparse.models import build_model
from lit_sparse.recipes.benchmark.report import BadArgument
from lit_sparse.recipes.study.collapse import figures, tables, verdicts
from lit_sparse.recipes.study.collapse.induced import Scan, scan
from lit_sparse.recipes.study.collapse.measure import TASKS, Sizes, shortest
from lit_sparse.recipes.study.collapse.mends import check_llama
from lit_sparse.recipes.study.collapse.training import Plan, all_runs, datamodule, train_all
from lit_sparse.recipes.study.findings import Chart, Findings, Settings
from lit_sparse.recipes.study.subjects import given

LOST = 0.2
"""The collapsed starts are the mildest of the scanned factors that leave no more than this share of
the answers."""

LONGEST = 512
"""Tokens; of a model with a longer context no more is looked at."""


@dataclass(frozen=True)
class Form:
    """How large the study is.

    Args:
        factors: on the logits, of the part without training; 1 is one of them.
        parts: the lengths of that part, as parts of the context; the last are a half and all of it.
        scanned, trained: what is asked in either part.
        row_tokens, steps, seeds: of the fine-tunes.
    """

    factors: tuple[float, ...]
    parts: tuple[int, ...]
    scanned: Sizes
    trained: Sizes
    row_tokens: int
    steps: int
    seeds: int


FULL = Form(
    tuple(2.0**i for i in (-5, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 2, 3, 4, 5)),
    (4, 2, 1),
    Sizes(texts=16, prompts=40, rows=256),
    Sizes(texts=16, prompts=32, rows=128),
    row_tokens=1024,
    steps=120,
    seeds=3,
)
QUICK = Form(
    (1 / 16, 1 / 4, 1.0, 4.0, 16.0),
    (2, 1),
    Sizes(texts=4, prompts=8, rows=32),
    Sizes(texts=2, prompts=4, rows=32),
    row_tokens=256,
    steps=4,
    seeds=2,
)


def run(settings: Settings) -> Findings:
    """See `Settings` and `Findings`."""
    form, base = QUICK if settings.quick else FULL, _base(settings)
    model = build_model(base)
    check_llama(model)
    context = min(model.config.max_position_embeddings, LONGEST)
    plan = Plan(base, context // 2, form.row_tokens, form.steps, form.trained, TASKS)
    data, lengths = datamodule(plan, settings.seed), [context // part for part in form.parts]
    text, tokenizer = data.validation_text, data.text_tokenizer
    if lengths[0] < shortest(tokenizer):
        raise BadArgument(
            f"collapse asks for answers in {lengths[0]} tokens, a part of MODEL's context, and its "
            f"tasks need {shortest(tokenizer)}: give a longer model"
        )
    probes = [form.scanned.draw(text, tokenizer, n, TASKS, settings.seed) for n in lengths]
    scans = [scan(model, probe, form.factors, settings.progress) for probe in probes]
    plan = _collapsed(plan, scans[-2])
    seeds = list(range(settings.seed, settings.seed + form.seeds))
    results = train_all(plan, all_runs(seeds), settings.progress)
    return Findings(
        question="Does attention collapse, as concentration or as dispersion, show in a downstream "
        "task, and do QK-norm, QK-clip and length-scaled softmax mend it? (open question 3 of "
        "arXiv 2404.02690)",
        method=_method(form, plan, scans),
        verdicts=[*verdicts.of_scan(scans[-1], settings.seed), *verdicts.of_runs(results, plan)],
        tables=[tables.induced(scans), tables.arms(results, plan), tables.runs(results)],
        charts=[
            Chart(
                "induced",
                "Logits of all heads times a factor, without training: answers and loss against "
                "gamma, and how sharp attention is. Rings: the model as it is.",
                partial(figures.induced, scans),
                (13, 4),
            ),
            Chart(
                "mends",
                "Short fine-tunes from a healthy and from collapsed starts, measured at the length "
                "of training and at twice that. Dots: seeds; red: before; dashed: the control.",
                partial(figures.mends, results, plan),
                (13, 5),
            ),
        ],
        notes=NOTES,
        seeds=seeds,
    )


NOTES = (
    "A factor changes all heads alike; collapse by training need not, and the statistics shown are "
    "means of heads.",
    "QK-clip only ever lowers logits: it is no mend of dispersion, and was not run for it.",
    "QK-norm does not see how large W_Q and W_K are: a start that is collapsed by their size is "
    "not collapsed with it. What training has to mend then is the change of architecture.",
    "The seed of a run draws the files that it holds out, so the model may know some of them; all "
    "arms of a seed are asked the same. Numbers that are planted are new to all.",
    "Attention is dense everywhere: the question is about attention, not about sparsity.",
)


def _base(settings: Settings) -> Path:
    if len(settings.models) > 1:
        raise BadArgument(f"collapse takes one MODEL, got {len(settings.models)}")
    return given(settings)[0]


def _collapsed(plan: Plan, at_training: Scan) -> Plan:
    """The plan with the tasks that the model can do, starts at which they are lost, and a threshold
    that the model does not pass by itself."""
    tasks = verdicts.able(at_training) or TASKS
    sides = {"concentrated": at_training.side(True), "dispersed": at_training.side(False)}
    return replace(
        plan,
        tasks=tasks,
        factors={
            start: side.only(tasks).lost(LOST) or side.factors[-1] for start, side in sides.items()
        },
        threshold=at_training.healthy.sharpness["logit_max"],
    )


def _method(form: Form, plan: Plan, scans: Sequence[Scan]) -> str:
    lengths = ", ".join(str(own.healthy.length) for own in scans)
    scanned, factors = form.scanned, plan.factors
    return (
        f"Without training: W_Q and W_K of all layers times the square root of "
        f"{len(form.factors)} factors from {min(form.factors):g} to {max(form.factors):g}, at "
        f"{lengths} tokens; {scanned.prompts} prompts each of {', '.join(TASKS)}, "
        f"{scanned.texts} texts, and {scanned.rows} sampled rows of these. With training: "
        f"{form.steps} steps of {form.row_tokens} tokens in pieces of {plan.length}, half of them "
        f"with a task, at a learning rate of {plan.learning_rate:g} with warm-up and cosine. "
        f"Starts: the model as it is; logits times {factors['concentrated']:g} and "
        f"{factors['dispersed']:g}, the mildest factors that leave {LOST:.0%} of the answers "
        f"at {plan.length} tokens or, where none does, the strongest; and the model as it is "
        f"with W_Q and W_K at {plan.high_rate:g} times the learning rate. {form.seeds} seeds, "
        f"{form.trained.prompts} prompts of each task that the model can do "
        f"({', '.join(plan.tasks)}). QK-clip: threshold {plan.threshold:.3g}, the largest logit of "
        "the model as it is. QK-norm: the weights carried into Qwen3, gains such that this is the "
        "largest logit there can be. Length-scaled softmax: queries times ln n / "
        f"ln {plan.length}. A mend is said to mend if the interval of its gain over no mend "
        f"(Student's t over seeds) is above 0 and {verdicts.BACK:.0%} of what collapse cost is "
        "back: of the answers where half of them was lost, else of the loss of text."
    )
