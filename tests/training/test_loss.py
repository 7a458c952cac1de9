"""Losses that never hold the logits of a whole row: equal to the plain one, with its gradients."""

from functools import partial

import pytest
import torch

from lit_sparse.training.activations import set_activations
from lit_sparse.training.loss import check_loss, chunked_cross_entropy, summed_loss
from lit_sparse.training.tiled import tile_mlps


@pytest.fixture(params=["chunked", "tiled"])
def loss(request):
    if request.param == "tiled":
        pytest.importorskip("deepspeed")
    return partial(summed_loss, kind=request.param, chunk=64)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("chunk", [7, 64, 1000])
def test_equals_the_whole_cross_entropy(tiny, row, train, assert_same, loss, chunk, tied):
    model = tiny(tie_word_embeddings=tied)
    plain = train(model, row)
    assert_same(train(model, row, partial(loss, chunk=chunk)), plain)


def test_a_factor_reaches_all_gradients(tiny, row, train, assert_same, loss):
    """The step's tokens, or the scale of fp16, which Lightning applies when it has the loss."""
    plain = train(tiny(), row, scale=2.0**10)
    assert_same(train(tiny(), row, loss, scale=2.0**10), plain)


@pytest.mark.parametrize("tied", [False, True])
def test_capped_logits(tiny, row, train, assert_same, loss, tied):
    """Gemma 2's final soft cap is no part of the output embeddings."""

    def own(model, hidden, labels):
        # As transformers itself has it; its labels are not shifted yet.
        with_loss = model(row["input_ids"], position_ids=row["position_ids"], labels=labels.roll(1))
        return with_loss.loss * (labels.roll(1)[:, 1:] >= 0).sum()

    row["labels"][0, -1] = -100
    model = tiny("gemma2", head_dim=8, final_logit_softcapping=0.5, tie_word_embeddings=tied)
    plain = train(model, row, own)
    assert_same(train(model, row, loss), plain, tolerance=1e-5)
    model.config.final_logit_softcapping = None
    assert train(model, row, loss)[0] > 1.1 * plain[0], "it matters"


@pytest.mark.parametrize("learns", ["lm_head", "model.", "embed_tokens"])
def test_parts_that_are_frozen(tiny, row, train, assert_same, loss, learns):
    model = tiny()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(learns in name)
    plain = train(model, row)
    assert plain[1]
    assert_same(train(model, row, loss), plain)


def test_under_autocast(tiny, row, train, assert_same, loss, plain_loss):
    def autocast(loss):
        return torch.autocast("cpu", torch.bfloat16)(loss)

    # Sums of gradients that are rounded to bfloat16 chunk by chunk differ by the chunks.
    plain = train(tiny(), row, autocast(plain_loss))
    assert_same(train(tiny(), row, autocast(partial(loss, chunk=1000))), plain)
    assert_same(train(tiny(), row, autocast(loss)), plain, tolerance=1e-2)


def test_nothing_to_predict_is_zero_and_has_a_gradient(tiny, row, train, loss):
    row["labels"].fill_(-100)
    total, gradients = train(tiny(), row, loss)
    assert total == 0
    assert gradients.keys() == dict(tiny().named_parameters()).keys()
    assert all((gradient == 0).all() for gradient in gradients.values())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_validation(tiny, row, loss, plain_loss, mode):
    model = tiny()
    with mode():
        hidden = model.base_model(row["input_ids"], position_ids=row["position_ids"])[0]
        found, whole = (f(model, hidden, row["labels"]) for f in (loss, plain_loss))
    torch.testing.assert_close(found, whole)
    assert not found.requires_grad


def test_the_logits_of_a_whole_row_never_exist(
    tiny, row, train_and_save, loss, rows_of, vocabulary
):
    with rows_of(vocabulary) as whole:
        _, saved = train_and_save(tiny(), row)
    with rows_of(vocabulary) as found:
        _, saved_in_parts = train_and_save(tiny(), row, loss=loss)
    assert whole.rows == 221
    assert found.rows <= 64
    assert saved - saved_in_parts >= 4 * 221 * vocabulary


def test_all_of_it_together(tiny, row, train, assert_same):
    pytest.importorskip("deepspeed")
    model = tiny(tie_word_embeddings=True)
    plain = train(model, row)
    tile_mlps(model, 3)
    set_activations(model, "offload")
    assert_same(train(model, row, partial(summed_loss, kind="tiled", chunk=64)), plain)


def test_head_of_any_kind():
    """The chunked loss takes what turns hidden states into logits, with a bias here."""
    head, hidden = torch.nn.Linear(4, 9), torch.randn(1, 20, 4)
    labels = torch.randint(9, (1, 20))
    whole = torch.nn.functional.cross_entropy(head(hidden)[0], labels[0], reduction="sum")
    torch.testing.assert_close(chunked_cross_entropy(hidden, head, labels, 7), whole)


def test_an_unknown_loss_is_named():
    with pytest.raises(ValueError, match=r"model.loss must be one of chunked, tiled, liger, got"):
        check_loss("fused")
