"""Gradients and losses of many ranks are those of one process: real engines, real gloo ranks."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lit_sparse.attention import select
from lit_sparse.models import find_models, observe

SCRIPT = Path(__file__).with_name("parity.py")


@pytest.fixture(scope="module")
def parity():
    """The script as a module: its model, data and training, for one process."""
    spec = importlib.util.spec_from_file_location("parity", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield module
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def one(parity):
    """Micro-batches of a step -> what one process finds, by Lightning's default strategy."""
    return {rows: parity.gradients("auto", 1, rows, 1) for rows in (1, 2, 4, 8)}


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """DATAxSEQUENCE -> what its ranks found; spawned when first asked for."""
    found = {}

    def ask(size):
        if size not in found:
            out = tmp_path_factory.mktemp("parity") / "found.pt"
            command = [sys.executable, str(SCRIPT), size, str(out)]
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
            done = subprocess.run(command, env=environment, capture_output=True, timeout=300)
            assert done.returncode == 0, done.stderr.decode()[-3000:]
            found[size] = torch.load(out)
        return found[size]

    return ask


def _same_gradients(found, expected):
    assert found["gradients"].keys() == expected["gradients"].keys()
    for name, gradient in expected["gradients"].items():
        error = (found["gradients"][name] - gradient).norm() / gradient.norm()
        assert error < 1e-5, f"{name}: {error}"
    for ours, theirs in zip(found["logged"], expected["logged"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5), "loss and norm, before and after clipping"


@pytest.mark.parametrize("size", ["2x1", "1x2", "2x2"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_gradients_are_those_of_one_process(one, many, size, stage, accumulate):
    data_size = int(size[0])
    _same_gradients(many(size)[stage, accumulate], one[data_size * accumulate])


def test_a_model_that_configure_model_makes_starts_from_its_own_weights(one, many):
    _same_gradients(many("1x2")["late"], one[1])


def test_plain_ddp_is_right_too(one, many):
    _same_gradients(many("2x1")["ddp"], one[8])


def test_a_module_may_take_its_steps_itself(one, many):
    _same_gradients(many("2x1")["manual"], {**one[2], "logged": []})


@pytest.mark.parametrize("how", [(1, 1), (3, 1)])
def test_the_loss_of_a_step_is_that_of_its_own_row(one, many, how):
    """The first rank has the first of two rows, counted twice: DeepSpeed averages over ranks."""
    alone = [2 * loss for loss in one[2]["losses"][::2]]
    assert many("2x1")[how]["losses"] == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_offloading_to_the_cpu_changes_nothing(one, many, stage):
    _same_gradients(many("2x1")["offload", stage], one[8])


@pytest.fixture(scope="module")
def one_tied(parity):
    return parity.gradients("auto", 1, 4, 1, parity.make_module(tied=True))


@pytest.mark.parametrize("size", ["2x1", "1x2"])
def test_memory_features_change_nothing(parity, one, one_tied, many, size):
    for stage, tied in parity.MEMORY_CASES:
        _same_gradients(many(size)["memory", stage, tied], one_tied if tied else one[4])


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_four_ranks_that_share_a_row(one, many, stage):
    _same_gradients(many("1x4")[stage, 4], one[4])


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("one head", "= 2 does not divide the 1 key-value heads of LlamaForCausalLM; on 2 ranks"),
        ("not sparse", "LlamaForCausalLM does not run our attention: add SparseAttention"),
        ("unaware", "Unaware does not say that it shards sequences: pass shard_sequence"),
        ("float16", "trainer.precision: 16-mixed is for GPUs; set bf16-mixed"),
    ],
)
def test_what_ranks_cannot_do_is_refused(many, what, message):
    assert message in many("1x2")["refusals"][what]


def test_a_trained_model_takes_whole_rows(many):
    found = many("1x2")["generated"]
    assert found["after"] == found["whole"]


def test_thirty_steps_of_four_ranks_are_those_of_one(parity, many):
    alone = parity.curve("auto", 1, 1)
    assert alone[-1] < alone[0]
    assert many("2x2")["curve"] == pytest.approx(alone, rel=1e-4)


def test_a_rank_without_labels_is_among_them(parity):
    """What the cases above hold because of this: a rank of each kind has nothing to learn."""
    first, second, *_ = parity.rows(2)
    half = parity.ROW_TOKENS // 2
    assert (first["labels"][:, :half] == -100).all()
    assert (first["labels"][:, half:] != -100).any()
    assert (second["labels"] == -100).all()
    counts = [int((row["labels"] != -100).sum()) for row in parity.rows(8)]
    assert len(set(counts)) > 4


def test_the_selection_has_room_to_round(parity):
    """The selection is discontinuous: ranks that round differently may select differently. With
    these seeds the choice stays the same when queries and keys change by 1e-5 of themselves.
    """
    calls = []

    class Watch(parity.Callback):
        def on_train_start(self, trainer, pl_module):
            (model,) = find_models(pl_module)
            observe(model, lambda *call: calls.append(call))

    parity.train("auto", 1, 8, parity.Rows(8, steps=2), [parity.plugin(), Watch()])
    assert len(calls) == 2 * 2 * 8, "layers x steps x rows"
    noise = torch.Generator().manual_seed(0)
    for _, q, k, _, _, _, selection, options, documents in calls:
        assert 0 < selection.density < 0.9
        q, k = (x * (1 + 1e-5 * torch.randn(x.shape, generator=noise)) for x in (q, k))
        again = select(
            q,
            k,
            parity.BUDGET,
            cu_seqlens=documents.cu_seqlens,
            scale=options.scale,
            **parity.ATTENTION,
        )
        assert torch.equal(again.columns, selection.columns)
        assert torch.equal(again.entry, selection.entry)
