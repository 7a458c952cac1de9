"""One rank is killed or hangs: the job ends soon, and says so in a line. Real processes."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
import yaml

from lit_sparse.distributed.failure import lost_contact

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
    },
    "sparse_attention": {
        "budget": {"alpha": 2.0, "floor": 80, "sink": 16},
        "block": 16,
        "tile": 16,
    },
    "curriculum": {"stages": [{"length": 256, "steps": 10000}]},
    "checkpoint": {"every_n_steps": 3, "keep": 1},
    "data": {"path": "corpus", "row_tokens": 256, "validation_rows": 1, "validation_fraction": 0.2},
    "trainer": {
        "accelerator": "cpu",
        "devices": 2,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    },
}


@pytest.fixture
def start(tmp_path, corpus):
    """Starts a job of two ranks that share a row; returns it with its two processes, training."""
    jobs = []

    def job(**strategy):
        options = {"stage": 3, "sequence_parallel": 2, **strategy}
        config = {**CONFIG, "trainer": {**CONFIG["trainer"]}}
        config["trainer"]["strategy"] = {
            "class_path": "lit_sparse.distributed.DeepSpeedSparseStrategy",
            "init_args": options,
        }
        (tmp_path / "job.yaml").write_text(yaml.safe_dump(config))
        command = [sys.executable, "-m", "lit_sparse", "fit", "--config", "job.yaml"]
        with open(tmp_path / "log", "w") as log:
            started = subprocess.Popen(
                command,
                cwd=tmp_path,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        jobs.append(started)
        checkpoints = tmp_path / "runs" / "job" / "checkpoints"
        until = time.monotonic() + 120
        while not list(checkpoints.glob("step=*.ckpt")):
            assert started.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < until, (tmp_path / "log").read_text()
            time.sleep(0.2)
        ranks = [psutil.Process(started.pid), *psutil.Process(started.pid).children()]
        assert len(ranks) == 2
        return started, ranks

    yield job
    for started in jobs:
        if started.poll() is None:
            os.killpg(started.pid, signal.SIGKILL)
            started.wait()


def _ends(ranks, log, within):
    _, alive = psutil.wait_procs(ranks, timeout=within)
    assert not alive
    assert ranks[0].returncode != 0
    text = log.read_text()
    assert "Traceback" not in text, text[-3000:]
    return [line for line in text.splitlines() if line.startswith("lit-sparse: error")]


def test_a_killed_rank_ends_the_job(start, tmp_path):
    _, ranks = start()
    ranks[1].kill()
    (line,) = _ends(ranks, tmp_path / "log", within=60)
    assert line.startswith("lit-sparse: error: rank 0 lost contact with another rank, and ends.")
    assert "--ckpt_path last" in line


@pytest.mark.slow
def test_a_killed_first_rank_ends_the_job(start, tmp_path):
    _, ranks = start()
    ranks[0].kill()
    (line,) = _ends(ranks, tmp_path / "log", within=60)
    assert "rank 1 lost contact" in line


@pytest.mark.slow
def test_a_rank_that_hangs_ends_the_job_by_the_timeout(start, tmp_path):
    job, ranks = start(timeout_minutes=0.2)
    ranks[1].suspend()
    began = time.monotonic()
    assert job.wait(60) == 1
    assert time.monotonic() - began > 5
    (line,) = [x for x in (tmp_path / "log").read_text().splitlines() if "lit-sparse: error" in x]
    assert "rank 0 waited in vain for another rank" in line
    ranks[1].kill()


def test_other_errors_are_not_of_the_communication():
    assert lost_contact(RuntimeError("Connection closed by peer")) is None, "one process"
    assert lost_contact(ValueError("timeout")) is None
    assert "lost contact" in lost_contact(torch.distributed.DistNetworkError("gone"))


def test_the_reason_is_not_lost():
    error = torch.distributed.DistBackendError(
        "NCCL error in: ProcessGroupNCCL.cpp, invalid usage\nLast error:\nDuplicate GPU detected"
    )
    line = lost_contact(error)
    assert line.endswith("Last error: Duplicate GPU detected")
    assert "\n" not in line
