"""What `lit-sparse study` refuses, in one line and before anything is measured."""

import json

import pytest
import torch

from lit_sparse.cli import main
from lit_sparse.models import build_model

SMALL = {
    "model_type": "llama",
    "vocab_size": 257,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "bos_token_id": None,
    "eos_token_id": 256,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A run directory with a model of 64 tokens, a directory without one, one without weights, one
    that knows too few tokens for bytes, and a file."""
    folder = tmp_path_factory.mktemp("study")
    torch.manual_seed(0)
    short = build_model(architecture={**SMALL, "max_position_embeddings": 64})
    short.save_pretrained(folder / "short" / "huggingface")
    few = {**SMALL, "vocab_size": 100, "eos_token_id": 99, "max_position_embeddings": 512}
    build_model(architecture=few).save_pretrained(folder / "few")
    (folder / "empty").mkdir()
    (folder / "weightless").mkdir()
    config = json.loads((folder / "short" / "huggingface" / "config.json").read_text())
    (folder / "weightless" / "config.json").write_text(json.dumps(config))
    (folder / "file").write_text("")
    return folder


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["nothing"], "invalid choice: 'nothing'"),
        (["norms", "--fast"], "unrecognized arguments: --fast"),
        (["norms", "short"], "norms takes no models, got"),
        (["norms", "--seed", "-1"], "--seed must be 0 or more, got -1"),
        (["norms", "--large"], "--large is a form of training"),
        (["norms", "--out", "file"], "file: File exists"),
        (["norms", "--work", "file"], "file: File exists"),
        (["layers", "nowhere"], "nowhere: there is no such directory"),
        (["layers", "empty"], "empty has no config.json"),
        (["layers", "--quick", "short"], "has positions for 64 tokens; a law is fitted"),
        (["windows", "short"], "has positions for 64 tokens; windows are compared"),
        (["collapse", "short", "few"], "collapse takes one MODEL, got 2"),
        (["radius", "weightless"], "error: MODEL"),
        (["alpha", "weightless"], "error: MODEL"),
        (["windows", "few"], "knows 100"),
    ],
)
def test_what_it_refuses(place, capsys, arguments, why):
    named = [str(place / x) if (place / x).exists() else x for x in arguments]
    named = [str(place / "nowhere") if x == "nowhere" else x for x in named]
    given = [] if "--out" in named else ["--out", str(place / "out")]
    given += [] if "--work" in named else ["--work", str(place / "work")]
    assert main(["study", *named, *given]) == 2
    said = capsys.readouterr().err.strip().split("\n")
    assert said[-1].startswith("lit-sparse study: error: ")
    assert why in said[-1]


def test_help_names_every_study(capsys):
    with pytest.raises(SystemExit) as end:
        main(["study", "--help"])
    assert end.value.code == 0
    said = capsys.readouterr().out
    assert "collapse     whether collapse shows in a task, and what mends it" in said
