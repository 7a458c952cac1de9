"""With a budget that keeps everything a sparsified model is the sdpa model, to rounding."""

import copy

import pytest
import torch

from lit_sparse.budget import Budget
from lit_sparse.models import sparsify


@pytest.fixture
def pair(kind, tiny):
    """The same model with sdpa and with sparse attention that keeps everything."""
    model = tiny(kind)
    assert model.config._attn_implementation == "sdpa"
    return model, sparsify(copy.deepcopy(model), Budget.dense(), block=16)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=2e-4, atol=2e-4)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def compare_gradients(actual, expected):
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        close(actual[name], gradient)


def test_logits_and_gradients(pair, tokens):
    sdpa, ours = pair
    ids = tokens(2, 50)
    expected, actual = (m(ids, labels=ids, use_cache=False) for m in (sdpa, ours))
    close(actual.logits, expected.logits)
    compare_gradients(gradients(ours, actual.loss), gradients(sdpa, expected.loss))


def test_packed_documents_are_separate_ones(pair, tokens):
    sdpa, ours = pair
    lengths = (33, 1, 18)
    ids = tokens(1, sum(lengths))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    packed = ours(ids, position_ids=positions, use_cache=False).logits
    alone = [sdpa(piece, use_cache=False).logits for piece in ids.split(lengths, 1)]
    close(packed, torch.cat(alone, 1))
    weight = torch.randn(packed.shape, generator=torch.Generator().manual_seed(2))
    compare_gradients(
        gradients(ours, (packed * weight).sum()),
        gradients(sdpa, (torch.cat(alone, 1) * weight).sum()),
    )


@pytest.mark.parametrize("ones", [False, True])
def test_rows_packed_differently(pair, tokens, ones):
    """An all-ones mask is no padding and does not undo packing."""
    sdpa, ours = pair
    ids = tokens(2, 40)
    splits = ((25, 15), (7, 33))
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in splits])
    mask = torch.ones_like(ids) if ones else None
    packed = ours(ids, position_ids=positions, attention_mask=mask, use_cache=False).logits
    for row, lengths in enumerate(splits):
        alone = [sdpa(p, use_cache=False).logits for p in ids[row : row + 1].split(lengths, 1)]
        close(packed[row : row + 1], torch.cat(alone, 1))


def test_flash_lengths(pair, tokens):
    sdpa, ours = pair
    ids = tokens(1, 40)
    positions = torch.cat([torch.arange(25), torch.arange(15)])[None]
    expected = sdpa(ids, position_ids=positions, use_cache=False).logits
    lengths = torch.tensor([0, 25, 40], dtype=torch.int32)
    for cu in (lengths, (0, 25, 40)):
        actual = ours(
            ids, position_ids=positions, cu_seq_lens_q=cu, cu_seq_lens_k=cu, use_cache=False
        )
        close(actual.logits, expected)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(pair, tokens, side):
    sdpa, ours = pair
    ids = tokens(3, 40)
    mask = torch.ones_like(ids)
    for row, padding in enumerate((0, 9, 31)):
        if padding:
            mask[row, slice(0, padding) if side == "left" else slice(-padding, None)] = 0
    real = mask.bool()
    expected = sdpa(ids, attention_mask=mask, use_cache=False).logits[real]
    actual = ours(ids, attention_mask=mask, use_cache=False).logits
    assert actual.isfinite().all()
    close(actual[real], expected)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2))
    compare_gradients(
        gradients(ours, (actual[real] * weight).sum()),
        gradients(sdpa, (expected * weight).sum()),
    )


@pytest.mark.parametrize("beams", [1, 3])
def test_generate_with_left_padding(pair, tokens, beams):
    sdpa, ours = pair
    ids = tokens(3, 24)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    mask[2, :20] = 0
    ids = ids * mask
    settings = {"max_new_tokens": 8, "num_beams": beams, "do_sample": False}
    expected = sdpa.generate(ids, attention_mask=mask, **settings)
    assert expected.shape == (3, 32)
    assert torch.equal(ours.generate(ids, attention_mask=mask, **settings), expected)


def test_chunks_through_a_cache(pair, tokens):
    sdpa, ours = pair
    ids = tokens(2, 30)
    expected = sdpa(ids).logits
    for padded in (False, True):
        mask = torch.ones_like(ids)
        if padded:
            mask[1, :13] = 0
            expected = sdpa(ids, attention_mask=mask, use_cache=False).logits
        cache, pieces, seen = None, [], 0
        for piece in ids.split((10, 8, 11, 1), 1):
            seen += piece.shape[1]
            step = ours(piece, attention_mask=mask[:, :seen], past_key_values=cache, use_cache=True)
            cache = step.past_key_values
            pieces.append(step.logits)
        actual = torch.cat(pieces, 1)
        close(actual[mask.bool()], expected[mask.bool()])
        assert actual.isfinite().all()


def test_row_of_padding_only(pair, tokens):
    sdpa, ours = pair
    ids = tokens(2, 20)
    mask = torch.ones_like(ids)
    mask[1] = 0
    logits = ours(ids, attention_mask=mask, use_cache=False).logits
    assert logits.isfinite().all()
    close(logits[:1], sdpa(ids[:1], use_cache=False).logits)


def test_batch_of_padding_only_reaches_every_parameter(pair, tokens):
    _, ours = pair
    ids = tokens(2, 20)
    loss = ours(ids, attention_mask=torch.zeros_like(ids), labels=ids, use_cache=False).loss
    loss.backward()
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert torch.equal(
        ours.model.layers[0].self_attn.q_proj.weight.grad,
        torch.zeros_like(ours.model.layers[0].self_attn.q_proj.weight),
    )


def test_autocast(pair, tokens):
    """Under autocast RoPE gives float32 queries beside bfloat16 values."""
    sdpa, ours = pair
    ids = tokens(1, 40)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = sdpa(ids, use_cache=False).logits
        actual = ours(ids, use_cache=False).logits
    exact = sdpa(ids, use_cache=False).logits
    error = (expected.float() - exact).abs().mean()
    assert 0 < (actual.float() - exact).abs().mean() < 2 * error
