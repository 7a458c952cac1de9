"""The measurement that monitors share: which rows, of which step, layers, models and ranks."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from monitored import ARCHITECTURE, Module, batches, make_trainer, sparse
from transformers import AutoModelForCausalLM, MistralConfig, Qwen2Config

from lit_sparse.callbacks import BudgetController, CollapseMonitor, DenseGapMonitor, sampler
from lit_sparse.callbacks.sampled import Average, SampledAttentionMonitor, log2_bucket
from lit_sparse.models.state import require_state

pytestmark = pytest.mark.filterwarnings("ignore")


class Recorder(SampledAttentionMonitor):
    def __init__(self, **options):
        super().__init__(**{"every_n_steps": 1, "rows": 6, "min_context": 8, **options})
        self.samples = []

    def finish(self, trainer, pl_module, sample):
        self.samples.append((trainer.current_epoch, sample))


def fit(module, *callbacks, count=2, **options):
    trainer = make_trainer([*callbacks, sparse()], **options)
    trainer.fit(module, batches(count))
    return trainer


def test_monitors_of_equal_settings_share_one_measurement(monkeypatch):
    probed, probe = [], sampler.probe_rows
    monkeypatch.setattr(sampler, "probe_rows", lambda *a, **k: probed.append(1) or probe(*a, **k))
    first, second, other = Recorder(), Recorder(), Recorder(rows=3)
    fit(Module(), first, second, other, count=2)
    assert len(probed) == 2 * 2 * 2  # steps, layers, different settings
    for (_, a), (_, b), (_, c) in zip(first.samples, second.samples, other.samples, strict=True):
        assert a is b
        assert len(a.layers[0].context) == 6
        assert len(c.layers[0].context) == 3


def test_rows_are_those_of_the_step_whatever_was_drawn_before():
    """Rows differ from step to step, and a resumed run has those of the step it stands at."""
    recorder = Recorder(every_n_steps=2)
    fit(Module(), recorder, count=6)
    contexts = [sample.layers[0].context.tolist() for _, sample in recorder.samples]
    assert len(contexts) == 4  # steps 0, 1, 3 and 5
    assert contexts[0] != contexts[1] != contexts[2] != contexts[3]
    again = Recorder(every_n_steps=4)
    torch.manual_seed(7)
    fit(Module(dropout=0.5), again, count=6)
    assert [s.layers[1].context.tolist() for _, s in again.samples] == [contexts[0], contexts[2]]


def test_a_sample_is_of_its_own_micro_batch_only():
    """Steps of two micro-batches over two epochs: the second epoch's batches have the numbers of
    the first one's.
    """
    recorder = Recorder(every_n_steps=3)
    fit(Module(), recorder, count=4, max_epochs=3, accumulate_grad_batches=2)
    # Optimizer steps 0 and 1, 2 and 3, 4 and 5: 0, 2 and 5 are measured.
    assert [epoch for epoch, _ in recorder.samples] == [0, 1, 2]
    assert len({id(sample) for _, sample in recorder.samples}) == 3


class Failing(Module):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if batch_idx == 1:
            raise RuntimeError("out of memory")
        return loss


def test_nothing_observes_after_an_exception():
    module, recorder = Failing(), Recorder()
    with pytest.raises(RuntimeError, match="out of memory"):
        fit(module, recorder, count=3)
    assert require_state(module.model).observers == []
    assert len(recorder.samples) == 1
    module.training_step = lambda batch, batch_idx: Module.training_step(module, batch, batch_idx)
    fit(module, recorder, count=2)  # the same callback serves another fit
    assert len(recorder.samples) == 3


def test_layers_and_heads_are_chosen_by_number():
    recorder = Recorder(layers=[1], heads=[3, 0])
    every = Recorder()
    fit(Module(), recorder, every, count=1)
    (_, sample), (_, whole) = recorder.samples[0], every.samples[0]
    assert sample.heads == (0, 3)
    assert list(sample.layers) == [1]
    assert torch.equal(sample.layers[1].tau, whole.layers[1].tau[:, [0, 3]])
    torch.testing.assert_close(sample.similarity[1], whole.similarity[1][:, [0, 3]])
    first = Recorder(layers=[0])
    fit(Module(), first, count=1)
    assert list(first.samples[0][1].layers) == [0]


class TwoModels(Module):
    """The second has one layer of two heads."""

    def __init__(self):
        super().__init__()
        self.small = Module(num_hidden_layers=1, num_attention_heads=2).model

    def loss(self, batch):
        return super().loss(batch) + self.small(batch["input_ids"][:, :250]).logits.mean()


def test_several_models_are_numbered_through():
    every, last = Recorder(), Recorder(layers=[2], heads=[1, 2])
    fit(TwoModels(), every, last, count=1)
    sample = every.samples[0][1]
    assert list(sample.layers) == [0, 1, 2]
    tau = sample.stack("tau")
    assert tau.shape == (3, 6, 4)
    assert tau[:2].isfinite().all()
    assert tau[2, :, :2].isfinite().all()
    assert tau[2, :, 2:].isnan().all()
    alone = last.samples[0][1]
    assert torch.equal(alone.stack("tau")[0, :, 0], tau[2, :, 1])
    assert alone.stack("tau")[0, :, 1].isnan().all()


class Windowed(Module):
    """Layers with a sliding window, before one of full attention or everywhere."""

    def __init__(self, everywhere=False):
        super().__init__()
        config = MistralConfig(**ARCHITECTURE, sliding_window=32)
        if not everywhere:
            types = ["sliding_attention", "full_attention"]
            config = Qwen2Config(
                **ARCHITECTURE, use_sliding_window=True, sliding_window=32, layer_types=types
            )
        torch.manual_seed(0)
        self.model = AutoModelForCausalLM.from_config(config)


def test_layers_with_a_window_of_their_own_are_left_out():
    recorder = Recorder()
    trainer = fit(Windowed(), recorder, CollapseMonitor(every_n_steps=1), count=1)
    ((_, sample),) = recorder.samples
    assert list(sample.layers) == [1]
    assert sample.layers[1].tau.max() > 0
    logged = trainer.callback_metrics
    assert {"collapse_by_layer/entropy_ratio_01", "curriculum/density"} < logged.keys()
    assert "collapse_by_layer/entropy_ratio_00" not in logged
    # That of the layer of full attention: the window keeps a fifth of the pairs.
    assert logged["curriculum/density"] > 0.5
    with pytest.raises(ValueError, match=r"names \[0\], but layers 1 have no sliding window"):
        fit(Windowed(), Recorder(layers=[0, 1]), count=1)


def test_windows_everywhere_are_said_once_by_each_monitor():
    recorder, collapse = Recorder(), CollapseMonitor(every_n_steps=1)
    gap, controller = DenseGapMonitor(every_n_steps=1), BudgetController(every_n_steps=1)
    trainer = make_trainer([collapse, gap, controller, recorder, sparse()])
    with pytest.warns(UserWarning, match="measures nothing") as caught:
        trainer.fit(Windowed(everywhere=True), batches(2), batches(1, seed=2))
    said = [str(w.message) for w in caught if "measures nothing" in str(w.message)]
    names = ["CollapseMonitor", "DenseGapMonitor", "BudgetController", "Recorder"]
    assert [text.split()[0] for text in said] == names
    assert all("every layer of this MistralForCausalLM has a sliding window" in t for t in said)
    assert recorder.samples == []
    assert not [name for name in trainer.callback_metrics if name.startswith(("gap", "controller"))]


class Generating(Module):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.model.generate(batch["input_ids"][:, :60], max_new_tokens=2, do_sample=False)
        return loss


def test_what_a_step_generates_besides_is_not_measured():
    plain, besides = Recorder(), Recorder()
    fit(Module(), plain, count=1)
    fit(Generating(), besides, count=1)
    assert torch.equal(plain.samples[0][1].stack("tau"), besides.samples[0][1].stack("tau"))


def test_rows_without_enough_context_are_no_sample():
    recorder = Recorder(min_context=161)
    fit(Module(), recorder, count=1)
    assert recorder.samples == []
    short = Recorder(min_context=159, rows=64)
    fit(Module(), short, count=1)
    ((_, sample),) = short.samples
    assert sample.layers[0].context.tolist() == [159, 160]
    assert sample.budgets[0].tolist() == [80, 80]
    assert sample.similarity[0].isfinite().all()
    one = Recorder(min_context=160)
    fit(Module(), one, count=1)
    assert one.samples[0][1].similarity[0].isnan().all()  # not: as alike as can be


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every_n_steps": 0}, "every_n_steps must be >= 1"),
        ({"every_n_steps": -5}, "every_n_steps must be >= 1"),
        ({"rows": 0}, "rows must be >= 1"),
        ({"min_context": 0}, "min_context must be >= 1"),
        ({"seed": -1}, "seed must be >= 0"),
        ({"layers": []}, "layers is empty"),
        ({"heads": []}, "heads is empty"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=f"Recorder {message}"):
        Recorder(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": [0, 2]}, r"layers names \[2\], but the model has layers 0 to 1"),
        ({"heads": [-1, 9]}, r"heads names \[-1, 9\], but the model has heads 0 to 3"),
    ],
)
def test_a_layer_or_head_that_does_not_exist_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        fit(Module(), Recorder(**options), count=1)


def test_average_forgets_after_it_was_taken_and_skips_nan():
    average, nan = Average(), float("nan")
    average.add({"a": torch.tensor([[1.0, nan]])})
    average.add({"a": torch.tensor([[3.0, nan]])})
    other = Average()
    other.load_state_dict(average.state_dict())
    (found,) = other.take().values()
    assert found[0, 0] == 2
    assert found[0, 1].isnan()
    assert other.take() == {}


def test_contexts_of_one_bucket_are_within_a_factor_of_two():
    context = torch.tensor([1, 2, 3, 4, 511, 512, 1023, 1024])
    assert log2_bucket(context).tolist() == [1, 2, 2, 4, 256, 512, 512, 1024]
