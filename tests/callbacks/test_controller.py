"""BudgetController on real trainers: it moves, it stops, it says why, it resumes bit for bit."""

import pytest
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from transformers import AutoModelForCausalLM, LlamaConfig

from lit_sparse import Budget
from lit_sparse.callbacks import (
    BudgetController,
    ContextCurriculum,
    HuggingFaceExport,
    RunCheckpoint,
    SparseAttention,
)
from lit_sparse.models import alpha_factor, budget_of, configured_law, law_of, sparsify
from lit_sparse.training import Stage

# An untrained model spreads its mass evenly: of 256 tokens these 80 keys miss about two thirds.
LAW = Budget(alpha=5, exponent=0.5, floor=16, sink=16, local=0.0, late=0.0)


class Module(LightningModule):
    def __init__(self, architecture):
        super().__init__()
        torch.manual_seed(0)
        self.model = AutoModelForCausalLM.from_config(LlamaConfig(**architecture))

    def training_step(self, batch, batch_idx):
        # Data by the step: where a run goes on is not the subject here.
        generator = torch.Generator().manual_seed(self.trainer.global_step)
        ids = torch.randint(257, (1, 256), generator=generator)
        return self.model(input_ids=ids, labels=ids).loss

    def validation_step(self, batch, batch_idx):
        self.validated = law_of(self.model)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class Watch(Callback):
    """Per micro-batch: optimizer step, factor and alpha in force, and what was logged."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        model, logged = pl_module.model, trainer.callback_metrics
        self.seen.append(
            (
                trainer.global_step,
                alpha_factor(model),
                law_of(model).budget.alpha,
                {k: float(v) for k, v in logged.items() if k.startswith("controller/")},
            )
        )

    @property
    def factors(self):
        return [factor for _, factor, _, _ in self.seen]


def _trainer(controller, steps, law=LAW, callbacks=(), **options):
    settings = {
        "accelerator": "cpu",
        "max_steps": steps,
        "logger": False,
        "enable_checkpointing": any(isinstance(c, RunCheckpoint) for c in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "limit_val_batches": 1,
        **options,
    }
    plugin = SparseAttention(law, block=16, tile=16)
    return Trainer(callbacks=[controller, plugin, *callbacks], **settings)


def _fit(architecture, controller, steps, law=LAW, callbacks=(), ckpt=None, **options):
    watch, module = Watch(), Module(architecture)
    trainer = _trainer(controller, steps, law, [watch, *callbacks], **options)
    trainer.fit(module, range(steps * trainer.accumulate_grad_batches), ckpt_path=ckpt)
    return module, watch


def _controller(**options):
    settings = {"every_n_steps": 1, "rows": 32, "min_context": 200, "patience": 2, "target": 0.3}
    return BudgetController(**{**settings, **options})


def test_alpha_rises_until_the_target_is_met_and_the_export_has_it(architecture, tmp_path):
    export = HuggingFaceExport(str(tmp_path / "export"))
    module, watch = _fit(architecture, _controller(), 9, callbacks=[export])
    # Two measurements over the target, then a raise by seven levels of .97 each time.
    raised = [1, 1, *(0.97 ** (-7 * times) for times in (1, 2, 3, 4))]
    assert watch.factors[:6] == pytest.approx(raised[:6])
    logged = [entry[3] for entry in watch.seen]
    missed = [values["controller/missed_mass_p95"] for values in logged]
    assert missed[0] > 0.6
    assert missed[-1] < 0.3
    assert watch.factors[-1] == watch.factors[-2]
    for (_, factor, alpha, _), values in zip(watch.seen, logged, strict=True):
        assert alpha == pytest.approx(5 * factor)
        assert values["controller/alpha"] == pytest.approx(alpha)
        assert values["controller/alpha_factor"] == pytest.approx(factor)
        assert values["controller/target"] == pytest.approx(0.3)
    assert configured_law(module.model).budget == LAW
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    assert law_of(sparsify(saved)) == law_of(module.model)


def test_alpha_falls_slowly_where_there_is_room(architecture):
    _, watch = _fit(architecture, _controller(target=0.99, room=0.9), 6)
    assert watch.factors == pytest.approx([1, 1, 0.97, 0.97, 0.97**2, 0.97**2])
    _, watch = _fit(architecture, _controller(target=0.99, room=0.9, least=0.96, patience=1), 4)
    assert watch.factors == pytest.approx([1, 0.97, 0.97, 0.97])


def test_between_the_two_nothing_moves(architecture):
    _, watch = _fit(architecture, _controller(target=0.9, room=0.3, patience=1), 4)
    assert set(watch.factors) == {1.0}


@pytest.mark.parametrize(
    ("law", "options", "reason"),
    [
        (LAW, {"most": 1.1}, "largest factor allowed"),
        (Budget(alpha=1, floor=80, sink=16), {}, "floor of the law"),
        (Budget(alpha=50, floor=16, ceiling=80, sink=16), {}, "ceiling of the law"),
    ],
)
def test_what_stops_a_raise_is_said_once(architecture, law, options, reason):
    with pytest.warns(UserWarning, match=reason) as warned:
        _, watch = _fit(architecture, _controller(**options), 6, law=law)
    assert sum("BudgetController" in str(w.message) for w in warned) == 1
    assert watch.factors[-1] == pytest.approx(0.97**-3 if "most" in options else 1)


def test_rows_that_keep_all_do_not_count(architecture, recwarn):
    """Of contexts from 1 to 256 the first 80 are dense; they would hide what the others miss."""
    options = {"min_context": 1, "rows": 256, "patience": 1}
    _, watch = _fit(architecture, _controller(**options), 1)
    assert watch.seen[0][3]["controller/missed_mass_p95"] > 0.6
    _, watch = _fit(architecture, _controller(patience=1), 3, law=Budget(floor=256))
    assert set(watch.factors) == {1.0}
    assert watch.seen[-1][3] == {}
    assert not [w for w in recwarn if "BudgetController" in str(w.message)]


class TwoModels(Module):
    def __init__(self, architecture):
        super().__init__(architecture)
        self.small = Module({**architecture, "num_attention_heads": 2}).model

    def training_step(self, batch, batch_idx):
        ids = torch.randint(257, (1, 256))
        return super().training_step(batch, batch_idx) + self.small(input_ids=ids, labels=ids).loss


def test_models_of_different_numbers_of_heads_count_together(architecture):
    controller, watch = _controller(patience=1), Watch()
    _trainer(controller, 2, callbacks=[watch]).fit(TwoModels(architecture), range(2))
    assert watch.seen[0][3]["controller/missed_mass_p95"] > 0.6
    assert watch.factors[-1] > 1


def test_the_micro_batches_of_a_step_obey_one_law(architecture):
    _, watch = _fit(architecture, _controller(patience=1), 3, accumulate_grad_batches=2)
    assert watch.factors[0::2] == watch.factors[1::2]
    assert len(set(watch.factors)) == 3


def test_a_resumed_run_goes_on_bit_for_bit(architecture, tmp_path):
    save = RunCheckpoint(every_n_steps=1, keep=9, dirpath=str(tmp_path))
    whole, all_of_it = _fit(architecture, _controller(), 6, callbacks=[save])
    for step in (1, 4):  # in the middle of a streak; after raises
        path = tmp_path / f"step={step}.ckpt"
        other = RunCheckpoint(dirpath=str(tmp_path / "resumed"))
        resumed, rest = _fit(architecture, _controller(), 6, callbacks=[other], ckpt=path)
        assert rest.seen == all_of_it.seen[step:]
        for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
            assert torch.equal(a, b)

    trainer, module = _trainer(_controller(), 6), Module(architecture)
    trainer.validate(module, range(1), ckpt_path=tmp_path / "step=4.ckpt", verbose=False)
    assert module.validated.budget.alpha == all_of_it.seen[4][2]


def test_stages_keep_the_factor_and_dense_ones_do_not_count(architecture):
    wide = Budget(alpha=7, exponent=0.5, floor=16, sink=16, local=0.0)
    stages = [Stage(256, 2), Stage(256, 2, attention="dense"), Stage(256, 2, budget=wide)]

    class Laws(Callback):
        seen = []  # noqa: RUF012

        def on_train_batch_end(self, trainer, pl_module, *_):
            self.seen.append((law_of(pl_module.model).budget, budget_of(pl_module.model)))

    laws = Laws()
    controller = _controller(patience=1)
    _, watch = _fit(architecture, controller, 6, callbacks=[ContextCurriculum(stages), laws])
    once, twice = 0.97**-7, 0.97**-14
    assert watch.factors == pytest.approx([1, once, twice, twice, twice, 0.97**-21])
    in_force = [now for _, now in laws.seen]
    assert in_force[2] == in_force[3] == Budget.dense()
    assert in_force[4] == wide.scaled(watch.factors[4])
    assert in_force[1] == LAW.scaled(watch.factors[1])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("target", 0.0),
        ("target", 1.0),
        ("patience", 0),
        ("up", 1.0),
        ("down", 1.0),
        ("down", 0.0),
        ("room", 1.0),
        ("most", 0.5),
        ("least", 0.0),
        ("every_n_steps", 0),
    ],
)
def test_bad_options_are_named(name, value):
    with pytest.raises(ValueError, match=f"BudgetController {name} must be"):
        BudgetController(**{name: value})


def test_two_ranks_decide_alike(two_ranks):
    """Each rank sees other rows, of another length; the mass missed by both together decides."""
    first, second = two_ranks["control"]
    assert first == second
    assert first["factors"][-1] > 1
