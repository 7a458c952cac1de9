"""Windows, soft caps and sinks where ranks share a row, each with the sinks of its own heads; and
weights that are loaded in shards.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    out = tmp_path_factory.mktemp("families") / "found.pt"
    command = [sys.executable, str(Path(__file__).with_name("family_ranks.py")), str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    return torch.load(out)


@pytest.mark.parametrize("kind", ["gemma2", "gpt_oss"])
def test_loss_and_gradients_are_those_of_one_process(found, kind):
    alone, shared = found["rows", kind].values()
    assert alone.keys() == shared.keys()
    assert ("model.layers.0.self_attn.sinks" in alone) == (kind == "gpt_oss")
    for name, expected in alone.items():
        assert expected.norm() > 0, name
        error = (shared[name] - expected).norm() / expected.norm()
        assert error < 1e-5, f"{name}: {error}"


@pytest.mark.parametrize("kind", ["gemma3_text", "gpt_oss"])
def test_weights_and_buffers_that_are_loaded_in_shards(found, kind):
    saved, loaded = found["weights", kind].values()
    assert saved.keys() == loaded.keys()
    for name, value in saved.items():
        assert torch.equal(value, loaded[name]), name
