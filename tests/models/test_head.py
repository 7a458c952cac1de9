"""Logits computed from hidden states are those of each family's own forward."""

import pytest
import torch
from families import NAMES, VARIANTS, build

from lit_sparse.models.head import language_head


@pytest.mark.parametrize(("kind", "config"), VARIANTS, ids=NAMES)
def test_logits_are_the_models_own(kind, config):
    model = build(kind, **config)
    # Of a size that a cap would change.
    torch.nn.init.normal_(model.get_output_embeddings().weight, std=4.0)
    tokens = torch.arange(1, 9)[None]
    with torch.no_grad():
        hidden = model.base_model(tokens, use_cache=False).last_hidden_state
        own = model(tokens, use_cache=False).logits
        assert torch.equal(language_head(model)(hidden), own)
        assert own.abs().max() > 29
