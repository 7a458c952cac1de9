"""The study of R: its measurements against brute force, rotations and what comes back after."""

import csv
import json

import pytest
import torch

from lit_sparse.models import build_model, observe, rope_parameters
from lit_sparse.models.norms import distances, logit_norms
from lit_sparse.models.rope import frequencies
from lit_sparse.recipes.benchmark.report import BadArgument
from lit_sparse.recipes.study import main, subjects
from lit_sparse.recipes.study.findings import Settings
from lit_sparse.recipes.study.radius.measure import MISSED, measure
from lit_sparse.recipes.study.radius.rope import NONE, OWN, RULES, lengths, rope, rules_of

LENGTH = 64


@pytest.fixture
def subject(tmp_path, architecture):
    torch.manual_seed(0)
    path = tmp_path / "small"
    build_model(architecture={**architecture, "initializer_range": 0.2}).save_pretrained(path)
    return subjects.trained(path)


def test_measured_logits_are_those_of_the_full_matrix(subject):
    texts = subjects.read("random tokens", subject, {LENGTH: 2}, seed=0)
    seen = []

    def look(layer, q, k, v, out, lse, selection, options, documents):
        keys = k.repeat_interleave(2, 1)
        seen.append(options.scale * torch.einsum("ihd,jhd->hij", q, keys))

    # All rows of the last quarter.
    count = LENGTH // 4
    with observe(subject.model, look):
        found = measure(subject, "random tokens", texts, count, seed=0)
    logits = torch.stack(seen).view(2, 2, 4, LENGTH, LENGTH)  # text, layer, head
    spread, share, largest = [], [], []
    for row in range(LENGTH - count, LENGTH):
        own = logits[..., row, : row + 1]
        spread.append(own.std(-1, correction=0))
        largest.append(own.abs().amax(-1))
        mass = own.softmax(-1).sort(-1, descending=True).values.cumsum(-1)
        share.append((1 + (mass < 1 - MISSED - 1e-6).sum(-1)) / (row + 1))
    for value, expected in (
        (found.spread, torch.stack(spread).mean((0, 1))),
        (found.share, torch.stack(share).mean((0, 1))),
        (found.largest, torch.stack(largest).amax((0, 1))),
    ):
        torch.testing.assert_close(value, expected.double(), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        losses = [subject.model(text[None], labels=text[None]).loss.item() for text in texts]
    assert found.loss == pytest.approx(sum(losses) / 2, rel=1e-4)


def test_r_of_random_weights_and_tokens_is_the_spread_of_the_logits(subject):
    """Entries of the first layer's inputs are independent there."""
    texts = subjects.read("random tokens", subject, {256: 4}, seed=0)
    found = measure(subject, "random tokens", texts, 16, seed=0)
    ratio = (found.spread / found.by_rms)[0]
    assert ratio.mean() == pytest.approx(1, abs=0.15)
    assert (found.bound > found.largest).all()


def test_without_rotation_a_norm_is_the_same_at_every_distance_and_all_comes_back(subject):
    model, at = subject.model, distances(LENGTH)
    before, parameters = frequencies(model)[0].clone(), rope_parameters(model)
    positions = model.config.max_position_embeddings
    own = logit_norms(model, at)[0].weight
    with rope(model, RULES[NONE]):
        weight = logit_norms(model, at)[0].weight
        with torch.no_grad():
            text = torch.arange(20)
            turned = torch.cat([text[:19].flip(0), text[19:]])
            # One layer's last row sees a set of keys where there are no positions.
            seen = []
            hook = model.model.layers[0].self_attn.register_forward_hook(
                lambda _, __, out: seen.append(out[0][0, -1])
            )
            for ids in (text, turned):
                model(ids[None])
            hook.remove()
    torch.testing.assert_close(weight, own[:, :1].expand_as(weight), rtol=1e-6, atol=0)
    torch.testing.assert_close(seen[0], seen[1], rtol=1e-4, atol=1e-6)
    assert torch.equal(frequencies(model)[0], before)
    assert rope_parameters(model) == parameters
    assert model.config.max_position_embeddings == positions


def test_what_fails_inside_leaves_the_rotation_as_it_was(subject):
    before = frequencies(subject.model)[0].clone()
    with pytest.raises(RuntimeError, match="inside"), rope(subject.model, RULES["theta 5e5"]):
        raise RuntimeError("inside")
    assert torch.equal(frequencies(subject.model)[0], before)


def test_a_rule_that_the_model_has_already_is_not_repeated(subject):
    assert list(rules_of(subject)) == [OWN, NONE, "theta 5e5", "theta 1e7", "YaRN x4"]
    assert lengths(256) == [256, 512, 1024]
    assert lengths(100_000) == [8192]


def test_two_models_of_one_name_are_refused(tmp_path):
    models = (tmp_path / "a" / "huggingface", tmp_path / "b" / "a")
    with pytest.raises(BadArgument, match="two directories are named a"):
        subjects.given(Settings(tmp_path, tmp_path, models=models))


def test_random_weights_are_of_the_seed_and_leave_torch_alone(subject):
    state = torch.get_rng_state()
    first, again, other = (subjects.untrained(subject.path, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    weight, same, different = (s.model.model.embed_tokens.weight for s in (first, again, other))
    assert torch.equal(weight, same)
    assert not torch.equal(weight, different)
    # As wide as the config of the directory says.
    assert weight.std().item() == pytest.approx(0.2, rel=0.1)


@pytest.mark.slow
def test_the_quick_form_writes_what_is_known_of_random_weights(tmp_path, subject):
    out = tmp_path / "out"
    command = ["radius", str(subject.path), "--quick", "--out", str(out), "--work", str(tmp_path)]
    assert main(command) == 0
    verdicts = json.loads((out / "verdicts.json").read_text())["verdicts"]
    bounded = next(v for v in verdicts if v["claim"].startswith("B is bounded"))
    assert bounded["outcome"] == "supported"
    rows = list(csv.DictReader((out / "rope.csv").open()))
    none = [float(row["R/R none"]) for row in rows if row["rule"] == NONE]
    assert none == [1, 1, 1]
    # YaRN's factor on queries and on keys: (0.1 ln 4 + 1)^2; a rotation changes little of
    # random weights' norms.
    yarn = [float(row["R/R none"]) for row in rows if row["rule"] == "YaRN x4"]
    assert yarn == pytest.approx([1.2965] * 3, rel=0.05)
    kinds = {row["text"] for row in csv.DictReader((out / "heads.csv").open())}
    assert kinds == set(subjects.KINDS)
    for name in ("predictions", "inputs", f"rope_{subject.name}"):
        assert (out / f"{name}.png").stat().st_size > 10_000
