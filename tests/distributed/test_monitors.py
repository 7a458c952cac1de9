"""Monitors and guards under ZeRO and sequence parallelism find what one process finds."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_sparse import sparsify
from lit_sparse.attention.probe import sample_rows
from lit_sparse.callbacks.step_seed import seed_of
from lit_sparse.models import observe
from lit_sparse.training import SparseLM

HERE = Path(__file__).parent
ONE = "1x1:watch@0,own@0,padded@0,guard@0,recall@0"
SOME = ["1x2:watch@2,own@2,guard@2,stop@2,recall@3", "2x1:watch@3,unchanged@3,guard@3"]
MORE = [
    "1x2:watch@0,watch@1,watch@3,watch@3_offload,own@3,unchanged@3,guard@0,guard@3",
    "2x1:watch@0,watch@1,watch@2,own@0,padded@3,unchanged@0,guard@0,guard@1,stop@3,recall@3",
    "2x2:watch@0,watch@1,watch@2,watch@2_offload,watch@3,own@1,unchanged@1,unchanged@3,guard@0,"
    "guard@1,guard@2,guard@3,guard@2_offload,guard@3_offload,stop@3,recall@0,recall@3",
]


def run(out, *sizes):
    """Case -> what each rank found, first that of one process; see monitors.py."""
    subprocess.run(
        [sys.executable, str(HERE / "monitors.py"), str(out), *sizes],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=True,
        timeout=900,
    )
    found = {}
    for entry in sizes:
        size, _, cases = entry.partition(":")
        for case in cases.split(","):
            ranks = sorted((out / size / case).glob("*.pt"))
            found[size, case] = [torch.load(path, weights_only=False) for path in ranks]
    return found


def cases(found, name):
    """Size, stage and what each rank found, of the cases with several ranks."""
    for (size, case), ranks in found.items():
        kind, _, stage = case.partition("@")
        if kind == name and size != "1x1":
            yield size, stage, ranks


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("monitors")


@pytest.fixture(scope="module")
def some(out):
    return run(out, ONE, *SOME)


@pytest.fixture(scope="module", params=["some", pytest.param("more", marks=pytest.mark.slow)])
def found(request, out, some):
    if request.param == "some":
        return some
    return {**run(out, *MORE), **{key: ranks for key, ranks in some.items() if key[0] == "1x1"}}


@pytest.fixture(scope="module")
def runs():
    """The module that makes what the ranks train."""
    sys.path.insert(0, str(HERE))
    import runs

    sys.path.remove(str(HERE))
    return runs


def brute_force(runs, data_ranks):
    """Layer -> context [R], tau, entropy and output error [R, 8] of the rows that `data_ranks`
    ranks sample in the first step, from whole attention matrices.
    """
    torch.manual_seed(0)
    model = SparseLM(architecture=runs.ARCHITECTURE).model
    sparsify(model, runs.BUDGET, **runs.ATTENTION)
    found = {layer: [] for layer in range(2)}
    share = runs.ROWS // data_ranks
    for rank, row in enumerate(runs.rows(2)[:data_ranks]):

        def look(layer, q, k, v, out, lse, selection, options, documents, rank=rank):
            draw = torch.Generator().manual_seed(seed_of(0, 0, rank))
            rows = sample_rows(selection.plan, share, draw, 16)
            keys, values = (x.repeat_interleave(2, 1).transpose(0, 1) for x in (k, v))
            ends = torch.tensor(documents.cu_seqlens[1:])
            document = torch.bucketize(torch.arange(len(q)), ends, right=True)
            visible = (document[:, None] == document).tril()
            logits = options.scale * q.transpose(0, 1).double() @ keys.transpose(1, 2).double()
            p = logits.masked_fill(~visible, -torch.inf).softmax(-1)
            kept = selection.to_mask().repeat_interleave(2, 0)
            dense = (p @ values.double()).transpose(0, 1)
            error = (dense - out).norm(dim=-1) / dense.norm(dim=-1)
            entropy = -torch.special.xlogy(p, p).sum(-1).T
            tau = (p * ~kept).sum(-1).T
            context = visible.sum(-1)
            found[layer].append([x[rows] for x in (context, tau, entropy, error)])

        with torch.no_grad(), observe(model, look):
            model(input_ids=row["input_ids"], position_ids=row["position_ids"], use_cache=False)
    return {
        layer: [torch.cat(x) for x in zip(*parts, strict=True)] for layer, parts in found.items()
    }


def test_a_sample_has_the_rows_of_all_data_parallel_ranks_and_all_heads(found, runs):
    for size, _, ranks in cases(found, "watch"):
        sample = ranks[0]["samples"][0]
        expected = brute_force(runs, int(size[0]))
        for layer, (context, tau, entropy, error) in expected.items():
            shown = sample["layers"][layer]
            assert torch.equal(shown["context"], context)
            torch.testing.assert_close(shown["tau"].double(), tau, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(shown["entropy"].double(), entropy, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(sample["error"][layer].double(), error, atol=1e-4, rtol=1e-3)
            assert torch.equal(sample["budgets"][layer], runs.BUDGET(context))
        assert tau.max() > 0.1
        assert sample["heads"] == tuple(range(8))


def test_a_sample_is_the_same_on_all_ranks_and_in_one_process(found):
    (one,) = found["1x1", "watch@0"]
    for size, _, ranks in cases(found, "watch"):
        for other in ranks[1:]:
            assert_equal(other["samples"], ranks[0]["samples"])
        if size == "1x2":  # the same rows
            assert_equal(ranks[0]["samples"], one["samples"], rtol=1e-4, atol=1e-5)


def assert_equal(ours, theirs, rtol=0.0, atol=0.0):
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol, equal_nan=True)


def test_a_comparison_counts_documents_that_span_ranks_once(found):
    (one,) = found["1x1", "watch@0"]
    assert one["documents"][:, 0].sum() == 4 * 256
    for _, _, ranks in cases(found, "watch"):
        for rank in ranks:
            torch.testing.assert_close(rank["sums"], one["sums"], rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(rank["documents"], one["documents"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["own", "padded"])
def test_a_module_that_names_no_documents_or_pads_is_compared_too(found, name):
    (one,) = found["1x1", f"{name}@0"]
    assert one["gap/kl"] > 0.1
    assert one["gap/loss_delta"] != 0
    for _, _, ranks in cases(found, name):
        for rank in ranks:
            assert rank == pytest.approx(one, rel=1e-5, abs=1e-7)


def kept(names):
    """Without those that the sampled rows decide about."""
    return {name for name in names if not name.startswith("gap_by_context/")}


def test_what_is_logged_is_that_of_one_process_on_every_rank(found):
    (one,) = found["1x1", "watch@0"]
    for size, stage, ranks in cases(found, "watch"):
        for rank in ranks:
            assert rank["tokens"] == 256 * int(size[0])  # not times the ranks that share a row
            assert rank["alerts"] == ranks[0]["alerts"]
            for step, expected in zip(rank["steps"], one["steps"], strict=True):
                assert kept(step) == kept(expected)
                for name in expected:
                    if "grad_norm" in name or name == "train/loss":
                        assert step[name] == pytest.approx(expected[name], rel=1e-5), (stage, name)
            for name in ("gap/kl", "gap/loss_delta", "gap/top1_agreement", "val/loss"):
                assert rank["last"][name] == pytest.approx(one["last"][name], rel=1e-5)
        own = {"train/tokens_per_second"}
        for step in zip(*(rank["steps"] for rank in ranks), strict=True):
            first, *others = ({k: v for k, v in x.items() if k not in own} for x in step)
            assert all(other == pytest.approx(first, rel=0, nan_ok=True) for other in others)
    assert one["alerts"]


def test_tensorboard_has_every_number_once(found, out):
    def read(size, case):
        folder = out / size / case
        assert len(list(folder.glob("events.*"))) == 1
        events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0}).Reload()
        tags = events.Tags()
        for tag in kept(tags["scalars"]) - {"epoch"}:
            steps = [event.step for event in events.Scalars(tag)]
            assert steps in ([0, 1], [1]), tag
        texts = [tag for tag in tags["tensors"] if tag.startswith("alerts/")]
        assert [len(events.Tensors(tag)) for tag in texts] == [1]
        return kept(tags["scalars"]), texts, set(tags["images"])

    expected = read("1x1", "watch@0")
    for size, stage, _ in cases(found, "watch"):
        assert read(size, f"watch@{stage}") == expected


def test_weights_are_the_same_with_and_without_monitors(found):
    for _, _, ranks in cases(found, "unchanged"):
        for rank in ranks:
            assert torch.equal(rank["with"], rank["without"])
            assert torch.equal(rank["with"], ranks[0]["with"])


def test_what_is_not_finite_is_named_as_in_one_process_and_thrown_away(found):
    (one,) = found["1x1", "guard@0"]
    assert one["alerts"] == [
        (1, "the loss, though all layers' outputs are finite, is not finite"),
        (2, "a gradient in model.model.layers.1 is not finite"),
        (3, "the output of model.model.layers.0 is not finite"),
    ]
    for size, stage, ranks in cases(found, "guard"):
        for rank in ranks:
            assert rank["alerts"] == one["alerts"], (size, stage)
            assert rank["thrown"] == 3
            first, *thrown, last = rank["weights"]
            assert all(torch.equal(first, after) for after in thrown)
            assert not torch.equal(first, last)
            torch.testing.assert_close(last, one["weights"][-1], rtol=1e-4, atol=1e-5)


def test_an_alert_that_stops_stops_all_ranks_after_the_step(found):
    for _, _, ranks in cases(found, "stop"):
        assert [rank["step"] for rank in ranks] == [1] * len(ranks)


def test_passkeys_curriculum_and_controller_go_as_in_one_process(found):
    (one,) = found["1x1", "recall@0"]
    assert len({tuple(tokens) for tokens in one["chosen"]}) > 4
    assert [step["curriculum/length"] for step in one["steps"]] == [128, 128, 256, 256]
    assert one["steps"][-1]["controller/alpha_factor"] > 1
    same = ("curriculum/stage", "curriculum/length", "curriculum/rope_factor", "controller/alpha")
    for _, _, ranks in cases(found, "recall"):
        for rank in ranks:
            assert rank["chosen"] == one["chosen"]
            for step, expected in zip(rank["steps"], one["steps"], strict=True):
                assert [step[name] for name in same] == [expected[name] for name in same]
                assert step["train/loss"] == pytest.approx(expected["train/loss"], rel=1e-4)
            for name in ("passkey/teacher_forced", "passkey/token_accuracy", "passkey/generated"):
                assert rank["last"][name] == one["last"][name]
            assert rank["last"]["val/loss"] == pytest.approx(one["last"]["val/loss"], rel=1e-4)
