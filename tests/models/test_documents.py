"""find_documents: the three ways of telling documents, and what is refused."""

import gc

import pytest
import torch

from lit_sparse.models import find_documents
from lit_sparse.models.documents import DocumentCache


def positions(*rows):
    return torch.stack([torch.cat([torch.arange(n) for n in row]) for row in rows])


def test_rows_are_documents():
    found = find_documents(3, 5, 5)
    assert found.cu_seqlens == (0, 5, 10, 15)
    assert (found.cu_seqlens_k, found.queries, found.keys) == (None, None, None)
    assert len(found) == 3
    assert find_documents(3, 5, 5, position_ids=torch.arange(7, 12)[None]).cu_seqlens == (
        *range(0, 16, 5),
    )


def test_packed_positions():
    found = find_documents(2, 6, 6, position_ids=positions((2, 1, 3), (6,)))
    assert found.cu_seqlens == (0, 2, 3, 6, 12)
    # [1, S] stands for every row.
    found = find_documents(2, 6, 6, position_ids=positions((4, 2)))
    assert found.cu_seqlens == (0, 4, 6, 10, 12)
    ones = torch.ones(2, 6, dtype=torch.bool)
    found = find_documents(2, 6, 6, position_ids=positions((4, 2)), attention_mask=ones)
    assert found.cu_seqlens == (0, 4, 6, 10, 12)
    # A jump forward, or a repeated position, begins a document too.
    jump = torch.tensor([[0, 1, 5, 6, 6, 7]])
    assert find_documents(1, 6, 6, position_ids=jump).cu_seqlens == (0, 2, 4, 6)


def test_padding():
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0], [0, 0, 0, 0], [1, 0, 1, 1]])
    found = find_documents(4, 4, 4, attention_mask=mask)
    assert found.cu_seqlens == (0, 2, 5, 5, 8)
    assert found.cu_seqlens_k is None
    assert found.queries.tolist() == found.keys.tolist() == [2, 3, 4, 5, 6, 12, 14, 15]


def test_padding_with_a_cache():
    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 0]]).bool()
    found = find_documents(2, 2, 5, attention_mask=mask)
    assert found.cu_seqlens == (0, 2, 3)
    assert found.cu_seqlens_k == (0, 4, 8)
    assert found.queries.tolist() == [0, 1, 2]
    assert found.keys.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]


def test_a_static_cache():
    """A mask of fewer columns than keys: no token has filled the others yet."""
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    found = find_documents(2, 1, 6, attention_mask=mask)
    assert found.cu_seqlens == (0, 1, 2)
    assert found.cu_seqlens_k == (0, 3, 7)
    assert found.queries.tolist() == [0, 1]
    assert found.keys.tolist() == [1, 2, 3, 6, 7, 8, 9]
    found = find_documents(2, 4, 6, attention_mask=mask)
    assert (found.cu_seqlens, found.cu_seqlens_k) == ((0, 3, 7), None)
    assert found.queries.tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert found.keys.tolist() == [1, 2, 3, 6, 7, 8, 9]


def test_cache():
    found = find_documents(2, 3, 8, position_ids=torch.arange(5, 8)[None])
    assert found.cu_seqlens == (0, 3, 6)
    assert found.cu_seqlens_k == (0, 8, 16)


@pytest.mark.parametrize("filler", [0, 1])
def test_positions_of_padded_prompts(filler):
    """generate() counts real tokens only and fills the padding; other callers count every token."""
    mask = torch.tensor([[0, 0, 0, 1, 1, 1], [1, 1, 0, 0, 1, 1]])
    counted = (mask.cumsum(1) - 1).masked_fill(mask == 0, filler)
    for ids in (counted, torch.arange(6)[None]):
        found = find_documents(2, 6, 6, attention_mask=mask, position_ids=ids)
        assert found.cu_seqlens == (0, 3, 7)


@pytest.mark.parametrize(
    "packed",
    [
        [0, 1, 2, 0, 1, 0],  # starts again beside a real token
        [0, 1, 5, 6, 7, 8],  # jumps
    ],
)
def test_packed_positions_and_padding(packed):
    mask = torch.tensor([[1, 1, 1, 1, 1, 0]])
    with pytest.raises(ValueError, match=r"start again.*attention mask has padding"):
        find_documents(1, 6, 6, attention_mask=mask, position_ids=torch.tensor([packed]))


def test_packed_positions_across_padding():
    mask = torch.tensor([[1, 1, 0, 1, 1, 1]])
    ids = torch.tensor([[0, 1, 0, 0, 1, 2]])
    with pytest.raises(ValueError, match="start again"):
        find_documents(1, 6, 6, attention_mask=mask, position_ids=ids)


def test_flash_lengths():
    for q in ((0, 2, 2, 6), torch.tensor([0, 2, 2, 6], dtype=torch.int32)):
        found = find_documents(1, 6, 6, cu_seq_lens_q=q, cu_seq_lens_k=q)
        assert found.cu_seqlens == (0, 2, 2, 6)
        assert found.cu_seqlens_k is None
    found = find_documents(1, 3, 7, cu_seq_lens_q=(0, 1, 3), cu_seq_lens_k=(0, 4, 7))
    assert (found.cu_seqlens, found.cu_seqlens_k) == ((0, 1, 3), (0, 4, 7))
    # They overrule the positions, and an all-ones mask says nothing.
    found = find_documents(
        1,
        4,
        4,
        cu_seq_lens_q=(0, 1, 4),
        position_ids=torch.arange(4)[None],
        attention_mask=torch.ones(1, 4),
    )
    assert found.cu_seqlens == (0, 1, 4)


@pytest.mark.parametrize(
    ("error", "message", "sizes", "arguments"),
    [
        (ValueError, "4D attention mask.*position_ids", (1, 4, 4), {"mask": (1, 1, 4, 4)}),
        (ValueError, r"must be \[1, 6\]", (1, 4, 6), {"mask": (1, 3)}),
        (ValueError, r"must be \[1, 4\]", (1, 4, 4), {"mask": (2, 4)}),
        (ValueError, r"must be \[1, 4\]", (1, 4, 4), {"mask": (1, 6)}),
        (ValueError, r"\[2, 4\] or \[1, 4\]", (2, 4, 4), {"position_ids": torch.zeros(3, 2, 4)}),
        (ValueError, "row 0, token 1.*cached", (1, 3, 5), {"position_ids": positions((1, 2))}),
        (NotImplementedError, "static", (1, 3, 9), {"position_ids": torch.arange(3)[None]}),
        (ValueError, "one packed row.*2 rows", (2, 4, 4), {"cu_seq_lens_q": (0, 4)}),
        (ValueError, "from 0 to the 4 tokens", (1, 4, 4), {"cu_seq_lens_q": (0, 3)}),
        (ValueError, "from 0 to the 4 tokens", (1, 4, 4), {"cu_seq_lens_q": (0, 3, 2, 4)}),
        (ValueError, "without cu_seq_lens_q", (1, 4, 4), {"cu_seq_lens_k": (0, 4)}),
        (ValueError, "cu_seq_lens_k is needed", (1, 2, 4), {"cu_seq_lens_q": (0, 2)}),
        (
            ValueError,
            "1 documents, cu_seq_lens_k of 2",
            (1, 2, 4),
            {"cu_seq_lens_q": (0, 2), "cu_seq_lens_k": (0, 2, 4)},
        ),
        (
            ValueError,
            "document 1 has 2 queries but only 1 keys",
            (1, 3, 4),
            {"cu_seq_lens_q": (0, 1, 3), "cu_seq_lens_k": (0, 3, 4)},
        ),
        (ValueError, "self-attention", (1, 4, 2), {}),
    ],
)
def test_refused(error, message, sizes, arguments):
    shape = arguments.pop("mask", None) if "mask" in arguments else None
    mask = None if shape is None else torch.ones(shape)
    with pytest.raises(error, match=message):
        find_documents(*sizes, attention_mask=mask, **arguments)


def test_flash_lengths_and_padding():
    mask = torch.tensor([[1, 1, 1, 0]])
    with pytest.raises(ValueError, match="two ways"):
        find_documents(1, 4, 4, cu_seq_lens_q=(0, 4), attention_mask=mask)


def test_remembered_while_the_tensors_live():
    cache = DocumentCache()
    ids = positions((2, 4))
    first = cache.find(0, 1, 6, 6, position_ids=ids)
    assert cache.find(1, 1, 6, 6, position_ids=ids) is first
    # The same layer again is a new forward, other sizes or another tensor another batch.
    second = cache.find(0, 1, 6, 6, position_ids=ids)
    assert second is not first
    assert cache.find(1, 1, 6, 6, position_ids=ids) is second
    assert cache.find(2, 1, 6, 6, position_ids=ids.clone()) is not second
    ids[0, 3] = 0
    assert cache.find(2, 1, 6, 6, position_ids=ids).cu_seqlens == (0, 2, 3, 4, 6)
    host = cache.find(0, 1, 6, 6, cu_seq_lens_q=(0, 6))
    assert cache.find(1, 1, 6, 6, cu_seq_lens_q=[0, 6]) is host


@pytest.mark.parametrize("inference", [False, True])
def test_a_freed_tensor_is_not_remembered(inference):
    """A later tensor may get the address and id of a freed one."""
    cache = DocumentCache()
    for layer in range(50):
        with torch.inference_mode(inference):
            ids = positions((layer + 1, 60 - layer))
        found = cache.find(layer, 1, 61, 61, position_ids=ids)
        assert found.cu_seqlens == (0, layer + 1, 61)
        del ids
        gc.collect(0)
    assert cache.find(99, 1, 61, 61).cu_seqlens == (0, 61)
