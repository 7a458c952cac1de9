"""A run on many ranks that is continued is the run that was not stopped, bit for bit; what cannot
go on is refused. Real DeepSpeed engines, real gloo ranks.
"""

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lit_sparse.distributed.checkpoint import damage
from lit_sparse.training.checkpoint import (
    AtomicCheckpointIO,
    newest_whole,
    own_state,
    remove_unfinished,
)

SCRIPT = Path(__file__).with_name("resume.py")
CASES = {
    "half precision": {"stage": 1, "precision": "bf16-mixed", "data": 1, "sequence": 2},
    "all at once": {
        "stage": 3,
        "precision": "bf16-mixed",
        "data": 1,
        "sequence": 2,
        "accumulate": 2,
        "offload": True,
        "tied": True,
    },
    "stage 0": {"stage": 0},
    "offloaded": {"stage": 1, "offload": True},
    "frozen embeddings": {"stage": 3, "frozen": True},
    # The last one is also refused, poisoned and killed.
    "stage 2": {"stage": 2, "accumulate": 2, "tied": True},
}
EVERY = [
    {"stage": stage, "accumulate": accumulate, "offload": offload, "precision": precision}
    for stage, accumulate, offload, precision in itertools.product(
        (0, 1, 2, 3), (1, 2), (False, True), ("32-true", "bf16-mixed")
    )
    if stage or not offload
]


def _run(out, cases):
    """What the script found, by file name."""
    texts = [json.dumps({"name": name, **options}) for name, options in cases.items()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, str(SCRIPT), str(out), *texts]
    done = subprocess.run(command, env=environment, capture_output=True, timeout=1800)
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    return {path.stem: torch.load(path) for path in out.glob("*.pt")}


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("resume")


@pytest.fixture(scope="module")
def found(out):
    return _run(out, CASES)


def _assert_exact(run):
    whole, continued = run["whole"], run["continued"]
    assert [shown["step"] for shown in continued["shown"]] == [3, 4]
    assert continued["shown"] == whole["shown"][2:]
    _assert_equal(continued["weights"], whole["weights"])


def _assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys() != set()
    for name, weight in theirs.items():
        assert torch.equal(ours[name], weight), name


@pytest.mark.parametrize("case", CASES)
def test_the_rest_of_a_continued_run_is_the_same(found, case):
    _assert_exact(found[case])


@pytest.mark.slow
@pytest.mark.parametrize(("data", "sequence"), [(2, 1), (1, 2), (2, 2)])
def test_the_rest_is_the_same_however_it_is_sharded(tmp_path, data, sequence):
    size = {"data": data, "sequence": sequence}
    found = _run(tmp_path, {str(i): {**size, **case} for i, case in enumerate(EVERY)})
    for i in range(len(EVERY)):
        _assert_exact(found[str(i)])


@pytest.mark.parametrize("case", CASES)
def test_weights_give_the_same_loss_from_shards_and_from_a_file(found, case):
    """The file in one process and under DDP too."""
    losses, alone = found[case]["validated"], found[f"{case}.alone"]
    assert losses["file"] == losses["shards"]
    # In half precision DeepSpeed rounds weights, one process products.
    within = 0.02 if "precision" in CASES[case] else 1e-5
    assert alone == pytest.approx(losses["file"], rel=within)
    assert losses.get("ddp", alone) == pytest.approx(losses["file"], rel=within)


@pytest.mark.parametrize("case", CASES)
def test_a_file_holds_all_weights_and_nothing_of_the_optimizer(found, out, case):
    file = torch.load(out / case / "whole" / "full.ckpt", weights_only=True)
    assert "optimizer_states" not in file
    weights = file["state_dict"]
    _assert_equal(weights, found[case]["whole"]["weights"])
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    head, embeddings = (weights[f"model.{n}.weight"] for n in ("lm_head", "model.embed_tokens"))
    assert (head.data_ptr() == embeddings.data_ptr()) == ("tied" in CASES[case])


def test_a_checkpoint_says_what_it_is(found, out):
    whole = out / "all at once" / "whole"
    shards, file = own_state(whole / "checkpoints" / "step=4.ckpt"), own_state(whole / "full.ckpt")
    assert shards["sharding"] == {"stage": 3, "data": 1, "sequence": 2}
    assert file["sharding"] is None
    for state in (shards, file):
        config = json.loads(json.dumps(state["models"]["model"]))
        assert (config["model_type"], config["tie_word_embeddings"]) == ("llama", True)
        assert config["sparse_attention"]["budget"]["alpha"] == 5.0


def test_another_sharding_a_file_and_code_are_refused(found, out):
    errors = found["refused"]
    assert "is sharded for stage 2 on 2 data-parallel x 1 sequence-parallel" in errors["stage"]
    assert "but this run is sharded for stage 1" in errors["stage"]
    assert "lit-sparse export" in errors["stage"]
    assert "full.ckpt is not sharded, but this run is" in errors["file"]
    assert "holds more than tensors and plain values" in errors["code"]
    assert not (out / "code_ran").exists()


def test_a_run_without_deepspeed_refuses_shards(checkpoint):
    with pytest.raises(ValueError, match="is sharded for stage 2 .* but this run is not sharded"):
        AtomicCheckpointIO().load_checkpoint(checkpoint)


def test_a_rank_that_dies_while_it_writes_leaves_no_checkpoint(found):
    assert found["left"] == [".step=4.ckpt.tmp", "step=2.ckpt"]
    assert found["after"]["shown"] == found["stage 2"]["continued"]["shown"]
    _assert_equal(found["after"]["weights"], found["stage 2"]["whole"]["weights"])


# -- a directory as a checkpoint --


@pytest.fixture
def checkpoint(found, out, tmp_path):
    """A copy of a sharded checkpoint, with an older one and an unfinished one beside it."""
    made = out / "stage 2" / "whole" / "checkpoints"
    for step in (2, 4):
        shutil.copytree(made / f"step={step}.ckpt", tmp_path / f"step={step}.ckpt")
    shutil.copytree(made / "step=2.ckpt", tmp_path / ".step=6.ckpt.tmp")
    return tmp_path / "step=4.ckpt"


def _flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def _cut(path):
    path.write_bytes(path.read_bytes()[:-1])


SHARD = "checkpoint/zero_pp_rank_1_mp_rank_00_optim_states.pt"


@pytest.mark.parametrize(
    ("name", "harm", "said"),
    [
        (SHARD, _flip, f"the checksum of {SHARD} does not match"),
        (SHARD, _cut, f"{SHARD} has .* bytes"),
        (SHARD, Path.unlink, f"{SHARD} cannot be read: No such file"),
        ("run.ckpt", _flip, "the checksum of run.ckpt"),
        ("latest", _flip, "the checksum of latest"),
        ("manifest.json", Path.unlink, "there is no manifest.json"),
        ("manifest.json", _cut, "manifest.json cannot be read"),
    ],
)
def test_damage_is_found_and_passed_over(checkpoint, name, harm, said):
    assert damage(checkpoint) is None
    assert newest_whole(checkpoint.parent) == checkpoint
    harm(checkpoint / name)
    with pytest.warns(UserWarning, match=f"damaged: .*step=4.ckpt .{said}.*Using .*step=2.ckpt"):
        assert newest_whole(checkpoint.parent) == checkpoint.parent / "step=2.ckpt"


def test_what_was_not_finished_is_removed(checkpoint):
    remove_unfinished(checkpoint.parent)
    names = sorted(path.name for path in checkpoint.parent.iterdir())
    assert names == ["step=2.ckpt", "step=4.ckpt"]
