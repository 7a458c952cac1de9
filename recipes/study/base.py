"""The dense model that the studies on trained models start from."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from lit_sparse.recipes.study.findings import Settings
from lit_sparse.recipes.study.fits import Fit, run_fits

CONTEXT = 512
"""Tokens of its longest stage."""


def base_fit(settings: Settings, keys: Mapping[str, str] | None = None) -> Fit:
    """The run of the base: its full form takes minutes, the quick one learns little more than which
    bytes there are.

    Args:
        keys: changes to its config, of the large form.
    """
    own = {"seed_everything": str(settings.seed), **(keys or {})}
    if settings.large:
        return Fit(f"base-large-{settings.seed}", "study_base", own)
    if not settings.quick:
        return Fit(f"base-{settings.seed}", "study_base", own)
    stages = [{"length": 128, "steps": 60}, {"length": CONTEXT, "steps": 20}]
    dense = str([{**stage, "attention": "dense"} for stage in stages])
    return Fit(f"base-quick-{settings.seed}", "study_base", {**own, "curriculum.stages": dense})


def base_model(settings: Settings, keys: Mapping[str, str] | None = None) -> Path:
    """Its Hugging Face directory: trained once, with all cores, and found again in
    `settings.work`. Arguments as of `base_fit`.
    """
    threads = len(os.sched_getaffinity(0))
    (run,) = run_fits([base_fit(settings, keys)], settings.work, threads, settings.progress)
    return run / "huggingface"
