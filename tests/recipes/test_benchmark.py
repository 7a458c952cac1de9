import json
from statistics import median

import pytest
import torch

from lit_sparse.attention import select
from lit_sparse.attention.reference import select_blocks
from lit_sparse.budget import Budget
from lit_sparse.recipes.benchmark import attention, load, main
from lit_sparse.recipes.benchmark.report import render_table
from lit_sparse.recipes.benchmark.steps import Problem, packed_inputs

OPTIONS = """
    --device cpu --threads 1 --heads 4 --kv-heads 2 --head-dim 16
    --block 16 --tile 16 --sink 16 --alpha 4 --lengths 256,640 --repeats 3
"""
ATTENTION = OPTIONS.split()


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def report_of(tmp_path, *arguments: str) -> dict:
    path = tmp_path / "report.json"
    assert main([*arguments, "--json", str(path)]) == 0
    return json.loads(path.read_text())


def body(printed: str) -> list[list[str]]:
    """Cells of the table's rows, without the separators."""
    lines = printed.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("--")) + 1
    last = lines.index("", first)
    return [line.replace("|", " ").split() for line in lines[first:last]]


# -- attention --


def test_attention_report_is_consistent(tmp_path, capsys):
    report = report_of(tmp_path, *ATTENTION, "--no-memory")
    assert report["what"] == "attention"
    machine = report["machine"]
    assert machine["command"].startswith("lit-sparse benchmark --device cpu")
    assert machine["torch"] == torch.__version__
    assert machine["threads"] == 1
    assert [result["length"] for result in report["results"]] == [256, 640]

    for result in report["results"]:
        problem = Problem(
            result["length"], 4, 2, 16, "float32", Budget(4, floor=0, sink=16), 16, 16
        )
        q, k, _, _ = packed_inputs(problem)
        selection = select(q, k, problem.budget, block=16, tile=16)
        assert result["density"] == selection.density < 1
        assert result["keys"] == problem.budget(result["length"])

        sparse, dense = result["sparse_runs_ms"], result["dense_runs_ms"]
        assert len(sparse) == len(dense) == 3
        for runs, medians in ((sparse, result["sparse_ms"]), (dense, result["dense_ms"])):
            for part, value in medians.items():
                assert value == median(run[part] for run in runs) > 0
            for run in runs:
                parts = sum(value for part, value in run.items() if part != "total")
                assert parts == pytest.approx(run["total"])
        pairs = zip(sparse, dense, strict=True)
        assert result["ratio"] == median(d["total"] / s["total"] for s, d in pairs)
        assert "sparse_peak_mib" not in result

    printed = capsys.readouterr().out
    assert all(len(line) <= 120 for line in printed.splitlines())
    assert torch.__version__ in printed
    for cells, result in zip(body(printed), report["results"], strict=True):
        assert cells[:2] == [str(result["length"]), str(result["keys"])]
        assert cells[2] == f"{result['density']:.3f}"
        assert cells[11:13] == [f"{result['ratio']:.2f}", f"{result['flops_ratio']:.2f}"]
        assert cells[13:] == ["-"] * 4


def test_ratio_is_that_of_the_reported_times(tmp_path):
    # With one run there are no medians between the times and the ratio.
    report = report_of(tmp_path, *ATTENTION, "--no-memory", "--repeats", "1")
    for result in report["results"]:
        times = result["dense_ms"]["total"] / result["sparse_ms"]["total"]
        assert result["ratio"] == pytest.approx(times, rel=1e-12)


def test_executed_pairs_are_whole_blocks_of_whole_tiles(tmp_path):
    # 250 is no multiple of the tile: rows past the end are work, blocks past the end are not there.
    arguments = [*ATTENTION, "--no-memory", "--repeats", "1", "--lengths", "250", "--late", "0"]
    result = report_of(tmp_path, *arguments)["results"][0]
    budget = Budget(4, floor=0, sink=16, late=0.0)
    q, k, _, _ = packed_inputs(Problem(250, 4, 2, 16, "float32", budget, 16, 16))
    kept = select_blocks(q, k, budget, [250], block=16, tile=16)
    blocks = sum(len(entries) for (_, head, _), entries in kept.items() if head == 0)
    assert result["executed_pairs"] == blocks * 16 * 16
    assert result["causal_pairs"] == 250 * 251 // 2
    assert result["flops_ratio"] == result["causal_pairs"] / result["executed_pairs"]


def test_a_law_that_keeps_everything_promises_no_gain(tmp_path):
    arguments = [*ATTENTION, "--no-memory", "--repeats", "1", "--lengths", "100", "--floor", "128"]
    result = report_of(tmp_path, *arguments)["results"][0]
    assert result["density"] == result["flops_ratio"] == 1.0


def test_memory_is_measured_for_both_sides(tmp_path, capsys):
    arguments = [*ATTENTION, "--lengths", "1024", "--repeats", "1"]
    result = report_of(tmp_path, *arguments)["results"][0]
    # Both must at least hold the output and the gradients of q, k and v.
    least = 1024 * 16 * 4 * (4 + 4 + 2 + 2) / 2**20
    assert least * 0.9 < result["sparse_peak_mib"] < 200
    assert least * 0.9 < result["dense_peak_mib"] < 200
    assert "-" not in body(capsys.readouterr().out)[0]


def test_long_lengths_run_densely_once(monkeypatch):
    monkeypatch.setattr(attention, "LONG", 64)
    monkeypatch.setattr(attention, "DENSE_MEMORY_UP_TO", 32)
    monkeypatch.setattr(attention, "peak_mib", lambda problem, side, threads: 8.0)
    problem = Problem(128, 2, 1, 8, "float32", Budget(4, floor=0, sink=16), 16, 16)
    result = attention.measure(problem, repeats=2, threads=1)
    assert len(result["sparse_runs_ms"]) == 2
    assert len(result["dense_runs_ms"]) == 1
    first = result["sparse_runs_ms"][0]["total"]
    assert result["ratio"] == result["dense_runs_ms"][0]["total"] / first
    cells = attention.cells(result)
    assert cells[7] == "1"
    assert cells[-4:] == ["8.0", "64.0", "-", "-"]


def test_disturbed_runs_are_marked(monkeypatch, capsys):
    arguments = [*ATTENTION, "--no-memory", "--repeats", "1", "--lengths", "64"]
    for cores, marked in ((1.3, True), (0.0, False), (None, False)):
        monkeypatch.setattr(load.OtherLoad, "cores", lambda self, cores=cores: cores)
        assert main(arguments) == 0
        printed = capsys.readouterr().out
        assert ("DISTURBED: other processes kept up to 1.3 cores busy" in printed) == marked


def test_own_work_is_no_other_load(monkeypatch):
    # (seconds, busy seconds of all cores, busy seconds of this process)
    readings = iter([(10.0, 100.0, 5.0), (12.0, 107.0, 9.0)])
    monkeypatch.setattr(load, "_now", lambda: next(readings))
    assert load.OtherLoad().cores() == 1.5


def test_threads_are_put_back():
    before = torch.get_num_threads()
    assert main([*ATTENTION, "--no-memory", "--lengths", "64", "--threads", str(before + 1)]) == 0
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_other_dtypes_run(dtype, tmp_path):
    arguments = [*ATTENTION, "--no-memory", "--repeats", "1", "--dtype", dtype]
    assert report_of(tmp_path, *arguments)["problem"]["dtype"] == dtype


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--lengths 0", "--lengths must be >= 1, got 0"),
        ("--lengths 64,x", "whole numbers with commas"),
        ("--heads 3", "--kv-heads 2 must divide --heads 3"),
        ("--kv-heads 0", "--kv-heads must be >= 1"),
        ("--dtype int8", "invalid choice: 'int8'"),
        ("--repeats 0", "--repeats must be >= 1"),
        ("--threads 0", "--threads must be >= 1"),
        ("--block 48", "--block must be a power of two, got 48"),
        ("--tile 3", "--tile must be a power of two, got 3"),
        ("--alpha -1", "--alpha must be a positive number"),
        ("--what speed", "invalid choice: 'speed'"),
        ("--rows 8", "unrecognized arguments: --rows 8"),
        ("--json no/such/folder.json", "there is no directory no/such"),
        ("--what selection", "required: --model"),
        ("--what selection --model no_such_folder", "there is no directory no_such_folder"),
        ("--what selection --model x --length 0", "--length must be >= 1"),
    ],
)
def test_bad_arguments_are_one_line_and_code_2(arguments, says, capsys):
    device = [] if "--device" in arguments or "--what" in arguments else ["--device", "cpu"]
    assert main([*device, *arguments.split()]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("lit-sparse benchmark: error: ")
    assert printed.err.count("\n") == 1
    assert says in printed.err


@pytest.mark.parametrize("what", ["attention", "step", "selection"])
def test_help_names_the_options(what, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--what", what, "--help"])
    assert stop.value.code == 0
    printed = " ".join(capsys.readouterr().out.split())
    other = "selection" if what == "attention" else "attention"
    assert f"--what {other} --help" in printed
    assert "--exponent" in printed


def test_table_columns_stand_under_their_names():
    lines = render_table(
        [("one", ("name", "n")), ("a long group", ("x",))],
        [["first", "1", "2.00"], ["b", "100", "-"]],
    )
    assert lines == [
        "   one    | a long group",
        "name    n |            x",
        "----------+-------------",
        "first   1 |         2.00",
        "b     100 |            -",
    ]
