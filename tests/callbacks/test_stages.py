"""What a stage may set: RoPE by rule, budget, learning rate. Switched, logged, exact on resume."""

import csv

import pytest
import torch
import yaml
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.loggers import CSVLogger
from transformers import AutoModelForCausalLM

from lit_sparse import Budget
from lit_sparse.callbacks import ContextCurriculum, HuggingFaceExport, SparseAttention
from lit_sparse.data import PackedTextDataModule
from lit_sparse.models import budget_of, law_of, rope_parameters, sparsify
from lit_sparse.recipes.fit import main
from lit_sparse.training import Curriculum, Doubling, SparseLM, Stage

OWN = Budget(1, 0.5, floor=32, sink=8)
WIDE = Budget(2, 0.5, floor=64, sink=8)
STAGES = [
    Stage(128, 2, attention="dense", rope={"rule": "yarn"}),
    Stage(256, 2, budget=WIDE, learning_rate=1e-3, rope={"rule": "yarn"}),
    Stage(512, 3, learning_rate=5e-4, rope={"rule": "yarn"}),
]


class Watch(Callback):
    """State of the model at each optimizer step, and the length of each validation."""

    def __init__(self):
        self.steps, self.validations = {}, {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        model = pl_module.model
        self.steps[trainer.global_step] = (
            rope_parameters(model).get("factor", 1.0),
            model.base_model.rotary_emb.inv_freq.tolist(),
            law_of(model).budget,
            budget_of(model),
        )

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, *_):
        self.longest = int(batch["position_ids"].max()) + 1

    def on_validation_end(self, trainer, pl_module):
        length = trainer.datamodule.validation_length
        loss = float(trainer.callback_metrics["val/loss"])
        assert loss == float(trainer.callback_metrics[f"val_by_length/{length}"])
        self.validations[trainer.global_step] = (length, law_of(pl_module.model).budget, loss)


class LearningRates(SparseLM):
    def on_before_optimizer_step(self, optimizer):
        super().on_before_optimizer_step(optimizer)
        self.rates = {
            **getattr(self, "rates", {}),
            self.global_step: optimizer.param_groups[0]["lr"],
        }


class Interrupted(Exception):
    pass


class SaveAndStop(Callback):
    def __init__(self, step, path):
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step and not trainer.fit_loop._should_accumulate():
            trainer.save_checkpoint(self.path)
            raise Interrupted


def _parts(architecture, corpus, stages=STAGES, callbacks=(), first="plugin", **options):
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
    plugin = SparseAttention(OWN, block=16, tile=16)
    ours = [plugin, curriculum] if first == "plugin" else [curriculum, plugin]
    settings = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": -1,
        "num_sanity_val_steps": 1,
        "log_every_n_steps": 1,
        **options,
    }
    trainer = Trainer(callbacks=[*ours, *callbacks, watch], **settings)
    short = {**architecture, "max_position_embeddings": 128}
    module = LearningRates(architecture=short, warmup_steps=1, learning_rate=2e-3)
    return trainer, module, data, watch


@pytest.fixture
def whole(architecture, corpus, tmp_path):
    export, logger = HuggingFaceExport(str(tmp_path / "export")), CSVLogger(tmp_path, version="")
    trainer, module, data, watch = _parts(architecture, corpus, callbacks=[export], logger=logger)
    trainer.fit(module, datamodule=data)
    logger.save()
    return module, watch, logger


def test_stages_switch_are_logged_and_survive_a_stop(whole, architecture, corpus, tmp_path):
    module, watch, logger = whole
    # RoPE, and the law that the config stores and the one in force.
    seen = {step: (factor, law, now) for step, (factor, _, law, now) in watch.steps.items()}
    assert seen == {
        **dict.fromkeys([0, 1], (1.0, OWN, Budget.dense())),
        **dict.fromkeys([2, 3], (2.0, WIDE, WIDE)),
        **dict.fromkeys([4, 5, 6], (4.0, OWN, OWN)),
    }
    validated = {step: entry[:2] for step, entry in watch.validations.items() if step}
    assert validated == {2: (128, OWN), 4: (256, WIDE), 7: (512, OWN)}
    shares = [module._learning_rate_share(step, 7) for step in range(7)]
    peaks = [2e-3, 2e-3, 1e-3, 1e-3, 5e-4, 5e-4, 5e-4]
    expected = [share * peak for share, peak in zip(shares, peaks, strict=True)]
    assert list(module.rates.values()) == pytest.approx(expected)

    with open(logger.experiment.metrics_file_path) as file:
        rows = list(csv.DictReader(file))

    def logged(name):
        return {int(row["step"]) + 1: float(row[name]) for row in rows if row[name]}

    assert list(logged("train/lr").values()) == pytest.approx(expected)
    assert logged("curriculum/rope_factor") == {3: 2, 4: 2, 5: 4, 6: 4, 7: 4}
    budgets, lengths = logged("curriculum/budget"), logged("curriculum/length")
    assert all(budgets[step] <= 128 for step in (1, 2))  # dense: as many keys as tokens
    assert budgets[1] > WIDE(128)
    assert (budgets[4], budgets[7]) == (64, 32)  # their floors
    assert set(lengths.values()) == {128, 256, 512}

    for stop in (1, 2, 3, 6):
        path = tmp_path / "middle.ckpt"
        trainer, broken, data, before = _parts(
            architecture, corpus, callbacks=[SaveAndStop(stop, path)]
        )
        with pytest.raises(Interrupted):
            trainer.fit(broken, datamodule=data)
        trainer, resumed, data, after = _parts(architecture, corpus)
        trainer.fit(resumed, datamodule=data, ckpt_path=path)
        assert {**before.steps, **after.steps} == watch.steps
        assert min(after.steps) == stop
        assert {**broken.rates, **resumed.rates} == module.rates
        later = {step: v for step, v in watch.validations.items() if step > stop}
        assert {step: v for step, v in after.validations.items() if step > stop} == later
        for a, b in zip(module.parameters(), resumed.parameters(), strict=True):
            assert torch.equal(a, b)


def test_the_export_has_the_last_stage(whole, tmp_path):
    module, _, _ = whole
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    rotary, ours = loaded.model.rotary_emb, module.model.model.rotary_emb
    assert torch.equal(rotary.inv_freq, ours.inv_freq)
    assert rotary.attention_scaling == ours.attention_scaling > 1
    assert rope_parameters(loaded)["original_max_position_embeddings"] == 128
    assert loaded.config.max_position_embeddings == 512
    assert law_of(sparsify(loaded)).budget == OWN


def test_validating_a_checkpoint_is_at_its_stage(architecture, corpus, tmp_path):
    """Whatever the order of the callbacks, and with workers that read ahead."""
    path = tmp_path / "middle.ckpt"
    trainer, module, data, _ = _parts(architecture, corpus, callbacks=[SaveAndStop(4, path)])
    with pytest.raises(Interrupted):
        trainer.fit(module, datamodule=data)
    for first, workers in (("plugin", 1), ("curriculum", 0)):
        trainer, module, data, watch = _parts(architecture, corpus, first=first)
        data.num_workers = workers
        trainer.validate(module, datamodule=data, ckpt_path=path, verbose=False)
        length, law, _ = next(iter(watch.validations.values()))
        assert (length, law) == (256, WIDE)
        assert rope_parameters(module.model)["factor"] == 2
        assert watch.longest == 256


def test_a_learning_rate_that_nobody_applies_is_refused(architecture, corpus):
    trainer, module, data, _ = _parts(architecture, corpus)
    module.applies_stage_learning_rates = False
    with pytest.raises(ValueError, match=r"stages\[1\].learning_rate is set, but LearningRates"):
        trainer.fit(module, datamodule=data)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([Stage(256, 1)], r"stages\[0\].length = 256 .* 128 positions .* rope: {rule: abf}"),
        (
            [Stage(256, 1, rope={"rule": "abf"}), Stage(512, 1)],
            r"stages\[1\].length = 512 is longer than the 256 positions .* rule of stages\[0\]",
        ),
        (
            [Stage(128, 1), Stage(256, 1, rope={"rope_type": "linear"})],
            r"curriculum.stages\[1\].rope: .*factor",
        ),
        (
            [Stage(128, 1), Stage(256, 1, rope={"rope_type": "dynamic", "factor": 2.0})],
            r"curriculum.stages\[1\].rope: .* 'dynamic' scales by max_position_embeddings",
        ),
    ],
)
def test_rope_that_does_not_fit_the_model_is_named_before_training(
    architecture, corpus, stages, message
):
    trainer, module, data, watch = _parts(architecture, corpus, stages)
    with pytest.raises(ValueError, match=message):
        trainer.fit(module, datamodule=data)
    assert not watch.steps


def test_a_stage_past_a_window_that_was_no_limit_is_named_before_training(architecture, corpus):
    """Phi-3 for 128k has one of 262144 tokens: extended further it would begin to count."""
    phi = {**architecture, "model_type": "phi3", "sliding_window": 192, "pad_token_id": None}
    stages = [Stage(128, 1), Stage(256, 1, rope={"rule": "abf"})]
    trainer, module, data, watch = _parts(phi, corpus, stages)
    with pytest.raises(
        ValueError, match=r"stage of 256 tokens goes past the sliding window of 192"
    ):
        trainer.fit(module, datamodule=data)
    assert not watch.steps


def test_data_of_another_curriculum_is_refused(architecture, corpus):
    trainer, module, data, _ = _parts(architecture, corpus)
    data.curriculum = Curriculum([Stage(512, 7)])
    with pytest.raises(ValueError, match="data.curriculum has other stages than"):
        trainer.fit(module, datamodule=data)


def test_stages_or_doubling():
    doubled = ContextCurriculum(doubling=Doubling(first=64, last=256, steps=3))
    assert [stage.length for stage in doubled.curriculum.stages] == [64, 128, 256]
    for arguments in ({}, {"stages": STAGES, "doubling": Doubling(first=64, last=128, steps=1)}):
        with pytest.raises(ValueError, match="exactly one of stages and doubling"):
            ContextCurriculum(**arguments)


def test_every_key_is_a_key_of_the_config(tmp_path, capsys):
    options = {
        "rope": {"rule": "abf", "theta": 500000.0},
        "attention": "sparse",
        "budget": {**OWN.to_dict()},
        "learning_rate": 0.0001,
        "mixture": {"books": 2.0, "code": 1.0},
    }
    stage = {"length": 512, "steps": 3, **options}
    doubling = {"first": 512, "last": 2048, "steps": [3, 2, 1], **options}
    for given in (
        {"stages": [stage], "doubling": None},
        {"stages": None, "doubling": doubling},
    ):
        path = tmp_path / "given.yaml"
        path.write_text(yaml.safe_dump({"curriculum": given}))
        for _ in range(2):  # what is printed says the same when it is read again
            with pytest.raises(SystemExit) as stop:
                main(["fit", "--config", "quickstart", "--config", str(path), "--print_config"])
            assert stop.value.code == 0
            printed = capsys.readouterr().out
            found = yaml.safe_load(printed)["curriculum"]
            assert {key: found[key] for key in given} == given
            path.write_text(printed)
