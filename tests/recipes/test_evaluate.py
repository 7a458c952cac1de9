"""lit-sparse evaluate as a user meets it: models in directories, tables, JSON, a figure."""

import io
import json
from contextlib import redirect_stdout

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from lit_sparse.budget import Budget
from lit_sparse.cli import main
from lit_sparse.data import ByteTokenizer, Documents, TokenStore, pack
from lit_sparse.evaluation import DENSE, SPARSE, Questions, evaluate
from lit_sparse.models import Law, build_model, sparsify
from lit_sparse.recipes.evaluate.subject import default_lengths, parse_law

LAW = Budget(1, 0.5, floor=16, sink=8)
TASKS = "ppl,passkey,multikey,aggregation"


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A run directory whose model has a law, a plain model, and a store of 40 documents."""
    folder = tmp_path_factory.mktemp("evaluate")
    torch.manual_seed(0)
    model = build_model(
        architecture={
            "model_type": "llama",
            "vocab_size": 257,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "initializer_range": 0.2,
            "bos_token_id": None,
            "eos_token_id": 256,
        }
    )
    model.save_pretrained(folder / "plain")
    sparsify(model, LAW, layers={1: Budget.dense()}, block=8, tile=8)
    model.save_pretrained(folder / "run" / "huggingface")
    rng = np.random.default_rng(0)
    (folder / "texts").mkdir()
    for i in range(40):
        words = [f"{word:x}" for word in rng.integers(10**6, size=90)]
        (folder / "texts" / f"{i:02d}.txt").write_text(" ".join(words))
    pack([folder / "texts"], ByteTokenizer(), folder / "store", processes=1)
    return folder


def run(place, *others, models=("run",)):
    given = [str(place / model) for model in models]
    small = ["--documents", "3", "--prompts", "4", "--lengths", "64,128,256", "--tasks", TASKS]
    return main(["evaluate", *given, "--data", str(place / "store"), *small, *others])


@pytest.fixture(scope="module")
def made(place):
    """What is printed and written of both models, side by side."""
    files = ["--json", str(place / "all.json"), "--plot", str(place / "all.png")]
    with redirect_stdout(io.StringIO()) as printed:
        assert run(place, *files, models=("run", "plain")) == 0
    return printed.getvalue(), json.loads((place / "all.json").read_text())


def test_numbers_are_those_of_the_evaluation_of_held_out_text(place, made):
    own, plain = made[1]["models"]
    model = AutoModelForCausalLM.from_pretrained(place / "run" / "huggingface").eval()
    store = TokenStore.open(place / "store")
    # What fit keeps for validation where its config says nothing else.
    held_out = Documents(store, store.split(0.05, 0)[1])
    assert own["held_out_documents"] == len(held_out) < 10
    asked = Questions([64, 128, 256], TASKS.split(","), documents=3, prompts=4)
    found = evaluate(sparsify(model), ByteTokenizer(), held_out, asked)
    for side in (DENSE, SPARSE):
        loss = own["loss"]["256"]
        expected = found.losses[256][side]
        assert loss["64-127"][side]["mean"] == pytest.approx(expected.of_texts(64, 128).mean())
        assert loss["last_quarter"][side]["mean"] == pytest.approx(expected.late.mean())
        answers = found.answers["passkey"][256][side]
        written = own["tasks"]["passkey"]["256"][side]
        assert written["nats_per_token"] == pytest.approx(answers.loss)
        assert written["right"]["mean"] == answers.accuracy.mean
    gap = found.losses[256][SPARSE].of_texts() - found.losses[256][DENSE].of_texts()
    assert own["loss"]["256"]["all"]["difference"]["mean"] == pytest.approx(gap.mean())
    assert own["density"]["256"] == pytest.approx(found.density[256])
    assert own["law"] == Law(LAW, {1: Budget.dense()}, 8, 8).to_dict()
    # The same weights, run densely.
    assert list(plain["tasks"]["passkey"]["256"]) == ["prompts", "depths", "dense"]
    assert plain["loss"]["256"]["all"]["dense"]["mean"] == pytest.approx(
        own["loss"]["256"]["all"]["dense"]["mean"], rel=1e-4
    )
    assert made[1]["machine"]["command"].startswith("lit-sparse evaluate ")


def test_what_is_printed(place, made):
    printed = " ".join(made[0].split())
    assert f"{place / 'run' / 'huggingface'}: llama, float32; {LAW} (its own law)" in printed
    assert "layer 1 dense" in printed
    assert "loss by position in 256 tokens" in printed
    assert "Dense only: the model's config has no law" in printed
    assert "Left out: multikey at 64" in printed
    side_by_side = made[0].partition("[1] run/huggingface")[2]
    assert "[2] " in side_by_side
    assert [
        line.replace("|", " ").split()[:2]
        for line in side_by_side.splitlines()
        if line[:7] == "passkey"
    ] == [
        ["passkey", "64"],
        ["passkey", "128"],
        ["passkey", "256"],
    ]
    assert (place / "all.png").read_bytes()[:4] == b"\x89PNG"


def test_another_law_longer_texts_and_written_answers(place, capsys):
    law = ["--budget", "alpha=2,exponent=.5,floor=500", "--block", "16"]
    more = ["--lengths", "512", "--rope", "yarn", "--tasks", "passkey", "--generate"]
    assert run(place, *law, *more) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "k(n) = 2 n^0.5, floor 500 (--budget alpha=2,exponent=.5,floor=500), block 16" in printed
    assert "generated" in printed
    assert run(place, *law, "--tasks", "ppl") == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "At 64, 128, 256 tokens the law keeps every key: sparse is dense there." in printed


def test_laws_of_the_command_line(tmp_path):
    own = Law(LAW, {0: Budget.dense()}, 16, 32)
    assert parse_law("eco", own) == Law(Budget.preset("eco"), {}, 16, 32)
    assert parse_law("alpha=16, exponent=.5,floor=0", own).budget == Budget(16, 0.5, 0)
    assert parse_law("alpha=3,law=log,ceiling=64,floor=0", own).budget.law == "log"
    assert parse_law("dense", own).budget == Budget.dense()
    path = tmp_path / "budget.yaml"
    path.write_text(yaml.safe_dump({"sparse_attention": {**own.to_dict(), "backend": None}}))
    assert parse_law(str(path), Law(Budget())) == own


def test_lengths_without_any_given():
    assert default_lengths(4096) == [512, 1024, 2048, 4096]
    assert default_lengths(40960) == [4096, 8192, 16384, 32768]
    assert default_lengths(8) == [2, 4, 8]


def test_a_model_whose_losses_are_not_finite_is_refused(place, capsys):
    model = AutoModelForCausalLM.from_pretrained(place / "plain")
    torch.nn.init.constant_(model.lm_head.weight, torch.nan)
    model.save_pretrained(place / "nan")
    assert run(place, "--tasks", "passkey", models=("nan",)) == 2
    assert "has losses that are not finite" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--lengths", "512"], "--lengths: 512 is past the 256 tokens"),
        (["--lengths", "128,64"], "--lengths must rise"),
        (["--lengths", "many"], "whole numbers with commas, got 'many'"),
        (["--lengths", "512", "--rope", "stretch"], "stretch"),
        (["--tasks", "ppl,needle"], "--tasks: there is no 'needle'"),
        (["--prompts", "0"], "--prompts must be >= 1"),
        (["--budget", "tiny"], "--budget: 'tiny' is no file, no preset (eco, balanced"),
        (["--budget", "alpha=-1"], "--budget: budget.alpha must be a positive number"),
        (["--budget", "alpha=x"], "--budget: 'alpha=x' has a value that is no number"),
        (["--budget", "beta=1"], "--budget: 'beta=1': a budget has alpha"),
        (["--budget", "{}/layers.yaml"], "layers names [7]"),
        (["--budget", "{}/texts/00.txt"], "has no key sparse_attention"),
        (["--budget", "eco", "--block", "3"], "--block"),
        (["--tile", "16"], "--block and --tile need --budget"),
        (["--data", "{}/nothing"], "nothing"),
        (["--data", "{}/texts/00.txt"], "--all-documents"),
        (["--json", "{}/no/where.json"], "there is no directory"),
        (["--plot", "{}/figure.nope"], "must end in .png, .pdf or .svg"),
        (["--device", "tpu"], "--device"),
        (["{}/nowhere"], "there is no such directory"),
        (["{}/texts"], "has no config.json"),
        ([], ""),
    ],
)
def test_errors_are_one_line(place, capsys, change, message):
    deep = Law(LAW, {7: Budget.dense()}).to_dict()
    (place / "layers.yaml").write_text(yaml.safe_dump({"sparse_attention": deep}))
    change = [part.format(place) for part in change]
    if not change:  # no MODEL
        assert main(["evaluate"]) == 2
    elif change[0].startswith("-"):
        assert run(place, *change) == 2
    else:
        assert main(["evaluate", *change]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (error,) = [line for line in printed.err.splitlines() if "error:" in line]
    assert error.startswith("lit-sparse evaluate: error: ")
    assert message in error
