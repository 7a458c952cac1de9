"""Error that more keys do not cure, and a gap that grows with length: constructed, and healthy."""

import sys
from pathlib import Path

import pytest
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

sys.path.insert(0, str(Path(__file__).parent))
from monitored import Module, batches, make_trainer, sparse

from lit_sparse.attention.row_statistics import STATISTICS, RowStatistics
from lit_sparse.callbacks import DenseGapMonitor, dense_gap
from lit_sparse.callbacks.dense_comparison import Gap
from lit_sparse.callbacks.sampler import Sample
from lit_sparse.callbacks.signatures import (
    GrowingGap,
    PersistentError,
    PersistentGap,
    slope_by_document,
)

ROWS = 64


def sample(keys, errors, seed=0, noise=0.02, contexts=(512, 4096)):
    """A measurement of rows anywhere in `contexts` that get keys * sqrt(n / 1024) keys; layer ->
    mean relative output error.
    """
    generator = torch.Generator().manual_seed(seed)
    context = torch.randint(*contexts, (ROWS,), generator=generator)
    layers = {}
    for layer, error in errors.items():
        columns = {name: torch.zeros(ROWS, 2) for name in STATISTICS}
        own = error + noise * torch.randn(ROWS, 2, generator=generator)
        columns["output_error"] = own + 0.1 * (context[:, None] / 4096)
        layers[layer] = RowStatistics(context, **columns)
    law = (keys * (context / 1024).sqrt()).long()
    return Sample(layers, {}, (0, 1), dict.fromkeys(layers, law))


def layers_of(found):
    return [place.layer for place in found]


def watch(laws, error_of, **options):
    """Measurements under each of the laws (keys at 1024 tokens); what was reported, and when."""
    signature, found = PersistentError(0.2, **{"patience": 4, **options}), []
    for step, keys in enumerate(laws):
        found.append(layers_of(signature.add(sample(keys, error_of(keys), seed=step))))
    return found


def test_layers_whose_error_stays_are_reported_and_no_other():
    """Layer 1 does not need more keys or less: it misses something else. Layer 2 mends as
    independent values do, layer 5 is too small to matter.
    """

    def error_of(keys):
        return {1: 0.5, 2: 0.5 * (128 / keys) ** 0.5, 5: 0.05}

    found = watch([128] * 6 + [256] * 6, error_of)
    assert found[:9] == [[]] * 9  # patience: four measurements under the larger budget
    assert found[9:] == [[1]] * 3


def test_small_moves_of_a_controller_add_up():
    laws = [128 * 1.25**move for move in range(4) for _ in range(4)]
    found = watch(laws, lambda keys: {0: 0.6, 3: 0.6 * (128 / keys) ** 0.5})
    assert found[-1] == [0]
    assert not any(found[: 2 * 4])  # 1.25 times the keys are no larger budget yet
    assert all(layers in ([], [0]) for layers in found)


@pytest.mark.parametrize(
    "laws",
    [
        [128] * 30,  # a stage lengthens contexts under one law: more keys, but not at equal n
        [256] * 6 + [128] * 6,  # a smaller budget
        [128] * 6 + [150] * 6,
    ],
)
def test_error_that_stays_without_a_larger_budget_is_no_sign(laws):
    assert not any(watch(laws, lambda keys: {0: 0.8}))


def test_an_error_that_grows_with_the_context_is_no_sign():
    """The quickstart's level: .23 at 512 tokens, .86 at 4096, keys growing with the context."""
    signature = PersistentError(0.2, patience=2)
    for step in range(20):
        longest = 512 * 2 ** (step // 5)
        measured = sample(
            128, {0: 0.23 + 0.2 * (step // 5)}, step, contexts=(longest // 2, longest)
        )
        assert signature.add(measured) == []


def test_what_training_does_long_after_a_move_is_no_sign():
    """Heads go on sharpening, and lose more to the same budget than before."""
    signature = PersistentError(0.2, patience=4)
    for step in range(40):
        keys, mended = (128, 1) if step < 6 else (256, 0.5**0.5)
        measured = sample(keys, {0: mended * 0.5 + 0.02 * max(step - 14, 0)}, step)
        assert signature.add(measured) == []


@pytest.mark.parametrize("seed", range(3))
def test_noise_alone_reports_no_layer_that_mends(seed):
    signature = PersistentError(0.2, patience=4)
    for step in range(16):
        keys = 128 if step < 8 else 256
        errors = dict.fromkeys(range(16), 0.6 * (128 / keys) ** 0.5)
        assert signature.add(sample(keys, errors, seed=100 * seed + step, noise=0.3)) == []


def gap(kl_of, documents=12, longest=4096, seed=0, noise=0.05):
    """A comparison of documents of several lengths; `kl_of(n)` nats at context n."""
    generator = torch.Generator().manual_seed(seed)
    sums, parts = torch.zeros(48, 6, dtype=torch.float64), []
    for document in range(documents):
        n = torch.arange(1, longest >> (document % 4), dtype=torch.float64) + 1
        own = torch.randn(2, generator=generator, dtype=torch.float64) * noise
        kl = (kl_of(n) * (1 + own[0]) + own[1]).clamp(min=0)
        one, x = torch.ones_like(n), n.log()
        columns = torch.stack([kl, one, one, 0 * one, 0 * one, 0 * one], 1)
        sums.index_add_(0, n.log2().floor().long(), columns)
        parts.append(torch.stack([one, x, x * x, kl, x * kl], 1).sum(0))
    return Gap(sums, torch.stack(parts))


def flat(kl):
    return lambda n: torch.full_like(n, kl)


def growing(longest):
    return lambda n: longest * (n / 4096) ** 0.5


def test_kl_that_a_larger_budget_does_not_lower_is_reported():
    contexts = [2**i for i in range(13)]
    few, many = (dict.fromkeys(contexts, keys) for keys in (128.0, 256.0))
    signature = PersistentGap(0.25)
    assert signature.add(gap(flat(0.4)), few) is None
    assert signature.add(gap(flat(0.41)), few) is None
    assert signature.add(gap(flat(0.42)), many) == pytest.approx(0.42, abs=0.05)
    assert signature.add(gap(flat(0.3)), many) is None
    for before, after in ((0.09, 0.2), (0.6, 0.4)):  # too small to matter; lower than before
        healthy = PersistentGap(0.25)
        assert healthy.add(gap(flat(before)), few) is None
        assert healthy.add(gap(flat(after)), many) is None


def test_a_gap_that_grows_with_length_is_reported_the_second_time():
    signature = GrowingGap(0.25)
    assert signature.add(gap(growing(0.6), seed=0)) is None
    assert signature.add(gap(growing(0.6), seed=1)) == pytest.approx(0.52, abs=0.1)
    interrupted = GrowingGap(0.25)
    for kl_of in (growing(0.6), flat(0.1), growing(0.6), growing(0.1), growing(0.6)):
        assert interrupted.add(gap(kl_of)) is None


@pytest.mark.parametrize(
    "kl_of",
    [
        growing(0.1),  # grows, but stays small: the quickstart
        flat(0.5),  # large everywhere
        lambda n: 0.5 - 0.3 * (n / 4096) ** 0.5,
    ],
)
def test_a_gap_that_is_small_or_does_not_grow_is_no_sign(kl_of):
    signature = GrowingGap(0.25)
    assert [signature.add(gap(kl_of, seed=i)) for i in range(4)] == [None] * 4


def test_a_few_documents_prove_nothing():
    """However many tokens they have: those of one document depend on each other."""
    signature = GrowingGap(0.25)
    few = [gap(growing(0.6), documents=5, seed=i) for i in range(4)]
    assert [signature.add(one) for one in few] == [None] * 4
    noisy = [gap(growing(0.35), documents=6, seed=i, noise=1.5) for i in range(4)]
    assert [signature.add(one) for one in noisy] == [None] * 4


def test_the_slope_and_its_error_are_those_of_all_tokens():
    generator = torch.Generator().manual_seed(0)
    xs, ys, owners = [], [], []
    for document in range(9):
        x = (torch.arange(1, 30 + 7 * document, dtype=torch.float64) + 1).log()
        own = torch.randn((), generator=generator, dtype=torch.float64)
        xs.append(x)
        ys.append(0.3 * x + own + torch.randn(len(x), generator=generator, dtype=torch.float64))
        owners.append(torch.full((len(x),), document))
    sums = torch.stack(
        [
            torch.stack([torch.ones_like(x), x, x * x, y, x * y], 1).sum(0)
            for x, y in zip(xs, ys, strict=True)
        ]
    )
    x, y, owner = torch.cat(xs), torch.cat(ys), torch.cat(owners)
    design = torch.stack([torch.ones_like(x), x], 1)
    solution = torch.linalg.lstsq(design, y).solution
    residual = y - design @ solution
    bread = torch.linalg.inv(design.T @ design)
    scores = torch.stack([design[owner == d].T @ residual[owner == d] for d in range(9)])
    sandwich = bread @ (9 / 8 * scores.T @ scores) @ bread
    slope, error = slope_by_document(sums)
    assert slope == pytest.approx(float(solution[1]), rel=1e-9)
    assert error == pytest.approx(float(sandwich[1, 1].sqrt()), rel=1e-9)


# -- in a run --


class Scripted(DenseGapMonitor):
    """Gets constructed measurements in place of its own: four under each of two budgets."""

    def finish(self, trainer, pl_module, own):
        keys = 128 if trainer.global_step <= 4 else 256
        super().finish(trainer, pl_module, sample(keys, {0: 0.5, 1: 0.5 * (128 / keys) ** 0.5}))


def run(monitor, steps, logger=False):
    trainer = make_trainer([monitor, sparse()], logger=logger)
    trainer.fit(Module(num_hidden_layers=1), batches(steps, (40,)))
    return trainer


def test_the_alert_names_the_layer_and_what_to_do(tmp_path):
    monitor = Scripted(every_n_steps=1, validation_batches=0, min_context=8)
    with pytest.warns(UserWarning, match=r"persistent_error at step 8: .*layer 0: 0\.5"):
        trainer = run(monitor, 8, TensorBoardLogger(tmp_path, version=""))
    events = EventAccumulator(trainer.log_dir, size_guidance={"tensors": 0}).Reload()
    (text,) = events.Tensors("alerts/persistent_error/text_summary")
    shown = text.tensor_proto.string_val[0].decode()
    assert "| 0 | all | 0.5" in shown
    assert "What to do" in shown
    again = Scripted(every_n_steps=1, validation_batches=0, min_context=8)
    again.load_state_dict(monitor.state_dict())
    assert (
        again.alarm.state_dict()
        == monitor.alarm.state_dict()
        != DenseGapMonitor().alarm.state_dict()
    )


@pytest.mark.filterwarnings("ignore")
def test_it_stops_training_or_calls_a_function():
    options = {"every_n_steps": 1, "validation_batches": 0, "min_context": 8}
    stopped = run(Scripted(**options, on_alert="stop"), 10)
    assert stopped.global_step == 8
    got = []
    called = Scripted(**options, on_alert=lambda trainer, alert: got.append(alert))
    assert run(called, 10).global_step == 10
    assert [(alert.kind, alert.places[0].layer) for alert in got] == [("persistent_error", 0)]


@pytest.mark.filterwarnings("ignore")
def test_alerts_of_the_whole_model(monkeypatch):
    """KL that grows with length in two validations, after a healthy one."""

    results = [gap(growing(kl)) for kl in (0.1, 0.6, 0.6)]

    class Constructed(dense_gap.DenseComparison):
        def result(self, pl_module):
            return results.pop(0)

    monkeypatch.setattr(dense_gap, "DenseComparison", Constructed)
    got = []
    monitor = DenseGapMonitor(
        compare_every=1, on_alert=lambda trainer, alert: got.append((trainer.global_step, alert))
    )
    trainer = make_trainer([monitor, sparse()], max_epochs=3)
    trainer.fit(Module(num_hidden_layers=1), batches(1, (40,)), batches(1, (40,)))
    ((step, alert),) = got
    assert (step, alert.kind) == (3, "gap_grows_with_length")
    assert str(alert.places[0]).startswith("model: 0.5")
    assert trainer.callback_metrics["gap_by_context/kl_02048"] > 0.4
