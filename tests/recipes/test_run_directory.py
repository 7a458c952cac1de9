"""What may change while a run goes on, and what is said about it."""

import os

import pytest
import torch
import yaml

from lit_sparse.recipes.changes import changes
from lit_sparse.recipes.run_directory import Run

CONFIG = {
    "seed_everything": 0,
    "run": {"name": "a", "overwrite": False},
    "checkpoint": {"every_n_steps": 10},
    "model": {"learning_rate": 0.001, "betas": [0.9, 0.95], "architecture": {"hidden_size": 32}},
    "curriculum": {
        "stages": [{"length": 64, "steps": 8, "rope": None}, {"length": 128, "steps": 8}],
        "validate_every": None,
    },
    "data": {"path": "corpus", "num_workers": 0},
    "trainer": {
        "devices": "auto",
        "log_every_n_steps": 10,
        "callbacks": [
            {"class_path": "lit_sparse.callbacks.CollapseMonitor", "init_args": {"rows": 64}}
        ],
    },
}


def _with(**keys):
    """CONFIG with other values, `a__b=1` for the key a.b."""
    config = yaml.safe_load(yaml.safe_dump(CONFIG))
    for key, value in keys.items():
        *path, last = key.split("__")
        at = config
        for name in path:
            at = at[name]
        at[last] = value
    return config


@pytest.mark.parametrize(
    "keys",
    [
        {"run__overwrite": True},
        {"checkpoint__every_n_steps": 5},
        {"data__num_workers": 2},
        {"trainer__log_every_n_steps": 1},
        {"trainer__callbacks": []},
        {"curriculum__validate_every": 5},
    ],
)
def test_what_only_watches_may_change(keys):
    found = changes(CONFIG, _with(**keys))
    assert found
    assert all(change.harmless for change in found)


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        ({"seed_everything": 1}, "seed_everything: 0 -> 1"),
        ({"model__learning_rate": 0.002}, "model.learning_rate: 0.001 -> 0.002"),
        ({"model__betas": [0.9, 0.99]}, "model.betas: [0.9, 0.95] -> [0.9, 0.99]"),
        (
            {"curriculum__stages": [{"length": 64, "steps": 8}, {"length": 256, "steps": 8}]},
            "curriculum.stages[1].length: 128 -> 256",
        ),
        ({"data__path": "other"}, "data.path: corpus -> other"),
        ({"data__unheard_of": 1}, "data.unheard_of: None -> 1"),
        ({"trainer__devices": 2}, "trainer.devices: auto -> 2"),
        (
            {"trainer__callbacks": [{"class_path": "my.Own", "init_args": {"rate": 2}}]},
            "trainer.callbacks.Own.rate: None -> 2",
        ),
    ],
)
def test_what_makes_another_run_does_not(keys, text):
    assert text in [str(c) for c in changes(CONFIG, _with(**keys)) if not c.harmless]


@pytest.fixture
def run(tmp_path):
    run = Run(name="a", root=str(tmp_path))
    run.checkpoints.mkdir(parents=True)
    for step in (4, 8):
        state = {"lit_sparse": {"ranks": 1, "data": "cafe", "events": {}}}
        torch.save(state, run.checkpoints / f"step={step}.ckpt")
    (run.path / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    return run


def test_the_same_run_goes_on_without_a_word(run, capsys):
    newest = run.checkpoints / "step=8.ckpt"
    assert run.checkpoint("last") == str(newest)
    run.check_resume(newest, CONFIG, 1, "cafe")
    run.check_resume(newest, CONFIG, 1, None)
    assert capsys.readouterr().out == ""


def test_other_data_and_ranks_are_refused_like_other_keys(run, capsys):
    newest = run.checkpoints / "step=8.ckpt"
    with pytest.raises(ValueError) as error:
        run.check_resume(newest, _with(seed_everything=5), 2, "beef")
    for line in (
        "seed_everything: 0 -> 5",
        "number of ranks: 1 -> 2",
        "rows (content of data.path, packing, stages): cafe -> beef",
        "--run.allow_changes true",
    ):
        assert line in str(error.value)
    run.allow_changes = True
    run.check_resume(newest, _with(seed_everything=5), 2, "beef")
    assert "no exact continuation:\n  seed_everything: 0 -> 5" in capsys.readouterr().out


@pytest.mark.parametrize("keys", [{}, {"overwrite": True}])
def test_one_process_at_a_time_trains_in_a_directory(run, tmp_path, keys):
    run.prepare(resume=True)
    other = os.fork()
    if other == 0:
        try:
            Run(name="a", root=str(tmp_path), **keys).prepare(resume=not keys)
        except ValueError as error:
            os._exit("another process trains" in str(error))
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(other, 0)[1]) == 1
    assert len(list(run.checkpoints.iterdir())) == 2


def test_another_runs_checkpoint_starts_a_run_of_its_own(run, tmp_path):
    branch = Run(name="b", root=str(tmp_path))
    branch.prepare(resume=True)
    branch.check_resume(run.checkpoints / "step=4.ckpt", CONFIG, 1, "cafe")
    branch.rewind_to(run.checkpoints / "step=4.ckpt")
    assert len(list(run.checkpoints.iterdir())) == 2
    with pytest.raises(ValueError, match="model.learning_rate"):
        branch.check_resume(
            run.checkpoints / "step=4.ckpt", _with(model__learning_rate=1.0), 1, "cafe"
        )


def test_a_checkpoint_of_unknown_origin_is_used_with_a_warning(run):
    torch.save({"state_dict": {}}, run.checkpoints / "step=9.ckpt")
    with pytest.warns(UserWarning, match="was not written by lit-sparse"):
        run.check_resume(run.checkpoints / "step=9.ckpt", CONFIG, 1, None)


def test_a_run_without_a_checkpoint_says_how_to_start_over(tmp_path):
    with pytest.raises(ValueError, match=r"holds no checkpoint; .*--run.overwrite true"):
        Run(name="none", root=str(tmp_path)).checkpoint("last")
