"""R = B^2 ||W||_F across models, data and RoPE: does it bound and predict the logits, and with them
how many keys a head needs?

How R behaves across models and data, and what RoPE does to it, is an open question and a check of
arXiv 2404.02690; its theory assumes inputs |x| <= B and W = W_Q W_K^T / sqrt(d), without rotation.
"""

from __future__ import annotations

from pathlib import Path

from lit_sparse.recipes.study import subjects
from lit_sparse.recipes.study.findings import Findings, Settings
from lit_sparse.recipes.study.radius import figures, tables
from lit_sparse.recipes.study.radius.measure import DELTA, Radii, measure
from lit_sparse.recipes.study.radius.rope import Rotated, rotate
from lit_sparse.recipes.study.radius.verdicts import verdicts
from lit_sparse.recipes.study.subjects import Subject

QUICKSTART = Path("runs/quickstart/huggingface")
"""Looked at as well where no model is given, if it is there."""

LONGEST = 4096
"""Tokens of the texts, whatever the model's context is."""

_ROWS = 16


def run(settings: Settings) -> Findings:
    """See the package."""
    models = subjects.given(settings)
    if not settings.models and (QUICKSTART / "config.json").is_file():
        models.append(QUICKSTART)
    own = [subjects.trained(path) for path in models]
    count = 4 if settings.quick else 32
    found, rotated = [], []
    for subject in (*own, subjects.untrained(models[0], settings.seed)):
        found += _on_all_texts(subject, settings, count)
    for subject in own:
        rotated += rotate(subject, settings, 2 if settings.quick else 12, _ROWS)
    return _findings(found, rotated, settings, count)


def _on_all_texts(subject: Subject, settings: Settings, count: int) -> list[Radii]:
    wanted = {min(subject.context, LONGEST): count}
    found = []
    for kind, what in subjects.KINDS.items():
        settings.progress(f"{subject.name}, {subject.weights} weights, {what}")
        texts = subjects.read(kind, subject, wanted, settings.seed)
        found.append(measure(subject, kind, texts, _ROWS, settings.seed))
    return found


def _findings(
    found: list[Radii], rotated: list[Rotated], settings: Settings, count: int
) -> Findings:
    kinds = "; ".join(f"{name}: {what}" for name, what in subjects.KINDS.items())
    return Findings(
        question="Is R = B^2 ||W||_F a usable predictor of a trained head's logits and of the keys "
        "that it needs, is B bounded under RMSNorm, and what does RoPE do to R (open question 2 "
        "and check 2 of arXiv 2404.02690)?",
        method=f"Every model ran densely on {count} texts of each kind ({kinds}), as long as its "
        f"context, at most {LONGEST} tokens; {_ROWS} rows of the last quarter of each were looked "
        "at. ||W||_F is that of W_Q Rot W_K^T / sqrt(d), Rot the rotation of RoPE, in root mean "
        "square over the distances of two tokens up to the length; B is the largest entry of what "
        "enters W_Q and W_K, or its root mean square. The largest logit predicted is "
        f"R sqrt(2 ln(2 pairs / {DELTA:g})) (reconstructed) at the distance where it is largest. "
        "sigma is the standard deviation of a row's logits, k the fewest keys that miss 5 % of its "
        "mass. Correlations are Spearman's, over heads of all layers. Each trained model then ran "
        "on Python source under several RoPE rules, at its context and beyond, without training.",
        verdicts=verdicts(found, rotated, settings.seed),
        tables=tables.all_of(found, rotated, settings.seed),
        charts=figures.all_of(found, rotated),
        notes=[
            *_of_qk_norm(found),
            "Whether R grows as fast as sqrt(ln n) needs one model trained at several contexts: "
            "here each has one, and R is held against sqrt(2 ln n) at it.",
            "Rows enter the bound in root mean square: it is no bound of each row.",
            subjects.SEEN,
            "RoPE rules are changed without training: what a model makes of another rotation after "
            "fine-tuning is another question. No rotation is position interpolation with a factor "
            "of 1e12. Losses are of the last 256 tokens of each text.",
        ],
        seeds=(settings.seed,),
    )


def _of_qk_norm(found: list[Radii]) -> list[str]:
    normed = {r.subject.name for r in found if any(x.ceiling is not None for x in r.norms)}
    if not normed:
        return []
    return [
        f"{', '.join(sorted(normed))} normalises queries and keys: R is that of the projections "
        "before it, and the bound is the ceiling that the norm sets."
    ]
