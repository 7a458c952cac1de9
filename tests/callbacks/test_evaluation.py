"""LongContextEval in a short run: what it logs, draws, leaves out, and keeps for a resumed run."""

import re

import numpy as np
import pytest
import torch
from pytorch_lightning import Trainer
from pytorch_lightning.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_sparse import Budget
from lit_sparse.callbacks import (
    Cockpit,
    ContextCurriculum,
    LongContextEval,
    SparseAttention,
)
from lit_sparse.data import PackedTextDataModule
from lit_sparse.evaluation import DENSE, SPARSE, Questions, evaluate
from lit_sparse.models import set_dense
from lit_sparse.training import SparseLM, Stage

STAGES = [Stage(64, 1, attention="dense"), Stage(256, 1)]


@pytest.fixture
def run(architecture, corpus, tmp_path):
    """A callback -> trainer, module, data of a run that has ended."""

    def make(callback):
        torch.manual_seed(0)
        curriculum = ContextCurriculum(STAGES)
        data = PackedTextDataModule(
            path=str(corpus),
            row_tokens=512,
            curriculum=curriculum.curriculum,
            validation_rows=1,
            validation_fraction=0.2,
        )
        plugin = SparseAttention(Budget(1, 0.5, floor=32, sink=8), block=16, tile=16)
        trainer = Trainer(
            callbacks=[callback, plugin, curriculum, Cockpit()],
            accelerator="cpu",
            logger=TensorBoardLogger(tmp_path, name="", version=""),
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            max_epochs=-1,
            num_sanity_val_steps=0,
        )
        module = SparseLM(architecture=architecture, warmup_steps=1)
        trainer.fit(module, datamodule=data)
        return trainer, module, data

    return make


def test_numbers_are_those_of_the_evaluation(run, tmp_path):
    tasks = ["ppl", "passkey", "multivalue"]
    callback = LongContextEval(tasks, prompts=3, documents=2, generate=False, dense=True)
    with pytest.warns(UserWarning, match=r"leaves out multivalue at 64 tokens: a prompt needs \d+"):
        trainer, module, data = run(callback)
    set_dense(module.model, False)
    found = evaluate(
        module.model.eval(),
        data.text_tokenizer,
        data.validation_text,
        Questions([256], tasks, documents=2, prompts=3, longest=512),
    )
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    for task in ("passkey", "multivalue"):
        for side, behind in ((SPARSE, ""), (DENSE, "_dense")):
            answers = found.answers[task][256][side]
            assert logged[f"{task}/teacher_forced{behind}"] == answers.accuracy.mean
            assert logged[f"{task}/token_accuracy{behind}"] == pytest.approx(answers.token_accuracy)
            assert f"{task}/generated{behind}" not in logged
    starts = [re.sub("_dense$", "", name) for name in logged if name.startswith("loss_by_position")]
    # Ranges of rows of 512, in every stage.
    assert sorted(set(starts)) == ["loss_by_position/00000", "loss_by_position/00128"]
    for side, behind in ((SPARSE, ""), (DENSE, "_dense")):
        mean = found.losses[256][side].of_texts(128, 256).mean()
        assert logged[f"loss_by_position/00128{behind}"] == pytest.approx(mean, rel=1e-4)

    shown = EventAccumulator(str(tmp_path), size_guidance={"images": 0}).Reload()
    # The first stage is dense: there is no other side.
    assert len(shown.Scalars("passkey/teacher_forced")) == 2
    assert len(shown.Scalars("passkey/teacher_forced_dense")) == 1
    assert [image.step for image in shown.Images("retrieval")] == [1, 2]


def test_a_resumed_run_still_shows_the_earlier_lengths(run):
    callback = LongContextEval(prompts=2, generate=True)
    trainer, _, _ = run(callback)
    assert trainer.callback_metrics["passkey/generated"] == 0  # an untrained model knows nothing
    again = LongContextEval(prompts=2)
    again.load_state_dict(callback.state_dict())
    assert sorted(again.state_dict()["answers"]["passkey"]) == [64, 256]
    assert again.state_dict() == callback.state_dict()
    assert np.isclose(again.state_dict()["answers"]["passkey"][256][SPARSE]["depths"][0], 0.25)


def test_the_page_has_a_chart_of_each_task(run):
    trainer, _, _ = run(LongContextEval(["ppl", "passkey"], prompts=1, documents=1, generate=False))
    from lit_sparse.callbacks.cockpit import layout

    page = layout(trainer)["Long context"]
    for chart, (_, (pattern,)) in page.items():
        assert any(re.search(pattern, name) for name in trainer.callback_metrics), chart
    assert list(page) == ["loss by position (nats a token)", "passkey (share answered)"]


def test_it_needs_our_data_and_tasks_that_there_are():
    trainer = Trainer(logger=False, accelerator="cpu", enable_checkpointing=False)
    with pytest.raises(ValueError, match="PackedTextDataModule; remove it from"):
        LongContextEval().on_fit_start(trainer, None)
    with pytest.raises(ValueError, match="LongContextEval tasks: there is no 'needle'"):
        LongContextEval(["needle"])
    with pytest.raises(ValueError, match="LongContextEval prompts must be >= 1"):
        LongContextEval(prompts=0)
