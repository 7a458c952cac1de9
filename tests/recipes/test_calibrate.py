"""lit-sparse calibrate as a user meets it: a model whose layers differ in, files out."""

import json
import logging

import numpy as np
import pytest
import torch
import yaml

from lit_sparse.budget import Budget
from lit_sparse.calibration import ChosenLaw
from lit_sparse.cli import main
from lit_sparse.data import ByteTokenizer, TokenStore, pack
from lit_sparse.models import Law, build_model, dense_attention, law_of, observe, sparsify
from lit_sparse.recipes.benchmark.report import BadArgument
from lit_sparse.recipes.calibrate.check import Attempt, Check, _search, raised
from lit_sparse.recipes.calibrate.measure import late_rows
from lit_sparse.recipes.calibrate.report import check_lines
from lit_sparse.recipes.calibrate.texts import choose_texts, open_documents

SHARP = 40.0
"""Factor of the second layer's queries: few keys get its attention."""


@pytest.fixture(autouse=True)
def _closed_streams(monkeypatch):
    # Handlers of libraries keep the streams that pytest captured in an earlier test.
    monkeypatch.setattr(logging, "raiseExceptions", False)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model of one even and one sharp layer, and a store of 40 documents."""
    folder = tmp_path_factory.mktemp("calibrate")
    torch.manual_seed(0)
    model = build_model(
        architecture={
            "model_type": "llama",
            "vocab_size": 257,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "initializer_range": 0.2,
            "bos_token_id": None,
            "eos_token_id": 256,
        }
    )
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.mul_(0.1)
        model.model.layers[1].self_attn.q_proj.weight.mul_(SHARP)
    model.save_pretrained(folder / "model")
    rng = np.random.default_rng(0)
    texts = folder / "texts"
    texts.mkdir()
    for i in range(40):
        words = [f"{word:x}" for word in rng.integers(10**6, size=90 if i % 2 else 40)]
        (texts / f"{i:02d}.txt").write_text(" ".join(words))
    pack([texts], ByteTokenizer(), folder / "store", processes=1)
    return folder


def calibrate(place, out, *others):
    model, store = str(place / "model"), str(place / "store")
    small = ["--documents", "4", "--check-documents", "2", "--prompts", "2", "--block", "8"]
    small += ["--tile", "8", "--sink", "8"]
    return main(
        ["calibrate", "--model", model, "--data", store, "--out", str(out), *small, *others]
    )


@pytest.fixture(scope="module")
def made(place):
    """A calibration: its directory, exit code, what was printed."""
    import contextlib
    import io

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        code = calibrate(place, place / "out")
    return place / "out", code, printed.getvalue()


def test_it_finds_the_layer_that_can_be_sparse(made):
    out, code, printed = made
    assert code == 0
    files = ["budget.yaml", "calibration.json", "exponents.png", "k_of_n.png"]
    assert sorted(p.name for p in out.iterdir()) == files
    found = json.loads((out / "calibration.json").read_text())
    assert found["settings"]["lengths"] == [32, 64, 128, 256], "twice the longest is the model's"
    assert found["dense_layers"] == [0]
    assert found["verdicts"][0] == ["proportional"] * 4
    exponents = np.array(found["fits"]["exponent"])
    assert exponents[0].min() > 0.9
    assert exponents[1].max() < 0.7
    assert found["keys"]["512"][0] == 512
    assert found["check"]["met"]
    sentences = " ".join(printed.split())
    assert "keys in proportion to the context" in sentences
    assert "no sublinear budget is written" in sentences
    assert "layer 0: every key" in sentences
    assert "4 documents at each length are few" in printed
    assert f"lit-sparse fit --config NAME --config {out / 'budget.yaml'}" in printed
    read = [name for names in found["documents"].values() for name in names]
    assert len(set(read + found["held_out"])) == 4 * 4 + 2, "no document is read twice"


def test_the_check_is_the_dropped_mass_of_the_operator(made, place):
    """The first attempt again, by brute force: softmax over all keys, dropped ones summed."""
    found = json.loads((made[0] / "calibration.json").read_text())
    stored = {**found["law"], **found["law_before_the_check"]}
    law = Law.from_dict(stored)
    model = build_model(pretrained=place / "model").eval()
    sparsify(model, law.budget, layers=law.layers, block=law.block, tile=law.tile, score=law.score)
    store = TokenStore.open(place / "store")
    numbers = {store.name(i): i for i in range(len(store))}
    generator = torch.Generator().manual_seed(0)
    missed, losses = [], {"sparse": [], "dense": []}

    def observer(layer, q, k, v, out, lse, selection, options, documents):
        rows = torch.randperm(127, generator=generator)[:63].sort().values + 384
        rows = torch.cat([rows, torch.tensor([511])])
        logits = options.scale * torch.einsum("rhd,thd->hrt", q[rows], k.repeat_interleave(2, 1))
        logits[:, torch.arange(512) > rows[:, None]] = -torch.inf
        kept = selection.to_mask()[:, rows].repeat_interleave(2, 0)
        missed.append(logits.softmax(-1).masked_fill(kept, 0).sum(-1).flatten())

    for name in found["held_out"]:
        tokens = torch.from_numpy(store.read(numbers[name], 0, 512).astype(np.int64))[None]
        for kind in losses:
            with (
                torch.no_grad(),
                dense_attention(model) if kind == "dense" else observe(model, observer, [1]),
            ):
                logits = model(tokens).logits[0, 383:-1]
            loss = torch.nn.functional.cross_entropy(logits, tokens[0, 384:])
            losses[kind].append(float(loss))
    first = found["check"]["attempts"][0]
    every = torch.cat(missed).sort().values
    assert first["missed_mean"] == pytest.approx(float(every.mean()), abs=1e-5)
    assert first["missed_p95"] == pytest.approx(float(every[int(np.ceil(0.95 * len(every))) - 1]))
    assert first["loss"] == pytest.approx(np.mean(losses["sparse"]), abs=1e-5)
    assert found["check"]["dense_loss"] == pytest.approx(np.mean(losses["dense"]), abs=1e-5)


def test_fit_takes_what_was_written(made, place, tmp_path, monkeypatch, capsys):
    out = made[0]
    fragment = str(out / "budget.yaml")
    wanted = Law.from_dict(json.loads((out / "calibration.json").read_text())["law"])
    assert set(wanted.layers) == {0}
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(["fit", "--config", "quickstart", "--config", fragment, "--print_config"])
    assert end.value.code == 0
    merged = yaml.safe_load(capsys.readouterr().out)["sparse_attention"]
    del merged["backend"]
    assert Law.from_dict(merged) == wanted

    keys = {
        "model": {"pretrained": str(place / "model")},
        "curriculum": {"stages": [{"length": 64, "steps": 1}]},
        "data": {"path": str(place / "store"), "row_tokens": 128, "validation_rows": 1},
        "trainer": {
            "accelerator": "cpu",
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "limit_val_batches": 0,
            "callbacks": [{"class_path": "lit_sparse.callbacks.HuggingFaceExport"}],
        },
    }
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(keys))
    assert main(["fit", "--config", "small.yaml", "--config", fragment]) == 0
    trained = build_model(pretrained=tmp_path / "runs" / "small" / "huggingface")
    assert law_of(sparsify(trained)) == wanted


def test_a_target_that_is_missed_is_exit_status_1(place, tmp_path, capsys):
    fast = ["--steps", "1", "--prompts", "0", "--check-documents", "1", "--lengths", "32,64,128"]
    assert calibrate(place, tmp_path / "out", *fast) == 1
    captured = capsys.readouterr()
    assert "TARGET MISSED" in captured.out
    assert "# TARGET MISSED" in (tmp_path / "out" / "budget.yaml").read_text()
    found = json.loads((tmp_path / "out" / "calibration.json").read_text())
    assert not found["check"]["met"]
    assert found["check"]["length"] == 256
    assert found["check"]["tasks"] == {}


def attempt(factor, p95):
    return Attempt(factor, p95, p95 / 2, {0: p95}, 0.0, 0.0, 0.5, 1.0)


def test_alpha_is_raised_to_the_least_that_meets_the_target():
    def needs(least):
        return lambda factor: attempt(factor, 0.01 if factor >= least else 0.2)

    def search(least, steps=8):
        return Check(64, 0.05, _search(needs(least), 0.05, steps), 1.0, {}, {})

    assert [a.factor for a in search(1.0).attempts] == [1.0]
    for least in (1.2, 2.0, 3.1):
        check = search(least)
        assert check.met
        assert least <= check.factor <= 1.1 * least
    check = search(1000.0, steps=3)
    assert not check.met
    assert check.factor == pytest.approx(2.25)
    dense = Check(64, 0.05, [], 1.0, {}, {})
    assert dense.met
    assert "Every layer stays dense: no mass is missed." in check_lines(dense)


def test_a_raised_law_leaves_dense_layers_dense():
    law = raised(ChosenLaw(Budget(alpha=2.87, exponent=0.5), {3: Budget.dense()}), 1.5)
    assert law.budget.alpha == 4.305
    assert law.layers == {3: Budget.dense()}


def test_documents_are_long_enough_and_never_shared(place):
    documents, tokenizer = open_documents(place / "model", str(place / "store"), 257)
    assert tokenizer.vocab_size == 257
    texts = choose_texts(documents, [32, 64, 128], 6, 3, seed=1)
    chosen = [*texts.held_out, *(n for own in texts.fitted.values() for n in own)]
    assert len(set(chosen)) == len(chosen) == 3 + 3 * 6
    assert min(documents.lengths[texts.held_out]) > 256
    text = texts.read(texts.held_out[0], 256)
    assert text.shape == (1, 256)
    assert 256 not in text, "the end of a document is none of its text"
    assert choose_texts(documents, [32, 64, 128], 6, 3, seed=2).held_out != texts.held_out
    # 20 documents have 512 tokens, all have 200.
    with pytest.raises(BadArgument) as error:
        choose_texts(documents, [64, 128, 256], 15, 8, seed=0)
    assert "of 40 there are 20 of the 23 that must have 256 tokens or more" in str(error.value)
    assert "40 of the 53 that must have 64" in str(error.value)


def test_the_text_is_in_the_tokens_of_the_model(place, tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    store = str(place / "store")
    ByteTokenizer().save_pretrained(tmp_path / "bytes")
    documents, _ = open_documents(tmp_path / "bytes", store, 257)
    assert len(documents) == 40, "another kind of tokenizer, the same ids"
    words = Tokenizer(models.WordLevel({"</s>": 0, "word": 1}, unk_token="</s>"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>").save_pretrained(
        tmp_path / "words"
    )
    with pytest.raises(BadArgument, match="was packed with another tokenizer"):
        open_documents(tmp_path / "words", store, 257)
    with pytest.raises(BadArgument, match="in the 257 tokens of bytes, the model .* knows 256"):
        open_documents(place / "model", store, 256)


def test_rows_are_late_and_the_last_is_one_of_them():
    generator = torch.Generator().manual_seed(0)
    for length, count, expected in ((240, 8, 8), (240, 1, 1), (9, 64, 3), (1, 4, 1)):
        rows = late_rows(length, count, generator).tolist()
        assert len(set(rows)) == expected
        assert rows == sorted(rows)
        assert rows[0] >= 3 * length // 4
        assert rows[-1] == length - 1


def test_logits_that_are_not_finite_name_their_layer(place, tmp_path, capsys):
    model = build_model(pretrained=place / "model")
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[0, 0] = torch.nan
    model.save_pretrained(tmp_path / "model")
    arguments = ["--model", str(tmp_path / "model"), "--lengths", "32,64,128"]
    assert calibrate(place, tmp_path / "out", *arguments) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.endswith("layer 1 has logits that are not finite")


def test_layers_with_a_window_of_their_own_are_left_out(place, tmp_path, capsys):
    """The sharp layer alone is measured, and named by its number in the model."""
    model = build_model(pretrained=place / "model")
    keys = {key: getattr(model.config, key) for key in ("vocab_size", "hidden_size")}
    keys |= {"intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    keys |= {"num_key_value_heads": 2, "max_position_embeddings": 512, "eos_token_id": 256}
    windows = {"use_sliding_window": True, "sliding_window": 16}
    windows["layer_types"] = ["sliding_attention", "full_attention"]
    partly = build_model(architecture={"model_type": "qwen2", **keys, **windows})
    partly.load_state_dict(model.state_dict(), strict=False)
    partly.save_pretrained(tmp_path / "partly")
    small = ["--prompts", "0", "--steps", "1", "--lengths", "32,64,128"]
    calibrate(place, tmp_path / "out", "--model", str(tmp_path / "partly"), *small)
    found = json.loads((tmp_path / "out" / "calibration.json").read_text())
    assert found["fits"]["layers"] == [1]
    assert len(found["fits"]["exponent"]) == 1
    assert found["law"]["layers"] == {}
    assert list(found["check"]["attempts"][0]["missed_p95_by_layer"]) == ["1"]
    assert "layer 1: k(n)" in capsys.readouterr().out

    everywhere = {"model_type": "mistral", **keys, "sliding_window": 16}
    build_model(architecture=everywhere).save_pretrained(tmp_path / "everywhere")
    nowhere = ["--model", str(tmp_path / "everywhere"), *small]
    assert calibrate(place, tmp_path / "none", *nowhere) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "every layer of this MistralForCausalLM has a sliding window" in error


def test_mistakes_are_one_line(place, tmp_path, capsys, made):
    model, store = str(place / "model"), str(place / "store")
    (tmp_path / "long.txt").write_text("one long document " * 100)
    basic = ["--model", model, "--data", store, "--out", str(tmp_path / "out")]
    small, few = ["--block", "8", "--tile", "8", "--sink", "8"], ["--documents", "4"]
    for arguments, message in (
        (["--data", store], "the following arguments are required: --model, --out"),
        ([*basic, "--model", str(tmp_path / "no")], "there is no directory"),
        ([*basic, *small, "--data", str(tmp_path / "no")], "/no' does not exist"),
        (
            [*basic, *small, "--data", str(tmp_path / "long.txt")],
            "the documents are too few or too short",
        ),
        ([*basic, "--target-mass", "1"], "--target-mass must lie between 0 and 1, got 1"),
        ([*basic, "--target-mass", "0.9999999999"], "--target-mass must lie between 0 and 1"),
        ([*basic, "--target-mass", "0"], "--target-mass must lie between 0 and 1, got 0"),
        ([*basic, "--lengths", "64"], "--lengths 64 is too little to fit a law"),
        ([*basic, "--lengths", "64,96,128"], "four times the shortest"),
        ([*basic, "--lengths", "60,70,250"], "three lengths that differ by a quarter or more"),
        ([*basic, "--lengths", "64,32,256"], "--lengths must rise, each given once"),
        ([*basic, "--lengths", "64,a"], "whole numbers with commas, got '64,a'"),
        ([*basic, "--lengths", "64,128,512"], "the longest may be 256"),
        ([*basic, "--lengths", "32,64,128"], "192 are always kept (64 at the start, 128 next to"),
        ([*basic, "--documents", "2"], "--documents must be >= 3, got 2"),
        ([*basic, *small, "--documents", "12"], "40 of the 44 that must have 64"),
        ([*basic, "--block", "12"], "--block must be a power of two"),
        ([*basic, *small, *few, "--out", str(tmp_path / "long.txt")], "long.txt: File exists"),
        ([*basic, "--out", str(made[0])], "holds a calibration already (budget.yaml"),
    ):
        assert main(["calibrate", *arguments]) == 2, arguments
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("lit-sparse calibrate: error: ")
        assert message in error
    assert not (tmp_path / "out").exists()
