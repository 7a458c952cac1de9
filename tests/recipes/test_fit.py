"""The command line as a user meets it: files in, files out, one line where something is wrong."""

import json
import logging
import resource

import pytest
import torch
import yaml

from lit_sparse.callbacks import StepSeed
from lit_sparse.cli import main
from lit_sparse.training import SparseLM


@pytest.fixture(autouse=True)
def _closed_streams(monkeypatch):
    # Handlers of libraries keep the streams that pytest captured in an earlier test.
    monkeypatch.setattr(logging, "raiseExceptions", False)


@pytest.fixture
def config(tmp_path, architecture, corpus, monkeypatch):
    """A config file of a run of a few steps, in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    keys = {
        "model": {"architecture": architecture, "warmup_steps": 1},
        "sparse_attention": {
            "budget": {"alpha": 1.0, "floor": 32, "sink": 8},
            "block": 16,
            "tile": 16,
        },
        "curriculum": {"stages": [{"length": 128, "steps": 2}, {"length": 256, "steps": 2}]},
        "data": {
            "path": str(corpus),
            "row_tokens": 512,
            "validation_rows": 1,
            "validation_fraction": 0.2,
            "tasks": {"passkey": 0.5},
        },
        "trainer": {
            "accelerator": "cpu",
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": [
                {"class_path": f"lit_sparse.callbacks.{name}"}
                for name in (
                    "DenseGapMonitor",
                    "LongContextEval",
                    "HuggingFaceExport",
                    "StageReport",
                )
            ],
        },
    }
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(keys))
    return str(path)


def _weights(checkpoint):
    return torch.load(checkpoint, weights_only=True, map_location="cpu")["state_dict"]


def test_a_run_leaves_everything_in_its_directory(config, tmp_path, capsys, monkeypatch):
    assert main(["fit", "--config", config]) == 0
    run = tmp_path / "runs" / "small"
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step=2.ckpt", "step=4.ckpt"]
    assert len(list(run.glob("events.out.tfevents.*"))) == 1
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert saved["sparse_attention"]["budget"]["floor"] == 32
    rows = json.loads((run / "stages.json").read_text())
    assert [row["curriculum/length"] for row in rows] == [128, 256]
    out = capsys.readouterr().out
    assert "tensorboard --logdir runs/small" in out
    assert "bits/byte" in out
    assert "9 documents for training, 3 for validation" in out

    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lit_sparse.models import law_of, sparsify

    model = AutoModelForCausalLM.from_pretrained(run / "huggingface", local_files_only=True)
    assert model.config._attn_implementation == "sdpa"
    trained = _weights(run / "checkpoints" / "step=4.ckpt")
    assert torch.equal(model.lm_head.weight, trained["model.lm_head.weight"])
    assert law_of(sparsify(model)).budget.floor == 32
    tokenizer = AutoTokenizer.from_pretrained(run / "huggingface")
    assert tokenizer("def é").input_ids == list("def é".encode())

    # The directory holds a run now: nothing may be overwritten. A second rank says no by itself: it
    # would wait for the first in vain.
    before = (run / "config.yaml").read_text()
    with monkeypatch.context() as second:
        for name, value in {"LOCAL_RANK": 1, "RANK": 1, "WORLD_SIZE": 2, "NODE_RANK": 0}.items():
            second.setenv(name, str(value))
        assert main(["fit", "--config", config, "--trainer.devices", "2"]) == 2
    assert "lit-sparse: error" not in capsys.readouterr().err, "the first rank says it"
    assert main(["fit", "--config", config]) == 2
    error = capsys.readouterr().err
    assert "run.name: runs/small already holds a run" in error
    assert "--ckpt_path last" in error
    assert (run / "config.yaml").read_text() == before
    assert main(["fit", "--config", config, "--run.overwrite", "true"]) == 0
    assert main(["validate", "--config", config, "--ckpt_path", "last"]) == 0
    assert "val/bits_per_byte" in capsys.readouterr().out


def test_a_full_disk_is_named_in_a_line(config, capsys):
    # More than the packed corpus has, less than a checkpoint.
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, hard))
    try:
        assert main(["fit", "--config", config, "--checkpoint.every_n_steps", "1"]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("lit-sparse: error")]
    assert "runs/small/checkpoints/.step=1.ckpt." in line
    assert "cannot be written (File too large): make room, and go on from the last" in line


def test_a_run_that_fails_between_its_steps_keeps_what_it_has(config, tmp_path):
    other = tmp_path / "stopping.yaml"
    stopping = {
        "class_path": "pytorch_lightning.callbacks.EarlyStopping",
        "init_args": {"monitor": "nothing"},
    }
    other.write_text(yaml.safe_dump({"trainer": {"callbacks": [stopping]}}))
    with pytest.raises(RuntimeError, match="nothing"):
        main(["fit", "--config", config, "--config", str(other), "--checkpoint.every_n_steps", "1"])
    run = tmp_path / "runs" / "small"
    assert {"step=1.ckpt", "step=2.ckpt"} < {p.name for p in (run / "checkpoints").iterdir()}
    assert (run / "config.yaml").exists()


def test_a_trial_step_leaves_nothing_to_go_on_from(config, tmp_path):
    before = set(tmp_path.iterdir())
    assert main(["fit", "--config", config, "--trainer.fast_dev_run", "true"]) == 0
    assert set(tmp_path.iterdir()) - before == {tmp_path / "runs"}
    assert not list((tmp_path / "runs").rglob("*.ckpt"))
    assert main(["fit", "--config", config, "--trainer.max_steps", "1"]) == 0


def test_without_a_logger_all_is_in_the_run_directory_too(config, tmp_path):
    before = set(tmp_path.iterdir())
    assert main(["fit", "--config", config, "--trainer.logger", "false"]) == 0
    assert set(tmp_path.iterdir()) - before == {tmp_path / "runs"}
    made = {path.name for path in (tmp_path / "runs" / "small").iterdir()}
    assert made == {".lock", "checkpoints", "config.yaml", "huggingface", "stages.json"}


def test_configs_merge_and_keys_override(config, tmp_path, capsys):
    other = tmp_path / "more.yaml"
    other.write_text(yaml.safe_dump({"sparse_attention": {"budget": {"late": 0.2}}}))
    arguments = ["fit", "--config", config, "--config", str(other), "--model.weight_decay", "0.3"]
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--print_config"])
    assert stop.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["sparse_attention"]["budget"]["late"] == 0.2
    assert printed["sparse_attention"]["budget"]["floor"] == 32
    assert printed["model"]["weight_decay"] == 0.3


def test_shipped_configs_are_listed_and_parse(capsys):
    assert main(["configs"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert "quickstart" in listed
    for name in listed:
        with pytest.raises(SystemExit) as stop:
            main(["fit", "--config", name, "--print_config"])
        assert stop.value.code == 0
        curriculum = yaml.safe_load(capsys.readouterr().out)["curriculum"]
        assert curriculum["stages"] or curriculum["doubling"]


BAD = [
    (["--trainer.strategy", "deepspeed_stage_3"], "Lightning's own, which divides the gradients"),
    (["--sparse_attention.budget.exponent", "1.5"], r"budget.exponent must be in [0, 1]"),
    (["--sparse_attention.budget.alpha", "0"], "budget.alpha must be a positive number"),
    (["--sparse_attention.block", "48"], "block must be a power of two"),
    (["--sparse_attention.tile", "12"], "tile must be a power of two"),
    (["--sparse_attention.block", "256"], "curriculum.stages[0].length = 128 is not a multiple"),
    (["--sparse_attention.score", "best"], "score must be one of mass"),
    (["--data.row_tokens", "200"], "curriculum.stages[1].length = 256 exceeds data.row_tokens"),
    (["--model.lora.rank", "abc"], "model.lora.rank must be int, got abc"),
    (["--trainer.devices", "abc"], "trainer.devices: "),
    (["--data.path", "nowhere"], "data.path"),
    (["--data.tokenizer", "nowhere"], "data.tokenizer"),
    (["--data.rows_per_step", "0"], "data.rows_per_step must be >= 1"),
    (["--model.architecture.max_position_embeddings", "128"], "curriculum.stages[1].length = 256"),
    (["--model.architecture.hiden_size", "64"], "hidden_size"),
    (["--model.architecture.vocab_size", "100"], "model.architecture.vocab_size"),
    (["--model.pretrained", "nowhere"], "model."),
    (["--trainer.max_steps", "9"], "trainer.max_steps = 9 goes past the end of the curriculum"),
    (["--trainer.limit_train_batches", "2"], "trainer.limit_train_batches = 2"),
    (["--trainer.barebones", "true"], "barebones"),
    (["--ckpt_path", "last"], "ckpt_path: last, but"),
    (["--ckpt_path", "no.ckpt"], "ckpt_path: there is no checkpoint no.ckpt"),
    (["--checkpoint.dirpath", "elsewhere"], "checkpoint.dirpath = elsewhere"),
    (["--checkpoint.keep", "0"], "checkpoint.keep must be >= 1"),
    (["--run.root", "/proc/none"], "run.root: /proc/none"),
    (
        [
            "--trainer.callbacks+=lit_sparse.callbacks.BudgetController",
            "--trainer.callbacks.target",
            "2",
        ],
        "error: BudgetController target must be in (0, 1), got 2.0\n",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[" ".join(a) for a, _ in BAD])
def test_what_is_wrong_is_one_line_before_training(config, capfd, arguments, message, tmp_path):
    status = main(["fit", "--config", config, *arguments])
    error = capfd.readouterr().err
    assert status == 2
    assert message in error
    assert "Traceback" not in error
    assert not list(tmp_path.glob("runs/*"))  # the next try must not find a run there


def test_numbers_that_are_not_finite_end_a_run_with_one_line(config, tmp_path, capfd, monkeypatch):
    def raise_at_the_second_step(module, optimizer):
        if module.global_step:
            raise FloatingPointError("layer 1: its gradient is not finite")

    monkeypatch.setattr(SparseLM, "on_before_optimizer_step", raise_at_the_second_step)
    assert main(["fit", "--config", config, "--checkpoint.every_n_steps", "1"]) == 1
    error = capfd.readouterr().err
    assert "lit-sparse: error: layer 1: its gradient is not finite\n" in error
    assert "Traceback" not in error
    assert (tmp_path / "runs" / "small" / "checkpoints" / "step=1.ckpt").exists()
    monkeypatch.setenv("LIT_SPARSE_TRACEBACK", "1")
    with pytest.raises(FloatingPointError):
        main(["fit", "--config", config, "--run.overwrite", "true"])


def test_an_error_in_training_says_where(config, tmp_path, capfd, monkeypatch):
    """A callback's own mistake, past the first step: none of the user's, so not one line."""

    def fail(self, trainer, *others):
        if trainer.global_step == 2:
            raise ValueError("a bug")

    monkeypatch.setattr(StepSeed, "on_train_batch_end", fail)
    with pytest.raises(ValueError, match="a bug"):
        main(["fit", "--config", config, "--checkpoint.every_n_steps", "1"])
    assert (tmp_path / "runs" / "small" / "checkpoints" / "step=1.ckpt").exists()


def test_falling_lengths_are_refused(config, tmp_path, capfd):
    other = tmp_path / "falling.yaml"
    stages = [{"length": 256, "steps": 1}, {"length": 128, "steps": 1}]
    other.write_text(yaml.safe_dump({"curriculum": {"stages": stages}}))
    with pytest.raises(SystemExit) as stop:
        raise SystemExit(main(["fit", "--config", config, "--config", str(other)]))
    assert stop.value.code == 2
    assert "lengths of a curriculum must not fall" in capfd.readouterr().err


def test_a_corpus_that_is_too_short_says_how_long_it_is(config, capfd):
    arguments = ["--data.row_tokens", "8192", "--curriculum.stages", "[{length: 8192, steps: 1}]"]
    assert main(["fit", "--config", config, *arguments]) == 2
    error = capfd.readouterr().err
    assert "curriculum.stages[0].length" in error
    assert "tokens" in error


def test_an_unknown_config_names_the_nearest(capfd):
    assert main(["fit", "--config", "quikstart"]) == 2
    assert "did you mean quickstart" in capfd.readouterr().err
    assert main(["fit", "--config", "no/such.yaml"]) == 2
    assert "no file no/such.yaml" in capfd.readouterr().err


def test_an_unknown_key_is_named(config, capfd):
    assert main(["fit", "--config", config, "--sparse_attention.budget.alhpa", "3"]) == 2
    error = capfd.readouterr().err
    assert error == "lit-sparse: error: sparse_attention.budget has no key 'alhpa'\n"


def test_unreadable_and_empty_files_are_counted_not_fatal(config, corpus, capsys):
    (corpus / "empty.py").write_text("")
    (corpus / "broken.txt").write_bytes(b"\xff\xfe\x00 not text \xff")
    assert main(["fit", "--config", config, "--trainer.max_steps", "1"]) == 0
    assert "2 skipped" in capsys.readouterr().out


def test_an_unsupported_model_names_layer_and_feature(config, tmp_path, capfd):
    other = tmp_path / "linear.yaml"
    architecture = {
        "model_type": "qwen3_next",
        "layer_types": ["full_attention", "linear_attention"],
    }
    architecture |= {"num_hidden_layers": 2, "vocab_size": 257, "hidden_size": 32, "num_experts": 2}
    architecture |= {"linear_num_key_heads": 1, "linear_num_value_heads": 1}
    other.write_text(yaml.safe_dump({"model": {"architecture": architecture}}))
    assert main(["fit", "--config", config, "--config", str(other)]) == 2
    said = capfd.readouterr()
    assert "layers.1 has linear_attention" in said.err
    assert "documents for training" not in said.out  # before data is packed


def test_no_sub_command_shows_them_all(capsys):
    assert main([]) == 2
    out = capsys.readouterr().out
    assert all(name in out for name in ("fit", "validate", "test", "configs", "benchmark"))
    assert main(["fti"]) == 2
    assert "no sub-command 'fti'" in capsys.readouterr().err


def test_a_callback_that_is_there_twice_is_named(config, capsys):
    arguments = ["--trainer.callbacks+=lit_sparse.callbacks.DenseGapMonitor"]
    assert main(["fit", "--config", config, *arguments]) == 2
    assert "trainer.callbacks has DenseGapMonitor twice" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="the machine has a GPU")
def test_a_gpu_that_is_not_there(config, capsys):
    assert main(["fit", "--config", config, "--trainer.accelerator", "gpu"]) == 2
    assert "trainer.accelerator asks for a GPU" in capsys.readouterr().err
