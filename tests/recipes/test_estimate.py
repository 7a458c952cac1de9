"""`lit-sparse estimate`, held against real models, real training and real DeepSpeed engines."""

import contextlib
import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from lit_sparse.attention import select, sparse_attention
from lit_sparse.models import sparsify
from lit_sparse.recipes.estimate import main
from lit_sparse.recipes.estimate.live import LiveBytes
from lit_sparse.recipes.estimate.memory import cache_bytes
from lit_sparse.recipes.estimate.model import Model, read_model
from lit_sparse.recipes.estimate.settings import read_settings
from lit_sparse.recipes.estimate.sharding import Sharding, Zero, states
from lit_sparse.recipes.estimate.sizing import Sizing, stage_work
from lit_sparse.recipes.estimate.step import decoder_bytes
from lit_sparse.training import SparseLM

HERE = Path(__file__).parent
ARCHITECTURE = {
    "model_type": "llama",
    "vocab_size": 257,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 65536,
    "bos_token_id": None,
    "eos_token_id": 256,
}
CONFIG = {
    "model": {"architecture": ARCHITECTURE, "loss_chunk": 256},
    "sparse_attention": {
        "budget": {"alpha": 4.0, "exponent": 0.5, "floor": 64, "sink": 16},
        "block": 16,
        "tile": 16,
    },
    "curriculum": {
        "stages": [
            {"length": 256, "steps": 10, "attention": "dense"},
            {"length": 1024, "steps": 20},
        ]
    },
    "data": {"row_tokens": 1024, "rows_per_step": 4},
    "trainer": {"precision": "bf16-true"},
}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """The path of a small config."""
    path = tmp_path_factory.mktemp("estimate") / "small.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    return path


@pytest.fixture(scope="module")
def report(config):
    return _estimate(config, "--gpus", "h100,l40s", "--devices", "4")


def _estimate(config, *arguments):
    """What is printed, and what is written."""
    out = config.parent / "out.json"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main(["--config", str(config), "--json", str(out), *arguments]) == 0
    return printed.getvalue(), json.loads(out.read_text())


def _settings(config, *arguments):
    return read_settings(["--config", str(config), *arguments], None)


# -- parameters and FLOPs --


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_parameters_are_those_of_the_built_model(kind, tied):
    keys = {**ARCHITECTURE, "model_type": kind, "tie_word_embeddings": tied}
    keys |= {"sliding_window": None} if kind == "mistral" else {}
    if kind == "qwen2":
        del keys["head_dim"]
    model = read_model(None, keys)
    keys.pop("model_type")
    built = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **keys))
    assert model.parameters == sum(p.numel() for p in built.parameters())
    assert model.matrices - model.mlp == 3 * 2 * (64 + 32) * 64  # q, k, v, o
    assert model.mlp == 3 * 3 * 64 * 192


def test_a_directory_needs_no_weights(tmp_path):
    AutoConfig.for_model(**ARCHITECTURE).save_pretrained(tmp_path)
    assert read_model(str(tmp_path), None) == read_model(str(tmp_path), None)
    assert read_model(str(tmp_path), None).parameters == read_model(None, ARCHITECTURE).parameters


def _batch(tokens):
    ids = torch.zeros(1, tokens, dtype=torch.int64)
    return {"input_ids": ids, "labels": ids, "position_ids": torch.arange(tokens)[None]}


@pytest.mark.parametrize("recompute", ["false", "true"])
def test_flops_of_products_are_those_of_a_real_step(config, recompute):
    settings = _settings(config, "--model.gradient_checkpointing", recompute)
    work = stage_work(settings, settings.curriculum.stages[1])
    module = SparseLM(
        architecture=ARCHITECTURE, gradient_checkpointing=recompute == "true", loss_chunk=256
    ).train()
    sparsify(module.model, settings.law.budget, block=16, tile=16)
    with FlopCounterMode(display=False) as counter:
        module.token_loss(_batch(1024))[0].backward()
    counts = counter.get_flop_counts()["Global"]
    products = counts[torch.ops.aten.mm] + counts.get(torch.ops.aten.addmm, 0)
    if recompute == "false":
        assert work.products == 20 * 4 * products
    else:  # but for the last product of each layer, which nothing needs again
        assert work.products == 20 * 4 * (products + 2 * 1024 * settings.model.mlp // 3)


def test_flops_of_attention_are_those_of_the_operator(config):
    settings = _settings(config)
    work = stage_work(settings, settings.curriculum.stages[1])
    q = torch.randn(1024, 4, 16, requires_grad=True)
    k, v = (torch.randn(1024, 2, 16, requires_grad=True) for _ in range(2))
    selection = select(q, k, settings.law.budget, block=16, tile=16)
    with FlopCounterMode(display=False) as counter:
        sparse_attention(q, k, v, selection)[0].sum().backward()
    assert work.attention == 20 * 4 * 3 * counter.get_total_flops()
    assert work.executed == pytest.approx(work.attention / work.dense_attention)
    assert work.executed > selection.density
    assert 0 < work.selection < work.attention


def test_the_plan_adds_up(report):
    printed, found = report
    dense, sparse = found["stages"]
    assert [stage["tokens"] for stage in found["stages"]] == [10 * 4096, 20 * 4096]
    assert dense["attention"] == dense["dense_attention"]
    assert dense["selection"] == 0
    assert dense["executed"] == 1 > sparse["executed"]
    total = sum(sparse[part] for part in ("products", "attention", "selection"))
    assert sparse["days"]["H100"] == pytest.approx(total / (4 * 989.4e12 * 0.4) / 86400)
    assert sparse["days"]["L40S"] > sparse["days"]["H100"]
    assert "small: llama, 181 k parameters" in printed
    assert "10 41 k" in " ".join(printed.split())


# -- memory --


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


def test_sharded_states_are_those_of_the_zero_paper():
    """arXiv 1910.02054, figure 1: 7.5 billion parameters on 64 GPUs."""
    model = Model(None, 7_500_000_000, 0, 0, 0, 0)
    gigabytes = []
    for stage in (0, 1, 2, 3):
        found = states(Sharding(64, stage), model, 2, False, Zero())
        gigabytes.append((found.weights + found.gradients + found.optimizer) / 1e9)
    assert gigabytes == pytest.approx([120, 31.4, 16.6, 1.9], abs=0.05)


def test_lists_are_as_large_as_real_ones(config):
    settings = _settings(config)
    plan = settings.plan(1024, settings.law.budget)
    found = decoder_bytes(settings.model, settings.recipe(Sharding(1, 0)), plan, 1)
    q, k = torch.randn(1024, 4, 16), torch.randn(1024, 2, 16)
    selection = select(q, k, settings.law.budget, block=16, tile=16)
    assert found.layer["selection"] == selection.columns.nbytes + selection.entry.nbytes


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
    return _estimate(config, *run[2:])[1]["own"]


def test_bytes_of_real_training(config, corpus):
    stages = "[{length: 2048, steps: 3}]"
    longer = ["--curriculum.stages", stages, "--data.row_tokens", "2048", "--data.path", corpus]
    runs = [
        _fit(config, *map(str, longer), "--run.name", mode, "--model.gradient_checkpointing", mode)
        for mode in ("false", "true")
    ]
    for run, measured in zip(runs, _measure(runs), strict=True):
        found = _own(config, run)
        for part in ("weights", "gradients", "optimizer"):
            assert found["states"][part] == measured[part]
        (row,) = found["rows"]
        assert row["kept"] == pytest.approx(measured["kept"], rel=0.02)
        # The operator of the CPU works with other buffers.
        assert row["peak"] == pytest.approx(measured["peak"], rel=0.1)


def test_ranks_of_a_sequence_share_its_activations(config):
    sizing = Sizing(_settings(config))
    whole, half = (sizing.memory(Sharding(2, 1, n)) for n in (1, 2))
    for stage in range(2):
        ratio = half.rows[stage].kept / whole.rows[stage].kept
        assert 0.5 < ratio < 0.6  # what attention exchanges exists twice


def test_offloaded_activations_wait_in_cpu_memory(config):
    settings = _settings(config, "--model.gradient_checkpointing", "true")
    sharding = Sharding(1, 2)
    gpu, cpu = (
        Sizing(replace(settings, activations=kind)).memory(sharding)
        for kind in ("recompute", "offload")
    )
    layer_input = 1024 * 64 * 2
    assert cpu.row.cpu == 3 * layer_input
    assert gpu.row.kept - cpu.row.kept == 2 * layer_input


# -- the suggestion --


def test_the_smallest_sharding_has_the_fewest_gpus_then_the_least_traffic(report):
    found = report[1]
    assert {entry["gpus"] for entry in found["shardings"]} == {1, 2, 4}
    # 2 key-value heads.
    assert {entry["sequence"] for entry in found["shardings"]} == {1, 2}
    assert found["smallest"]["H100"] == found["shardings"][0]
    order = [Sharding(1, 0), Sharding(1, 3, 1, "cpu"), Sharding(1, 3, 1, "cpu", "cpu")]
    order += [Sharding(2, 0), Sharding(2, 1), Sharding(2, 1, 2), Sharding(2, 2)]
    order += [Sharding(2, 1, 1, "cpu")]
    assert sorted(order, key=lambda sharding: sharding.cost) == order


def test_the_printed_fragment_is_a_config(config, report, tmp_path):
    printed, found = report
    lines = [line for line in printed.splitlines() if line.startswith("  trainer: {")]
    assert len(lines) == 2
    (tmp_path / "fragment.yaml").write_text(lines[1])
    _, again = _estimate(
        config, "--gpus", "h100,l40s", "--devices", "1", "--config", str(tmp_path / "fragment.yaml")
    )
    assert again["own"] == found["smallest"]["L40S"]


def test_where_nothing_fits_it_says_what_would(config):
    large = {
        "--curriculum.stages": "[{length: 1024, steps: 1}]",
        "--data.row_tokens": "262144",
        "--data.rows_per_step": "1",
        "--model.architecture.hidden_size": "2048",
        "--model.architecture.intermediate_size": "4096",
        "--gpus": "rtx4090",
        "--devices": "2",
    }
    printed, found = _estimate(config, *(x for pair in large.items() for x in pair))
    assert found["smallest"] == {"RTX 4090": None}
    said = " ".join(printed.split())
    assert "RTX 4090: no sharding on up to 2 GPUs fits 22.4 GiB." in said
    assert "of them activations. It would fit with model.activations: recompute" in said


# -- the command --

STRATEGY = "lit_sparse.distributed.DeepSpeedSparseStrategy"
QUICKSTART_ZERO = ["--config", "quickstart", "--trainer.strategy", STRATEGY]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gpus", "h100"], "give --config"),
        (["--config", "quikstart"], "did you mean quickstart?"),
        (["--config", "quickstart", "--model.no_such", "3"], "no_such"),
        (["--config", "quickstart", "--data.row_tokens", "many"], "data.row_tokens"),
        (["--config", "quickstart", "--gpus", "h100,tpu"], "--gpus: tpu is not one of h100, "),
        (["--config", "quickstart", "--devices", "0"], "--devices must be at least 1"),
        (["--config", "quickstart", "--utilisation", "40"], "--utilisation must be in (0, 1]"),
        (["--config", "quickstart", "--json", "no/such/file"], "--json no/such/file"),
        (["--config", "quickstart", "--sparse_attention.budget.alpha", "-1"], "budget.alpha"),
        (["--config", "quickstart", "--sparse_attention.block", "24"], "block"),
        (["--config", "quickstart", "--data.row_tokens", "2048"], "exceeds data.row_tokens"),
        (["--config", "quickstart", "--trainer.strategy", "fsdp"], "trainer.strategy: fsdp"),
        ([*QUICKSTART_ZERO, "--trainer.devices", "8"], "data.rows_per_step = 1 does not divide"),
        ([*QUICKSTART_ZERO, "--trainer.strategy.sequence_parallel", "4"], "the 2 key-value heads"),
        ([*QUICKSTART_ZERO, "--trainer.strategy.stage", "4"], "strategy.stage must be 0, 1, 2 or"),
        (["--config", "quickstart", "--model.architecture.hidden_sise", "8"], "hidden_sise"),
    ],
)
def test_nonsense_is_one_line(capsys, arguments, said):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("lit-sparse estimate: error: ")
    assert said in captured.err
    assert captured.err.count("\n") == 1


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
    script = HERE / "zero_engines.py"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), json.dumps(cases)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    measured = json.loads(done.stdout.splitlines()[-1])
    model = Model(None, measured["parameters"], 0, 0, 0, measured["largest"])
    for case, peak in zip(cases, measured["peaks"], strict=True):
        itemsize = 2 if case["half"] else 4
        sharding = Sharding(2, case["stage"], 1, *(case[key] for key in keys[3:]))
        found = states(sharding, model, itemsize, case["accumulate"] > 1, Zero.of(measured["zero"]))
        expected = found.weights + found.gradients + found.optimizer + found.buffers + found.cpu
        # Where the activations are gone before the step, gradients are there in another form too.
        if case["stage"] == 0:
            expected += itemsize * model.parameters
        if case["stage"] == 1 and not case["offload_optimizer"]:
            expected += itemsize * model.parameters / 2 - found.buffers
        assert expected == pytest.approx(peak, rel=0.06), case
