"""The memory that `lit-sparse estimate` finds, against real models, training and engines."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parent))
from small_config import ARCHITECTURE, estimate, keys, settings, write

from lit_sparse.attention import select
from lit_sparse.attention.plan import make_plan
from lit_sparse.budget import Budget
from lit_sparse.models import sparsify
from lit_sparse.recipes.estimate.kinds import Keeps
from lit_sparse.recipes.estimate.live import LiveBytes
from lit_sparse.recipes.estimate.memory import cache_bytes
from lit_sparse.recipes.estimate.model import Model, read_model
from lit_sparse.recipes.estimate.sharding import Sharding, Zero, states
from lit_sparse.recipes.estimate.sizing import Sizing
from lit_sparse.recipes.estimate.step import Recipe, decoder_bytes

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """The path of a small config."""
    return write(tmp_path_factory.mktemp("estimate"))


def test_live_bytes_counts_storages_once_and_until_they_are_freed():
    with LiveBytes("x") as live:
        x = torch.ones(1000)
        part = x[::2]
        with live.named("y"):
            y = torch.ones(10)
        assert live.now == {"x": 4000, "y": 40}
        del x, y
        assert live.now == {"x": 4000, "y": 0}
        del part
        assert live.now.total() == 0
    assert live.peak == {"x": 4000, "y": 40}


def _sized(parameters, trained=None, largest=0):
    """A model of which no more is known."""
    nothing = dict.fromkeys(("config", "matrices", "trained_matrices", "head", "mlp"), 0)
    trained = parameters if trained is None else trained
    return Model(
        **nothing, parameters=parameters, trained=trained, trains_head=True, largest=largest
    )


def test_sharded_states_are_those_of_the_zero_paper():
    """arXiv 1910.02054, figure 1: 7.5 billion parameters on 64 GPUs."""
    model = _sized(7_500_000_000)
    gigabytes = []
    for stage in (0, 1, 2, 3):
        found = states(Sharding(64, stage), model, 2, False, Zero())
        gigabytes.append((found.weights + found.gradients + found.optimizer) / 1e9)
    assert gigabytes == pytest.approx([120, 31.4, 16.6, 1.9], abs=0.05)


def test_lists_are_as_large_as_real_ones(config):
    given = settings(config)
    plan = given.plan(1024, Keeps(given.law.budget))
    found = decoder_bytes(given.model, given.recipe(Sharding(1, 0)), plan, 1)
    q, k = torch.randn(1024, 4, 16), torch.randn(1024, 2, 16)
    selection = select(q, k, given.law.budget, block=16, tile=16)
    assert found.layer["selection"] == selection.columns.nbytes + selection.entry.nbytes


KINDS = ["llama", "mistral", "qwen2", "qwen3"]
OTHERS = ["gemma2", "gemma3_text", "phi3", "gpt_oss", "qwen3_moe", "mixtral"]


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [*product(KINDS, (torch.float32, torch.bfloat16)), *product(OTHERS, (torch.bfloat16,))],
)
def test_what_a_real_forward_keeps(kind, dtype):
    model, budget = read_model(None, keys(kind)), Budget(4, 0.5, floor=64, sink=16)
    assert len(model.windows) == 3
    expected = 0
    for i, window in enumerate(model.windows):
        plan = make_plan((0, 600, 1024), (0, 600, 1024), budget, 16, 16, window)
        found = decoder_bytes(model, Recipe(dtype), plan, 1)
        expected += found.layer.total() + (found.once.total() if i == 0 else 0)
    real = AutoModelForCausalLM.from_config(model.config, dtype=dtype)
    sparsify(real, budget, block=16, tile=16)
    positions = torch.cat([torch.arange(600), torch.arange(424)])[None]
    with LiveBytes() as live:
        ids = torch.zeros_like(positions)
        hidden = real.base_model(input_ids=ids, position_ids=positions, use_cache=False)
    assert expected == pytest.approx(live.now.total(), rel=0.01)
    del hidden


def test_the_cache_is_as_large_as_a_real_one():
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**ARCHITECTURE))
    with torch.no_grad():
        cache = model(torch.zeros(1, 100, dtype=torch.int64), use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert cache_bytes(read_model(None, ARCHITECTURE), 4, 100) == held


def _fit(config, *arguments):
    """Arguments of a short fit, and of the estimate of it."""
    return [
        *("--config", str(config), "--trainer.max_steps", "2", "--trainer.limit_val_batches", "0"),
        *("--trainer.accelerator", "cpu", "--trainer.devices", "1"),
        *("--trainer.precision", "32-true", "--data.rows_per_step", "1"),
        *("--run.root", str(config.parent / "runs"), "--run.overwrite", "true"),
        *("--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"),
        *arguments,
    ]


def _measure(runs):
    """What a fresh process measures of real training."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(HERE / "measured_fit.py"), json.dumps(runs)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def _own(config, run):
    """The estimate of one process of a fit."""
    return estimate(config, *run[2:])[1]["own"]


def test_bytes_of_real_training(config, corpus, tmp_path):
    stages = "[{length: 2048, steps: 3}]"
    longer = ["--curriculum.stages", stages, "--data.row_tokens", "2048", "--data.path", corpus]
    runs = [
        _fit(config, *map(str, longer), "--run.name", kind, "--model.activations", kind)
        for kind in ("keep", "recompute")
    ]
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**ARCHITECTURE)).save_pretrained(
        tmp_path / "model"
    )
    adapters = ["--model.pretrained", str(tmp_path / "model"), "--data.tokenizer", "bytes"]
    adapters += ["--model.lora.rank", "4", "--model.lora.train_norms", "true"]
    runs.append(_fit(config, *map(str, longer), "--run.name", "lora", *adapters))
    for run, measured in zip(runs, _measure(runs), strict=True):
        found = _own(config, run)
        for part in ("weights", "gradients", "optimizer"):
            assert found["states"][part] == measured[part]
        (row,) = found["rows"]
        assert row["kept"] == pytest.approx(measured["kept"], rel=0.02)
        # The operator of the CPU works with other buffers.
        assert row["peak"] == pytest.approx(measured["peak"], rel=0.1)


def test_ranks_of_a_sequence_share_its_activations(config):
    sizing = Sizing(settings(config))
    whole, half = (sizing.memory(Sharding(2, 1, n)) for n in (1, 2))
    for stage in range(2):
        ratio = half.rows[stage].kept / whole.rows[stage].kept
        assert 0.5 < ratio < 0.6  # what attention exchanges exists twice


def test_offloaded_activations_wait_in_cpu_memory(config):
    given = settings(config, "--model.activations", "recompute")
    sharding = Sharding(1, 2)
    gpu, cpu = (
        Sizing(replace(given, activations=kind)).memory(sharding)
        for kind in ("recompute", "offload")
    )
    layer_input = 1024 * 64 * 2
    assert cpu.row.cpu == 3 * layer_input
    assert gpu.row.kept - cpu.row.kept == 2 * layer_input


# -- slow: larger, and sharded --


@pytest.mark.slow
def test_bytes_of_a_large_row(config, tmp_path):
    """A gigabyte of activations, as the system sees them."""
    for i in range(8):
        lines = [f"def value_{j}(x):\n    return x + {i * j}\n\n" for j in range(3000)]
        (tmp_path / f"{i}.py").write_text("".join(lines))
    large = {
        "--curriculum.stages": "[{length: 16384, steps: 3}]",
        "--data.row_tokens": 16384,
        "--data.path": tmp_path,
        "--model.architecture.hidden_size": 256,
        "--model.architecture.intermediate_size": 1024,
        "--model.architecture.vocab_size": 4000,
    }
    run = _fit(config, *(str(x) for pair in large.items() for x in pair))
    (measured,), found = _measure([run]), _own(config, run)
    kept = found["rows"][0]["kept"]
    assert kept > 2**30
    assert kept == pytest.approx(measured["kept"], rel=0.01)
    assert kept == pytest.approx(measured["kept_resident"], rel=0.1)


@pytest.mark.slow
def test_states_of_real_deepspeed_engines():
    pytest.importorskip("deepspeed")
    keys = ("stage", "half", "accumulate", "offload_optimizer", "offload_parameters")
    every = product((0, 1, 2, 3), (False, True), (1, 2), (None, "cpu"), (None, "cpu"))
    cases = [
        dict(zip(keys, case, strict=True))
        for case in every
        if (case[0] or not case[3]) and (case[0] == 3 or not case[4])
    ]
    whole = [case for case in cases if case["half"] and not case["offload_optimizer"]]
    cases += [{**case, "frozen": True} for case in whole]
    script = HERE / "zero_engines.py"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), json.dumps(cases)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    measured = json.loads(done.stdout.splitlines()[-1])
    for case, peak in zip(cases, measured["peaks"], strict=True):
        itemsize = 2 if case["half"] else 4
        sharding = Sharding(2, case["stage"], 1, *(case[key] for key in keys[3:]))
        trained = measured["parameters"] // (2 if case.get("frozen") else 1)
        model = _sized(measured["parameters"], trained, measured["largest"])
        found = states(sharding, model, itemsize, case["accumulate"] > 1, Zero.of(measured["zero"]))
        expected = found.weights + found.gradients + found.optimizer + found.buffers + found.cpu
        # Where the activations are gone before the step, gradients are there in another form too.
        if case["stage"] == 0:
            expected += itemsize * model.trained
        if case["stage"] == 1 and not case["offload_optimizer"]:
            expected += itemsize * model.trained / 2 - found.buffers
        assert expected == pytest.approx(peak, rel=0.06), case
