import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lit_sparse.attention import select
from lit_sparse.attention.options import Options
from lit_sparse.attention.plan import make_plan
from lit_sparse.budget import Budget
from lit_sparse.data import ByteTokenizer
from lit_sparse.models import dense_attention, observe, sparsify
from lit_sparse.recipes.benchmark import main
from lit_sparse.recipes.benchmark.selection import Quality, Rule, block_masses, far_blocks, rules

LENGTH, BLOCK, TILE = 200, 8, 16
BUDGET = Budget(3, 0.5, floor=0, sink=8, local=0.25, late=0.25)


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny(kind="llama", vocab_size=257, **others):
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind,
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.3,  # logits that are not flat
        **others,
    )
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture
def model_dir(tmp_path):
    tiny().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(40):
        text = " ".join(f"{number * i % 977}" for i in range(150))
        (folder / f"{number:02}.txt").write_text(text)
    return folder


@pytest.fixture(scope="module")
def observed():
    """q and k of each layer of one document under dense attention, and all rules' tallies."""
    model = sparsify(tiny(), BUDGET, block=BLOCK, tile=TILE)
    quality = Quality(rules(BUDGET, TILE), BUDGET, BLOCK)
    quality.rows = torch.tensor([100, 117, 127, 128, 150, 199])
    tokens = torch.randint(0, 257, (1, LENGTH), generator=torch.Generator().manual_seed(1))
    layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def keep(layer, q, k, *_):
        layers[layer] = (q, k)

    with torch.no_grad(), dense_attention(model), observe(model, quality), observe(model, keep):
        model.base_model(input_ids=tokens, use_cache=False)
    return layers, quality


def dense_weights(q, k, row):
    """float64 [Hq, row + 1]: softmax weights of one row over all its keys."""
    keys = k[: row + 1].double().repeat_interleave(q.shape[1] // k.shape[1], 1)
    return (torch.einsum("hd,thd->ht", q[row].double(), keys) * q.shape[2] ** -0.5).softmax(-1)


def test_missed_mass_and_recall_are_those_of_brute_force(observed):
    layers, quality = observed
    assert sorted(layers) == [0, 1]
    entries = {Rule(e["selection"], e["score"], e["late"], e["tile"]): e for e in quality.results()}
    working = [rule for rule in entries if rule.kind == "working set"]
    assert len(working) == 9
    for rule in working:
        budget = replace(BUDGET, late=rule.late)
        missed, found = [], []
        for q, k in layers.values():
            selection = select(q, k, budget, block=BLOCK, tile=rule.tile, score=rule.score)
            mask = selection.to_mask()
            for row in quality.rows.tolist():
                weights = dense_weights(q, k, row)
                kept = mask[:, row, : row + 1].repeat_interleave(2, 0)
                missed += (1 - (weights * kept).sum(-1)).tolist()
                # Blocks behind the sink (8 tokens: block 0) and before the local window.
                t0 = row // rule.tile * rule.tile
                keys = budget(t0 + rule.tile)
                window = max(-(-(keys - 8) // 4), rule.tile + BLOCK)
                for head in range(4):
                    far = {
                        b: float(weights[head, b * BLOCK : (b + 1) * BLOCK].sum())
                        for b in range(1, max(t0 - window, 0) // BLOCK)
                    }
                    if far:
                        found.append(bool(kept[head, max(far, key=far.__getitem__) * BLOCK]))
        entry = entries[rule]
        assert entry["missed_mass"] == pytest.approx(sum(missed) / len(missed), abs=1e-6)
        assert entry["rows_and_heads"] == len(missed)
        assert entry["far_recall"] == pytest.approx(sum(found) / len(found), abs=1e-12)
        assert entry["rows_and_heads_with_far_blocks"] == len(found) > 0
        assert 0 < entry["missed_mass"] < 1
        mean = sum(entry["missed_mass_by_layer"]) / len(entry["missed_mass_by_layer"])
        assert entry["missed_mass"] == pytest.approx(mean)


def test_density_is_that_of_the_selection(observed):
    layers, quality = observed
    entry = quality.results()[0]
    selections = [select(q, k, BUDGET, block=BLOCK, tile=TILE) for q, k in layers.values()]
    assert entry["density"] == pytest.approx(sum(s.density for s in selections) / 2)
    executed = selections[0].columns.shape[1] * BLOCK * TILE / (LENGTH * (LENGTH + 1) / 2)
    assert entry["executed_density"] == pytest.approx(executed)
    assert entry["executed_density"] > entry["density"]


def test_yardsticks_choose_as_they_say(observed):
    layers, quality = observed
    q, k = layers[0]
    plan = make_plan((0, LENGTH), (0, LENGTH), replace(BUDGET, late=0.0), BLOCK, TILE)
    entries = {e["selection"]: e for e in quality.results()}
    for kind in ("per query", "leaky"):
        missed = []
        for row in quality.rows.tolist():
            t0 = row // TILE * TILE
            tile = t0 // TILE
            local = int(plan.first_local[tile])
            asking = range(t0, min(t0 + TILE, LENGTH)) if kind == "leaky" else [row]
            weights = dense_weights(q, k, row)
            # What the plan's list holds beside the sink (block 0), the window and the diagonal.
            size = int(plan.base[tile])
            for head in range(4):
                group = [head // 2 * 2, head // 2 * 2 + 1]
                means = k[: t0 // BLOCK * BLOCK, head // 2].unflatten(0, (-1, BLOCK)).mean(1)
                scores = torch.zeros(len(means))
                for asking_row in asking:
                    logits = q[asking_row, group] @ means.T * q.shape[2] ** -0.5
                    scores += logits.softmax(-1).sum(0)
                best = scores[1:local].topk(size).indices + 1
                blocks = {0, *best.tolist(), *range(local, LENGTH // BLOCK)}
                kept = sum(weights[head, b * BLOCK : (b + 1) * BLOCK].sum() for b in blocks)
                missed.append(1 - float(kept))
        expected = sum(missed) / len(missed)
        assert entries[kind]["missed_mass_by_layer"][0] == pytest.approx(expected, abs=1e-6)
        assert entries[kind]["executed_density"] is None


def test_a_scorer_that_keeps_everything_misses_nothing(observed):
    layers, _ = observed
    quality = Quality([Rule("working set", "exact", 0.1, TILE)], Budget.dense(), BLOCK)
    quality.rows = torch.arange(150, 200)
    quality(0, *layers[0], *[None] * 4, Options(0.5), None)
    (entry,) = quality.results()
    assert entry["far_recall"] == 1.0
    assert entry["rows_and_heads_with_far_blocks"] == 50 * 4
    assert entry["missed_mass"] == 0.0
    assert entry["density"] == entry["executed_density"] == 1.0


def test_block_masses_with_a_soft_cap_and_sinks(observed):
    """What is missing of the whole is the sink's."""
    (q, k), sinks = observed[0][1], torch.tensor([-1.0, 0.0, 2.0, 6.0])
    rows = torch.tensor([40, 120])
    masses = block_masses(q, k, rows, Options(0.5, softcap=3.0, sinks=sinks), BLOCK)
    keys = k.repeat_interleave(2, 1)
    for i, row in enumerate(rows.tolist()):
        for head in range(4):
            logits = 3 * (0.5 * keys[: row + 1, head] @ q[row, head] / 3).tanh()
            weights = torch.cat([logits, sinks[head : head + 1]]).softmax(0)[:-1]
            own = masses[head // 2, head % 2, i]
            torch.testing.assert_close(own.sum(), weights.sum())
            torch.testing.assert_close(own[2], weights[2 * BLOCK : 3 * BLOCK].sum())


def test_far_blocks_agree_with_the_plan_where_it_tells_them():
    plan = make_plan((0, LENGTH), (0, LENGTH), BUDGET, BLOCK, TILE)
    assert plan.sparse.any()
    first, end = far_blocks(plan, BUDGET)
    sparse = torch.from_numpy(plan.sparse)
    assert torch.equal(end[sparse], torch.from_numpy(plan.first_local)[sparse])
    assert torch.equal(first[sparse], torch.from_numpy(plan.counts[:, 0].copy())[sparse])


def test_every_rule_stands_once():
    listed = rules(BUDGET, 32)
    assert len(set(listed)) == len(listed)
    assert {rule.score for rule in listed} == {"mass", "mean", "variance", "minmax", "exact"}
    assert {rule.tile for rule in listed} == {16, 32, 64}
    assert {rule.late for rule in listed if rule.kind == "working set"} == {0.0, 0.1, 0.25}


# -- the command --


def run(model_dir, corpus, *others):
    arguments = (
        "--alpha 3 --floor 0 --sink 8 --block 8 --tile 16 --rows 5 --documents 2 --length 200"
    )
    where = ["--what", "selection", "--model", str(model_dir), "--data", str(corpus)]
    return main([*where, *arguments.split(), *others])


def test_report(model_dir, corpus, tmp_path, capsys):
    path = tmp_path / "report.json"
    assert run(model_dir, corpus, "--json", str(path)) == 0
    printed = capsys.readouterr().out
    report = json.loads(path.read_text())
    assert (report["what"], report["length"], report["rows"]) == ("selection", 200, 5)
    assert (report["layers"], report["heads"], report["kv_heads"]) == (2, 4, 2)
    assert len(report["documents"]) == len(set(report["documents"])) == 2
    # 2 documents, 2 layers, 4 heads, 5 rows
    assert {entry["rows_and_heads"] for entry in report["rules"]} == {80}
    for entry in report["rules"]:
        assert f"{entry['missed_mass']:.4f}" in printed
        assert len(entry["far_recall_by_layer"]) == 2
    lines = printed.splitlines()
    names = next(line for line in lines if line.startswith("selection "))
    for name in ("scorer", "late", "tile", "kept", "executed", "missed mass", "far recall"):
        assert name in names
    assert sum(line.startswith(("working set ", "per query ", "leaky ")) for line in lines) >= 10

    assert run(model_dir, corpus, "--json", str(path)) == 0
    assert json.loads(path.read_text())["rules"] == report["rules"]


def test_tokenizer_of_the_model_is_used(model_dir, corpus, capsys):
    ByteTokenizer().save_pretrained(model_dir)
    assert run(model_dir, corpus) == 0
    with_tokenizer = capsys.readouterr().out
    for file in model_dir.glob("tokenizer*"):
        file.unlink()
    assert run(model_dir, corpus) == 0
    # The same bytes either way.
    assert capsys.readouterr().out == with_tokenizer


def test_what_does_not_fit_is_refused(model_dir, corpus, tmp_path, capsys):
    tiny(vocab_size=100).save_pretrained(tmp_path / "small")
    tiny("mistral", sliding_window=64).save_pretrained(tmp_path / "window")
    cases = [
        (model_dir, corpus, ["--length", "513"], "past the 512 positions"),
        (tmp_path / "small", corpus, [], "knows 100 tokens, its tokenizer (bytes"),
        (tmp_path / "window", corpus, [], "sliding"),
        (model_dir, tmp_path / "nowhere", [], "does not exist"),
    ]
    for model, data, others, says in cases:
        assert run(model, data, *others) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("lit-sparse benchmark: error: ")
        assert says in error


def test_too_short_a_corpus_is_refused(model_dir, tmp_path, capsys):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("short")
    assert run(model_dir, tmp_path) == 2
    assert "the longest validation document" in capsys.readouterr().err
