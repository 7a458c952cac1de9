"""`lit-sparse inspect` on tiny models of every type, against the full matrices."""

import io
import json
from contextlib import redirect_stdout

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lit_sparse import theory
from lit_sparse.budget import Budget
from lit_sparse.models import observe, sparsify
from lit_sparse.recipes.inspect import main

LENGTH, ROWS = 96, 49  # all rows that see at least half of a text
LAW = Budget(2, 0.5, floor=8, sink=8)
KINDS = ("llama", "qwen2", "qwen3", "mistral")


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _build(kind, **others):
    torch.manual_seed(1)
    settings = {
        "vocab_size": 257,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        **({"head_dim": 8} if kind == "qwen3" else {}),
        **({"sliding_window": None} if kind == "mistral" else {}),
        **others,
    }
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings)).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models of all types, the llama with a law of its own, and a corpus."""
    folder = tmp_path_factory.mktemp("inspect")
    for kind in KINDS:
        model = _build(kind)
        if kind == "llama":
            sparsify(model, LAW, layers={1: Budget.dense()}, block=8)
        if kind == "qwen2":
            for layer in model.model.layers:
                torch.nn.init.normal_(layer.self_attn.q_proj.bias)
                torch.nn.init.normal_(layer.self_attn.k_proj.bias)
        model.save_pretrained(folder / kind)
    (folder / "text").mkdir()
    for number in range(40):
        text = " ".join(str(number * i % 977) for i in range(60))
        (folder / "text" / f"{number:02}.txt").write_text(text)
    return folder


def _arguments(folder, *kinds):
    models = [str(folder / kind) for kind in kinds]
    return ["--model", *models, "--length", str(LENGTH), "--rows", str(ROWS), "--documents", "1"]


@pytest.fixture(scope="module")
def report(folder):
    """What is printed for all models on one text, and what is written."""
    out, data = folder / "out.json", folder / "text"
    arguments = ["--data", str(data), "--json", str(out), "--plot", str(folder / "f.png")]
    with redirect_stdout(io.StringIO()) as printed:
        assert main([*_arguments(folder, *KINDS), *arguments]) == 0
    return printed.getvalue(), json.loads(out.read_text())["models"]


def _run_densely(folder, kind, name):
    """Layer inputs and logits [H, rows, keys] of the later rows on the piece that was measured."""
    file, _, piece = name.rpartition("[")
    begin, end = (int(x) for x in piece.rstrip("]").split(":"))
    raw = (folder / "text" / file.rsplit("/", 1)[-1]).read_bytes()
    ids = torch.tensor([*raw, 256])[begin:end][None]
    model, inputs, logits = AutoModelForCausalLM.from_pretrained(folder / kind).eval(), [], []
    for layer in model.model.layers:
        layer.input_layernorm.register_forward_hook(lambda _, __, x: inputs.append(x[0]))

    def observer(layer, q, k, v, out, lse, selection, options, documents):
        keys = k.repeat_interleave(2, 1)
        logits.append(options.scale * torch.einsum("ihd,jhd->hij", q, keys)[:, -ROWS:])

    with torch.no_grad(), observe(sparsify(model, Budget.dense()), observer):
        model.model(ids, use_cache=False)
    return model, inputs, logits


@pytest.mark.parametrize("kind", KINDS)
def test_every_number_is_that_of_brute_force(folder, report, kind):
    found = next(model for model in report[1] if model["model_type"] == kind)
    model, inputs, logits = _run_densely(folder, kind, found["texts"][0])
    hidden = torch.arange(LENGTH) > torch.arange(LENGTH - ROWS, LENGTH)[:, None]
    for layer, x, rows in zip(found["layers"], inputs, logits, strict=True):
        attention = model.model.layers[layer["layer"]].self_attn
        w_q = attention.q_proj.weight.unflatten(0, (4, -1)).double()
        w_k = attention.k_proj.weight.unflatten(0, (2, -1)).double().repeat_interleave(2, 0)
        norm = attention.scaling * torch.linalg.matrix_norm(w_q.mT @ w_k)
        torch.testing.assert_close(layer["norm"], norm.tolist(), rtol=1e-5, atol=0)
        assert layer["input_largest"] == pytest.approx(x.abs().max().item(), rel=1e-4)
        assert layer["input_rms"] == pytest.approx(x.square().mean().sqrt().item(), rel=1e-4)
        common = x.mean(0).square().sum() / x.square().sum(-1).mean()
        assert layer["input_mean_share"] == pytest.approx(common.item(), rel=1e-4)
        largest = rows.masked_fill(hidden, 0).abs().amax((1, 2))
        torch.testing.assert_close(layer["largest_logit"], largest.tolist(), rtol=1e-4, atol=1e-5)
        low = rows.masked_fill(hidden, torch.inf).amin(-1)
        span = (rows.masked_fill(hidden, -torch.inf).amax(-1) - low).median(-1).values
        torch.testing.assert_close(layer["range"], span.tolist(), rtol=1e-4, atol=1e-5)


def test_the_bound_is_that_of_the_norm_and_the_inputs(report):
    llama, qwen3 = (next(x for x in report[1] if x["model_type"] == kind) for kind in KINDS[::2])
    for layer in llama["layers"]:
        norm = torch.tensor(layer["norm_largest_over_distances"], dtype=torch.float64)
        for scale, name in (("input_largest", "bound"), ("input_rms", "estimate")):
            r = theory.logit_scale(layer[scale], norm)
            expected = theory.largest_logit_bound(r, ROWS * LENGTH, 0.05)
            torch.testing.assert_close(layer[name], expected.tolist(), rtol=1e-6, atol=0)
    for layer in qwen3["layers"]:
        assert layer["bound"] == layer["qk_norm_ceiling"]
        assert all(a <= b for a, b in zip(layer["largest_logit"], layer["bound"], strict=True))
        assert layer["estimate"] == [None] * 4


def test_the_required_range_is_that_of_the_model_s_law(report):
    for found in report[1]:
        own = found["model_type"] == "llama"
        assert found["own_law"] == own
        assert found["lengths"] == [LENGTH, 8192, 32768, 131072, 1048576]
        n = torch.tensor(found["lengths"])
        for layer in found["layers"]:
            budget = Budget.preset("balanced")
            if own:
                budget = Budget.dense() if layer["layer"] else LAW
            required = theory.required_logit_range(n, budget(n), 0.05)
            torch.testing.assert_close(layer["required_range"], required.tolist())
            span = torch.tensor(layer["range"], dtype=torch.float64)
            assert layer["reached"] == (span[:, None] >= required).tolist()


def test_what_is_printed_names_models_layers_and_what_is_infeasible(folder, report):
    printed = report[0]
    assert "[1] " in printed.partition("Side by side")[2]
    for kind in KINDS:
        of = {"qwen2": " with biases", "qwen3": " with QK-norm"}.get(kind, "")
        assert f"{folder / kind}: {kind}, 2 layers of 4 query heads{of}; 1 x {LENGTH}" in printed
        assert f"{folder.name}/{kind}" in printed
    assert f"{LAW} (the model's law) in layer 0 can miss at most 5 % of the mass" in printed
    assert "(the model's law) in layer 1 requires no range of logits" in printed
    assert 'preset "balanced", as the config has no law' in printed
    assert "it says nothing there" in printed
    assert "Infeasible at " in printed
    assert (folder / "f.png").read_bytes()[:4] == b"\x89PNG"


def test_heads_one_by_one_on_random_tokens(folder, capsys):
    assert main([*_arguments(folder, "mistral"), "--heads"]) == 0
    printed = capsys.readouterr().out
    assert "Measured on random tokens" in printed
    assert [line.split()[0] for line in printed.splitlines() if line[1:2] == "."] == [
        f"{layer}.{head}" for layer in range(2) for head in range(4)
    ]


def test_a_tight_qk_norm_makes_the_law_infeasible_for_certain(tmp_path, capsys):
    model = _build("qwen3")
    for layer in model.model.layers:
        torch.nn.init.constant_(layer.self_attn.q_norm.weight, 0.3)
    model.save_pretrained(tmp_path / "tight")
    assert main([*_arguments(tmp_path, "tight")]) == 0
    printed = capsys.readouterr().out
    assert "Infeasible at 8k, 32k, 128k, 1M: QK-norm lets no row of layers 0-1 reach it" in printed


def test_layers_with_a_window_of_their_own_are_left_out(tmp_path, capsys):
    """A model with two rotations, of whose layers one obeys the law; one with a fused matrix."""
    types = ["sliding_attention", "full_attention"]
    window = {"sliding_window": 16, "layer_types": types}
    _build("gemma3_text", head_dim=8, **window).save_pretrained(tmp_path / "gemma")
    _build("phi3").save_pretrained(tmp_path / "phi")
    assert main([*_arguments(tmp_path, "gemma", "phi"), "--json", str(tmp_path / "f.json")]) == 0
    gemma, phi = json.loads((tmp_path / "f.json").read_text())["models"]
    assert [layer["layer"] for layer in gemma["layers"]] == [1]
    assert [layer["layer"] for layer in phi["layers"]] == [0, 1]
    (only,) = gemma["layers"]
    pairs = zip(only["largest_logit"], only["qk_norm_ceiling"], strict=True)
    assert all(0 < measured <= ceiling for measured, ceiling in pairs)
    capsys.readouterr()
    _build("phi3", sliding_window=16).save_pretrained(tmp_path / "windows")
    assert main(_arguments(tmp_path, "windows")) == 2
    assert "every layer of this Phi3ForCausalLM has a sliding" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--model", "nowhere"], "there is no directory nowhere"),
        (["--model", "{}/empty"], "has no config.json"),
        (["--model", "{}/unweighted"], "has no model.safetensors"),
        (["--model", "{}/gpt2"], "model_type gpt2 is not supported"),
        (["--model", "{}/flat"], "the model has no attention layer"),
        (["--model", "{}/nan"], "layer 1 has logits that are not finite"),
        (["--length", "300"], "--length 300 is past the 256 positions"),
        (["--data", "{}/nothing"], "nothing"),
        (["--data", "{}/text", "--length", "256"], "the longest validation document"),
        (["--rows", "0"], "--rows must be at least 1"),
        (["--missed", "1"], "--missed must lie between 0 and 1"),
        (["--json", "{}/no/where.json"], "there is no directory"),
        (["--json", "{}"], "is a directory; name a file"),
        (["--plot", "{}/figure.nope"], "must end in .png, .pdf or .svg"),
        (["--device", "tpu"], "--device must be cpu or cuda"),
        (["--dtype", "int3"], "model.dtype"),
    ],
)
def test_errors_are_one_line(folder, capsys, change, message):
    (folder / "empty").mkdir(exist_ok=True)
    (folder / "unweighted").mkdir(exist_ok=True)
    config = (folder / "llama" / "config.json").read_text()
    (folder / "unweighted" / "config.json").write_text(config)
    if "{}/gpt2" in change:
        small = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 257}
        special = {"bos_token_id": None, "eos_token_id": None}
        config = AutoConfig.for_model("gpt2", **small, **special)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / "gpt2")
    if "{}/nan" in change:
        model = _build("llama")
        torch.nn.init.constant_(model.model.layers[1].self_attn.k_proj.weight, torch.nan)
        model.save_pretrained(folder / "nan")
    if "{}/flat" in change:
        _build("llama", num_hidden_layers=0).save_pretrained(folder / "flat")
    change = [part.format(folder) for part in change]
    assert main([*_arguments(folder, "llama"), *change]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (error,) = [line for line in printed.err.splitlines() if "error:" in line]
    assert error.startswith("lit-sparse inspect: error: ")
    assert message in error
