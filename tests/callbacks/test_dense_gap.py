"""What the sparse model loses: on sampled rows, on the same validation batch, and what alerts."""

import sys
from pathlib import Path

import pytest
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent))
from monitored import Module, Recorder, batches, gap_metrics, make_trainer, sparse

from lit_sparse import sparsify
from lit_sparse.callbacks import ContextCurriculum, DenseGapMonitor, sampled
from lit_sparse.callbacks.compare_schedule import SHARE, CompareSchedule
from lit_sparse.callbacks.dense_comparison import IGNORED, DenseComparison
from lit_sparse.callbacks.heatmap import heat_maps
from lit_sparse.models import dense_attention, observe
from lit_sparse.training import Stage

pytestmark = pytest.mark.filterwarnings("ignore")


def weights(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])


# -- sampled rows --


def test_tau_of_the_monitor_is_the_dropped_mass_of_brute_force():
    module, recorder = Module(), Recorder(every_n_steps=1, rows=16, min_context=8)
    seen = {}

    def keep(layer, q, k, v, out, lse, selection, options, documents):
        seen.setdefault(layer, (q.double(), k.double(), selection, options.scale))

    class Watch(Recorder):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.watch = observe(pl_module.model, keep)

    make_trainer([sparse(), recorder, Watch(every_n_steps=100)]).fit(module, batches(1))
    sample = recorder.samples[0]
    cu = torch.tensor([0, 160, 161, 252])
    for layer, rows in sample.layers.items():
        q, k, selection, scale = seen[layer]
        document = torch.bucketize(torch.arange(252), cu[1:], right=True)
        causal = (document[:, None] == document) & torch.ones(252, 252).tril().bool()
        logits = scale * torch.einsum("ihd,jhd->hij", q, k.repeat_interleave(2, 1))
        p = logits.masked_fill(~causal, -torch.inf).softmax(-1)
        kept = selection.to_mask().repeat_interleave(2, 0)
        tau = p.masked_fill(kept, 0).sum(-1).T
        # The sampled rows are told by what they see, in order.
        context = torch.arange(252) - cu[document] + 1
        places = [
            i for n in rows.context.tolist() for i in (context == n).nonzero().flatten().tolist()
        ]
        found, wanted = rows.tau.double(), tau[places]
        for row in found:
            assert (wanted - row).abs().amax(1).min() < 1e-5
        torch.testing.assert_close(rows.kl, -torch.log1p(-rows.tau), atol=1e-6, rtol=1e-5)
    assert sample.stack("tau").max() > 0.05


def test_it_logs_means_spread_layers_and_contexts():
    recorder = Recorder(every_n_steps=1, rows=32, min_context=16, validation_batches=0)
    trainer = make_trainer([recorder, sparse()])
    trainer.fit(Module(), batches(1))
    logged, sample = gap_metrics(trainer), recorder.samples[0]
    for name, field in (("missed_mass", "tau"), ("output_error", "output_error")):
        x = sample.stack(field)
        assert logged[f"gap/{name}"] == pytest.approx(float(x.mean()))
        assert logged[f"gap/{name}_p5"] == pytest.approx(float(x.quantile(0.05)))
        assert logged[f"gap/{name}_p95"] == pytest.approx(float(x.quantile(0.95)))
        for layer in (0, 1):
            assert logged[f"gap_by_layer/{name}_{layer:02d}"] == pytest.approx(
                float(x[layer].mean())
            )
        context = sample.layers[0].context
        for n in (16, 32, 64):
            rows = x[:, (context >= n) & (context < 2 * n)]
            assert logged[f"gap_by_context/{name}_{n:05d}"] == pytest.approx(float(rows.mean()))
    assert logged["gap/captured_mass"] == pytest.approx(1 - logged["gap/missed_mass"])
    recall = sample.stack("recall")
    assert logged["gap/recall"] == pytest.approx(float(recall.nanmean()))
    assert 0 < logged["gap/recall_p5"] <= logged["gap/recall_p95"] <= 1
    assert not any("kl" in name for name in logged)


@pytest.mark.parametrize(("checkpointing", "accumulate"), [(False, 1), (True, 2)])
def test_the_step_is_the_same_bit_for_bit(checkpointing, accumulate):
    """With dropout, packed documents and comparisons; whatever the monitor draws, training does
    not notice.
    """
    found = []
    for monitors in ([], [DenseGapMonitor(every_n_steps=1, min_context=8, compare_every=1)]):
        module = Module(dropout=0.3, checkpointing=checkpointing)
        torch.manual_seed(3)
        trainer = make_trainer(
            [*monitors, sparse()], accumulate_grad_batches=accumulate, val_check_interval=2
        )
        trainer.fit(module, batches(4), batches(1))
        found.append((weights(module), float(trainer.callback_metrics["val_loss"])))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


# -- the same batch, sparse and dense --


def by_brute_force(model, rows):
    """KL, agreement and losses of every token, in float64: one document at a time, unpacked."""
    found = []
    for ids in rows:
        both = []
        for dense in (False, True):
            with torch.no_grad(), dense_attention(model) if dense else torch.no_grad():
                both.append(model(input_ids=ids[None]).logits[0].double().log_softmax(-1))
        sparse_log, dense_log = both
        kl = (dense_log.exp() * (dense_log - sparse_log)).sum(-1)
        agree = sparse_log.argmax(-1) == dense_log.argmax(-1)
        losses = [F.nll_loss(x[:-1], ids[1:], reduction="none").sum() for x in both]
        found.append((kl, agree, *losses))
    return found


@pytest.fixture
def model():
    found = Module().model.eval()
    return sparsify(found, sparse().law.budget, block=16, tile=16)


@pytest.mark.parametrize("padding", [None, "left", "right"])
def test_the_comparison_is_that_of_single_documents(model, padding):
    torch.manual_seed(0)
    rows = [torch.randint(257, (n,)) for n in (90, 1, 133)]
    if padding is None:
        positions = torch.cat([torch.arange(len(ids)) for ids in rows])
        batch = {"input_ids": torch.cat(rows)[None], "position_ids": positions[None]}
    else:
        pads = [(133 - len(ids), 0) if padding == "left" else (0, 133 - len(ids)) for ids in rows]
        pairs = list(zip(rows, pads, strict=True))
        batch = {
            "input_ids": torch.stack([F.pad(ids, pad, value=5) for ids, pad in pairs]),
            "attention_mask": torch.stack([F.pad(ids * 0 + 1, pad) for ids, pad in pairs]),
            "return_dict": padding == "left",  # or a tuple
        }
        if padding == "left":
            batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    gap = compare(model, batch)
    expected = by_brute_force(model, rows)
    kl = torch.cat([kl for kl, *_ in expected])
    assert kl.mean() > 1e-3
    assert gap.kl == pytest.approx(float(kl.mean()), rel=1e-4)
    agree = torch.cat([agree for _, agree, *_ in expected]).double()
    assert gap.top1_agreement == pytest.approx(float(agree.mean()), abs=1e-9)
    assert gap.top1_agreement < 1
    delta = sum(ours - theirs for *_, ours, theirs in expected) / (89 + 132)
    assert gap.loss_delta == pytest.approx(float(delta), abs=1e-5)
    longest = torch.cat([rows_kl[63:127] for rows_kl, *_ in expected])
    assert gap.by_context()[64] == pytest.approx(float(longest.mean()), rel=1e-4)
    assert gap.by_context(least_tokens=7).keys() == {4, 8, 16, 32, 64}  # 128: six tokens
    assert len(gap.documents) == 3
    assert gap.documents[:, 3].tolist() == pytest.approx(
        [float(rows_kl.sum()) for rows_kl, *_ in expected], rel=1e-4, abs=1e-5
    )


def compare(model, batch, whole=False, **labels):
    """As a validation step does that calls the decoder, or the whole model."""
    comparison, trainer = DenseComparison(model), make_trainer([])
    module = Module()
    module.trainer = trainer
    comparison.start_batch()
    with torch.no_grad():
        if whole:
            model(**batch, **labels)
        else:
            model.model(**batch)
    comparison.end_batch(trainer, {**batch, **labels})
    assert not model._forward_pre_hooks
    assert not model.model._forward_hooks
    return comparison.result(module)


def test_targets_are_the_labels_that_the_module_has(model):
    """A chat's prompt is not scored: labels say what is, passed on or in the batch, shifted or
    not.
    """
    torch.manual_seed(0)
    ids = torch.randint(257, (1, 150))
    answers = ids.clone()
    answers[:, :100] = IGNORED
    shifted = F.pad(answers[:, 1:], (0, 1), value=IGNORED)
    ((_, _, ours, theirs),) = by_brute_force(model, [ids[0]])
    everything = float(ours - theirs) / 149
    plain = compare(model, {"input_ids": ids}).loss_delta
    assert plain == pytest.approx(everything, abs=1e-5)
    passed = compare(model, {"input_ids": ids}, whole=True, labels=answers)
    held = compare(model, {"input_ids": ids}, labels=answers)
    aligned = compare(model, {"input_ids": ids}, labels=shifted)
    assert passed.loss_delta == held.loss_delta == aligned.loss_delta != plain
    assert passed.kl == held.kl  # all tokens' distributions are compared
    none = compare(model, {"input_ids": ids}, labels=torch.full_like(ids, IGNORED))
    assert none.loss_delta != none.loss_delta


def test_logits_exist_in_pieces(model, monkeypatch):
    batch = {"input_ids": torch.randint(257, (2, 120))}
    whole = compare(model, batch)
    monkeypatch.setattr("lit_sparse.callbacks.dense_comparison._LOGITS", 257 * 50)
    pieces = compare(model, batch)
    torch.testing.assert_close(whole.sums, pieces.sums)
    assert whole.sums[:, 1].sum() == 240


def test_autocast_of_the_trainer_holds_for_the_dense_run_too():
    module = Module(num_hidden_layers=1)
    trainer = make_trainer([DenseGapMonitor(), sparse()], precision="bf16-mixed")
    dtypes = set()
    module.model.model.layers[0].mlp.down_proj.register_forward_hook(
        lambda module, args, output: dtypes.add(output.dtype)
    )
    trainer.validate(module, batches(1), verbose=False)
    assert dtypes == {torch.bfloat16}
    assert gap_metrics(trainer)["gap/kl"] > 0


# -- ranks --


def test_two_ranks_measure_together(two_ranks):
    first, second = two_ranks["measure"]
    assert first == second
    for context, tau in zip(first["context"], first["tau"], strict=True):
        assert len(context) == 10  # 9 rows asked for: 5 of each rank
        assert context[:5] != context[5:]
        assert len(tau[0]) == 10
    context, (residual, cosine) = first["few"]
    assert len(context) == 2
    assert all(0.1 < x < 1 for x in residual)  # of two rows on each rank: one gives 0
    assert all(abs(x) < 1 for x in cosine)
    # Lightning deals the four rows out to the ranks: all of them were compared.
    trainer = make_trainer([DenseGapMonitor(validation_batches=4), sparse()])
    trainer.validate(Module(), batches(4), verbose=False)
    alone = gap_metrics(trainer)
    for name in ("gap/kl", "gap/loss_delta", "gap/top1_agreement", "gap_by_context/kl_00064"):
        assert first["validated"][name] == pytest.approx(alone[name], rel=1e-4, abs=1e-6)


# -- when to compare --


class Compared(DenseGapMonitor):
    """Writes down at which optimizer steps it compares."""

    def __init__(self, **options):
        super().__init__(**options)
        self.steps = []

    def on_validation_epoch_end(self, trainer, pl_module):
        if self._comparison is not None:
            self.steps.append(trainer.global_step)
        super().on_validation_epoch_end(trainer, pl_module)


def test_an_interval_counts_validations_and_stage_ends_always_compare():
    stages = ContextCurriculum([Stage(128, 5), Stage(128, 9)], validate_every=1)
    monitor = Compared(compare_every=4)
    trainer = make_trainer([monitor, stages, sparse()], max_steps=14)
    trainer.fit(Module(num_hidden_layers=1), batches(14, (40,)), batches(1, (40,)))
    assert monitor.steps == [4, 5, 8, 12, 14]


class Stream(torch.utils.data.IterableDataset):
    """Rows without a length."""

    def __iter__(self):
        return iter(batches(3, (40,)).dataset)


@pytest.mark.parametrize("stream", [False, True])
def test_without_a_curriculum_the_last_validation_compares(stream):
    monitor = Compared(compare_every=100)
    trainer = make_trainer([monitor, sparse()], max_epochs=2, num_sanity_val_steps=1)
    rows = torch.utils.data.DataLoader(Stream(), batch_size=None) if stream else batches(3, (40,))
    trainer.fit(Module(num_hidden_layers=1), rows, batches(1, (40,)))
    assert monitor.steps == [6]


class Clock:
    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now


def test_auto_spends_its_share_of_the_time(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("lit_sparse.callbacks.compare_schedule.time", clock)
    monkeypatch.setattr(
        "lit_sparse.callbacks.compare_schedule.is_stage_end", lambda trainer: trainer.end
    )

    class Trainer:
        end = False

        class strategy:
            @staticmethod
            def broadcast(value):
                return value

    def validate(seconds):
        schedule.resume_clock()
        clock.now += seconds
        due = schedule.due(Trainer)
        if due:
            clock.now += 2.0
            schedule.paid(2.0)
        return due

    schedule = CompareSchedule("auto")
    assert validate(10)  # what it costs is not known yet
    found = [validate(10) for _ in range(199)]
    spent = 2.0 * (1 + sum(found))
    assert 0.8 * SHARE < spent / 2000 <= SHARE + 2 / 2000
    Trainer.end = True
    assert validate(1)
    Trainer.end = False
    again = CompareSchedule("auto")
    again.load_state_dict(schedule.state_dict())
    schedule = again
    assert not validate(1)  # it remembers what was spent


# -- TensorBoard, state, errors --


def test_tensorboard_shows_figure_and_histograms(tmp_path, monkeypatch):
    logger = TensorBoardLogger(tmp_path, version="")
    monitor = Recorder(every_n_steps=2, min_context=8, heads=[1, 3])
    trainer = make_trainer([monitor, sparse()], logger=logger, log_every_n_steps=2)
    drawn = []

    def draw(panels, title, **numbers):
        drawn.append((panels, numbers))
        return heat_maps(panels, title, **numbers)

    monkeypatch.setattr(sampled, "heat_maps", draw)
    trainer.fit(Module(), batches(4), batches(1))
    events = EventAccumulator(trainer.log_dir, size_guidance={"images": 0, "histograms": 0})
    tags = events.Reload().Tags()
    assert "gap/by_layer_and_head" in tags["images"]
    assert {f"gap_rows/{x}" for x in ("missed_mass", "output_error", "recall")} <= set(
        tags["histograms"]
    )
    histogram, *others = events.Histograms("gap_rows/missed_mass")
    assert [other.step for other in others] == [2, 4]  # optimizer steps that are finished
    assert histogram.histogram_value.num == 2 * 64 * 2
    # Logged as often as measured, a number stands at the step that it was measured in.
    points = [(point.step, point.value) for point in events.Scalars("gap/missed_mass")]
    measured = [float(sample.stack("tau").nanmean()) for sample in monitor.samples]
    assert points == [(1, pytest.approx(measured[1])), (3, pytest.approx(measured[2]))]
    ((panels, numbers),) = drawn
    assert numbers == {"layers": None, "heads": (1, 3)}
    assert set(panels) == {"missed mass", "output error", "recall"}
    assert panels["missed mass"].shape == (2, 2)
    assert not any(tag.startswith("alerts/") for tag in tags["tensors"])


def test_a_resumed_run_logs_the_same(tmp_path):
    """Also what is averaged until the next figure."""

    def fit(path=None, **options):
        monitor = DenseGapMonitor(every_n_steps=1, min_context=8, compare_every=2)
        module = Module(num_hidden_layers=1)
        trainer = make_trainer([monitor, sparse()], **options)
        # One order of rows in every epoch: the second epoch is the resumed one.
        trainer.fit(module, batches(2), batches(1), ckpt_path=path, weights_only=path and True)
        return trainer, monitor

    whole, first = fit(max_epochs=4)
    half, _ = fit(max_epochs=2)
    half.save_checkpoint(tmp_path / "half.ckpt")
    resumed, second = fit(tmp_path / "half.ckpt", max_epochs=4)
    ours, theirs = gap_metrics(resumed), gap_metrics(whole)
    assert ours == {name: theirs[name] for name in ours}
    assert "gap/kl" in ours
    states = [monitor.state_dict() for monitor in (first, second)]
    clocks = [state.pop("schedule") for state in states]
    assert clocks[0]["validations"] == clocks[1]["validations"] == 4
    assert str(states[0]) == str(states[1])


@pytest.mark.parametrize(
    ("option", "value", "rule"),
    [
        ("compare_every", 0, "'auto' or a number of validations >= 1"),
        ("compare_every", -2, "'auto' or a number of validations >= 1"),
        ("compare_every", "always", "'auto' or a number of validations >= 1"),
        ("compare_every", True, "'auto' or a number of validations >= 1"),
        ("validation_batches", -1, ">= 0"),
        ("patience", 1, ">= 2"),
        ("kl_limit", -0.1, ">= 0"),
        ("error_limit", -0.1, ">= 0"),
        ("every_n_steps", 0, ">= 1"),
    ],
)
def test_bad_options_are_named(option, value, rule):
    with pytest.raises(ValueError, match=f"DenseGapMonitor {option} must be {rule}, got"):
        DenseGapMonitor(**{option: value})


def test_an_alert_reaction_that_is_none_is_refused():
    with pytest.raises(ValueError, match="on_alert"):
        DenseGapMonitor(on_alert="explode")


def test_a_model_that_was_never_sparsified_is_named():
    with pytest.raises(ValueError, match=r"no model in Module is sparse: add SparseAttention"):
        make_trainer([DenseGapMonitor()]).fit(Module(), batches(1))


def test_without_validation_data_it_says_what_is_missing():
    trainer = make_trainer([DenseGapMonitor(min_context=8), sparse()])
    with pytest.warns(UserWarning, match="no validation data .* gap/kl, gap/loss_delta"):
        trainer.fit(Module(), batches(1))
    assert "gap/missed_mass" in gap_metrics(trainer)
    assert "gap/kl" not in gap_metrics(trainer)


class Headless(Module):
    """Holds the decoder alone, and a head of its own."""

    def __init__(self):
        super().__init__(num_hidden_layers=1)
        self.head, self.model = self.model.lm_head, self.model.model

    def loss(self, batch):
        return self.head(self.model(**batch).last_hidden_state).square().mean()


def test_without_a_language_model_head_it_says_what_is_missing():
    trainer = make_trainer([DenseGapMonitor(min_context=8), sparse()])
    with pytest.warns(UserWarning, match="language-model head, gap/kl, gap/loss_delta"):
        trainer.fit(Headless(), batches(1), batches(1))
    assert "gap/missed_mass" in gap_metrics(trainer)
    assert "gap/kl" not in gap_metrics(trainer)
