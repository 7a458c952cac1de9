"""Study `training`: fine-tunes of one dense base, by attention rules of equal executed keys."""

from __future__ import annotations

from lit_sparse.recipes.study.base import base_model
from lit_sparse.recipes.study.findings import Findings, Settings
from lit_sparse.recipes.study.fits import Fit, run_fits
from lit_sparse.recipes.study.training import figures, tables, verdicts
from lit_sparse.recipes.study.training.arms import Arm, arms
from lit_sparse.recipes.study.training.measure import measure_all
from lit_sparse.recipes.study.training.rows import training_rows
from lit_sparse.recipes.study.training.scale import CONFIG, Form, form

QUESTION = (
    "What does sparse training by k(n) = alpha n^C cost in quality against dense training, and is "
    "it ahead of a window of one size, chosen or sliding, that executes equally many keys?"
)


def run(settings: Settings) -> Findings:
    """Train what has not been trained, evaluate it, compare."""
    chosen = form(settings)
    base = base_model(settings, chosen.base_keys)
    keys = {"model.pretrained": str(base), **chosen.stage_keys(), **chosen.keys}
    compared = arms(chosen.law, training_rows(chosen), chosen.block, chosen.tile)
    tried = [(arm, seed) for seed in chosen.seeds for arm in compared]
    fits = [_fit(arm, seed, keys, settings) for arm, seed in tried]
    runs = run_fits(fits, settings.work / "fine-tunes", chosen.threads, settings.progress)
    settings.progress(f"evaluating {len(runs)} models")
    jobs = [(run, arm, seed) for (arm, seed), run in zip(tried, runs, strict=True)]
    results = measure_all(jobs, chosen, settings.seed)
    return Findings(
        question=QUESTION,
        method=_method(chosen, compared),
        verdicts=verdicts.all_of(results),
        tables=tables.all_of(results),
        charts=figures.all_of(results),
        notes=_NOTES,
        seeds=chosen.seeds,
    )


def _fit(arm: Arm, seed: int, keys: dict[str, str], settings: Settings) -> Fit:
    # The same split for every seed: nothing is evaluated that was trained on.
    own = {"seed_everything": str(seed), "data.seed": str(seed), "data.split_seed": "0"}
    form = "large-" * settings.large + "quick-" * settings.quick
    return Fit(f"{form}{arm.name}-{seed}", CONFIG, {**keys, **own, **arm.keys()})


def _method(chosen: Form, compared: list[Arm]) -> str:
    stages = ", ".join(f"{steps} steps of {length}" for length, steps in chosen.stages)
    shares = "; ".join(f"{arm.title} {arm.executed:.3f}" for arm in compared)
    return (
        "One dense base was trained once (`configs/study_base.yaml`), and fine-tuned from there "
        f"(`configs/{CONFIG}.yaml`: {stages} tokens, half of the pieces long-range tasks), once "
        f"for each rule and seed ({len(chosen.seeds)}). The fixed and the sliding window are the "
        "smallest that execute at least as many query-key pairs as the law on the rows that the "
        f"first seed trains on; executed pairs over dense ones: {shares}. Each model was then "
        f"evaluated with its own attention on at most {chosen.documents} held-out files and "
        f"{chosen.prompts} prompts of each task at the shortest and the longest length, the same "
        f"for all, and the sparse ones densely too. Blocks of {chosen.block} keys, tiles of "
        f"{chosen.tile} queries."
    )


_NOTES = (
    "Differences are paired: the same seed, base, rows and held-out files. Intervals are 95 %, "
    "over files after the mean over seeds; the spread over seeds stands beside.",
    "Runs share the machine, two at a time: tokens/s and minutes are no comparison of speed.",
    "That half of the law's budget is local was settled on one of these models and some of these "
    "files: its lead over a quarter is a little flattered.",
    "Seeds draw the order of the rows and the tasks in them; the base is the same.",
    "The look-ups of the base are sharp: a few keys of a block, not its mean, decide what the "
    "block is worth.",
    "The scorer `exact` reads every key of every block: it tells what a perfect choice of blocks "
    "gives, and saves no work.",
)
