"""The study of depth: its measurements against brute force, its verdicts where they are known."""

import csv
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from lit_sparse import theory
from lit_sparse.attention.options import Options
from lit_sparse.calibration import Needs
from lit_sparse.models import build_model
from lit_sparse.recipes.study import main
from lit_sparse.recipes.study.findings import Outcome
from lit_sparse.recipes.study.layers import lengths
from lit_sparse.recipes.study.layers.depth import change_over_depth, fit, gaussian_needs
from lit_sparse.recipes.study.layers.measure import (
    LOCAL,
    MISSED,
    SINK,
    VIEWS,
    Measured,
    part_masses,
    without,
)
from lit_sparse.recipes.study.layers.verdicts import _every_layer, _one_exponent, _power_law

TOKENS, HEADS = 60, 4


def _dense(seed=0):
    """q, k, logits [H, T, T] with the future left out, and their log-sum-exps [T, H]."""
    drawn = torch.Generator().manual_seed(seed)
    q = 3 * torch.randn(TOKENS, HEADS, 8, generator=drawn)
    k = torch.randn(TOKENS, 2, 8, generator=drawn)
    logits = torch.einsum("ihd,jhd->hij", q, k.repeat_interleave(2, 1)) * 8**-0.5
    future = torch.ones(TOKENS, TOKENS).triu(1).bool()
    logits = logits.masked_fill(future, -torch.inf)
    return q, k, logits, logits.logsumexp(-1).T


def test_keys_of_a_view_are_counted_without_what_is_left_out():
    q, k, logits, _ = _dense()
    rows, options = torch.tensor([40, 59]), Options(8**-0.5)
    for sink, local in VIEWS.values():
        found = without(q, k, rows, sink, local, 0.1, options)
        for at, row in enumerate(rows.tolist()):
            own = logits[:, row, sink : row + 1 - local].softmax(-1)
            assert found.context[at] == own.shape[1]
            mass = own.sort(-1, descending=True).values.cumsum(-1)
            assert torch.equal(found.keys[at], (1 + (mass < 0.9 - 1e-6).sum(-1)).float())


def test_masses_of_sink_and_nearest_are_those_of_the_softmax():
    q, k, logits, lse = _dense()
    rows = torch.tensor([30, 59])
    sink, local = part_masses(q, k, lse, rows, Options(8**-0.5))
    for at, row in enumerate(rows.tolist()):
        p = logits[:, row, : row + 1].softmax(-1)
        torch.testing.assert_close(sink[at], p[:, :SINK].sum(-1))
        torch.testing.assert_close(local[at], p[:, -LOCAL:].sum(-1))


def _needs(keys, layers=2, heads=3, std=1.0):
    """24 documents of 4 lengths, whose rows need keys(n, layer) and one in ten of them less."""
    n = torch.tensor([64, 128, 256, 512]).repeat_interleave(6).repeat_interleave(4)
    drawn = torch.Generator().manual_seed(0)
    jitter = torch.rand(len(n), layers, heads, generator=drawn) * 0.1 + 0.95
    each = torch.stack([keys(n.double(), layer) for layer in range(layers)], 1)
    counted = (each[..., None] * jitter).round().clamp(min=1)
    return Needs(
        torch.arange(24).repeat_interleave(4), n, counted, counted, counted,
        torch.ones_like(counted), torch.full_like(counted, std), sink=0, local=0, block=1,
    )  # fmt: skip


def _depth(keys, layers=2):
    needs = _needs(keys, layers)
    every = {(view, missed): replace(needs, missed=missed) for view in VIEWS for missed in MISSED}
    nothing = torch.zeros_like(needs.keys)
    subject = SimpleNamespace(name="known", trained=True)
    measured = Measured(subject, "source", every, nothing, nothing, {}, needs.context)
    return fit(measured, samples=40, seed=0)


def test_a_root_of_the_context_at_every_depth_is_supported():
    depth = _depth(lambda n, layer: (layer + 4) * n**0.5)
    assert _every_layer([depth]).outcome == Outcome.SUPPORTED
    assert _one_exponent([depth], 0).outcome == Outcome.SUPPORTED
    assert _power_law([depth]).outcome == Outcome.SUPPORTED
    assert depth.main.raw_exponent.mean() == pytest.approx(0.5, abs=0.03)


def test_a_share_of_the_context_in_one_layer_is_not():
    depth = _depth(lambda n, layer: 0.4 * n if layer else 4 * n**0.5)
    assert _every_layer([depth]).outcome == Outcome.NOT_HERE
    assert _one_exponent([depth], 0).outcome == Outcome.NOT_HERE
    assert change_over_depth(depth.main.raw_exponent).mean == pytest.approx(0.5, abs=0.05)


def test_gaussian_rows_need_what_the_closed_form_says():
    needs = _needs(lambda n, layer: n, std=1.5)
    found = gaussian_needs(needs, seed=0)
    long = found.context == 512
    share = (found.keys[long] / 512).mean()
    assert share == pytest.approx(float(theory.gaussian_keys_fraction(1.5, 0.05)), abs=0.02)
    assert torch.equal(found.context, needs.context)


def test_change_over_depth_is_the_line_from_first_to_last():
    values = torch.tensor([[0.2, 0.4], [0.5, 0.5], [0.6, 0.8]])
    found = change_over_depth(values)
    assert found.mean == pytest.approx(0.4)
    assert 0.19 < found.low < found.mean < found.high < 0.61


def test_lengths_end_at_the_context():
    assert lengths(512) == [64, 96, 128, 192, 256, 384, 512]
    assert lengths(256, quick=True) == [64, 128, 256]
    assert max(lengths(131072)) == 4096


def test_a_model_of_a_short_context_is_refused(tmp_path, architecture, capsys):
    build_model(architecture={**architecture, "max_position_embeddings": 128}).save_pretrained(
        model := tmp_path / "short"
    )
    assert main(["layers", str(model), "--quick", "--work", str(tmp_path)]) == 2
    assert f"{model} has positions for 128 tokens" in capsys.readouterr().err


@pytest.mark.slow
def test_the_quick_form_says_that_random_weights_are_not_sparse(tmp_path, architecture):
    torch.manual_seed(0)
    model = tmp_path / "small"
    build_model(architecture=architecture).save_pretrained(model)
    out = tmp_path / "out"
    assert main(["layers", str(model), "--quick", "--out", str(out), "--work", str(tmp_path)]) == 0
    verdicts = json.loads((out / "verdicts.json").read_text())["verdicts"]
    by_claim = {verdict["claim"]: verdict["outcome"] for verdict in verdicts}
    (nature,) = (outcome for claim, outcome in by_claim.items() if "by nature" in claim)
    assert nature == Outcome.NOT_HERE
    for name in ("keys", "heads", "inputs"):
        assert (out / f"{name}.png").stat().st_size > 10_000
    rows = list(csv.DictReader((out / "layers.csv").open()))
    assert len(rows) == 3 * architecture["num_hidden_layers"]
    # Logits of small random weights are nearly equal: a row needs nearly all the keys.
    assert all(float(row["k/n longest"]) > 0.9 for row in rows)
    assert all(float(row["C"]) == pytest.approx(1, abs=0.05) for row in rows)
