"""Each number against float64 by hand, each alert where it was built in, and none where not."""

import dataclasses
import math
import warnings
from types import SimpleNamespace

import pytest
import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.strategies import FSDPStrategy
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_sparse import Budget, sparsify
from lit_sparse.attention import select
from lit_sparse.attention.probe import probe_rows
from lit_sparse.attention.row_statistics import RowStatistics
from lit_sparse.callbacks import CollapseLimits, CollapseMonitor
from lit_sparse.callbacks.collapse_metrics import head_metrics, row_metrics, spread
from lit_sparse.callbacks.sampler import Sample
from lit_sparse.models import attention_layers, build_model

BUDGET = Budget(alpha=1, exponent=0.5, floor=32, sink=8)
HEALTHY = {
    "kl": 0.3,
    "output_error": 0.1,
    "recall": 0.9,
    "entropy": 3.0,
    "entropy_without_sink": 2.8,
    "max_weight": 0.3,
    "max_weight_without_sink": 0.3,
    "collision": 0.1,
    "collision_without_sink": 0.1,
    "sink_mass": 0.1,
    "logit_std": 1.5,
    "logit_max": 8.0,
    "logit_range": 12.0,
}
SHARP = {
    "entropy": 0.1,
    "entropy_without_sink": 0.1,
    "collision_without_sink": 0.97,
    "max_weight_without_sink": 0.98,
}
LAYERS, HEADS, ROWS = (2, 5), (1, 4, 6), 16


def make(changes=None, alike=None, contexts=(256,) * ROWS, budget=64):
    """A sample of a healthy model but for `changes`, (layer, head) -> fields; a row's values may
    depend on its context. `alike`: (layer, head) -> rank residual and cosine.
    """
    context, layers = torch.tensor(contexts), {}
    for layer in LAYERS:
        values = {k: torch.full((len(contexts), len(HEADS)), v) for k, v in HEALTHY.items()}
        for head in HEADS:
            for name, value in (changes or {}).get((layer, head), {}).items():
                column = [value(n) if callable(value) else value for n in contexts]
                values[name][:, HEADS.index(head)] = torch.tensor(column)
        layers[layer] = RowStatistics(context=context, **values)
    similarity = {layer: torch.tensor([[0.8] * 3, [0.3] * 3]) for layer in LAYERS}
    for (layer, head), pair in (alike or {}).items():
        similarity[layer][:, HEADS.index(head)] = torch.tensor(pair)
    budgets = {layer: torch.full_like(context, budget) for layer in LAYERS}
    return Sample(layers, similarity, HEADS, budgets)


class Empty(LightningModule):
    """Takes what a monitor logs, outside of a run."""

    def log_dict(self, values, **options):
        self.logged = dict(values)


def feed(samples, monitor=None):
    """(kind, layer, head) of the alerts that measurements give, and the texts."""
    seen = []
    monitor = monitor or CollapseMonitor(patience=3)
    monitor._alarm.on_alert = lambda trainer, alert: seen.append(alert)
    trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    for sample in samples:
        monitor.finish(trainer, Empty(), sample)
    return {(a.kind, p.layer, p.head) for a in seen for p in a.places}, seen


# -- numbers --


def test_every_number_equals_float64_by_hand():
    torch.manual_seed(0)
    q, k, v = torch.randn(300, 4, 16) * 2, torch.randn(300, 2, 16), torch.randn(300, 2, 16)
    selection = select(q, k, BUDGET, block=16, tile=16)
    rows = torch.tensor([80, 131, 250, 299])
    keys = BUDGET(rows + 1)
    sample = Sample(
        {0: probe_rows(q, k, v, selection, rows)},
        {0: torch.tensor([[0.5] * 4, [0.2] * 4])},
        (0, 1, 2, 3),
        {0: keys},
    )
    found = row_metrics(sample, missed=0.1)
    expected = {name: torch.zeros(1, 4, 4, dtype=torch.float64) for name in found}
    for i, row in enumerate(rows.tolist()):
        for head in range(4):
            logits = (k[: row + 1, head // 2].double() @ q[row, head].double()) / 4
            n, p = row + 1, logits.softmax(0)
            rest = p[4:] / p[4:].sum()
            entropy, dull = -(p * p.log()).sum(), -(rest * rest.log()).sum()
            sigma, budget = logits.std(correction=0), int(keys[i])
            needed = math.log((n - budget) / budget) + math.log(0.9 / 0.1)
            for name, value in {
                "entropy": entropy,
                "entropy_ratio": entropy / math.log(n),
                "entropy_ratio_without_sink": dull / math.log(n - 4),
                "effective_support": entropy.exp(),
                "max_weight": p.max(),
                "max_weight_without_sink": rest.max(),
                "participation": 1 / (p * p).sum(),
                "jacobian_trace": 1 - (p * p).sum(),
                "jacobian_trace_without_sink": 1 - (rest * rest).sum(),
                "saturated": float(rest.max() > 0.95),
                "sink_mass": p[:4].sum(),
                "logit_std": sigma,
                "logit_max": logits.abs().max(),
                "logit_range": logits.max() - logits.min(),
                "range_margin": logits.max() - logits.min() - max(needed, 0.0),
                "gamma": sigma**2 / (2 * math.log(n)),
                "gamma_of_entropy": 1 - entropy / math.log(n),
            }.items():
                expected[name][0, i, head] = value
    for name, values in found.items():
        assert expected[name].count_nonzero() > 0 or name == "saturated", name
        torch.testing.assert_close(
            values.double(), expected[name], rtol=2e-4, atol=2e-5, msg=lambda m, n=name: f"{n} {m}"
        )
    heads = head_metrics(sample, found)
    for name, values in expected.items():
        by_head = values.amax(1) if name == "logit_max" else values.mean(1)
        torch.testing.assert_close(heads[name].double(), by_head, rtol=2e-4, atol=2e-5)
    assert heads["rank_residual"].tolist() == [[0.5] * 4]
    assert heads["cosine"][0].tolist() == pytest.approx([0.2] * 4)
    entropy = expected["entropy_ratio"].flatten()
    got = spread({"entropy_ratio": found["entropy_ratio"]})
    assert float(got["entropy_ratio_p5"]) == pytest.approx(float(entropy.quantile(0.05)), rel=1e-4)
    assert float(got["entropy_ratio_p95"]) == pytest.approx(float(entropy.quantile(0.95)), rel=1e-4)


def test_a_head_that_a_layer_lacks_is_left_out():
    nan = dict.fromkeys(HEALTHY, float("nan"))
    sample = make({(2, 4): nan}, {(2, 4): (float("nan"),) * 2})
    module, monitor = Empty(), CollapseMonitor()
    trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    monitor.finish(trainer, module, sample)
    assert all(bool(torch.as_tensor(value).isfinite()) for value in module.logged.values())
    assert float(module.logged["collapse/logit_max"]) == 8.0
    assert float(module.logged["collapse/sink_mass"]) == pytest.approx(0.1)
    assert float(module.logged["collapse_by_layer/rank_residual_02"]) == pytest.approx(0.8)


def test_one_row_alone_logs_no_rank_residual():
    alone = dict.fromkeys([(layer, head) for layer in LAYERS for head in HEADS], (math.nan,) * 2)
    module, monitor = Empty(), CollapseMonitor()
    monitor.finish(Trainer(logger=False, accelerator="cpu"), module, make({}, alone))
    assert not [name for name in module.logged if "rank_residual" in name or "cosine" in name]
    assert float(module.logged["collapse/sink_mass"]) == pytest.approx(0.1)


# -- alerts --

CASES = {
    "concentration": (SHARP, None, {("concentration", 5, 4), ("saturation", 5, None)}),
    "dispersion": ({"entropy": 5.4, "entropy_without_sink": 5.4}, None, {("dispersion", 5, 4)}),
    "rank_loss": ({}, (0.02, 0.99), {("rank_loss", 5, 4)}),
    "large_logits": ({"logit_max": 70.0}, None, {("large_logits", 5, 4)}),
    "exploding_logits": (
        {"logit_max": 130.0},
        None,
        {("large_logits", 5, 4), ("exploding_logits", 5, 4)},
    ),
}


@pytest.mark.parametrize("kind", CASES)
def test_a_failure_of_one_head_is_raised_there_when_it_persists(kind):
    changes, alike, expected = CASES[kind]
    bad = make({(5, 4): changes}, {(5, 4): alike} if alike else None)
    places, alerts = feed([make(), *[bad] * 3])
    assert places == expected
    shown = {a.kind: a for a in alerts}[kind]
    assert f"layer 5 head 4: {shown.places[0].value:.3g}" in str(shown)
    assert shown.advice in shown.to_markdown()
    assert feed([make(), bad, bad, make(), bad, bad])[0] == set()
    # As it was at the first measurement, as healthy sharp heads are.
    assert feed([bad] * 6)[0] == set()


def test_a_new_models_heads_disperse_when_they_were_sharper_for_a_while():
    even = {"entropy": 5.5, "entropy_without_sink": 5.5}
    new, trained = make({(layer, head): even for layer in LAYERS for head in HEADS}), make()
    again = make({(5, 4): even})
    assert feed([new, new, *[trained] * 3, *[again] * 3])[0] == {("dispersion", 5, 4)}
    assert feed([new, new, *[trained] * 2, *[again] * 3])[0] == set()


def test_saturation_is_of_a_layer():
    few = {"max_weight_without_sink": lambda n: 0.99 if n > 350 else 0.3}
    contexts = [256] * 13 + [360] * 3  # 19 % of the rows

    def sample(heads):
        return make({(2, head): few for head in heads}, contexts=contexts)

    assert feed([sample(()), *[sample(HEADS)] * 4])[0] == set()
    contexts[0] = 360
    assert feed([sample(()), *[sample((1,))] * 4])[0] == set()  # one head alone
    assert feed([sample(()), *[sample(HEADS)] * 4])[0] == {("saturation", 2, None)}


def test_a_layer_whose_gammas_near_one_is_warned_of():
    near = {"logit_std": 3.3, "entropy": 0.4}  # 0.98 by sigma, 0.93 by entropy
    assert feed([make(), *[make({(5, 4): near})] * 4])[0] == set()
    sample = make({(5, head): near for head in HEADS})
    places, (alert,) = feed([make(), *[sample] * 4])
    assert places == {("near_collapse", 5, None)}
    assert alert.places[0].value == pytest.approx(1 - 0.4 / math.log(256), abs=1e-4)
    assert feed([sample] * 5)[0] == set()


def test_outputs_of_heads_parked_on_the_sink_may_be_alike_but_not_a_whole_layers():
    parked = {"sink_mass": 0.99}

    def sample(heads):
        places = [(2, head) for head in heads]
        return make(dict.fromkeys(places, parked), dict.fromkeys(places, (0.01, 0.99)))

    assert feed([make(), *[sample((1, 4))] * 4])[0] == set()
    assert feed([make(), *[sample(HEADS)] * 4])[0] == {("rank_loss", 2, head) for head in HEADS}


def test_where_the_gammas_disagree_the_entropy_is_trusted():
    wide = {"logit_std": 5.0}  # gamma 2.25 by sigma, 0.46 by the entropy
    assert feed([make(), *[make({(2, 1): wide})] * 4])[0] == set()
    _, alerts = feed([make(), *[make({(2, 1): SHARP})] * 3])
    (alert,) = (a for a in alerts if a.kind == "concentration")
    assert "gamma is 0.20 by sigma and 0.98 by entropy" in alert.what
    assert "trust the entropy" in alert.what
    _, alerts = feed([make(), *[make({(2, 1): {**SHARP, "logit_std": 3.3}})] * 3])
    (alert,) = (a for a in alerts if a.kind == "concentration")
    assert "trust" not in alert.what


def test_a_logit_range_that_cannot_hold_the_mass_is_told_by_layer():
    # 64 of 256 keys miss no more than .05 only if logits span ln 3 + ln 19 = 4.04 nats.
    tight = {"logit_range": 4.0}
    assert feed([make(dict.fromkeys([(2, 1), (2, 4)], tight))] * 4)[0] == set()
    sample = make({(2, head): tight for head in HEADS})
    places, (alert,) = feed([sample] * 4)
    assert places == {("infeasible_range", 2, None)}
    assert alert.places[0].value == pytest.approx(4.0 - math.log(3 * 19), abs=1e-4)
    rising = [make({(2, h): {"logit_range": x} for h in HEADS}) for x in (3.2, 3.4, 3.6, 3.8)]
    assert feed(rising)[0] == set()  # a young model
    loose = CollapseMonitor(patience=3, limits=CollapseLimits(missed_mass=0.1))
    assert feed([sample] * 4, loose)[0] == set()
    assert feed([make({(2, h): {"logit_range": 0.1} for h in HEADS}, budget=256)] * 4)[0] == set()


def test_a_layer_without_numbers_is_no_alert():
    nan = dict.fromkeys(HEALTHY, math.nan)
    diverged = make({(2, head): nan for head in HEADS})
    assert feed([make(), *[diverged] * 5])[0] == set()


VARIED = [64, 100, 128, 200, 255, 300] + [2048, 3000, 3500, 4000] * 2


@pytest.mark.parametrize("failure", ["concentration", "dispersion"])
def test_a_collapse_of_the_longest_rows_alone_is_one_of_length(failure):
    name = "entropy_without_sink" if failure == "concentration" else "entropy"
    end = 0.1 if failure == "concentration" else 8.2
    at_length = {name: lambda n: end if n >= 2048 else 2.8}
    good, bad = make(contexts=VARIED), make({(2, 6): at_length}, contexts=VARIED)
    places, (alert,) = feed([good, *[bad] * 3])
    assert places == {("long_context_collapse", 2, 6)}
    assert f"{failure} of the longest rows" in alert.what
    assert feed([bad] * 5)[0] == set()  # from the first measurement


def test_a_few_rows_that_are_longer_than_the_rest_hide_no_collapse_of_length():
    at_length = {"entropy_without_sink": lambda n: 0.1 if n >= 2048 else 2.8}
    # The last row of a document of 4096 tokens, and three of a longer one.
    rare = [*VARIED[:-4], 4096, 5000, 6000, 9000]
    samples = [make(contexts=rare), *[make({(2, 6): at_length}, contexts=VARIED)] * 3]
    assert feed(samples)[0] == {("long_context_collapse", 2, 6)}
    exact = [*VARIED[:-4], *[4096] * 4]
    samples = [make(contexts=exact), *[make({(2, 6): at_length}, contexts=VARIED)] * 3]
    assert feed(samples)[0] == {("long_context_collapse", 2, 6)}


def test_a_collapse_that_begins_with_longer_contexts_is_one_of_length():
    short, long = [512 + 8 * i for i in range(16)], [1024 + 64 * i for i in range(16)]
    before, after = make(contexts=short), make({(2, 6): SHARP}, contexts=long)
    places, _ = feed([before, before, *[after] * 3])
    assert ("long_context_collapse", 2, 6) in places
    # It began before the contexts grew, or some time after.
    early = make({(2, 6): SHARP}, contexts=short)
    for samples in ([before, early, *[after] * 5], [before, make(contexts=long), *[after] * 5]):
        places, _ = feed(samples)
        assert ("concentration", 2, 6) in places
        assert ("long_context_collapse", 2, 6) not in places


def test_a_resumed_monitor_goes_on_where_it_was(tmp_path):
    at_length = {"entropy_without_sink": lambda n: 0.1 if n >= 2048 else 2.8}
    good = make(contexts=VARIED)
    bad = make({(2, 6): at_length, (5, 1): {"logit_max": 70.0}}, contexts=VARIED)
    whole = CollapseMonitor(patience=3)
    expected, _ = feed([good, bad, bad, bad, bad], whole)
    assert len(expected) == 2
    parts, found = CollapseMonitor(patience=3), []
    for sample in (good, bad, bad, bad, bad):
        found += sorted(feed([sample], parts)[0])
        torch.save(parts.state_dict(), tmp_path / "state")
        parts = CollapseMonitor(patience=3)
        parts.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    assert found == sorted(expected)  # each once
    torch.testing.assert_close(whole._average.take(), parts._average.take(), rtol=0, atol=0)


def test_a_run_resumed_with_other_heads_begins_anew_for_them():
    before = CollapseMonitor(patience=2)
    feed([make(), make({(5, 4): {"logit_max": 70.0}})], before)
    after = CollapseMonitor(patience=2, heads=[4, 6])
    after.load_state_dict(before.state_dict())

    def chosen(changes=None):
        sample = make(changes)
        rows = {
            layer: RowStatistics(s.context, **{name: getattr(s, name)[:, 1:] for name in HEALTHY})
            for layer, s in sample.layers.items()
        }
        similarity = {layer: pair[:, 1:] for layer, pair in sample.similarity.items()}
        return Sample(rows, similarity, (4, 6), sample.budgets)

    bad = chosen({(5, 6): {"logit_max": 70.0}})
    assert feed([chosen(), bad, bad], after)[0] == {("large_logits", 5, 6)}
    assert after._average.take()["logit_max"].shape == (2, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limits": {"concentration": 0.0}}, "limits.concentration must be above 0 and below 1"),
        ({"limits": {"dispersion": 1.0}}, "limits.dispersion must be above 0 and below 1, got 1.0"),
        ({"limits": {"large_logit": -1.0}}, "limits.large_logit must be above 0, got -1.0"),
        ({"patience": 0}, "CollapseMonitor patience must be >= 1, got 0"),
        ({"rows": 0}, "CollapseMonitor rows must be >= 1"),
        ({"on_alert": "nothing"}, "on_alert must be 'warn', 'stop' or a callable"),
    ],
)
def test_bad_options_are_named(options, message):
    def build(limits=None, **others):
        return CollapseMonitor(limits=CollapseLimits(**limits or {}), **others)

    with pytest.raises(ValueError, match=message):
        build(**options)


def test_limits_are_not_a_mapping():
    with pytest.raises(
        ValueError, match=r"limits must be CollapseLimits\(...\), got {'dispersion'"
    ):
        CollapseMonitor(limits={"dispersion": 0.9})


def test_all_fields_of_a_row_are_in_these_samples():
    assert {f.name for f in dataclasses.fields(RowStatistics)} == {"context", *HEALTHY}


# -- in a run --


class Tiny(LightningModule):
    """Three micro-batches a step; from `bad_step` on a head's queries are scaled by `factor`."""

    def __init__(self, architecture, factor=1.0, bad_step=2, scale=1.0):
        super().__init__()
        torch.manual_seed(0)
        self.model = sparsify(build_model(architecture=architecture), BUDGET, block=16, tile=16)
        self.factor, self.bad_step, self.scale = factor, bad_step, scale
        self.expected = []

    def on_train_batch_start(self, batch, batch_idx):
        if self.trainer.global_step == self.bad_step and self.factor != 1.0:
            self.bad_step = None
            query = attention_layers(self.model)[1][1].q_proj.weight
            query.data[2 * 8 : 3 * 8] *= self.factor  # head 2 of layer 1

    def training_step(self, batch, batch_idx):
        return self.model(batch, labels=batch).loss * self.scale

    def on_before_optimizer_step(self, optimizer):
        layers = [module for _, module in attention_layers(self.model)]
        self.expected.append([float(m.q_proj.weight.grad.double().norm()) for m in layers])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-3)


def run(architecture, tmp_path, monitor, batches=9, **options):
    """Train; tags and values of what was logged."""
    generator = torch.Generator().manual_seed(1)
    tokens = [torch.randint(257, (1, 128), generator=generator) for _ in range(batches)]
    module = Tiny(architecture, **options)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        accumulate_grad_batches=3,
        gradient_clip_val=1e-3,
        callbacks=[monitor],
        logger=TensorBoardLogger(tmp_path, version=""),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )
    trainer.fit(module, torch.utils.data.DataLoader(tokens, batch_size=None))
    return module, trainer, EventAccumulator(trainer.log_dir, {"tensors": 0}).Reload()


def _monitor(**options):
    return CollapseMonitor(every_n_steps=1, rows=16, min_context=32, patience=2, **options)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_head_whose_logits_explode_is_found_in_a_run(architecture, tmp_path):
    architecture["initializer_range"] = 0.3
    _, trainer, events = run(architecture, tmp_path, _monitor(on_alert="stop"), 15, factor=300.0)
    assert trainer.global_step == 4  # two healthy steps, two measurements past the limit
    tags = events.Tags()
    text = events.Tensors("alerts/exploding_logits/text_summary")[0].tensor_proto.string_val[0]
    rows = [line for line in text.decode().splitlines() if line.startswith("| 1 |")]
    assert [row.split("|")[2].strip() for row in rows] == ["2"]
    assert "| 0 |" not in text.decode()
    assert "QK-clip" in text.decode()
    assert {"collapse_rows/entropy_ratio", "collapse_rows/logit_max"} <= set(tags["histograms"])
    assert "collapse/by_layer_and_head" in tags["images"]


def test_a_healthy_run_raises_nothing_and_logs_all(architecture, tmp_path, recwarn):
    architecture["initializer_range"] = 0.3
    module, _, events = run(architecture, tmp_path, _monitor(), scale=7.0)
    assert not [w for w in recwarn if "lit-sparse" in str(w.message)]
    tags = events.Tags()
    assert not [tag for tag in tags["tensors"] if tag.startswith("alerts/")]
    for name in ("entropy_ratio", "cosine", "participation", "range_margin"):
        expected = {f"collapse/{name}", *(f"collapse_spread/{name}_p{p}" for p in (5, 95))}
        assert expected <= set(tags["scalars"]), name
    # The gradients of the whole step, before clipping.
    logged = [
        [event.value for event in events.Scalars(f"collapse_by_layer/query_grad_norm_{layer:02d}")]
        for layer in range(2)
    ]
    whole = [event.value for event in events.Scalars("collapse/query_grad_norm")]
    assert len(module.expected) == 3
    torch.testing.assert_close(
        torch.tensor(logged).T, torch.tensor(module.expected), rtol=1e-4, atol=0.0
    )
    norms = torch.tensor(module.expected).norm(dim=1)
    torch.testing.assert_close(torch.tensor(whole), norms, rtol=1e-4, atol=0.0)


def test_gradients_that_are_not_whole_are_said_once_and_not_logged(architecture):
    strategy = FSDPStrategy.__new__(FSDPStrategy)
    trainer = SimpleNamespace(strategy=strategy, global_step=0)
    module, monitor = Tiny(architecture), _monitor()
    with pytest.warns(UserWarning, match="no whole gradients .* sharded by FSDPStrategy"):
        monitor.on_before_optimizer_step(trainer, module, None)  # logging would raise
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monitor.on_before_optimizer_step(trainer, module, None)
        # Those that FiniteGuard has thrown away are none, but not for being sharded.
        trainer.strategy = None
        _monitor().on_before_optimizer_step(trainer, module, None)
