"""Pretrained weights into shards and out again, with real DeepSpeed engines on two gloo ranks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lit_sparse.cli import main
from lit_sparse.models import law_of, set_rope, sparsify

pytest.importorskip("deepspeed")

DEFAULT = ["2-tied", "3", "3-tied", "3-bfloat16", "3-sequence-tied"]
MORE = ["0", "1", "2-sequence"]


def _run(script, out, *arguments):
    command = [sys.executable, Path(__file__).with_name(script), out, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-5000:]


@pytest.fixture(scope="module")
def default(tmp_path_factory):
    out = tmp_path_factory.mktemp("exports")
    _run("exports.py", out, "alone", "alone-tied", "3-full-disk", *DEFAULT)
    return out


@pytest.fixture(scope="module")
def more(tmp_path_factory):
    out = tmp_path_factory.mktemp("exports")
    _run("exports.py", out, "alone", *MORE)
    return out


@pytest.fixture(params=[*DEFAULT, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)])
def case(request):
    """Name of a case, and where it is."""
    return request.param, request.getfixturevalue("more" if request.param in MORE else "default")


def _seen(out, name):
    return torch.load(out / name / "seen.pt")


def _source(out, name, dtype):
    directory = out / ("qwen3" if name.endswith("tied") else "llama")
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)


def _assert_weights(model, wanted):
    held = model.state_dict()
    assert wanted
    for name, values in wanted.items():
        assert held[name].dtype == values.dtype
        assert torch.equal(held[name], values), name


def test_loads_what_from_pretrained_loads(case):
    name, out = case
    seen = _seen(out, name)
    plain = _source(out, name, torch.bfloat16 if name == "3-bfloat16" else torch.float32)
    _assert_weights(plain, seen["before"])
    assert seen["before"].keys() == dict(plain.named_parameters()).keys()
    # Frequencies of RoPE, in float32 whatever the precision.
    buffers = dict(plain.named_buffers())
    assert buffers.keys() == seen["buffers"].keys()
    for key, values in seen["buffers"].items():
        assert values.dtype == torch.float32
        assert torch.equal(values, buffers[key])


def test_gradients_and_steps_are_those_of_one_process(case):
    """The steps too: what decays does not depend on the sharding."""
    name, out = case
    if name == "3-bfloat16":
        pytest.skip("one process has float32 weights")
    alone, seen = _seen(out, "alone-tied" if name.endswith("tied") else "alone"), _seen(out, name)
    assert seen["gradients"].keys() == alone["gradients"].keys()
    for key, values in alone["gradients"].items():
        assert (seen["gradients"][key] - values).norm() <= 1e-5 * values.norm(), key
    for key, values in alone["after"].items():
        torch.testing.assert_close(seen["after"][key], values, rtol=0, atol=1e-6)


def _assert_is_the_trained(directory, out, name):
    """Plain transformers gives the logits of the trained weights, and the law is remembered."""
    loaded = AutoModelForCausalLM.from_pretrained(directory)
    trained = _source(out, name, torch.float32)
    seen = _seen(out, name)
    after = seen["after"]
    trained.load_state_dict(after, strict=False)
    trained = trained.to(next(iter(after.values())).dtype)
    set_rope(trained, rope_theta=500.0)
    ids = torch.arange(1, 40)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, trained(ids).logits)
    assert loaded.dtype == trained.dtype
    assert law_of(sparsify(loaded)).to_dict() == seen["law"]
    assert load_file(directory / "model.safetensors").keys() == after.keys()  # tied ones once
    if name.endswith("tied"):
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
        assert loaded.generation_config.eos_token_id == [0, 7]


def test_the_end_of_training_leaves_a_hugging_face_directory(case):
    name, out = case
    _assert_is_the_trained(out / name / "huggingface", out, name)


def test_a_checkpoint_becomes_one(case, tmp_path, capsys):
    name, out = case
    checkpoint = out / name / "step=2.ckpt"
    to = tmp_path / "model"
    assert main(["export", str(checkpoint), "--out", str(to)]) == 0
    said = capsys.readouterr().out
    assert "ForCausalLM after 2 steps" in said
    if name != "3-bfloat16":
        _assert_is_the_trained(to, out, name)
        return
    assert "parameters in float32" in said  # those of the optimizer
    assert (
        main(["export", str(checkpoint), "--out", str(tmp_path / "b"), "--dtype", "bfloat16"]) == 0
    )
    _assert_is_the_trained(tmp_path / "b", out, name)


def test_a_plain_checkpoint_becomes_one(default, tmp_path):
    for name in ("alone", "alone-tied"):
        to = tmp_path / name
        assert main(["export", str(default / name / "step=2.ckpt"), "--out", str(to)]) == 0
        _assert_is_the_trained(to, default, name)


def test_a_full_disk_is_an_error_on_all_ranks_and_leaves_nothing(default):
    folder = default / "3-full-disk"
    for rank in (0, 1):
        said = (folder / f"{rank}.txt").read_text()
        assert said.startswith(f"HuggingFaceExport could not write {folder / 'huggingface'}: ")
        assert "File too large" in said
        assert "lit-sparse export" in said
    assert {path.name for path in folder.iterdir()} == {"0.txt", "1.txt", "seen.pt", "step=2.ckpt"}


@pytest.mark.parametrize("lost", ["zero_pp_rank_1_mp_rank_00_optim_states.pt", "*_optim_states.pt"])
def test_a_sharded_checkpoint_that_lacks_a_file_is_refused(default, tmp_path, capsys, lost):
    copy = tmp_path / "step=2.ckpt"
    copy.mkdir()
    for path in (default / "3" / "step=2.ckpt").iterdir():
        (copy / path.name).symlink_to(path)
    (copy / "checkpoint").unlink()
    (copy / "checkpoint").mkdir()
    gone = set((default / "3" / "step=2.ckpt" / "checkpoint").glob(lost))
    for path in set((default / "3" / "step=2.ckpt" / "checkpoint").iterdir()) - gone:
        (copy / "checkpoint" / path.name).symlink_to(path)
    assert main(["export", str(copy), "--out", str(tmp_path / "model")]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"lit-sparse: error: {copy}")
    assert not (tmp_path / "model").exists()


@pytest.mark.slow
def test_no_rank_has_the_whole_model_while_it_is_loaded(tmp_path):
    _run("memory_of_loading.py", tmp_path)
    for rank in (0, 1):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found["model"] > 300e6
        assert found["peak"] < 0.65 * found["model"]
        assert found["peak"] - found["end"] < 3 * found["largest"]
