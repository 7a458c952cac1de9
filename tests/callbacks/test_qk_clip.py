"""QK-clip: heads past the threshold come down to it, all others stay bit for bit."""

import copy
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from monitored import BUDGET, Module, batches, make_trainer, sparse
from pytorch_lightning.strategies import FSDPStrategy
from torch import nn

from lit_sparse import Budget, sparsify
from lit_sparse.callbacks import QKClip
from lit_sparse.models import attention_layers, observe

pytestmark = pytest.mark.filterwarnings("ignore")

ALL = 252
"""Rows of a batch: all of them are sampled."""


class Still(Module):
    """Steps are made, and change nothing: what changes the weights is the callback."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def largest(model, batch):
    """The largest absolute logit of each head, by hand: [layers, heads]."""
    found = {}

    def observer(layer, q, k, v, out, lse, selection, options, documents):
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        logits = options.scale * torch.einsum("ihd,jhd->hij", q, k)
        found[layer] = logits.masked_fill(~selection.to_mask()[0], 0).abs().amax((1, 2))

    with observe(model, observer), torch.no_grad():
        model(**batch, use_cache=False)
    return torch.stack([found[layer] for layer in sorted(found)])


def clipped(threshold, steps=1, **changes):
    """Model before and after, and its largest logits before and after, of a batch seen once."""
    module = Still(**changes)
    sparsify(module.model, Budget.dense())
    before, loader = copy.deepcopy(module.model), batches(1)
    batch = next(iter(loader))
    callbacks = [QKClip(threshold, rows=ALL, min_context=1)]
    make_trainer(callbacks, max_epochs=steps).fit(module, loader)
    return before, module.model, largest(before, batch), largest(module.model, batch)


@pytest.mark.parametrize("kv_heads", [2, 4])
def test_heads_above_come_down_to_the_threshold_and_others_stay(kv_heads):
    _, _, free, _ = clipped(1e9, num_key_value_heads=kv_heads)
    # Of the first layer, whose input no clipped layer changes.
    threshold = float(free[0].sort().values[1:3].mean())
    before, after, was, now = clipped(threshold, num_key_value_heads=kv_heads)
    above = was[0] > threshold
    assert 0 < above.sum() < len(above)
    torch.testing.assert_close(now[0][above], torch.full_like(now[0][above], threshold))
    assert torch.equal(now[0][~above], was[0][~above])
    for (layer, old), (_, new) in zip(
        attention_layers(before), attention_layers(after), strict=True
    ):
        same = (was[layer] <= threshold)[:, None, None]
        q, k = ([m.q_proj, m.k_proj] for m in (old, new))
        heads = [x.weight.unflatten(0, (4, -1)) for x in (q[0], k[0])]
        assert torch.equal(*(torch.where(same, x, 0) for x in heads))
        if kv_heads == 2:  # shared keys serve heads that are not clipped
            assert torch.equal(q[1].weight, k[1].weight)
        assert torch.equal(old.v_proj.weight, new.v_proj.weight)


class Growing(Module):
    """Query weights double with every step."""

    def on_train_batch_start(self, batch, batch_idx):
        with torch.no_grad():
            for _, module in attention_layers(self.model):
                module.q_proj.weight *= 2


def test_heads_that_grow_are_clipped_again_and_counted():
    module, callback = Growing(), QKClip(0.5, rows=ALL, min_context=1)
    trainer = make_trainer([sparse(), callback])
    trainer.fit(module, batches(3))
    assert trainer.callback_metrics["collapse/clipped_heads"] == 8
    sparsify(module.model, Budget.dense())
    # One step of AdamW behind the last measurement.
    assert largest(module.model, next(iter(batches(1))))[0].max() < 0.6


def test_it_waits_for_the_end_of_an_accumulated_step():
    module = Still()
    weights = []

    class Look(QKClip):
        def on_train_batch_end(self, trainer, pl_module, *others):
            super().on_train_batch_end(trainer, pl_module, *others)
            weights.append(pl_module.model.model.layers[0].self_attn.q_proj.weight.clone())

    look = Look(0.1, rows=ALL, min_context=1)
    make_trainer([sparse(), look], accumulate_grad_batches=2).fit(module, batches(4))
    start = Still().model.model.layers[0].self_attn.q_proj.weight
    assert torch.equal(weights[0], start)
    assert not torch.equal(weights[1], start)
    assert torch.equal(weights[2], weights[1])


def test_what_cannot_be_clipped_is_refused_by_name():
    with pytest.raises(ValueError, match="threshold must be above 0"):
        QKClip(0)
    trainer = make_trainer([sparse(), QKClip()])
    module = Module()
    module.model.model.layers[1].self_attn.q_norm = nn.Identity()
    with pytest.raises(ValueError, match="layer 1 of LlamaForCausalLM: it has QK-norm"):
        trainer.fit(module, batches(1))
    module = Module()
    sparsify(module.model, BUDGET)
    trainer = make_trainer([QKClip()])
    trainer.strategy.__class__ = FSDPStrategy
    with pytest.raises(ValueError, match="FSDPStrategy shards"):
        trainer.callbacks[-1].on_train_start(trainer, module)
