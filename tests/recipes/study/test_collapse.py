"""Verdicts of the study follow from numbers that are known; its quick form runs."""

import json

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from lit_sparse.cli import main
from lit_sparse.recipes.study.collapse import verdicts
from lit_sparse.recipes.study.collapse.induced import Scan, fall
from lit_sparse.recipes.study.collapse.measure import Measured, Sizes
from lit_sparse.recipes.study.collapse.training import ARMS, Plan, Result, Trained, all_runs
from lit_sparse.recipes.study.findings import Outcome

TINY = {
    "vocab_size": 257,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": 256,
}
FACTORS = [0.25, 0.5, 1.0, 2.0, 4.0, 8.0]
HEALTHY = {"gamma": 0.25, "layer_gamma": 0.3, "layer_saturated": 0.0, "dispersed": 0.0}


def measured(share, length=512, loss=1.5, **sharp):
    """100 prompts of each task, of which such a share is right; 4 texts."""
    right = np.zeros(100)
    right[: round(100 * share)] = 1.0
    losses = np.linspace(-0.1, 0.1, 4) + loss
    sharp = {**HEALTHY, "concentrated": 0.0, **sharp}
    return Measured(length, losses, {"passkey": right, "aggregation": right}, sharp)


def scan(shares, loss=1.5, **sharp_at_end):
    """gamma is 0.25 at the factor 1."""
    found = [
        measured(share, gamma=0.25 * factor**2)
        for factor, share in zip(FACTORS, shares, strict=True)
    ]
    found[-1] = measured(shares[-1], loss=loss, gamma=16.0, **sharp_at_end)
    return Scan(FACTORS, found)


def test_half_of_a_task_is_found_where_it_is_lost_on_either_side():
    # Half of .8 is left half way in ln gamma from 1 to 4, and from 1/4 to 1/16.
    found = scan([0.2, 0.2, 0.8, 0.6, 0.2, 0.2])
    concentration = fall(found.side(True), "passkey", 0)
    assert concentration.threshold.mean == pytest.approx(2)
    assert concentration.threshold.low < 2 < concentration.threshold.high
    assert concentration.cost.mean == pytest.approx(0.6)
    assert concentration.rank.mean < -0.9
    dispersion = fall(found.side(False), "passkey", 0)
    # Two thirds of the way from .8 to .2.
    assert dispersion.threshold.mean == pytest.approx(0.25 * 0.25 ** (2 / 3))
    assert dispersion.threshold.low < dispersion.threshold.mean < dispersion.threshold.high
    flat = fall(scan([0.8] * 6).side(True), "passkey", 0)
    assert flat.threshold is None
    assert np.isnan(flat.rank.mean)


def test_what_is_lost_at_gamma_1_is_found_there():
    found = scan([1.0, 1.0, 1.0, 0.5, 0.1, 0.1], concentrated=1.0)
    shows, dispersion, at_one, limits = verdicts.of_scan(found, seed=0)
    assert shows.outcome == at_one.outcome == Outcome.SUPPORTED
    assert dispersion.outcome == Outcome.NOT_HERE
    assert found.side(True).lost(0.2) == 4
    assert found.side(False).lost(0.2) is None
    # The monitor sees it at the last factor only, behind the loss.
    assert found.side(True).warned() == 8
    assert (limits.outcome, limits.limit) == (Outcome.NOT_HERE, "too late for concentration")


def test_a_limit_that_is_passed_first_and_a_loss_that_is_not_at_1():
    found = scan([0.1, 1.0, 1.0, 1.0, 1.0, 0.1], concentrated=1.0)
    found.measured[0].sharpness["dispersed"] = 1.0
    *shows, at_one, limits = verdicts.of_scan(found, seed=0)
    assert [one.outcome for one in shows] == [Outcome.SUPPORTED, Outcome.SUPPORTED]
    assert at_one.outcome == Outcome.NOT_HERE
    assert limits.outcome == Outcome.SUPPORTED


def test_answers_that_stay_while_the_loss_grows_are_a_limit():
    shows, *_ = verdicts.of_scan(scan([1.0] * 6, loss=1.9), seed=0)
    assert shows.outcome == Outcome.LIMITED
    assert "0.4 (0.4 to 0.4) nats" in shows.numbers


def test_a_model_that_cannot_answer_decides_nothing():
    said = verdicts.of_scan(scan([0.1, 0.2, 0.3, 0.1, 0.0, 0.0]), seed=0)
    assert {one.outcome for one in said} == {Outcome.NOT_HERE}
    assert all("answers fewer than 50%" in one.limit for one in said)


PLAN = Plan(None, 256, 256, 1, Sizes(1, 100, 1), ("passkey", "aggregation"))


def results(shares, losses=None):
    """Three seeds; before training a tenth is answered, and after it unless said otherwise."""
    found = []
    for run in all_runs([0, 1, 2]):
        arm, jitter = (run.start, run.mend), run.seed / 100
        share, loss = shares.get(arm, 0.1) + jitter, (losses or {}).get(arm, 3.0) + jitter
        before, after = (
            {n: measured(x, n, y) for n in (256, 512)} for x, y in ((0.1, 3.0), (share, loss))
        )
        found.append(Result(run, before, after))
    return found


def test_a_mend_mends_if_seeds_agree_and_the_task_is_back():
    shares = {
        ("healthy", "no mend"): 0.9,
        ("concentrated", "QK-norm"): 0.88,
        ("concentrated", "QK-clip"): 0.5,
        ("dispersed", "no mend"): 0.88,
        ("dispersed", "QK-norm"): 0.88,
    }
    said = verdicts.of_runs(results(shares), PLAN)
    by = {one.claim: (one.outcome, one.limit) for one in said}
    # Each mend from each start, at twice the length too where the start is dispersed.
    assert len(by) == sum(len(mends) - 1 for mends in ARMS.values()) + 2
    assert by["QK-norm mends a concentrated start"] == (Outcome.SUPPORTED, "")
    outcome, limit = by["QK-clip mends a concentrated start"]
    assert (outcome, limit) == (Outcome.LIMITED, "51% of what collapse cost is back")
    assert by["Length-scaled softmax mends a concentrated start"][0] == Outcome.NOT_HERE
    outcome, limit = by["QK-norm mends a dispersed start, at the length of training"]
    assert outcome == Outcome.NOT_HERE
    assert "without a mend" in limit


def test_a_control_that_cannot_answer_decides_nothing():
    said = verdicts.of_runs(results({}, {("healthy", "no mend"): 1.0}), PLAN)
    assert {one.outcome for one in said} == {Outcome.NOT_HERE}
    assert {one.limit for one in said} == {said[0].limit}
    assert "answers fewer than 50%" in said[0].limit


def test_where_answers_stay_the_loss_decides():
    found = results(
        dict.fromkeys(((s, m) for s, ms in ARMS.items() for m in ms), 0.9),
        {
            ("healthy", "no mend"): 1.0,
            ("concentrated", "no mend"): 2.0,
            ("concentrated", "QK-clip"): 1.05,
        },
    )
    for result in found:
        result.before.update(result.after)
    said = {one.claim: one for one in verdicts.of_runs(found, PLAN)}
    one = said["QK-clip mends a concentrated start"]
    assert one.outcome == Outcome.SUPPORTED
    assert "costs 1 (1 to 1) nats a token of text; 95% of it is back" in one.numbers


def test_intervals_of_few_seeds_are_students():
    found = verdicts.paired([0.1, 0.2, 0.3])
    assert (found.mean, found.high - found.mean) == pytest.approx((0.2, 4.303 * 0.1 / 3**0.5))
    assert verdicts.paired([0.1]).low == -np.inf


def test_only_queries_and_keys_train_at_the_high_rate():
    module = Trained(30.0, architecture={"model_type": "llama", **TINY}, learning_rate=1e-3)
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    rates = {
        names[id(parameter)]: group["lr"]
        for group in module.adamw().param_groups
        for parameter in group["params"]
    }
    assert set(rates) == set(names.values())
    fast = {name for name, rate in rates.items() if rate == pytest.approx(3e-2)}
    assert fast == {name for name in rates if "q_proj" in name or "k_proj" in name}
    assert {rates[name] for name in rates if name not in fast} == {1e-3}


def test_models_that_it_cannot_take_are_refused(tmp_path, capsys):
    torch.manual_seed(0)
    MistralForCausalLM(MistralConfig(**TINY)).save_pretrained(tmp_path / "mistral")
    LlamaForCausalLM(LlamaConfig(**TINY | {"max_position_embeddings": 64})).save_pretrained(
        tmp_path / "short"
    )
    common = ["--out", str(tmp_path / "out"), "--work", str(tmp_path), "--quick"]
    for model, why in (("mistral", "this is a mistral"), ("short", "give a longer model")):
        assert main(["study", "collapse", str(tmp_path / model), *common]) == 2
        assert why in capsys.readouterr().err


@pytest.mark.slow
def test_the_quick_form_writes_its_report(tmp_path):
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**TINY)).save_pretrained(tmp_path / "model")
    out = tmp_path / "out"
    assert main(["study", "collapse", str(tmp_path / "model"), "--quick", "--out", str(out)]) == 0
    for name in ("report.md", "induced.png", "mends.png", "induced.csv", "arms.csv", "runs.csv"):
        assert (out / name).stat().st_size > 0
    said = json.loads((out / "verdicts.json").read_text())["verdicts"]
    # It is a new model: there are no answers to lose, and the study says so.
    assert "supported" not in {one["outcome"] for one in said}
    assert all("answers fewer than 50%" in one["limit"] for one in said)
