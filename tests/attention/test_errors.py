"""What a user passes wrongly is named."""

import pytest
import torch

from lit_sparse.attention import select, sparse_attention
from lit_sparse.budget import Budget

Q, K, V = torch.randn(40, 4, 16), torch.randn(40, 2, 16), torch.randn(40, 2, 16)

SELECT = {
    "q is batched": ({"q": Q[None]}, "q must be floating .tokens, heads, head_dim."),
    "q is batched, boundaries given": ({"q": Q[None], "cu_seqlens": [0, 40]}, "q must be floating"),
    "q is flat": ({"q": Q.flatten()}, "q must be floating"),
    "q is int": ({"q": Q.int()}, "q must be floating"),
    "k is batched": ({"k": K[None]}, "k must be floating"),
    "head_dim": ({"k": K[..., :8]}, "head_dim.*q .40, 4, 16.*k .40, 2, 8"),
    "dtype": ({"k": K.double()}, "dtype.*float32.*float64"),
    "device": ({"k": K.to("meta")}, "device.*cpu.*meta"),
    "heads": ({"k": torch.randn(40, 3, 16)}, "3 heads of k must divide the 4 heads of q"),
    "no heads": ({"k": torch.randn(40, 0, 16)}, "0 heads of k"),
    "lengths differ": ({"k": K[:39]}, "k has 39 tokens and q 40: give cu_seqlens_k"),
    "budget": ({"budget": 128}, "budget must be a Budget"),
    "start": ({"cu_seqlens": [1, 40]}, "cu_seqlens must run from 0 to the 40"),
    "end": (
        {"cu_seqlens": [0, 39]},
        "cu_seqlens must run from 0 to the 40 tokens given, got 0 to 39",
    ),
    "past": ({"cu_seqlens": torch.tensor([0, 41])}, "cu_seqlens must run"),
    "empty": ({"cu_seqlens": []}, "cu_seqlens must run.*empty"),
    "fall": ({"cu_seqlens": [0, 30, 20, 40]}, "cu_seqlens must not fall"),
    "nested": ({"cu_seqlens": torch.tensor([[0, 40]])}, "cu_seqlens must be a flat sequence"),
    "fractions": ({"cu_seqlens": [0.0, 20.5, 40.0]}, "cu_seqlens must be .*whole numbers"),
    "keys start": ({"cu_seqlens_k": [3, 40]}, "cu_seqlens_k must run from 0"),
    "keys fall": ({"cu_seqlens_k": [0, 50, 40]}, "cu_seqlens_k must not fall"),
    "documents": ({"cu_seqlens_k": [0, 20, 40]}, "cu_seqlens has 1 documents and cu_seqlens_k 2"),
    "fewer keys": (
        {"cu_seqlens": [0, 20, 40], "cu_seqlens_k": [0, 30, 40]},
        "document 1 of cu_seqlens_k has fewer keys",
    ),
    "block": ({"block": 48}, "block must be a power of two, got 48"),
    "block 0": ({"block": 0}, "block must be a power of two"),
    "block float": ({"block": 64.0}, "block must be a power of two"),
    "tile": ({"tile": 12}, "tile must be a power of two, got 12"),
    "tile negative": ({"tile": -16}, "tile must be a power of two"),
    "score": ({"score": "topk"}, "score must be one of"),
}


@pytest.mark.parametrize(("wrong", "message"), SELECT.values(), ids=SELECT.keys())
def test_select_names_the_argument(wrong, message):
    with pytest.raises(ValueError, match=message):
        select(**{"q": Q, "k": K, "budget": Budget(), **wrong})


ATTENTION = {
    "backend": (
        {"backend": "cuda"},
        "backend must be None or one of triton, cpu, reference, got 'cuda'",
    ),
    "q tokens": (
        {"q": Q[:39]},
        "q must be .tokens, heads, head_dim. with the selection's 40 tokens",
    ),
    "q batched": ({"q": Q[None]}, "q must be"),
    "k tokens": ({"k": K[:39]}, "k must be .*40 tokens"),
    "v tokens": ({"v": V[:39]}, "v must be .*40 tokens"),
    "k dtype": ({"k": K.double()}, "dtype.*k is torch.float64"),
    "v dtype": ({"v": V.bfloat16()}, "dtype.*v is torch.bfloat16"),
    "v device": ({"v": V.to("meta")}, "device.*v is .*meta"),
    "int": ({"q": Q.int(), "k": K.int(), "v": V.int()}, "floating dtype"),
    "v shape": ({"v": torch.randn(40, 2, 8)}, "k and v must have one shape.*v .40, 2, 8"),
    "v heads": ({"v": torch.randn(40, 4, 16)}, "k and v must have one shape"),
    "head_dim": ({"q": torch.randn(40, 4, 8)}, "q their head_dim"),
    "kv heads": (
        {"k": torch.randn(40, 4, 16), "v": torch.randn(40, 4, 16)},
        "selection is for 2 key-value heads: k has 4",
    ),
    "q heads": ({"q": torch.randn(40, 3, 16)}, "selection is for 2 key-value heads.*q 3"),
    "no backend": (
        {"q": Q.to("meta"), "k": K.to("meta"), "v": V.to("meta")},
        "no backend for meta",
    ),
}


@pytest.mark.parametrize(("wrong", "message"), ATTENTION.values(), ids=ATTENTION.keys())
def test_sparse_attention_names_the_argument(wrong, message):
    selection = select(Q, K, Budget())
    with pytest.raises(ValueError, match=message):
        sparse_attention(**{"q": Q, "k": K, "v": V, "selection": selection, **wrong})


def test_a_callers_mistake_leaves_the_next_call_alone():
    with pytest.raises(ValueError):
        select(Q, K, Budget(), block=48)
    assert select(Q, K, Budget()).keeps_everything
