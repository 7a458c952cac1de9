"""The dense model that the studies on trained models start from."""

from __future__ import annotations

import os
from pathlib import Path

from lit_sparse.recipes.study.findings import Settings
from lit_sparse.recipes.study.fits import Fit, run_fits

CONTEXT = 512
"""Tokens of its longest stage."""


def base_fit(settings: Settings) -> Fit:
    """The run of the base: its full form takes minutes, the quick one learns little more than which
    bytes there are.
    """
    seed = {"seed_everything": str(settings.seed), "data.seed": str(settings.seed)}
    if not settings.quick:
        return Fit(f"base-{settings.seed}", "study_base", seed)
    stages = [{"length": 128, "steps": 60}, {"length": CONTEXT, "steps": 20}]
    dense = [{**stage, "attention": "dense"} for stage in stages]
    return Fit(
        f"base-quick-{settings.seed}", "study_base", {**seed, "curriculum.stages": str(dense)}
    )


def base_model(settings: Settings) -> Path:
    """Its Hugging Face directory: trained once, with all cores, and found again in
    `settings.work`.
    """
    threads = len(os.sched_getaffinity(0))
    (run,) = run_fits([base_fit(settings)], settings.work, threads, settings.progress)
    return run / "huggingface"
