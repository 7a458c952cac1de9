"""`lit-sparse estimate`: what it computes, suggests and refuses."""

import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parent))
from small_config import ARCHITECTURE, estimate, keys, settings, write

from lit_sparse.attention import select, sparse_attention
from lit_sparse.attention.plan import make_plan
from lit_sparse.budget import Budget
from lit_sparse.models import sparsify
from lit_sparse.models.lora.adapters import LoRA
from lit_sparse.recipes.estimate import main
from lit_sparse.recipes.estimate.compute import causal_pairs
from lit_sparse.recipes.estimate.model import read_model
from lit_sparse.recipes.estimate.sharding import Sharding
from lit_sparse.recipes.estimate.sizing import stage_work
from lit_sparse.training import SparseLM


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """The path of a small config."""
    return write(tmp_path_factory.mktemp("estimate"))


@pytest.fixture(scope="module")
def report(config):
    return estimate(config, "--gpus", "h100,l40s", "--devices", "4")


# -- parameters and FLOPs --


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_parameters_are_those_of_the_built_model(kind, tied):
    architecture = {**keys(kind), "tie_word_embeddings": tied}
    model = read_model(None, architecture)
    built = AutoModelForCausalLM.from_config(AutoConfig.for_model(**architecture))
    assert model.parameters == model.trained == sum(p.numel() for p in built.parameters())
    assert model.matrices - model.mlp == 3 * 2 * (64 + 32) * 64  # q, k, v, o
    assert model.mlp == 3 * 3 * 64 * 192


def test_a_token_is_multiplied_with_the_experts_that_it_is_sent_to():
    model = read_model(None, keys("qwen3_moe"))
    router, expert = 64 * 8, 3 * 64 * 64
    assert model.mlp == 3 * (router + 2 * expert)
    assert model.parameters - 2 * model.head > 3 * 8 * expert
    assert model.matrices - model.mlp == 3 * 2 * (64 + 32) * 64


def test_sliding_layers_have_the_pairs_of_their_window(config):
    pairs = sum(min(i + 1, 100) for i in range(1000)) + sum(range(1, 25))
    assert causal_pairs(make_plan((0, 1000, 1024), (0, 1000, 1024), Budget(), 16, 16), 100) == pairs


def test_a_directory_needs_no_weights(tmp_path):
    AutoConfig.for_model(**ARCHITECTURE).save_pretrained(tmp_path)
    assert read_model(str(tmp_path), None) == read_model(str(tmp_path), None)
    assert read_model(str(tmp_path), None).parameters == read_model(None, ARCHITECTURE).parameters


def _batch(tokens):
    ids = torch.zeros(1, tokens, dtype=torch.int64)
    return {"input_ids": ids, "labels": ids, "position_ids": torch.arange(tokens)[None]}


@pytest.mark.parametrize("activations", ["keep", "recompute"])
@pytest.mark.parametrize("lora", [None, LoRA(rank=4, train_embeddings=True)])
def test_flops_of_products_are_those_of_a_real_step(config, activations, lora):
    adapters = ["--model.lora.rank", "4", "--model.lora.train_embeddings", "true"] if lora else []
    given = settings(config, "--model.activations", activations, *adapters)
    work = stage_work(given, given.curriculum.stages[1])
    module = SparseLM(architecture=ARCHITECTURE, activations=activations, loss_chunk=256, lora=lora)
    sparsify(module.model, given.law.budget, block=16, tile=16)
    with FlopCounterMode(display=False) as counter:
        module.token_loss(_batch(1024))[0].backward()
    counts = counter.get_flop_counts()["Global"]
    products = counts[torch.ops.aten.mm] + counts.get(torch.ops.aten.addmm, 0)
    assert work.products == 20 * 4 * products


def test_flops_of_attention_are_those_of_the_operator(config):
    given = settings(config)
    work = stage_work(given, given.curriculum.stages[1])
    q = torch.randn(1024, 4, 16, requires_grad=True)
    k, v = (torch.randn(1024, 2, 16, requires_grad=True) for _ in range(2))
    selection = select(q, k, given.law.budget, block=16, tile=16)
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


def test_what_the_kernels_would_refuse_is_said(config, report):
    assert "kernels do not run" not in report[0]
    printed, _ = estimate(config, "--trainer.precision", "32-true", "--devices", "1")
    assert "The GPU kernels do not run this: trainer.precision 32-true" in printed


def test_the_printed_fragment_is_a_config(config, report, tmp_path):
    printed, found = report
    lines = [line for line in printed.splitlines() if line.startswith("  trainer: {")]
    assert len(lines) == 2
    (tmp_path / "fragment.yaml").write_text(lines[1])
    _, again = estimate(
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
    printed, found = estimate(config, *(x for pair in large.items() for x in pair))
    assert found["smallest"] == {"RTX 4090": None}
    said = " ".join(printed.split())
    assert "RTX 4090: no sharding on up to 2 GPUs fits 22.4 GiB." in said
    assert "of them activations. It would fit with model.activations: recompute" in said


# -- the command --


EIGHT_GPUS = ["--config", "quickstart_zero3", "--trainer.devices", "8"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gpus", "h100"], "give --config"),
        (["--config", "quikstart"], "did you mean quickstart"),
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
        (
            EIGHT_GPUS,
            "data.rows_per_step = 2 does not divide among the 4 data-parallel ranks",
        ),
        (
            [*EIGHT_GPUS, "--trainer.strategy.sequence_parallel", "4"],
            "strategy.sequence_parallel = 4 does not divide the 2 key-value heads",
        ),
        (["--config", "quickstart_zero3", "--trainer.strategy.stage", "4"], "must be 0, 1, 2 or 3"),
        (["--config", "quickstart", "--model.architecture.hidden_sise", "8"], "hidden_sise"),
        (["--config", "quickstart", "--model.architecture.num_attention_heads", "7"], "multiple"),
    ],
)
def test_nonsense_is_one_line(capsys, arguments, said):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("lit-sparse estimate: error: ")
    assert said in captured.err
    assert captured.err.count("\n") == 1
