"""lit-sparse benchmark --what generation: the numbers, and what it refuses."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lit_sparse.budget import Budget
from lit_sparse.models import dense_attention, sparsify
from lit_sparse.recipes.benchmark import main

LENGTH, PROMPT = 160, 150


def tiny():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    config = AutoConfig.for_model("llama", vocab_size=257, initializer_range=0.3, **sizes, **heads)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture
def directory(tmp_path):
    model = sparsify(tiny(), Budget.fixed(48, sink=16), block=16, tile=16)
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(40):
        (folder / f"{i:02}.txt").write_text(" ".join(f"{i * j % 977}" for j in range(150)))
    return folder


def run(directory, corpus, *others):
    where = ["--model", str(directory), "--data", str(corpus), "--length", str(LENGTH)]
    return main(["--what", "generation", *where, *others])


def test_the_three_ways(directory, corpus, tmp_path, capsys):
    report = tmp_path / "report.json"
    arguments = ["--prompt", str(PROMPT), "--documents", "1", "--json", str(report)]
    assert run(directory, corpus, *arguments) == 0
    printed = capsys.readouterr().out
    assert "sparse, cached" in printed
    found = json.loads(report.read_text())
    rows = {row["attention"]: row for row in found["rows"]}
    assert list(rows) == ["sparse, at once", "dense", "sparse, cached"]
    assert rows["sparse, at once"]["kl"] == 0
    assert rows["sparse, at once"]["agreement"] == 1
    assert rows["dense"]["kl"] > 0

    # The losses by transformers' own ways.
    name, _, span = found["documents"][0].partition("[")
    begin = int(span.split(":")[0])
    text = next(path for path in corpus.iterdir() if path.name == name.rpartition("/")[2])
    ids = torch.tensor([list(text.read_bytes()[begin : begin + LENGTH])])
    model = sparsify(AutoModelForCausalLM.from_pretrained(directory).eval())
    labels = ids.masked_fill(torch.arange(LENGTH) < PROMPT, -100)
    with torch.no_grad():
        expected = {"sparse, at once": model(ids, labels=labels, use_cache=False).loss}
        with dense_attention(model):
            expected["dense"] = model(ids, labels=labels, use_cache=False).loss
        past, losses = model(ids[:, :PROMPT]), []
        for i in range(PROMPT, LENGTH):
            losses.append(-past.logits[0, -1].log_softmax(0)[ids[0, i]])
            past = model(ids[:, i : i + 1], past_key_values=past.past_key_values)
        expected["sparse, cached"] = torch.stack(losses).mean()
    for way, loss in expected.items():
        assert rows[way]["loss"] == pytest.approx(loss.item(), rel=1e-5), way
        assert f"{loss.item():.4f}" in printed
    assert len({round(row["loss"], 6) for row in rows.values()}) == 3


def test_refused_in_one_line(directory, corpus, tmp_path, capsys):
    tiny().save_pretrained(tmp_path / "dense")
    for arguments, error in (
        ([directory, corpus, "--prompt", "160"], "--prompt must be 1 to 159"),
        ([tmp_path / "dense", corpus], "dense: "),
        ([directory, corpus, "--length", "1000"], "--length 1000 is past the 256 positions"),
    ):
        assert run(*arguments) == 2
        said = capsys.readouterr().err.splitlines()[-1]
        assert said.startswith("lit-sparse benchmark: error: ")
        assert error in said
