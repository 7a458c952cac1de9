"""Answers against the full logits, and of models that are known to find, or not to."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from lit_sparse.data import ByteTokenizer
from lit_sparse.data.tasks import Prompts, make_task, prompts
from lit_sparse.evaluation import Answers, ask


def _prompts(documents, task, length, count):
    rng = np.random.default_rng(0)
    return prompts(make_task(task, ByteTokenizer()), documents, length, count, rng)


@pytest.mark.parametrize(
    ("task", "length", "count"), [("passkey", 300, 30), ("multivalue", 400, 3), ("copy", 300, 30)]
)
def test_numbers_are_those_of_the_full_logits(model, documents, task, length, count):
    asked = _prompts(documents, task, length, count)
    found = ask(model, asked)
    with torch.no_grad():
        logits = model(torch.from_numpy(asked.ids)).logits[:, :-1]
    ids, answer = torch.from_numpy(asked.ids)[:, 1:], asked.answer[:, 1:]
    hits = (logits.argmax(-1) == ids).numpy()
    nats = F.cross_entropy(logits.mT, ids, reduction="none").numpy()
    assert (found.hits == hits[answer].reshape(count, -1)).all()
    np.testing.assert_allclose(found.nats, nats[answer].reshape(count, -1), rtol=1e-4)
    assert found.loss == pytest.approx(nats[answer].mean(), rel=1e-4)
    assert found.token_accuracy == pytest.approx(hits[answer].mean())
    assert found.generated is None


@pytest.mark.parametrize("task", ["passkey", "multikey"])
def test_a_model_that_copies_answers_and_writes_the_answer(copier, documents, task):
    found = ask(copier(), _prompts(documents, task, 256, 5), generate=True)
    assert found.right.all()
    assert found.generated.all()
    assert (found.accuracy.mean, found.token_accuracy) == (1.0, 1.0)
    assert found.loss < 1e-6


def test_depths_that_a_short_sighted_model_does_not_see(copier, documents):
    found = ask(copier(sees=150), _prompts(documents, "passkey", 300, 8), generate=True)
    assert found.by_depth(4).tolist() == [0, 0, 1, 1]
    assert found.by_depth(2).tolist() == [0, 1]
    assert (found.generated == found.right).all()
    assert found.accuracy.mean == 0.5
    again = Answers.from_dict(found.to_dict())
    assert all(
        (a == b).all() for a, b in zip(vars(found).values(), vars(again).values(), strict=True)
    )


def test_a_real_model_writes_what_it_writes(model):
    """The answer is what greedy decoding without a cache gives, or that with another last token."""
    ids = torch.randint(257, (1, 60), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        for _ in range(4):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    other = ids.clone()
    other[0, -1] = (other[0, -1] + 1) % 257
    answer = np.zeros((2, 64), dtype=bool)
    answer[:, 60:] = True
    asked = Prompts(torch.cat([ids, other]).numpy(), answer, np.array([0.25, 0.75]))
    found = ask(model, asked, generate=True)
    assert found.right.tolist() == found.generated.tolist() == [True, False]
    assert found.hits.tolist() == [[True] * 4, [True] * 3 + [False]]


def test_evidence_all_over_the_text_has_no_depth(model, documents):
    found = ask(model, _prompts(documents, "aggregation", 400, 3))
    assert found.by_depth(4).tolist() == [found.accuracy.mean]
