import pytest
import torch
from pytorch_lightning import Trainer

from lit_sparse.callbacks import CollapseMonitor
from lit_sparse.callbacks.heatmap import heat_maps


def _judge(monitor, entropies, logit=1.0):
    trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    for entropy in entropies:
        values = {"entropy": torch.full((1, 2), entropy), "logit": torch.full((1, 2), logit)}
        values["entropy"][0, 1] = 0.5
        monitor._judge(trainer, [3], values)


def test_concentration_alerts_once_when_it_persists():
    monitor = CollapseMonitor(patience=3)
    with pytest.warns(UserWarning, match=r"concentration .*layer 3 head 0: .*learning rate"):
        _judge(monitor, [0.5, *[0.01] * 12])
    assert monitor._alerted == {("concentration", 3, 0)}


def test_dispersion_is_told_apart():
    monitor = CollapseMonitor(patience=2)
    with pytest.warns(UserWarning, match=r"dispersion .*alpha"):
        _judge(monitor, [0.6, *[0.99] * 12])


@pytest.mark.parametrize("entropies", [[0.01] * 12, [0.5, 0.01, 0.5, 0.5, 0.5], [0.5] * 8])
def test_a_head_that_was_always_sharp_or_only_once_does_not_alert(entropies, recwarn):
    monitor = CollapseMonitor(patience=3)
    _judge(monitor, entropies)
    assert monitor._alerted == set()


def test_large_logits_alert():
    monitor = CollapseMonitor(patience=1)
    trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    flat = torch.full((1, 1), 0.5)
    monitor._judge(trainer, [0], {"entropy": flat, "logit": torch.full((1, 1), 10.0)})
    with pytest.warns(UserWarning, match="large logits"):
        monitor._judge(trainer, [0], {"entropy": flat, "logit": torch.full((1, 1), 80.0)})


def test_monitor_state_survives_a_checkpoint():
    monitor = CollapseMonitor(patience=1)
    with pytest.warns(UserWarning, match="concentration"):
        _judge(monitor, [0.5, 0.01])
    other = CollapseMonitor(patience=1)
    other.load_state_dict(monitor.state_dict())
    _judge(other, [0.01])  # known already: no second warning
    assert other._alerted == monitor._alerted


def test_heat_maps_draw_every_panel_with_its_limits():
    panels = {name: torch.rand(3, 4) for name in ("a", "b", "c", "d")}
    figure = heat_maps(panels, "title", {"a": (0.0, 1.0)})
    drawn = {axis.get_title(): axis for axis in figure.axes if axis.get_title()}
    assert set(drawn) == set(panels)
    assert drawn["a"].images[0].get_clim() == (0.0, 1.0)
    assert len(drawn["b"].texts) == 12
