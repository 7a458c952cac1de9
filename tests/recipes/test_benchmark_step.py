"""`lit-sparse benchmark --what step`: what it reports follows from steps that ran."""

import json
from statistics import median

import pytest
import torch

from lit_sparse.budget import Budget
from lit_sparse.recipes.benchmark import command, main, training, training_run
from lit_sparse.recipes.benchmark.shapes import SHAPES, Shape
from lit_sparse.recipes.benchmark.training import OWN, SPARSE, Task, Training, dense_sides
from lit_sparse.recipes.estimate.gpus import GPUS, data_sheet

CPU = torch.device("cpu")
TINY = Shape(
    "tiny",
    layers=2,
    whole=2,
    architecture={
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "tie_word_embeddings": True,
    },
)
LAW = Budget(4, floor=0, sink=16)
TASK = Task("tiny", 2, "float32", LAW, 16, 16, "keep", "chunked", False, False)
OPTIONS = """
    --what step --device cpu --threads 1 --shape tiny --lengths 640,256 --repeats 3
    --block 16 --tile 16 --sink 16 --alpha 4
"""
STEP = OPTIONS.split()

pytestmark = pytest.mark.filterwarnings("ignore:.*is below what is always kept")


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    monkeypatch.setitem(SHAPES, "tiny", TINY)


def report_of(tmp_path, *arguments):
    path = tmp_path / "report.json"
    assert main([*arguments, "--json", str(path)]) == 0
    return json.loads(path.read_text())


def table(printed):
    """Cells of the table's rows, without the separators."""
    lines = printed.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("--")) + 1
    last = lines.index("", first)
    return [line.replace("|", " ").split() for line in lines[first:last]]


def test_the_report_follows_from_the_steps(tmp_path, capsys):
    report = report_of(tmp_path, *STEP, "--no-memory")
    assert report["what"] == "step"
    assert report["peak_tflops"] is None
    printed = capsys.readouterr().out
    assert all(len(line) <= 120 for line in printed.splitlines())
    rows = table(printed)
    for cells, result, length in zip(rows, report["results"], (256, 640), strict=True):
        sparse, dense = result["sparse"], result["dense"]
        assert result["length"] == length
        assert 0 < result["executed_share"] < 1
        assert dense["attention"] in ("sdpa", "own")
        for side in (sparse, dense):
            runs = side["runs_s"]
            assert len(runs) == 3
            assert side["seconds"] == median(runs)
            assert min(runs) <= side["quartiles_s"][0] <= side["quartiles_s"][1] <= max(runs)
            assert side["tokens_per_second"] == pytest.approx(length / side["seconds"])
            assert side["loss"] < 10
            assert side["peak_mib"] is side["mfu"] is None
        rate, equivalent = sparse["tflops"]["executed"], sparse["tflops"]["dense_equivalent"]
        assert rate < equivalent, "what is not computed counts in the latter alone"
        assert dense["tflops"]["executed"] == dense["tflops"]["dense_equivalent"]
        turns = zip(sparse["runs_s"], dense["runs_s"], strict=True)
        assert result["ratio"]["tokens_per_second"] == median(d / s for s, d in turns)
        assert result["ratio"]["peak"] is None
        assert cells[0] == str(length)
        assert cells[-2:] == [f"{result['ratio']['tokens_per_second']:.2f}", "-"]
        assert cells[-3] == dense["attention"]


def test_flops_are_those_of_the_products():
    """Per token: 6 a parameter of the layers, 8 of the head, and 14 a causal pair, head and
    dimension; recomputation adds a forward.
    """
    length, dense = 256, Task(**{**vars(TASK), "budget": Budget.dense()})

    def counted(task):
        benchmark = training_run.StepBenchmark(
            task, [length], CPU, 1, None, None, False, print, print
        )
        benchmark.model = training_run.read_model(None, task.architecture(length))
        return benchmark.work(length)

    model = Training(TASK, CPU, length).module.model
    layers = sum(p.numel() for p in model.model.layers.parameters() if p.dim() == 2)
    head = model.lm_head.weight.numel()
    pairs = 2 * 4 * 8 * length * (length + 1) // 2
    expected = length * (6 * layers + 8 * head) + 14 * pairs
    assert counted(dense).total == counted(dense).dense == counted(TASK).dense == expected
    assert counted(TASK).total < expected
    again = Task(**{**vars(dense), "activations": "recompute"})
    mlp = sum(p.numel() for layer in model.model.layers for p in layer.mlp.parameters())
    assert counted(again).total == expected + length * (2 * layers - 2 * mlp // 3) + 4 * pairs


def test_all_sides_train_the_same_model():
    """Where nothing is dropped, losses and weights after a step are the same."""
    everything = Task(**{**vars(TASK), "budget": Budget.dense()})
    found = []
    for side in (SPARSE, *dense_sides(CPU, False)):
        made = Training(everything, CPU, 128)
        made.use(side)
        losses = [float(made.step(side, made.row(128))) for _ in range(3)]
        found.append((losses, torch.cat([p.detach().flatten() for p in made.module.parameters()])))
    assert found[0][0][0] > found[0][0][-1], "it trains"
    for losses, weights in found[1:]:
        assert losses == pytest.approx(found[0][0], rel=1e-5)
        torch.testing.assert_close(weights, found[0][1], atol=1e-5, rtol=1e-5)
    made.use(SPARSE)
    assert made.module.model.config._attn_implementation == "lit_sparse"
    assert OWN in dense_sides(CPU, False)


def test_memory_is_that_of_a_process_of_its_own(monkeypatch):
    asked = []
    monkeypatch.setattr(training, "in_own_process", lambda module, task: asked.append(task))
    training.peak_mib(TASK, 128, SPARSE, 1)
    # Weights, gradients and the two moments of AdamW, float32, at least.
    parameters = sum(p.numel() for p in Training(TASK, CPU, 128).module.parameters())
    assert training._measure(asked[0]) >= 0.9 * 4 * 4 * parameters / 2**20


def test_a_side_that_runs_out_of_memory_is_no_crash(tmp_path, monkeypatch, capsys):
    step = Training.step

    def limited(self, side, row):
        if side is not SPARSE and row["input_ids"].shape[1] > 256:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(self, side, row)

    monkeypatch.setattr(Training, "step", limited)
    report = report_of(tmp_path, *STEP, "--no-memory", "--repeats", "1")
    short, long = report["results"]
    assert short["ratio"]["tokens_per_second"] > 0
    assert "dense" not in long
    assert set(long["skipped"].values()) == {"out of memory"}
    assert long["sparse"]["tokens_per_second"] > 0
    printed = capsys.readouterr().out
    assert table(printed)[1].count("OOM") == 1
    assert "at 640: out of memory" in printed


def test_lengths_that_there_is_no_time_for_are_left_out(tmp_path, monkeypatch):
    def elapsed(self):
        return 0.0 if "sparse" not in self._rates else 1e6  # after the first length

    monkeypatch.setattr(training_run.StepBenchmark, "_elapsed", elapsed)
    report = report_of(tmp_path, *STEP, "--no-memory", "--seconds", "5")
    short, long = report["results"]
    assert short["ratio"]["tokens_per_second"] > 0
    assert set(long["skipped"].values()) == {"no time for it within --seconds 5"}
    assert not {"sparse", "dense", "ratio"} & set(long)


def test_a_gpu_is_known_by_its_name(tmp_path, monkeypatch, capsys):
    assert data_sheet("NVIDIA H100 80GB HBM3") is GPUS["h100"]
    assert data_sheet("NVIDIA A100-SXM4-80GB") is GPUS["a100-80"]
    assert data_sheet("NVIDIA H100 PCIe") is data_sheet("Tesla V100-SXM2-16GB") is None
    monkeypatch.setattr(command, "data_sheet", lambda name: GPUS["h100"])
    report = report_of(tmp_path, *STEP, "--no-memory", "--repeats", "1", "--lengths", "64")
    (result,) = report["results"]
    rates, shares = (result["sparse"][name] for name in ("tflops", "mfu"))
    assert all(shares[name] == pytest.approx(rates[name] / 989.4) for name in shares)
    assert "MFU" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--shape huge", "invalid choice: 'huge'"),
        ("--layers 0", "--layers must be >= 1"),
        ("--lengths 0", "--lengths must be >= 1"),
        ("--liger", "model.loss: liger runs on CUDA GPUs only"),
        ("--activations drop", "invalid choice: 'drop'"),
        ("--heads 4", "unrecognized arguments: --heads 4"),
    ],
)
def test_bad_arguments_are_one_line_and_code_2(arguments, says, capsys, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert main([*STEP, *arguments.split()]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("lit-sparse benchmark: error: ")
    assert says in printed.err


def test_real_shapes_are_those_of_the_models():
    """Parameters as their model cards give them: 1.23 and 8.03 billion."""
    for name, stated in (("llama3.2-1b", 1.23e9), ("llama3-8b", 8.03e9)):
        shape = SHAPES[name]
        model = training_run.read_model(None, shape.config(shape.whole, 8192))
        assert model.parameters == pytest.approx(stated, rel=5e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compiled", [[], ["--compile"]])
def test_on_a_gpu(tmp_path, compiled):
    arguments = "--what step --device cuda --shape small --lengths 4096,8192 --repeats 2"
    report = report_of(tmp_path, *arguments.split(), *compiled)
    assert report["machine"]["gpu"] == torch.cuda.get_device_name()
    for result in report["results"]:
        assert set(result["skipped"]) <= {"flash", "cudnn"}
        for side in ("sparse", "dense"):
            assert result[side]["peak_mib"] > 0
        assert result["sparse"]["loss"] == pytest.approx(result["dense"]["loss"], rel=0.05)
        assert result["ratio"]["peak"] < 1.2
