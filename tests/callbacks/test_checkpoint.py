"""Checkpoints and seeds in a plain Trainer, without the command line."""

import itertools
import os
import signal

import pytest
import torch
from lightning_fabric.plugins.environments import SLURMEnvironment
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from lit_sparse.callbacks import RunCheckpoint, StepSeed
from lit_sparse.callbacks.step_seed import seed_of
from lit_sparse.callbacks.stop import StopSignals
from lit_sparse.training.checkpoint import checkpoints


class Dropped(LightningModule):
    """Learns nothing but what its dropout and some noise leave of ones."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(64, 1)
        for parameter in self.layer.parameters():
            torch.nn.init.zeros_(parameter)
        self.dropout = torch.nn.Dropout(0.5)

    def training_step(self, batch, batch_idx):
        noise = torch.rand(())
        self.log("noise", noise, on_step=True, on_epoch=True)
        self.log("largest", noise, on_step=False, on_epoch=True, reduce_fx="max")
        if batch_idx == 1:
            self.log("seldom", noise)
        return self.layer(self.dropout(batch)).sum() + noise * self.layer.bias.sum()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.1)


class Counting(Dropped):
    """Asks how many steps there will be, for which Lightning makes the loaders at once."""

    def configure_optimizers(self):
        assert self.trainer.estimated_stepping_batches == 9
        return super().configure_optimizers()


class Interrupt(Callback):
    def __init__(self, batch):
        self.batch = batch

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == self.batch:
            raise RuntimeError("pulled the plug")


class Numbered:
    """A loader that can say how many of its batches it has given."""

    def __init__(self):
        self.given = self.start = 0

    def __len__(self):
        return 6

    def __iter__(self):
        self.given, self.start = self.start, 0
        return self

    def __next__(self):
        if self.given == 6:
            raise StopIteration
        self.given += 1
        return torch.full((2, 64), float(self.given))

    def state_dict(self):
        return {"given": self.given}

    def load_state_dict(self, state_dict):
        self.start = state_dict["given"]


def _train(directory, *callbacks, checkpoint=None, keep=3, loader=None, model=None, **length):
    loader = loader or DataLoader(torch.ones(32, 64), batch_size=2)
    trainer = Trainer(
        default_root_dir=directory,
        **(length or {"max_steps": 8}),
        accumulate_grad_batches=2,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[RunCheckpoint(every_n_steps=2, keep=keep), StepSeed(seed=3), *callbacks],
    )
    model = model or Dropped()
    trainer.fit(model, loader, ckpt_path=checkpoint)
    return model, trainer.callback_metrics


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("batch", [4, 5, 9])
def test_dropout_and_metrics_go_on_as_if_the_run_had_not_stopped(tmp_path, batch):
    whole, shown = _train(tmp_path / "whole")
    with pytest.raises(RuntimeError, match="plug"):
        _train(tmp_path / "cut", Interrupt(batch))
    torch.manual_seed(batch)  # whatever happens between the two processes
    newest = checkpoints(tmp_path / "cut" / "checkpoints")[-1]
    continued, shown_again = _train(tmp_path / "cut", checkpoint=newest)
    assert torch.equal(continued.layer.weight, whole.layer.weight)
    assert torch.equal(continued.layer.bias, whole.layer.bias)
    assert set(shown) == {"noise", "noise_step", "noise_epoch", "largest", "seldom"}
    assert shown_again == shown  # means and maxima over the whole epoch too


@pytest.mark.filterwarnings("ignore")
def test_the_newest_are_kept_and_lie_between_steps(tmp_path):
    _train(tmp_path, keep=2)
    found = checkpoints(tmp_path / "checkpoints")
    assert [p.name for p in found] == ["step=6.ckpt", "step=8.ckpt"]
    for path, step in zip(found, (6, 8), strict=True):
        saved = torch.load(path, weights_only=True)
        batches = saved["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]
        assert set(batches.values()) == {2 * step}
        assert saved["optimizer_states"][0]["state"][0]["step"] == step


@pytest.mark.filterwarnings("ignore")
def test_the_best_is_that_of_a_model_checkpoint_beside_it(tmp_path):
    best = ModelCheckpoint(tmp_path / "best", monitor="noise")
    model, _ = _train(tmp_path, best, max_epochs=1)
    assert model.trainer.checkpoint_callback.best_model_path == best.best_model_path != ""
    model, _ = _train(tmp_path, max_epochs=1)
    with pytest.raises(ValueError, match="not configured to save the best model"):
        model.trainer.validate(model, torch.ones(1), ckpt_path="best")


def test_seeds_differ_by_step_micro_batch_and_rank():
    seeds = {seed_of(0, *place) for place in itertools.product(range(9), range(2), range(2))}
    assert len(seeds) == 36
    assert seed_of(0, 1, 0, 0) == seed_of(0, 1, 0, 0) != seed_of(1, 1, 0, 0)


def test_bad_options_are_named():
    with pytest.raises(ValueError, match="checkpoint.every_n_steps must be >= 1, got 0"):
        RunCheckpoint(every_n_steps=0)
    with pytest.raises(ValueError, match="checkpoint.keep must be >= 1, got 0"):
        RunCheckpoint(keep=0)
    with pytest.raises(ValueError, match="StepSeed seed must be >= 0"):
        StepSeed(seed=-1)


@pytest.fixture
def trainer():
    return Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)


def _status_of(child):
    """How a process ends that does this."""
    pid = os.fork()
    if pid == 0:
        child()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("step", [2, 4, 6])
def test_a_loader_with_a_state_goes_on_where_it_was(tmp_path, step):
    """Within an epoch of three steps and in the next ones, one of them not begun yet."""
    whole, _ = _train(tmp_path, keep=9, loader=Numbered())
    newest = tmp_path / "checkpoints" / f"step={step}.ckpt"
    continued, _ = _train(tmp_path / "again", checkpoint=newest, loader=Numbered())
    assert torch.equal(continued.layer.weight, whole.layer.weight)


@pytest.mark.filterwarnings("ignore")
def test_a_module_that_asks_for_the_number_of_steps_changes_nothing(tmp_path):
    whole, _ = _train(tmp_path, keep=9, loader=Numbered(), model=Counting(), max_epochs=3)
    start = tmp_path / "checkpoints" / "step=4.ckpt"
    again = tmp_path / "again"
    continued, _ = _train(
        again, checkpoint=start, loader=Numbered(), model=Counting(), max_epochs=3
    )
    assert torch.equal(continued.layer.weight, whole.layer.weight)


def test_a_second_signal_ends_the_process_at_once(trainer):
    def child(signals):
        stop = StopSignals()
        stop.install(trainer)
        for number in signals:
            os.kill(os.getpid(), number)
        os._exit(stop.agreed(trainer))

    assert _status_of(lambda: child([signal.SIGTERM])) == signal.SIGTERM
    assert _status_of(lambda: child([signal.SIGINT])) == signal.SIGINT
    assert _status_of(lambda: child([signal.SIGTERM] * 2)) == -signal.SIGTERM


def test_a_data_worker_survives_ctrl_c_and_dies_when_it_is_told_to(trainer):
    stop = StopSignals()
    stop.install(trainer)
    try:
        assert _status_of(lambda: os.kill(os.getpid(), signal.SIGINT)) == 0
        assert _status_of(lambda: os.kill(os.getpid(), signal.SIGTERM)) == -signal.SIGTERM
        assert stop.agreed(trainer) == 0
    finally:
        stop.restore()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_slurm_job_goes_back_to_its_queue_on_its_own_signal(tmp_path, monkeypatch):
    (tmp_path / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/said\n')
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    for name, value in {"JOB_ID": "7", "JOB_NAME": "train", "NTASKS": "1", "PROCID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("SLURM_LOCALID", "0")
    monkeypatch.setenv("SLURM_NODEID", "0")
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, plugins=[SLURMEnvironment()]
    )
    stop = StopSignals()
    stop.install(trainer)
    try:
        os.kill(os.getpid(), signal.SIGUSR1)
        received = stop.agreed(trainer)
    finally:
        stop.restore()
    assert received == signal.SIGUSR1
    stop.requeue(trainer, signal.SIGTERM)
    assert not (tmp_path / "said").exists()
    stop.requeue(trainer, received)
    assert (tmp_path / "said").read_text() == "requeue 7\n"
