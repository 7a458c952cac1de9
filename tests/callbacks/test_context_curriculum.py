import pytest
import torch
from pytorch_lightning import Callback, Trainer

from lit_sparse import Budget
from lit_sparse.callbacks import ContextCurriculum, LongContextEval, SparseAttention, StageReport
from lit_sparse.data import PackedTextDataModule
from lit_sparse.models import rope_parameters
from lit_sparse.training import SparseLM, Stage

STAGES = [
    Stage(64, 2, attention="dense"),
    Stage(128, 2),
    Stage(512, 2, rope={"rope_theta": 50000.0}),
]


class Watch(Callback):
    """What the model and the batches are at each training step, and when validation comes."""

    def __init__(self):
        self.steps, self.validations = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        dense = pl_module.model.model.layers[0].self_attn.lit_sparse.model.dense
        theta = rope_parameters(pl_module.model)["rope_theta"]
        longest = int(batch["position_ids"].max()) + 1
        # Not every row has a piece of the full length of the stage.
        stage = min(s.length for s in STAGES if s.length >= longest)
        self.steps.append((stage, dense, theta))

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, *_):
        self.validations.append((trainer.global_step, int(batch["position_ids"].max()) + 1))


def _run(architecture, corpus, stages=STAGES, callbacks=(), ckpt=None, **options):
    torch.manual_seed(0)
    curriculum = ContextCurriculum(stages)
    data = PackedTextDataModule(
        path=str(corpus),
        row_tokens=512,
        rows_per_step=2,
        curriculum=curriculum.curriculum,
        validation_rows=1,
        validation_fraction=0.2,
    )
    watch = Watch()
    plugin = SparseAttention(Budget(1, 0.5, floor=32, sink=8), block=16, tile=16)
    settings = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": -1,
        "num_sanity_val_steps": 0,
        **options,
    }
    trainer = Trainer(callbacks=[*callbacks, plugin, curriculum, watch], **settings)
    module = SparseLM(architecture=architecture, warmup_steps=1)
    trainer.fit(module, datamodule=data, ckpt_path=ckpt)
    return trainer, module, watch


def test_stages_switch_length_rope_and_attention_and_end_with_a_validation(architecture, corpus):
    _, module, watch = _run({**architecture, "max_position_embeddings": 128}, corpus)
    theta = 10000.0
    assert watch.steps[0::2] == watch.steps[1::2]  # two micro-batches a step
    assert watch.steps[0::2] == [
        *[(64, True, theta)] * 2,
        *[(128, False, theta)] * 2,
        *[(512, False, 50000.0)] * 2,
    ]
    assert watch.validations == [(2, 64), (4, 128), (6, 512)]
    assert module.model.config.max_position_embeddings == 512


def test_more_validations_inside_stages(architecture, corpus):
    callback = ContextCurriculum([Stage(64, 5), Stage(128, 3)], validate_every=2)
    trainer = Trainer(logger=False, accelerator="cpu", enable_checkpointing=False, max_steps=7)
    ends = [callback._next_validation(trainer, step) for step in range(7)]
    assert ends == [2, 2, 4, 4, 5, 6, 7]


def test_a_run_cut_short_still_validates(architecture, corpus):
    _, _, watch = _run(architecture, corpus, max_steps=3)
    assert watch.validations == [(2, 64), (3, 128)]


def test_a_stage_longer_than_the_model_needs_a_rope_rule(architecture, corpus):
    short = {**architecture, "max_position_embeddings": 64}
    with pytest.raises(ValueError, match=r"stages\[1\].length = 128 .* 64 positions .* rope"):
        _run(short, corpus)


def test_a_resumed_run_finds_stage_and_rope_and_the_same_weights(architecture, corpus, tmp_path):
    class SaveInTheMiddle(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 5 and batch_idx % 2:
                trainer.save_checkpoint(tmp_path / "middle.ckpt")

    _, whole, _ = _run(architecture, corpus, callbacks=[SaveInTheMiddle()])
    _, resumed, watch = _run(architecture, corpus, ckpt=tmp_path / "middle.ckpt")
    assert watch.steps == [(512, False, 50000.0)] * 2
    assert watch.validations == [(6, 512)]
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_passkeys_are_asked_for_and_the_report_has_a_row_a_stage(
    architecture, corpus, tmp_path, capsys
):
    report = StageReport()
    passkey = LongContextEval(prompts=2)
    trainer, _, _ = _run(
        architecture, corpus, callbacks=[passkey, report], default_root_dir=tmp_path
    )
    assert [row["curriculum/length"] for row in report.rows] == [64, 128, 512]
    for row in report.rows:
        assert row["tokens_per_second"] > 0
        assert 0 < row["val/bits_per_byte"] < 20
        assert 0 <= row["passkey/teacher_forced"] <= row["passkey/token_accuracy"] <= 1
        assert row["passkey/generated"] == row["passkey/teacher_forced"]
    assert trainer.callback_metrics["passkey/generated"] == 0  # an untrained model knows nothing
    table = capsys.readouterr().out.strip().splitlines()[-4:]
    assert table[0].split()[:3] == ["stage", "length", "k(n)"]
    assert [line.split()[1] for line in table[1:]] == ["64", "128", "512"]
