"""The rows that the fine-tunes train on: lengths alone, since these decide what is executed."""

from __future__ import annotations

from lit_sparse.data import PackedTextDataModule
from lit_sparse.recipes.evaluate.subject import SPLIT_SEED
from lit_sparse.recipes.study.fits import shipped_keys
from lit_sparse.recipes.study.training.arms import Row
from lit_sparse.recipes.study.training.scale import CONFIG, Form
from lit_sparse.training import Curriculum, Stage


def training_rows(form: Form) -> list[Row]:
    """Document lengths of every row of the first seed's runs."""
    own = {"row_tokens": form.lengths[-1], "seed": form.seeds[0], "split_seed": SPLIT_SEED}
    options = {**shipped_keys(CONFIG)["data"], **own}
    stages = [Stage(length=length, steps=steps) for length, steps in form.stages]
    data = PackedTextDataModule(**options, curriculum=Curriculum(stages))
    data.setup()
    rows: list[Row] = []
    for row in range(len(data.run)):
        _, index, number = data.run.find(row)
        _, _, lengths = index.pieces(number)
        rows.append([int(length) for length in lengths])
    return rows
