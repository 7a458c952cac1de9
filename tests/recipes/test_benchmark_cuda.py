"""The GPU benchmark, its code run on CPU tensors: the device is a seam, not a branch."""

import copy
import json
import sys
from dataclasses import replace
from statistics import median
from types import ModuleType

import pytest
import torch

from lit_sparse.attention import select, sparse_attention
from lit_sparse.budget import Budget
from lit_sparse.recipes.benchmark import (
    command,
    cost,
    cuda,
    cuda_report,
    main,
    peers,
    plot,
    tune,
    verify,
)
from lit_sparse.recipes.benchmark.clock import Clock, Part
from lit_sparse.recipes.benchmark.cost import Point, Schedule
from lit_sparse.recipes.benchmark.cuda import Benchmark
from lit_sparse.recipes.benchmark.report import BadArgument
from lit_sparse.recipes.benchmark.steps import Problem, executed_pairs, packed_inputs
from lit_sparse.recipes.benchmark.tune import search

CPU = torch.device("cpu")
LAW = Budget(4, floor=0, sink=16)
TINY = Problem(256, 4, 2, 16, "float32", LAW, 16, 16)
GOALS = Problem(0, 32, 8, 128, "bfloat16", Budget(16, floor=0), 64, None)
OPTIONS = """
    --device cuda --threads 1 --heads 4 --kv-heads 2 --head-dim 16 --dtype float32
    --block 16 --tile 16 --sink 16 --alpha 4 --lengths 256,128 --repeats 3
"""


pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is below what is always kept"),
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
]


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _short_verification(monkeypatch):
    monkeypatch.setattr(verify, "LENGTH", 120)


@pytest.fixture
def on_cpu(monkeypatch):
    """The command's CUDA job on CPU tensors; one peer that computes there."""
    monkeypatch.setattr(command, "_cuda", lambda: CPU)
    monkeypatch.setattr(cuda, "PEERS", {name: cuda.PEERS[name] for name in ("flash", "cudnn")})


@pytest.fixture
def fla(monkeypatch):
    """A stand-in for fla.ops.nsa with the signature and the conventions of its kernels."""

    def parallel_nsa(
        q, k, v, g_cmp=None, g_slc=None, g_swa=None, block_indices=None, block_counts=16,
        block_size=64, window_size=0, scale=None, cu_seqlens=None,
    ):  # fmt: skip
        _, tokens, heads, dim = q.shape
        groups = heads // k.shape[2]
        assert groups >= 16
        assert groups & (groups - 1) == 0
        slots = block_indices.shape[-1]
        assert slots & (slots - 1) == 0
        used = torch.arange(slots) < block_counts[..., None]
        chosen = torch.where(used & (block_indices >= 0), block_indices, -1).long()
        blocks = -(-tokens // block_size)
        seen = torch.zeros(1, tokens, k.shape[2], blocks + 1, dtype=torch.bool)
        seen.scatter_(-1, torch.where(chosen < 0, blocks, chosen), True)
        keys = seen[..., :blocks].repeat_interleave(block_size, -1)[..., :tokens]
        keys &= torch.ones(tokens, tokens, dtype=torch.bool).tril()[None, :, None]
        mask = keys.repeat_interleave(groups, 2).transpose(1, 2)
        k, v = (x.repeat_interleave(groups, 2) for x in (k, v))
        logits = (q.transpose(1, 2) @ k.permute(0, 2, 3, 1)) * dim**-0.5
        return (logits.masked_fill(~mask, -torch.inf).softmax(-1) @ v.transpose(1, 2)).transpose(
            1, 2
        )

    module = ModuleType("fla.ops.nsa")
    module.parallel_nsa = parallel_nsa
    for name in ("fla", "fla.ops"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "fla.ops.nsa", module)


def inputs_of(problem):
    q, k, v, grad = packed_inputs(problem)
    return (q, k, v, grad), select(q, k, problem.budget, block=problem.block, tile=problem.tile)


def benchmark(problems, contestants, save=lambda report: None, **options):
    options = {"seconds": None, "limits": (), **options}
    return Benchmark(
        problems, Clock(CPU, 3), None, save=save, progress=print, peers=contestants, **options
    )


# -- cost --


def test_floors_are_those_of_the_goals():
    # Milliseconds at 800 TFLOP/s, as the design states them.
    for length, stated in ((32768, 4.5), (131072, 36), (524288, 290), (1048576, 821)):
        problem = replace(GOALS, length=length)
        floor = cost.floor_ms(problem, cost.planned_pairs(problem), cost.GOAL_TFLOPS)
        assert floor == pytest.approx(stated, rel=0.03)


def test_planned_pairs_are_the_executed_ones():
    for length in (64, 250, 640):
        problem = replace(TINY, length=length)
        assert cost.planned_pairs(problem) == executed_pairs(inputs_of(problem)[1])
    everything = replace(TINY, budget=Budget.dense())
    assert cost.planned_pairs(everything) == cost.dense_pairs(everything) == 256 * 257 // 2


def test_rates():
    # 14 D FLOPs a pair and query head, of which 4 forward.
    assert cost.flops(TINY, 100) == 14 * 16 * 4 * 100
    assert cost.tflops(TINY, 10**9, cost.FORWARD, 1.0) == pytest.approx(4 * 16 * 4 * 1e9 / 1e9)
    assert cost.floor_rate("NVIDIA H100 80GB HBM3", 600.0) == 800.0
    assert cost.floor_rate("NVIDIA A100", 250.0) == cost.floor_rate(None, 250.0) == 250.0


def schedule(points, seconds):
    """At 1 TFLOP/s, and a clock that stands at `time[0]`."""
    time = [0.0]
    return Schedule(points, 1.0, seconds, now=lambda: time[0]), time


def test_peers_give_way_when_time_runs_short():
    sparse = Point("sparse", "sparse", 64, 1e12)
    dense = Point("flash", "dense", 64, 10e12)
    flex = Point("flex", "blocks", 64, 1e12)
    plan, time = schedule([sparse, dense, flex], None)
    assert all(plan.refusal(point) is None for point in (sparse, dense, flex))
    plan, time = schedule([sparse, dense, flex], sum(plan.estimate().values()) * 1.3)
    assert plan.refusal(flex) is None
    time[0] = plan.seconds / 2
    assert "no time" in plan.refusal(flex)
    assert plan.refusal(dense) is None
    time[0] = plan.seconds * 0.9
    assert plan.refusal(dense) is not None
    plan.drop(dense.name, dense.length)
    assert plan.estimate()["dense"] == 0.0


def test_predictions_follow_what_was_measured():
    short, long = (Point("flash", "dense", n, n * n * 1e6) for n in (1000, 2000))
    plan, _ = schedule([short, long], None)
    wall = 3.0 + cost.measuring_seconds(0.25, "dense")
    plan.done(short, step=0.25, wall=wall)
    assert plan.step_seconds(long) == pytest.approx(1.0)
    assert not plan.once(long)
    assert plan.predict(long) == pytest.approx(3.0 + cost.measuring_seconds(1.0, "dense"))
    assert plan.once(replace(long, flops=100 * long.flops))


def test_at_the_longest_lengths_one_dense_peer_counts():
    points = [Point(name, "dense", cost.ONLY_FASTER_FROM, 1e15) for name in ("flash", "cudnn")]
    plan, _ = schedule(points, None)
    assert plan.estimate()["dense"] == plan.predict(points[0])
    assert plan.once(points[0])


# -- clock --


def test_prepared_state_reaches_the_timed_part_and_warm_ups_do_not_count():
    seen = []
    part = Part(seen.append, lambda: len(seen))
    assert len(Clock(CPU, 4).runs_ms(part)) == 4
    assert seen == [0, 1, 2, 3, 4]
    assert len(Clock(CPU, 4).runs_ms(part, warm_up=False, once=True)) == 1
    assert len(seen) == 6
    assert Clock(CPU).peak_mib() is None


def test_search_puts_the_fastest_first_and_failures_last(monkeypatch):
    clock = Clock(CPU)
    monkeypatch.setattr(clock, "runs_ms", lambda part: part.timed(None))

    def work(config):
        if config == "broken":
            raise ValueError("no such tile")
        return lambda: [float(config)]

    found = search(["2", "broken", "1"], work, clock)
    assert found == [
        ("1", 1.0, None),
        ("2", 2.0, None),
        ("broken", None, "ValueError: no such tile"),
    ]


# -- verification --


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_right_operator_passes(dtype):
    errors = verify.verify(replace(TINY, dtype=dtype), CPU)
    assert len(errors) == 8
    assert all(0 < entry["error"] <= entry["allowed"] < 0.1 for entry in errors.values())


def test_a_wrong_gradient_is_never_timed(monkeypatch, on_cpu, capsys, tmp_path):
    def wrong(q, k, v, selection, backend=None):
        return sparse_attention(q, k + 0.01 * (k - k.detach()), v, selection)

    monkeypatch.setattr(verify, "sparse_attention", wrong)
    with pytest.raises(verify.WrongResult, match="dk of sparse attention is wrong at 120 tokens"):
        verify.verify(TINY, CPU)
    path = tmp_path / "report.json"
    assert main([*OPTIONS.split(), "--json", str(path)]) == 1
    assert "nothing was timed" in capsys.readouterr().err
    assert not path.exists()


# -- peers --


def test_dense_peer_computes_dense_attention_with_grouped_or_expanded_heads(monkeypatch):
    inputs, everything = inputs_of(replace(TINY, budget=Budget.dense()))
    q, k, v, grad = inputs
    out, _ = sparse_attention(q, k, v, everything)
    grads = torch.autograd.grad(out, (q, k, v), grad)
    own = peers.scaled_dot_product_attention

    def no_groups(*tensors, enable_gqa=False, **options):
        if enable_gqa:
            raise RuntimeError("No available kernel")
        return own(*tensors, **options)

    for function, remark in ((own, None), (no_groups, "expanded")):
        monkeypatch.setattr(peers, "scaled_dot_product_attention", function)
        parts, said = peers.PEERS["flash"].make(TINY, inputs, everything)
        assert (said is None) if remark is None else (remark in said)
        torch.testing.assert_close(parts["forward"].timed(None), out)
        for part in ("total", "backward"):
            found = parts[part].timed(parts[part].prepare())
            torch.testing.assert_close(found, grads)


def test_flex_peer_computes_the_same_blocks():
    problem = replace(TINY, length=256)
    inputs, selection = inputs_of(problem)
    q, k, v, grad = (x.detach() for x in inputs)  # FlexAttention has no backward on a CPU
    parts, _ = peers.flex(problem, (q, k, v, grad), selection, compiled=False)
    expected, _ = sparse_attention(q, k, v, selection)
    assert not selection.keeps_everything
    torch.testing.assert_close(parts["forward"].timed(None), expected)
    assert set(parts) == set(peers.PEERS["flex"].parts)


@pytest.mark.parametrize(("heads", "kv_heads", "used"), [(32, 2, 2), (16, 4, 1)])
def test_nsa_peer_computes_the_same_blocks(fla, heads, kv_heads, used):
    law = Budget(8, floor=0, sink=16, late=0.5)
    problem = replace(TINY, length=200, heads=heads, kv_heads=kv_heads, budget=law)
    inputs, selection = inputs_of(problem)
    parts, remark = peers.nsa(problem, inputs, selection)
    assert (remark is None) == (used == kv_heads)
    q, k, v, grad = inputs
    k, v = (x.detach()[:, :used].contiguous().requires_grad_() for x in (k, v))
    chosen = select(q, k, problem.budget, block=16, tile=16)
    assert (chosen.entry > 0).any()  # late blocks, which only some rows of a tile see
    expected, _ = sparse_attention(q, k, v, chosen)
    torch.testing.assert_close(parts["forward"].timed(None), expected)
    grads = torch.autograd.grad(expected, (q, k, v), grad)
    torch.testing.assert_close(parts["kernels"].timed(None), grads)


def test_nsa_peer_says_what_it_needs(fla):
    inputs, selection = inputs_of(TINY)
    with pytest.raises(ValueError, match="needs 16 query heads"):
        peers.nsa(TINY, inputs, selection)


# -- the job --


def test_report_of_a_whole_run(on_cpu, tmp_path, capsys):
    new, figure = tmp_path / "new.json", tmp_path / "figure.png"
    assert main([*OPTIONS.split(), "--json", str(new), "--plot", str(figure)]) == 0
    printed = capsys.readouterr().out
    assert all(len(line) <= 120 for line in printed.splitlines())
    report = json.loads(new.read_text())
    assert report["what"] == "attention"
    assert report["machine"]["torch"] == torch.__version__
    assert report["problem"]["tile"] == 16
    assert report["floor_tflops"] == report["matmul_tflops"] > 0
    assert [result["length"] for result in report["results"]] == [128, 256]
    for result in report["results"]:
        _, selection = inputs_of(Problem(result["length"], 4, 2, 16, "float32", LAW, 16, 16))
        assert result["density"] == selection.density < 1
        assert result["executed_pairs"] == executed_pairs(selection)
        sparse, flash = result["sparse"], result["peers"]["flash"]
        assert set(sparse["ms"]) == {"total", "selection", "forward", "backward", "kernels"}
        assert set(flash["ms"]) == {"total", "forward", "backward"}
        for timed in (sparse, flash):
            for part, runs in timed["runs_ms"].items():
                assert len(runs) == 3
                assert timed["ms"][part] == median(runs) > 0
        flops = 10 * 16 * 4 * result["executed_pairs"]
        rate = flops / sparse["ms"]["backward"] / 1e9
        assert result["tflops"]["backward"] == pytest.approx(rate)
        ratio = flash["ms"]["total"] / sparse["ms"]["total"]
        assert result["ratio"] == pytest.approx(ratio)
        assert result["faster_dense"] == "flash"
        assert result["selection_share"] == sparse["ms"]["selection"] / sparse["ms"]["total"]
        assert result["times_floor"] == sparse["ms"]["total"] / result["floor_ms"]
        assert "cudnn" in result["skipped"]
        row = next(x for x in printed.splitlines() if x.startswith(f"{result['length']} "))
        assert row.replace("|", " ").split()[1:3] == [
            str(result["keys"]),
            f"{result['density']:.4f}",
        ]
        assert f"{result['ratio']:.2f}" in row.split()
    assert "Not run: SDPA cuDNN at 128, 256: RuntimeError" in printed
    assert figure.read_bytes().startswith(b"\x89PNG")

    # The same command against itself; the earlier file is read before it is overwritten.
    assert main([*OPTIONS.split(), "--json", str(new), "--compare", str(new)]) == 0
    printed = capsys.readouterr().out
    assert "New / old milliseconds" in printed
    assert "NOT ALIKE" not in printed


def test_what_fails_once_is_not_tried_again_and_the_rest_goes_on():
    tried = []

    def greedy(problem, inputs, selection):
        tried.append(problem.length)
        if problem.length > 64:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return peers.PEERS["flash"].make(problem, inputs, selection)

    contestants = {
        "greedy": peers.Peer("greedy", "dense", ("total", "forward", "backward"), greedy),
        "flash": peers.PEERS["flash"],
    }
    problems = [replace(TINY, length=length) for length in (256, 64, 128)]
    results = benchmark(problems, contestants).run()["results"]
    assert tried == [64, 128]
    assert [result["skipped"] for result in results] == [
        {},
        {"greedy": "out of memory"},
        {"greedy": "out of memory"},
    ]
    assert all("flash" in result["peers"] for result in results)


def test_results_so_far_survive_a_crash(monkeypatch):
    kept = []
    parts = cuda.sparse_parts

    def fragile(problem, inputs, selection, backend=None):
        if problem.length == 128:
            raise RuntimeError("illegal memory access")
        return parts(problem, inputs, selection, backend)

    monkeypatch.setattr(cuda, "sparse_parts", fragile)
    problems = [replace(TINY, length=length) for length in (64, 128)]
    with pytest.raises(RuntimeError, match="illegal memory access"):
        benchmark(problems, {}, save=lambda report: kept.append(len(report["results"]))).run()
    assert kept == [1]


def test_an_operator_without_memory_is_a_note(monkeypatch, capsys):
    def starved(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(cuda, "sparse_parts", starved)
    report = benchmark([TINY], {"flash": peers.PEERS["flash"]}).run()
    assert report["results"][0]["skipped"]["sparse"] == "out of memory"
    assert "Not run: sparse at 256: out of memory." in cuda_report.lines(report, "title")


def test_only_the_faster_dense_peer_runs_at_the_longest_lengths(monkeypatch):
    monkeypatch.setattr(cost, "ONLY_FASTER_FROM", 128)

    def slow(problem, inputs, selection):
        parts, remark = peers.PEERS["flash"].make(problem, inputs, selection)
        total = parts["total"]
        parts["total"] = Part(lambda state: [total.timed(state) for _ in range(20)])
        return parts, remark

    contestants = {
        "cudnn": peers.Peer("slow", "dense", ("total", "forward", "backward"), slow),
        "flash": peers.PEERS["flash"],
    }
    problems = [replace(TINY, length=length) for length in (64, 128)]
    first, last = benchmark(problems, contestants).run()["results"]
    assert set(first["peers"]) == {"cudnn", "flash"}
    assert list(last["peers"]) == ["flash"]
    assert [len(runs) for runs in last["peers"]["flash"]["runs_ms"].values()] == [1]
    assert last["skipped"] == {"cudnn": "SDPA flash is the faster one"}


def test_no_time_for_peers_leaves_the_operator():
    report = benchmark([TINY], {"flash": peers.PEERS["flash"]}, seconds=1e-3).run()
    (result,) = report["results"]
    assert "no time" in result["skipped"]["flash"]
    assert result["ratio"] is None
    assert result["sparse"]["ms"]["total"] > 0
    assert len(cuda_report.sparse_cells(result)) == sum(
        len(columns) for _, columns in cuda_report.SPARSE_GROUPS
    )


def test_dense_limit_runs_the_operators_own_kernels(monkeypatch):
    backends = []
    own = cuda.sparse_parts

    def spy(problem, inputs, selection, backend=None):
        backends.append((problem.length, backend, selection.keeps_everything))
        return own(problem, inputs, selection, backend)

    monkeypatch.setattr(cuda, "sparse_parts", spy)
    flash = {"flash": peers.PEERS["flash"]}
    report = benchmark([TINY], flash, limits=(256, 512)).run()
    # The length that was not asked for is left out.
    assert backends == [(256, "cpu", True), (256, None, False)]
    (entry,) = report["dense_limit"]
    line = next(x for x in cuda_report.lines(report, "title") if x.startswith("Everything kept"))
    assert f"{entry['flash']['ms']['total'] / entry['sparse']['ms']['total']:.2f} times" in line


# -- report --


def made_up(length, total, flash):
    """A result with the parts that comparison and figure read."""
    ms = {"total": total, "selection": total / 10, "kernels": total * 0.9}
    peer = {"flash": {"ms": {"total": flash}, "runs_ms": {}, "ratio": {"total": flash / total}}}
    return {"length": length, "floor_ms": total / 2, "sparse": {"ms": ms}, "peers": peer}


def test_compare_divides_new_by_old():
    problem = {"heads": 32, "kv_heads": 8, "head_dim": 128, "dtype": "bfloat16"}
    old = {"problem": problem, "machine": {"gpu": "one"}, "results": [made_up(4096, 2.0, 8.0)]}
    new = {
        "problem": problem,
        "machine": {"gpu": "other"},
        "results": [made_up(4096, 1.0, 10.0), made_up(8192, 3.0, 40.0)],
    }
    lines = cuda_report.compare(new, old)
    (row,) = (line for line in lines if line.startswith("4096"))
    assert row.replace("|", " ").split() == ["4096", "0.500", "0.500", "0.500", "1.250"]
    assert not any(line.startswith("8192") for line in lines)
    assert lines[-1] == "NOT ALIKE: gpu: one then, other now"
    assert cuda_report.compare({**new, "results": []}, old)[0].startswith("Nothing in common")


def test_figure_of_two_lengths(tmp_path):
    report = {
        "problem": {"heads": 32, "kv_heads": 8, "head_dim": 128, "dtype": "bfloat16"},
        "floor_tflops": 800.0,
        "results": [made_up(4096, 1.0, 3.0), made_up(8192, 3.0, 12.0)],
    }
    lines = plot.curves(report)
    assert lines["sparse", "total"] == ([4096, 8192], [1.0, 3.0])
    assert lines["flash", "total"] == ([4096, 8192], [3.0, 12.0])
    assert ("cudnn", "total") not in lines
    path = tmp_path / "figure.svg"
    plot.plot(report, path)
    text = path.read_text()
    for words in ("context length n (tokens)", "time (milliseconds)", "4k", "SDPA flash", "floor"):
        assert words in text


# -- the command line --


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--device cuda", "finds no CUDA device here; pass --device cpu"),
        ("--device cpu --plot x.png", "--plot is for --device cuda"),
        ("--device cuda --seconds 0", "--seconds must be >= 1"),
        ("--device cuda --plot no/such/x.png", "there is no directory no/such"),
        ("--device cuda --compare no_such.json", "--compare no_such.json"),
    ],
)
def test_bad_arguments_are_one_line_and_code_2(arguments, says, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(arguments.split()) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert says in error


def test_what_the_operator_refuses_is_a_bad_argument(on_cpu, monkeypatch, capsys):
    def refuse(*_, **__):
        raise NotImplementedError("head_dim 16: the kernels take 64 to 256")

    monkeypatch.setattr(verify, "sparse_attention", refuse)
    assert main(OPTIONS.split()) == 2
    assert "head_dim 16: the kernels take 64 to 256" in capsys.readouterr().err.splitlines()[-1]


def test_another_report_is_no_earlier_run(tmp_path):
    path = tmp_path / "other.json"
    path.write_text('{"what": "selection"}')
    with pytest.raises(BadArgument, match="not a report of"):
        cuda_report.load(path)


def test_defaults_on_cuda_are_those_of_the_goals(monkeypatch):
    asked = []
    monkeypatch.setattr(
        command, "_run_cuda", lambda problems, *_: asked.extend(problems) or ({}, [])
    )
    assert main(["--device", "cuda"]) == 0
    assert [problem.length for problem in asked] == [2**i for i in range(12, 21)]
    assert {replace(problem, length=0) for problem in asked} == {GOALS}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu(tmp_path, capsys):
    path = tmp_path / "report.json"
    arguments = ["--device", "cuda", "--lengths", "4096,8192", "--json", str(path)]
    assert main([*arguments, "--plot", str(tmp_path / "figure.png")]) == 0
    report = json.loads(path.read_text())
    assert report["machine"]["gpu"] == torch.cuda.get_device_name()
    for result in report["results"]:
        assert result["sparse"]["peak_mib"] > 0
        assert result["times_floor"] > 1
        # Every peer ran, or the table says why not.
        assert set(result["peers"]) | set(result["skipped"]) == set(peers.PEERS)
        assert "flash" in result["peers"]
    assert (tmp_path / "figure.png").exists()
    assert "Everything kept, 8192 tokens" in capsys.readouterr().out


def _result(length, ratio):
    return {"length": length, "ratio": ratio}


def test_crossover():
    def said(*ratios):
        return list(cuda_report._crossover([_result(2**i, r) for i, r in enumerate(ratios)]))

    assert said(None) == []
    assert said(0.5, 0.9, None) == [
        "Crossover: dense attention is the faster one at every length measured."
    ]
    assert said(1.1, 2.0)[0].endswith("from 1 tokens on.")
    # A length at which it is faster by accident does not count.
    assert (
        "from 8 tokens on, dense up to 4: with Budget(dense_below=4)"
        in said(0.5, 1.1, 0.9, 1.2, 2.0)[0]
    )


def test_tune_times_alternatives_and_leaves_the_table(monkeypatch, capsys):
    """In Triton's interpreter: whatever its times say, all launches run and are listed."""
    backend = pytest.importorskip("lit_sparse.attention.triton.backend")
    if not backend.interpreting():
        pytest.skip("without the interpreter this needs a GPU")
    from lit_sparse.attention.triton import config

    table = copy.deepcopy(config.TABLE)
    standing = config.Launch(64, 32, 4, tma=True)
    near = tune.alternatives(standing)
    assert near[0] == standing
    assert len(near) == len(set(near))
    assert config.Launch(64, 32, 4) in near
    monkeypatch.setattr(
        tune, "alternatives", lambda row: [row, replace(row, rows=32), replace(row, rows=48)]
    )
    problem = Problem(48, 2, 1, 16, "float32", Budget(2, 0.5, floor=0, sink=16), 16, 16)
    result = tune.tune(problem, Clock(torch.device("cpu"), 1), print)
    assert list(result["kernels"]) == list(tune.TIMED)
    for rows in result["kernels"].values():
        assert sum(row["standing"] for row in rows) == 1
        assert len(rows) == 3
        assert all(row["ms"] > 0 or row["failed"] for row in rows)
    text = "\n".join(tune.lines(result))
    assert "1.000 (table)" in text
    assert table == config.TABLE
