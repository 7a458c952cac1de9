"""The dense model that the studies on trained models start from."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from lit_sparse.recipes.study.findings import Settings
from lit_sparse.recipes.study.fits import Fit, run_fits, shipped_keys
from lit_sparse.recipes.study.start import write_start

CONFIG = "study_base"

NOTE = (
    "The base is a byte-level Llama of 4 layers (`configs/study_base.yaml`) that learned from "
    "weights which hold an induction circuit (`recipes/study/start.py`): alone a model of this "
    "size would need far more tokens before it looks anything up."
)
"""For the reports of studies on it."""

CONTEXT = 512
"""Tokens of its longest stage."""


def base_fit(settings: Settings, keys: Mapping[str, str] | None = None) -> Fit:
    """The run of the base: its full form takes minutes, the quick one less than one.

    Args:
        keys: changes to its config, of the large form.
    """
    own = {"seed_everything": str(settings.seed), **(keys or {})}
    if settings.large:
        return Fit(f"base-large-{settings.seed}", CONFIG, own)
    own["model.pretrained"] = str(_start(settings))
    if not settings.quick:
        return Fit(f"base-{settings.seed}", CONFIG, own)
    stages = [{"length": 256, "steps": 20}, {"length": CONTEXT, "steps": 20}]
    dense = str([{**stage, "attention": "dense"} for stage in stages])
    return Fit(f"base-quick-{settings.seed}", CONFIG, {**own, "curriculum.stages": dense})


def base_model(settings: Settings, keys: Mapping[str, str] | None = None) -> Path:
    """Its Hugging Face directory: trained once, with all cores, and found again in
    `settings.work`. Arguments as of `base_fit`.
    """
    threads = len(os.sched_getaffinity(0))
    (run,) = run_fits([base_fit(settings, keys)], settings.work, threads, settings.progress)
    return run / "huggingface"


def _start(settings: Settings) -> Path:
    directory = settings.work / f"start-{settings.seed}"
    if not (directory / "config.json").is_file():
        write_start(shipped_keys(CONFIG)["model"]["architecture"], directory, settings.seed)
    return directory
