"""What the tests of studies on models share."""

import pytest
import torch

from lit_sparse.models import build_model


@pytest.fixture(scope="session")
def small_model(tmp_path_factory):
    """Directory of a model of bytes with random weights, whose attention is neither even nor on a
    single key; context 512.
    """
    folder = tmp_path_factory.mktemp("study") / "small"
    torch.manual_seed(0)
    build_model(
        architecture={
            "model_type": "llama",
            "vocab_size": 257,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "initializer_range": 0.3,
            "bos_token_id": None,
            "eos_token_id": 256,
        }
    ).save_pretrained(folder)
    return folder
