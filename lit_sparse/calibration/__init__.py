"""From measured needs to a budget: the method, without models.

Rows of dense attention say how many keys they need (`attention.need.rows_need`); `fit_heads` fits
k(n) = alpha * n^C to every head, `choose_law` makes a budget of it, `feasibility` holds it against
the range of the logits. The claim that n^C keys are enough is that of arXiv 2404.02690; here it is
measured, and said where it does not hold.
"""

from lit_sparse.calibration.feasibility import Feasibility, feasibility
from lit_sparse.calibration.fit import PROPORTIONAL, HeadFits, Verdict, fit_heads, separate_lengths
from lit_sparse.calibration.law import ChosenLaw, choose_law
from lit_sparse.calibration.needs import Needs

__all__ = [
    "PROPORTIONAL",
    "ChosenLaw",
    "Feasibility",
    "HeadFits",
    "Needs",
    "Verdict",
    "choose_law",
    "feasibility",
    "fit_heads",
    "separate_lengths",
]
