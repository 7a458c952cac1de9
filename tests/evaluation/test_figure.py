"""The heat maps of answers."""

import numpy as np

from lit_sparse.evaluation import DENSE, SPARSE, Answers
from lit_sparse.evaluation.figure import answers_figure

ANSWERS = Answers(np.ones((4, 2), dtype=bool), np.zeros((4, 2)), (np.arange(4) + 0.5) / 4)


def test_a_task_that_only_the_sparse_stages_ask_has_no_dense_map():
    """A dense first stage that is too short for one of the tasks."""
    passkey = {64: {DENSE: ANSWERS}, 256: {SPARSE: ANSWERS}}
    figure = answers_figure({"passkey": passkey, "variables": {256: {SPARSE: ANSWERS}}}, "step 2")
    titles = [axes.get_title() for axes in figure.axes]
    assert titles[:4] == ["passkey, dense", "", "passkey, sparse", "variables, sparse"]
    assert not figure.axes[1].axison
