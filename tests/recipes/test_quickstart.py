"""The whole quickstart, as `make quickstart` runs it."""

import math

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_sparse.cli import main


@pytest.mark.slow
def test_a_healthy_run_is_measured_and_raises_no_alert(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "--config", "quickstart"]) == 0
    events = EventAccumulator(str(tmp_path / "runs" / "quickstart"), size_guidance={"tensors": 0})
    tags = events.Reload().Tags()
    assert not [tag for kind in ("scalars", "tensors") for tag in tags[kind] if "alert" in tag]
    # Every rule had its say: there were more measurements than its patience, at every length.
    for tag in ("gap/output_error", "collapse/entropy_ratio_without_sink"):
        values = [point.value for point in events.Scalars(tag)]
        assert len(set(values)) == 16
        assert all(map(math.isfinite, values))
    assert len(events.Scalars("gap/kl")) == 4
    assert {"gap/by_layer_and_head", "collapse/by_layer_and_head", "curriculum/law"} <= set(
        tags["images"]
    )
