"""The whole evaluation: both sides, every length, what cannot be asked."""

import numpy as np
import pytest
import torch

from lit_sparse.budget import Budget
from lit_sparse.data import ByteTokenizer
from lit_sparse.evaluation import DENSE, SPARSE, LeftOut, Questions, evaluate, position_loss
from lit_sparse.evaluation.evaluate import cut_texts
from lit_sparse.models import set_dense, sparsify

LAW = Budget(1, 0.5, floor=16, sink=8)


def _evaluate(model, documents, *args, tokenizer=None, **options):
    return evaluate(model, tokenizer or ByteTokenizer(), documents, Questions(*args, **options))


def test_the_sparse_side_is_the_sparse_model_and_the_dense_one_the_plain_one(model, documents):
    tasks = ["ppl", "passkey", "variables"]
    plain = _evaluate(model, documents, [128, 300], tasks, 3, 4)
    assert list(plain.losses[300]) == list(plain.answers["passkey"][300]) == [DENSE]
    assert plain.density == {}
    sparsify(model, LAW, block=8, tile=8)
    found = _evaluate(model, documents, [128, 300], tasks, 3, 4)
    for length in (128, 300):
        texts = cut_texts(documents, length, 300, 3, 0)
        own = position_loss(model, texts, found.losses[length][SPARSE].ranges)
        dense, sparse = found.losses[length][DENSE], found.losses[length][SPARSE]
        np.testing.assert_allclose(dense.nats, plain.losses[length][DENSE].nats, rtol=1e-4)
        np.testing.assert_allclose(sparse.nats, own.nats, rtol=1e-6)
        assert abs(sparse.late - dense.late).max() > 1e-3
        answers = found.answers["passkey"][length]
        np.testing.assert_allclose(
            answers[DENSE].nats, plain.answers["passkey"][length][DENSE].nats, rtol=1e-4
        )
        assert abs(answers[SPARSE].nats - answers[DENSE].nats).max() > 1e-3
    assert 1 > found.density[128] > found.density[300] > 0
    assert [what.task for what in found.left_out] == []


def test_a_law_that_keeps_everything_is_dense_attention(model, documents):
    sparsify(model, Budget(1, 0.5, floor=384), block=16)
    found = _evaluate(model, documents, [100, 300], ["ppl", "multikey"], 2, 3)
    assert found.density == {100: 1.0, 300: 1.0}
    for sides in (*found.losses.values(), *found.answers["multikey"].values()):
        np.testing.assert_array_equal(sides[SPARSE].nats, sides[DENSE].nats)


def test_a_dense_stage_and_a_dense_law_have_one_side(model, documents):
    sparsify(model, LAW, block=8)
    set_dense(model, True)
    assert list(_evaluate(model, documents, [128], ["ppl"]).losses[128]) == [DENSE]
    set_dense(model, False)
    found = _evaluate(model, documents, [128], ["ppl"], dense=False)
    assert list(found.losses[128]) == [SPARSE]
    sparsify(model, Budget.dense())
    assert list(_evaluate(model, documents, [128], ["ppl"]).losses[128]) == [DENSE]


def test_what_is_asked_does_not_depend_on_what_else_is(model, documents):
    few = _evaluate(model, documents, [300], ["multikey"], prompts=3)
    more = _evaluate(model, documents, [128, 300], ["passkey", "multikey"], prompts=3)
    other = _evaluate(model, documents, [300], ["multikey"], prompts=3, seed=1)
    (a,), (b,), (c,) = (found.answers["multikey"][300].values() for found in (few, more, other))
    np.testing.assert_allclose(a.nats, b.nats)
    assert not np.allclose(a.nats, c.nats)


def test_what_cannot_be_asked_is_left_out_with_the_reason(model, documents):
    class Joined(ByteTokenizer):
        """Some digits are two tokens."""

        def encode(self, text):
            text = text if isinstance(text, bytes) else text.encode()
            return super().encode(text.replace(b"7", b"77"))

    tasks = ["ppl", "passkey", "multikey", "aggregation"]
    found = _evaluate(model, documents, [24, 80, 1200], tasks, prompts=2, tokenizer=Joined())
    assert sorted(found.losses) == [24, 80]
    assert LeftOut("ppl", 1200, "no document is so long, the longest has 1000 tokens") in (
        found.left_out
    )
    why = {what.task: what for what in found.left_out}
    assert "digits take" in why["passkey"].why
    assert why["passkey"].length is None
    assert list(found.answers) == ["aggregation"]
    short = [what.length for what in found.left_out if what.task == "aggregation"]
    assert short == [24, 80]
    assert "a prompt needs" in why["aggregation"].why


def test_the_same_documents_are_read_at_each_length_while_there_are_enough(documents):
    longest = cut_texts(documents, 700, 700, 4, seed=0)
    assert longest.shape == (4, 700)
    assert torch.equal(cut_texts(documents, 300, 700, 4, seed=0), longest[:, :300])
    assert cut_texts(documents, 950, 950, 4, seed=0).shape == (1, 950)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tasks": ["ppl", "needle"]}, "tasks: there is no 'needle'; there are ppl, copy, passkey"),
        ({"tasks": []}, "tasks must name at least one"),
        ({"lengths": [64, 64]}, "lengths must name at least one, each once"),
        ({"lengths": [1, 64]}, "lengths must rise and be >= 2"),
        ({"lengths": [64, 32]}, "lengths must rise"),
        ({"prompts": 0}, "prompts must be >= 1"),
        ({"documents": 0}, "documents must be >= 1"),
        ({"seed": -1}, "seed must be >= 0"),
    ],
)
def test_questions_that_make_no_sense(given, message):
    with pytest.raises(ValueError, match=message):
        Questions(**{"lengths": [64], **given})
