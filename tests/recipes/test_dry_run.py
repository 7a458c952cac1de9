"""`lit-sparse fit --dry-run`: each shipped config is whole, and what is wrong is one line."""

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from lit_sparse.cli import main
from lit_sparse.recipes.shipped_configs import shipped_configs


def _dry_run(capsys, *arguments):
    """What is printed, as one line of words."""
    assert main(["fit", *map(str, arguments), "--dry-run"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return " ".join(captured.out.split())


PLANS = {
    "quickstart": [
        "llama, 2,066,496 parameters, all trained",
        "stdlib, 100% of the tokens: will be packed at the start tokenizer: bytes, 257 ids",
        "1 CPU process: plain PyTorch; 1 row at a time, 1 times a step",
    ],
    "quickstart_zero3": [
        "2 CPU processes: DeepSpeed, ZeRO 3; 2 ranks share a row, 1 row at a time, 2 times a step",
    ],
    "llama3_8b_128k": [
        "llama, 8,030,261,248 parameters, all trained; new",
        # k(n) = 16 sqrt(n), and the RoPE of each stage.
        "1 16k 60 252 M 2048 0.176 llama3, factor 2 1.00e-05",
        "4 128k 240 1.01 B 5793 0.060 llama3, factor 16 6.28e-06",
        "480 steps of 32 rows of 128k tokens: 2.01 B tokens",
        "stores/books, 33% of the tokens: not there yet",
        "8 GPUs: DeepSpeed, ZeRO 3; 4 ranks share a row, 2 rows at a time, 16 times a step",
        "of 74.5 GiB of one H100",
        # 14 bytes a parameter.
        "runs/llama3_8b_128k: config.yaml, TensorBoard events, up to 2 checkpoints of about 112 GB",
    ],
    "qwen3_8b_lora_64k": [
        # 8,190,735,360 and the adapters of 36 layers; these, the norms and the embedding train.
        "qwen3, 8,206,070,784 parameters, 637,973,504 of them trained; on weights that --model.pre",
        "1 32k 100 105 M 2897 0.121 default, theta 1e+06 2.00e-05",
        "2 64k 200 210 M 4096 0.085 yarn, factor 2",
        "1 GPU: DeepSpeed, ZeRO 1",
    ],
    "continue_pretraining": ["llama, 1,235,814,400 parameters", "stores/domain, 75% of the tokens"],
    "study_base": [
        "llama, 853,376 parameters, all trained; new",
        "2 512 1800 1.84 M dense 1.000 default, theta 10000",
    ],
    "study_finetune": ["3 4k 80 328 k 512 0.171 default, theta 776621 5.97e-04"],
    "chat_longcontext": ["llama, 3,212,749,824 parameters", "8 rows at a time, 8 times a step"],
}


@pytest.mark.parametrize("name", shipped_configs())
def test_shipped_configs_are_planned_without_weights_and_gpus(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    printed = _dry_run(capsys, "--config", name)
    for said in PLANS[name]:
        assert said in printed
    assert "warnings" not in printed, "it fits, and nothing else is doubtful"
    assert not list(tmp_path.iterdir()), "nothing is written"


@pytest.fixture
def config(tmp_path, architecture, corpus, monkeypatch):
    """The path of a config of a small model, in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    keys = {
        "model": {"architecture": architecture, "warmup_steps": 1},
        "sparse_attention": {"budget": {"alpha": 1.0, "floor": 32, "sink": 8}, "block": 16},
        "curriculum": {"stages": [{"length": 256, "steps": 4}]},
        "data": {"path": str(corpus), "row_tokens": 512, "rows_per_step": 2},
        "trainer": {"accelerator": "gpu", "devices": 2, "precision": "bf16-true"},
    }
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(keys))
    return "small.yaml"


def test_a_directory_and_a_store_are_looked_at(config, tmp_path, architecture, corpus, capsys):
    larger = {**architecture, "vocab_size": 300}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**larger))
    model.save_pretrained(tmp_path / "model")
    assert main(["pack", str(corpus), "--tokenizer", "bytes", "--out", "store"]) == 0
    capsys.readouterr()
    arguments = ["--config", config, "--data.path", "store"]
    printed = _dry_run(capsys, *arguments, "--model.pretrained", "model")
    assert "weights of model" in printed
    assert "300 ids" in printed
    assert "store, 100% of the tokens: text, 12 documents, " in printed
    assert "2 GPUs: plain PyTorch; 2 rows at a time, 1 times a step" in printed
    assert main(["fit", *arguments, "--dry-run=abacus"]) == 2
    assert "--dry-run: abacus is not one of h100" in capsys.readouterr().err
    # The run that is there, and a model that is too large for the GPU that is named.
    (tmp_path / "runs" / "small" / "checkpoints").mkdir(parents=True)
    large = ["--model.architecture.hidden_size", "4096", "--model.architecture.head_dim", "128"]
    large += ["--model.architecture.vocab_size", "999999"]
    assert main(["fit", *arguments, *large, "--dry-run=rtx4090"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "of 22.4 GiB of one RTX 4090" in printed
    assert "warnings it does not fit on one RTX 4090" in printed
    assert "fit would not start now: run.name: runs/small already holds a run" in printed
    wide = _dry_run(capsys, *arguments, "--model.architecture.head_dim", "512")
    assert "memory not known: the memory of attention is that of the Triton kernels, which" in wide


def test_a_run_that_ends_before_its_schedule(config, capsys):
    printed = _dry_run(capsys, "--config", config, "--trainer.max_steps", "3")
    assert "trainer.max_steps = 3 ends the run in stage 1 of 1, before step 4" in printed


def test_what_needs_a_gpu_is_planned_without_one(config, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    arguments = ["--model.loss", "liger", "--model.liger_kernels", "true"]
    printed = _dry_run(capsys, "--config", config, *arguments)
    assert "loss: liger" in printed
    assert "model.loss: liger needs a GPU to be tried" in printed
    assert "model.liger_kernels needs a GPU to be tried" in printed


BAD = [
    (["--model.no_such", "1"], "no_such"),
    (["--data.rows_per_step", "3"], "data.rows_per_step = 3 does not divide among the 2 data-para"),
    (["--model.architecture.vocab_size", "100"], "has 257 tokens but the model embeds 100"),
    (["--model.architecture.max_position_embeddings", "128"], "is longer than the 128 positions"),
    (
        ["--curriculum.stages", "[{length: 512, steps: 4, mixture: {other: 1}}]"],
        "curriculum.stages[0].mixture names 'other'",
    ),
    (["--data.tasks", "{needle: 0.5}"], "data.tasks: there is no task 'needle'"),
    (
        ["--data.tasks", "{variables: 0.5}", "--curriculum.stages", "[{length: 64, steps: 4}]"],
        "data.tasks.variables needs pieces of 108 tokens, and the longest stage has 64",
    ),
    (
        ["--data.passkey_fraction", "0.5"],
        "no key data.passkey_fraction any more: write data.tasks: {passkey: SHARE}",
    ),
    (["--trainer.max_step", "3"], "unrecognized arguments: --trainer.max_step 3"),
    (["--trainer.max_steps", "9"], "goes past the end of the curriculum"),
    (["--model.tiled_mlp", "2"], "model.tiled_mlp trains on 2 proc"),
    (["--model.lora.rank", "0"], "model.lora.rank must be"),
    (["--model.lora.rank", "abc"], "model.lora.rank must be int, got abc"),
    (["--model.lora.targets", "[3]"], "model.lora.targets must be list[str], str or null, got [3]"),
    (["--model.lora", "{r: 3}"], "model.lora has no key 'r'"),
    (["--model.compile", "maybe"], "model.compile must be bool, got maybe"),
    (["--trainer.callbacks+=lit_sparse.callbacks.Nope"], "has no attribute 'Nope'"),
    (["--trainer.devices", "abc"], "trainer.devices must be a number, auto, -1 or a list"),
    (["--trainer.accelerator", "abc"], "trainer.accelerator must be one of auto, gpu"),
    (["--model.lora.rank", "4"], "trainer.precision: bf16-true would"),
    (
        [
            "--trainer.callbacks+=lit_sparse.callbacks.BudgetController",
            "--trainer.callbacks.target=2",
        ],
        "BudgetController target must be in (0, 1), got 2.0",
    ),
    (["--ckpt_path", "last"], "ckpt_path: last, but"),
    (["--model.pretrained", "nowhere"], "model.pretrained: there is no directory nowhere"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[" ".join(a) for a, _ in BAD])
def test_what_fit_would_refuse_is_one_line(config, arguments, message, capsys):
    assert main(["fit", "--config", config, "--dry-run", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("lit-sparse: error: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err
