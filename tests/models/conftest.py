import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parent))
from families import TINY

KINDS = ("llama", "qwen2", "qwen3", "mistral")
OVERRIDES = {
    "qwen3": {"head_dim": 16},
    "mistral": {"sliding_window": None},
    "gemma3_text": {"head_dim": 16, "layer_types": ["sliding_attention", "full_attention"]},
    "gpt_oss": {"head_dim": 16, "num_local_experts": 2, "num_experts_per_tok": 1},
}


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def tiny():
    """Builds a random model: 2 layers, 4 query and 2 key-value heads of dimension 16."""

    def build(kind="llama", seed=0, **config):
        torch.manual_seed(seed)
        settings = {**TINY, **OVERRIDES.get(kind, {}), **config}
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings)).eval()

    return build


@pytest.fixture
def tokens():
    """Random token ids [rows, length] without the padding token."""

    def draw(rows, length, seed=1):
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(1, 97, (rows, length), generator=generator)

    return draw
