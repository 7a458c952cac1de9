import pytest
import torch

from lit_sparse import Budget, sparsify
from lit_sparse.attention import select, sparse_attention
from lit_sparse.attention.probe import SINK_TOKENS, probe_rows, sample_rows
from lit_sparse.callbacks import DenseGapMonitor
from lit_sparse.callbacks.dense_gap import _compare, _targets
from lit_sparse.callbacks.heatmap import heat_maps
from lit_sparse.callbacks.sampled import Average
from lit_sparse.models import build_model, dense_attention

BUDGET = Budget(alpha=1, exponent=0.5, floor=32, sink=8)


@pytest.fixture
def packed():
    torch.manual_seed(0)
    q, k, v = torch.randn(300, 4, 16) * 3, torch.randn(300, 2, 16), torch.randn(300, 2, 16)
    cu = (0, 90, 90, 300)
    return q, k, v, cu, select(q, k, BUDGET, cu, block=16, tile=16)


def test_probe_equals_what_the_operator_gives(packed):
    q, k, v, cu, selection = packed
    out, lse = sparse_attention(q, k, v, selection)
    dense_out, dense_lse = sparse_attention(q, k, v, select(q, k, Budget.dense(), cu))
    rows = torch.tensor([0, 5, 89, 90, 91, 200, 299])
    probed = probe_rows(q, k, v, selection, rows)
    torch.testing.assert_close(probed.captured_mass, (lse - dense_lse).exp()[rows])
    error = (out - dense_out).norm(dim=-1) / dense_out.norm(dim=-1)
    torch.testing.assert_close(probed.output_error, error[rows], atol=1e-5, rtol=1e-4)
    assert probed.context.tolist() == [1, 6, 90, 1, 2, 111, 210]


def test_probe_equals_a_row_by_hand(packed):
    q, k, v, _, selection = packed
    row, head = 250, 3
    logits = (k[90 : row + 1, head // 2] @ q[row, head]) / 4
    p = logits.softmax(0)
    probed = probe_rows(q, k, v, selection, torch.tensor([row]))
    entropy = float(-(p * p.log()).sum())
    rest = p[SINK_TOKENS:] / p[SINK_TOKENS:].sum()
    for name, value in {
        "entropy": entropy,
        "entropy_ratio": entropy / float(torch.tensor(161.0).log()),
        "effective_support": torch.tensor(entropy).exp(),
        "max_weight": p.max(),
        "max_weight_without_sink": rest.max(),
        "sink_mass": p[:SINK_TOKENS].sum(),
        "logit_std": logits.std(correction=0),
        "logit_max": logits.abs().max(),
        "gamma": logits.var(correction=0) / (2 * torch.tensor(161.0).log()),
    }.items():
        assert float(getattr(probed, name)[0, head]) == pytest.approx(float(value), rel=1e-4), name


def test_sampled_rows_see_enough_and_do_not_repeat(packed):
    plan = packed[-1].plan
    rows = sample_rows(plan, 50, torch.Generator().manual_seed(0), min_context=64)
    assert len(rows.unique()) == 50
    positions = torch.where(rows < 90, rows, rows - 90)
    assert (positions + 1 >= 64).all()
    assert sample_rows(plan, 1000, min_context=1).tolist() == list(range(300))
    assert len(sample_rows(plan, 5, min_context=1000)) == 0


def test_gap_is_the_kl_of_the_two_models(architecture):
    torch.manual_seed(0)
    model = sparsify(build_model(architecture=architecture), BUDGET, block=16, tile=16)
    for parameter in model.parameters():
        parameter.data *= 3
    ids = torch.randint(257, (1, 256))
    positions = torch.cat([torch.arange(100), torch.arange(156)])[None]

    def run():
        return model.model(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state

    with torch.no_grad():
        sparse = run()
        with dense_attention(model):
            dense = run()
        targets, real = _targets(ids, {"position_ids": positions}, sparse)
        sums = _compare(sparse, dense, model.lm_head, targets, real, chunk=100)
        ours, theirs = (model.lm_head(x)[0].log_softmax(-1) for x in (sparse, dense))
    assert targets[99] == -100
    assert targets[255] == -100
    assert sums[3] == 256
    assert sums[4] == 254
    kl = torch.nn.functional.kl_div(ours, theirs, log_target=True, reduction="sum")
    assert kl > 1e-3
    assert float(sums[0]) == pytest.approx(float(kl), rel=1e-4)
    kept = targets >= 0
    loss = -ours[kept].gather(1, targets[kept][:, None]).sum()
    assert float(sums[1]) == pytest.approx(float(loss), rel=1e-5)


def test_average_forgets_after_it_was_taken():
    average = Average()
    average.add({"a": torch.ones(2, 2)})
    average.add({"a": 3 * torch.ones(2, 2)})
    assert (average.take()["a"] == 2).all()
    assert average.take() == {}


@pytest.mark.parametrize("monitor", [DenseGapMonitor])
@pytest.mark.parametrize("option", ["every_n_steps", "rows", "min_context"])
def test_bad_options_are_named(monitor, option):
    with pytest.raises(ValueError, match=f"{monitor.__name__} {option} must be >= 1"):
        monitor(**{option: 0})


def test_heat_maps_draw_every_panel_with_its_limits():
    panels = {name: torch.rand(3, 4) for name in ("a", "b", "c", "d")}
    figure = heat_maps(panels, "title", {"a": (0.0, 1.0)})
    drawn = {axis.get_title(): axis for axis in figure.axes if axis.get_title()}
    assert set(drawn) == set(panels)
    assert drawn["a"].images[0].get_clim() == (0.0, 1.0)
    assert len(drawn["b"].texts) == 12
