"""How studies read packed rows, against transformers and against the selection's own mask."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lit_sparse.budget import Budget
from lit_sparse.models import build_model, observe, sparsify
from lit_sparse.recipes.study.reading import Row, read, read_densely

LENGTHS = (40, 96, 24)


@pytest.fixture(scope="module")
def documents():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(257, (length,), generator=generator) for length in LENGTHS]


@pytest.fixture
def model(small_model):
    return build_model(pretrained=small_model).eval()


def test_a_document_is_read_packed_as_alone(model, documents):
    sparsify(model, Budget(2, 0.5, 0, sink=4), block=4, tile=4)
    row = Row.pack(documents)
    packed = read(model, row, torch.arange(0, len(row.tokens), 3))
    starts = np.cumsum([0, *LENGTHS])
    for number, document in enumerate(documents):
        own = torch.arange(0, len(row.tokens), 3) - int(starts[number])
        own = own[(own >= 0) & (own < len(document))]
        alone = read(model, Row.pack([document]), own)
        for name in ("loss", "missed", "output_error"):
            expected = float(getattr(alone, name)[0])
            assert getattr(packed, name)[number] == pytest.approx(expected, rel=1e-4)
    assert (packed.missed > 0).all()


def test_dense_losses_are_those_of_transformers(model, documents):
    expected = []
    with torch.no_grad():
        for document in documents:
            logits = model(document[None]).logits[0]
            expected.append(float(F.cross_entropy(logits[:-1], document[1:])))
    sparsify(model, Budget(2, 0.5, 0, sink=4), block=4, tile=4)
    found = read_densely(model, Row.pack(documents))
    assert found.loss == pytest.approx(expected, rel=1e-4)
    assert found.keys == sum(n * (n + 1) / 2 for n in LENGTHS) / sum(LENGTHS)
    sparsify(model, Budget.dense(), block=4, tile=4)
    everything = read(model, Row.pack(documents), torch.arange(sum(LENGTHS)))
    assert everything.loss == pytest.approx(expected, rel=1e-4)
    assert everything.keys == pytest.approx(found.keys)
    assert everything.missed == pytest.approx(0, abs=1e-5)


def test_keys_are_those_that_the_selection_keeps(model, documents):
    sparsify(model, Budget(2, 0.5, 0, sink=4), block=4, tile=4)
    masks = []
    with observe(model, lambda *seen: masks.append(seen[6].to_mask())):
        found = read(model, Row.pack(documents))
    kept = torch.stack(masks).sum(-1).double().mean()
    assert found.keys == pytest.approx(float(kept))
    assert np.isnan(found.missed).all()


def test_an_answer_is_right_if_all_of_its_tokens_are(model, documents):
    """The answers are what the model says itself, but for one token of the second document."""
    sparsify(model, Budget.dense())
    said, answers = [], []
    with torch.no_grad():
        for number, document in enumerate(documents):
            document = document.clone()
            for place in (-2, -1):
                document[place] = model(document[None, :place]).logits[0, -1].argmax()
            answer = torch.zeros(len(document), dtype=torch.bool)
            answer[-2:] = True
            if number == 1:
                document[-1] = (document[-1] + 1) % 257
            said.append(document)
            answers.append(answer)
    assert read_densely(model, Row.pack(said, answers)).right.tolist() == [True, False, True]
