"""A run that is killed and continued is the run that was not, bit for bit. Real processes, real
signals.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.compat.proto.summary_pb2 import Summary

sys.path.insert(0, str(Path(__file__).parent))
from forked import Forked

from lit_sparse.distributed.checkpoint import weights_only_loads
from lit_sparse.training.checkpoint import checkpoint_step, checkpoints, damage

STAGES = [{"length": length, "steps": 8} for length in (64, 128, 256)]
MONITORS = {
    "Throughput": {},
    "CollapseMonitor": {"every_n_steps": 3, "rows": 8, "min_context": 8, "patience": 2},
    "DenseGapMonitor": {"every_n_steps": 5, "rows": 8, "min_context": 8, "validation_batches": 1},
    "BudgetController": {
        "target": 0.2,
        "every_n_steps": 3,
        "rows": 8,
        "min_context": 64,
        "patience": 1,
    },
    "LongContextEval": {"prompts": 1, "generate": False},
    "StageReport": {},
    "Cockpit": {},
}
CONFIG = {
    "model": {
        "architecture": {
            "model_type": "llama",
            "vocab_size": 257,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "bos_token_id": None,
            "eos_token_id": 256,
        },
        "learning_rate": 0.01,
        "warmup_steps": 4,
    },
    "sparse_attention": {
        "budget": {"alpha": 2.0, "floor": 32, "sink": 16},
        "block": 16,
        "tile": 16,
    },
    "checkpoint": {"every_n_steps": 3},
    "data": {
        "path": "corpus",
        "row_tokens": 256,
        "rows_per_step": 2,
        "validation_rows": 1,
        "validation_fraction": 0.2,
        "tasks": {"passkey": 0.5},
    },
    "trainer": {
        "accelerator": "cpu",
        "gradient_clip_val": 1.0,
        # Not every step: what is shown then was logged in other steps.
        "log_every_n_steps": 2,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    },
}
WALL_CLOCK = ("train/tokens_per_second", "train/memory_gib")


@pytest.fixture(scope="module")
def command():
    forked = Forked()
    yield forked
    forked.close()


@pytest.fixture(scope="module")
def home(command, tmp_path_factory):
    """A directory with a corpus, two configs, and under runs/ a run of each that nothing happened
    to: "whole" has all monitors; "lean" draws no figures, which take most of the time, and
    validates inside stages too.
    """
    directory = tmp_path_factory.mktemp("resume")
    (directory / "corpus").mkdir()
    for i in range(12):
        lines = [f"def value_{j}(x):\n    return x + {i * j}\n\n" for j in range(40)]
        (directory / "corpus" / f"{i:02d}.py").write_text("".join(lines))
    for name, monitors, every in (("whole", MONITORS, None), ("lean", {"StageReport": {}}, 5)):
        callbacks = [
            {"class_path": f"lit_sparse.callbacks.{monitor}", "init_args": keys}
            for monitor, keys in monitors.items()
        ]
        config = {
            **CONFIG,
            "curriculum": {"stages": STAGES, "validate_every": every},
            "trainer": {**CONFIG["trainer"], "callbacks": callbacks},
        }
        (directory / f"{name}.yaml").write_text(yaml.safe_dump(config))
        assert command.run(fit(name, name), directory) == 0, log(directory)
    return directory


def fit(config, name, *more):
    return ["fit", "--config", f"{config}.yaml", "--run.name", name, *more]


def resume(config, name, *more):
    return fit(config, name, "--ckpt_path", "last", *more)


def shown(run):
    """All that TensorBoard shows, tag -> (x, kind and value), in the order of the files."""
    found = {}
    for path in sorted(run.glob("events.out.tfevents.*"), key=lambda p: p.stat().st_mtime_ns):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                if value.tag not in WALL_CLOCK:
                    point = (event.step, value.SerializeToString())
                    found.setdefault(value.tag, []).append(point)
    return found


def losses(run):
    """Step and training loss of each point that TensorBoard shows."""
    read = Summary.Value.FromString
    return [(step, read(value).tensor.float_val[0]) for step, value in shown(run)["train/loss"]]


def state_of(checkpoint):
    """What must be equal in the end."""
    keys = {"state_dict", "optimizer_states", "lr_schedulers", "loops", "global_step"}
    if not checkpoint.is_dir():
        return {key: torch.load(checkpoint)[key] for key in keys}
    with weights_only_loads():
        shards = {path.name: torch.load(path) for path in checkpoint.glob("checkpoint/*.pt")}
    run = torch.load(checkpoint / "run.ckpt")
    return {**shards, **{key: run[key] for key in keys & run.keys()}}


def assert_same_run(run, whole):
    ours, theirs = (state_of(checkpoints(r / "checkpoints")[-1]) for r in (run, whole))
    assert_equal(ours, theirs, "checkpoint")
    ours, theirs = shown(run), shown(whole)
    assert ours.keys() == theirs.keys()
    for tag in ours:
        assert [x for x, _ in ours[tag]] == [x for x, _ in theirs[tag]], tag
        assert ours[tag] == theirs[tag], tag
    ours, theirs = (json.loads((r / "stages.json").read_text()) for r in (run, whole))
    for row in ours + theirs:
        for key in ("tokens_per_second", *WALL_CLOCK):
            row.pop(key, None)
    assert ours == theirs


def assert_equal(ours, theirs, where):
    if isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs), where
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), where
        for key in ours:
            assert_equal(ours[key], theirs[key], f"{where}.{key}")
    elif isinstance(ours, list):
        assert len(ours) == len(theirs), where
        for i, pair in enumerate(zip(ours, theirs, strict=True)):
            assert_equal(*pair, f"{where}[{i}]")
    else:  # DeepSpeed's loss scaler has a text, but no equality
        assert ours == theirs or repr(ours) == repr(theirs), where


def wait_for_step(run, step, seconds=60):
    """Wait until a checkpoint of this step or a later one is there."""
    end = time.monotonic() + seconds
    while not any(checkpoint_step(p) >= step for p in checkpoints(run / "checkpoints")):
        assert time.monotonic() < end, "the run has not come this far"
        time.sleep(0.002)


def copy_of_lean(home, name):
    return shutil.copytree(home / "runs" / "lean", home / "runs" / name)


def log(home):
    return (home / "log").read_text()


def test_killed_in_every_stage(command, home):
    run = home / "runs" / "killed"
    folder = run / "checkpoints"
    # Any seed must do; this one makes a failure easy to repeat.
    chance = random.Random(4)
    for stage in range(3):
        after, delay = stage * 8 + chance.randrange(1, 5), chance.uniform(0, 0.3)
        pid = command.start(resume("whole", "killed") if stage else fit("whole", "killed"), home)
        wait_for_step(run, after)
        time.sleep(delay)
        os.kill(pid, signal.SIGKILL)
        assert command.wait() == -signal.SIGKILL
        newest = checkpoints(folder)[-1]
        print(f"killed {delay:.3f} s after a checkpoint from step {after} on; newest: {newest}")
    # Once more, while it writes its first checkpoint.
    assert command.run(resume("whole", "killed"), home, die_in_write=0) == -signal.SIGKILL
    assert len(list(folder.glob(".*.tmp"))) == 1
    assert checkpoints(folder)[-1] == newest
    assert command.run(resume("whole", "killed"), home) == 0, log(home)
    assert not list(folder.glob(".*"))
    assert_same_run(run, home / "runs" / "whole")


def test_the_checkpoints_are_those_of_stage_ends_and_the_newest(home):
    names = [p.name for p in checkpoints(home / "runs" / "whole" / "checkpoints")]
    assert names == [f"step={n}.ckpt" for n in (8, 15, 16, 18, 21, 24)]


def test_curves_have_no_fold(home):
    curves = {tag: [x for x, _ in points] for tag, points in shown(home / "runs" / "whole").items()}
    assert curves["train/loss"] == list(range(1, 24, 2))
    del curves["epoch"]  # Lightning shows it with the step and once more with its validation
    assert all(xs == sorted(set(xs)) for xs in curves.values())


def test_told_to_stop_it_stops_after_the_step(command, home):
    run = home / "runs" / "stopped"
    for number, begin, step in (
        (signal.SIGTERM, fit("lean", "stopped"), 3),
        (signal.SIGINT, resume("lean", "stopped"), 9),
    ):
        pid = command.start(begin, home)
        wait_for_step(run, step)
        time.sleep(0.05)
        os.kill(pid, number)
        assert command.wait() == 128 + number
        assert f"{number.name}: stopping after this step" in log(home)
        assert "go on with the same command and --ckpt_path last" in log(home)
        newest = torch.load(checkpoints(run / "checkpoints")[-1])
        batches = newest["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]
        assert batches["ready"] == batches["completed"] == 2 * newest["global_step"] < 48
    assert command.run(resume("lean", "stopped"), home) == 0, log(home)
    assert_same_run(run, home / "runs" / "lean")


def test_damaged_checkpoints_are_passed_over(command, home):
    run = copy_of_lean(home, "damaged")
    *_, older, newer, newest = checkpoints(run / "checkpoints")
    newest.write_bytes(newest.read_bytes()[:-1000])
    content = bytearray(newer.read_bytes())
    content[len(content) // 2] ^= 1
    newer.write_bytes(content)
    assert command.run(resume("lean", "damaged"), home) == 0, log(home)
    warned = next(line for line in log(home).splitlines() if "damaged: " in line)
    assert all(path.name in warned for path in (older, newer, newest))
    assert_same_run(run, home / "runs" / "lean")

    for path in checkpoints(run / "checkpoints"):
        path.write_bytes(b"")
    assert command.run(resume("lean", "damaged"), home) == 2
    assert "holds no whole checkpoint" in log(home)


def test_an_older_checkpoint_abandons_the_newer_ones_on_a_flag_only(command, home):
    run = copy_of_lean(home, "rewound")
    older = ["--ckpt_path", "runs/rewound/checkpoints/step=16.ckpt"]
    before = shown(run)
    assert command.run(fit("lean", "rewound", *older), home) == 2
    assert "not the newest checkpoint" in log(home)
    assert "--run.rewind true" in log(home)
    assert shown(run) == before
    assert command.run(fit("lean", "rewound", *older, "--run.rewind", "true"), home) == 0, log(home)
    abandoned = sorted(p.name for p in (run / "checkpoints" / "abandoned").iterdir())
    assert abandoned == ["step=18.ckpt", "step=21.ckpt", "step=24.ckpt"]
    assert_same_run(run, home / "runs" / "lean")


def test_a_changed_config_is_shown_and_refused_where_it_matters(command, home):
    run = copy_of_lean(home, "changed")
    checkpoints(run / "checkpoints")[-1].unlink()
    config, events = (run / "config.yaml").read_text(), shown(run)
    change = ["--model.learning_rate", "0.02", "--checkpoint.keep", "5"]
    assert command.run(resume("lean", "changed", *change), home) == 2
    said = log(home)
    assert "checkpoint.keep: 3 -> 5" in said.split("changed, and taken over:")[-1]
    assert "model.learning_rate: 0.01 -> 0.02" in said.split("cannot go on exactly")[-1]
    assert "--run.allow_changes true" in said
    assert ((run / "config.yaml").read_text(), shown(run)) == (config, events)
    allowed = [*change, "--run.allow_changes", "true"]
    assert command.run(resume("lean", "changed", *allowed), home) == 0, log(home)
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert saved["model"]["learning_rate"] == 0.02
    # Asked for once, not for every start from this file.
    assert (saved["run"]["allow_changes"], saved["ckpt_path"]) == (False, None)


class Ranks:
    """Starts the console script as a user does, on two ranks."""

    SHARDED = (
        *("--trainer.strategy", "lit_sparse.distributed.DeepSpeedSparseStrategy"),
        *("--trainer.strategy.stage", "3"),
    )

    def __init__(self, home, *strategy):
        self.home, self.options = home, ["--trainer.devices", "2", *strategy]

    def start(self, arguments):
        command = [sys.executable, "-m", "lit_sparse", *arguments, *self.options]
        with open(self.home / "log", "ab") as output:
            return subprocess.Popen(
                [*command, "--data.validation_rows", "2"],
                cwd=self.home,
                stdout=output,
                stderr=output,
                start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )

    def run(self, arguments):
        return self.start(arguments).wait()


@pytest.fixture(scope="module")
def sharded(home):
    """Two ranks with shards, and "runs/sharded", which was stopped by SIGTERM and continued."""
    ranks = Ranks(home, *Ranks.SHARDED)
    first = ranks.start(fit("lean", "sharded"))
    wait_for_step(home / "runs" / "sharded", 3)
    os.kill(first.pid, signal.SIGTERM)  # rank 0 alone: the other must stop with it
    assert first.wait() == 128 + signal.SIGTERM, log(home)
    assert ranks.run(resume("lean", "sharded")) == 0, log(home)
    return ranks


def test_two_ranks_with_shards_stop_together_and_go_on(home, sharded):
    run = home / "runs" / "sharded"
    kept = checkpoints(run / "checkpoints")
    assert [path.name for path in kept] == [f"step={n}.ckpt" for n in (8, 15, 16, 18, 21, 24)]
    assert [damage(path) for path in kept] == [None] * 6
    ours, one_process = (np.array(losses(r)) for r in (run, home / "runs" / "lean"))
    assert ours == pytest.approx(one_process, rel=1e-4)


@pytest.mark.parametrize("change", ["one rank", "another stage", "no DeepSpeed"])
def test_shards_are_for_the_same_ranks(command, home, sharded, change):
    one = ["--trainer.devices", "1"]
    options = {
        "one rank": [*Ranks.SHARDED, *one],
        "another stage": [*sharded.options, "--trainer.strategy.stage", "2"],
        "no DeepSpeed": one,
    }[change]
    config = (home / "runs" / "sharded" / "config.yaml").read_text()
    for start in (resume("lean", "sharded"), ["validate", *resume("lean", "sharded")[1:]]):
        assert command.run([*start, *options], home) == 2
        said = log(home).splitlines()[-1]
        assert "is sharded for stage 3 on 2 data-parallel x 1 sequence-parallel ranks" in said
        assert "lit-sparse export" in said
    assert (home / "runs" / "sharded" / "config.yaml").read_text() == config


def test_a_file_is_not_for_a_run_with_shards(command, home, sharded):
    assert command.run([*resume("lean", "lean"), *Ranks.SHARDED], home) == 2
    assert "is not sharded, but this run is sharded for stage 3" in log(home).splitlines()[-1]


@pytest.mark.slow
def test_going_back_abandons_newer_directories(command, home, sharded):
    run = shutil.copytree(home / "runs" / "sharded", home / "runs" / "sharded_rewound")
    older = ["--ckpt_path", "runs/sharded_rewound/checkpoints/step=21.ckpt"]
    begin = fit("lean", "sharded_rewound", *older)
    assert sharded.run(begin) == 2
    assert "--run.rewind true" in log(home)
    assert sharded.run([*begin, "--run.rewind", "true"]) == 0, log(home)
    assert (run / "checkpoints" / "abandoned" / "step=24.ckpt" / "manifest.json").is_file()
    assert_same_run(run, home / "runs" / "sharded")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [("--trainer.strategy", "ddp"), Ranks.SHARDED])
def test_with_two_ranks_in_fresh_processes(home, strategy):
    """The console script with all monitors: killed, told to stop, and continued."""
    ranks, name = Ranks(home, *strategy), f"ranks_{len(strategy)}"
    assert ranks.run(fit("whole", name)) == 0, log(home)
    run = home / "runs" / f"{name}_killed"
    first = ranks.start(fit("whole", run.name))
    wait_for_step(run, 3)
    os.killpg(first.pid, signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    for number, step in ((signal.SIGTERM, 9), (signal.SIGINT, 15)):
        again = ranks.start(resume("whole", run.name))
        wait_for_step(run, step)
        if number == signal.SIGINT:
            os.killpg(again.pid, number)  # as a terminal does
        else:
            os.kill(again.pid, number)
        assert again.wait() == 128 + number
    assert ranks.run(resume("whole", run.name)) == 0, log(home)
    assert_same_run(run, home / "runs" / name)


@pytest.mark.slow
def test_tensorboard_shows_one_curve(command, home):
    """TensorBoard itself, with its own data server, on a run that was killed and continued."""
    board = home / "board"
    name = ["--run.root", str(board)]
    pid = command.start(fit("lean", "killed", *name), home)
    wait_for_step(board / "killed", 9)
    os.kill(pid, signal.SIGKILL)
    command.wait()
    assert command.run(resume("lean", "killed", *name), home) == 0, log(home)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "tensorboard.main", f"--logdir={board}", f"--port={port}"]
    )
    url = f"http://localhost:{port}/data/plugin/scalars/scalars?tag=train/loss&run=killed"
    try:
        end, curve = time.monotonic() + 60, []
        while len(curve) < 12 and time.monotonic() < end:
            time.sleep(0.5)
            with contextlib.suppress(OSError), urllib.request.urlopen(url) as answer:
                curve = json.load(answer)
    finally:
        server.terminate()
        server.wait()
    assert [x for _, x, _ in curve] == list(range(1, 24, 2))
