"""Long-context quality of a model, sparse and dense side by side: losses by position, answers."""

from lit_sparse.evaluation.answers import Answers, ask
from lit_sparse.evaluation.evaluate import (
    DENSE,
    LOSS,
    NAMES,
    SPARSE,
    Evaluation,
    LeftOut,
    Questions,
    evaluate,
)
from lit_sparse.evaluation.intervals import Estimate, mean_of, wilson
from lit_sparse.evaluation.perplexity import PositionLoss, position_loss, position_ranges

__all__ = [
    "DENSE",
    "LOSS",
    "NAMES",
    "SPARSE",
    "Answers",
    "Estimate",
    "Evaluation",
    "LeftOut",
    "PositionLoss",
    "Questions",
    "ask",
    "evaluate",
    "mean_of",
    "position_loss",
    "position_ranges",
    "wilson",
]
