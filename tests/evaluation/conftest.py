"""A tiny Llama, text in bytes, and a model that is known to copy from the last tokens it sees."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lit_sparse.data import ByteTokenizer, Documents, pack


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def model(architecture):
    torch.manual_seed(0)
    settings = {**architecture, "initializer_range": 0.2}
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model(settings.pop("model_type"), **settings)
    ).eval()


@pytest.fixture(scope="session")
def documents(tmp_path_factory):
    """Ten documents of 100, 200, ..., 1000 bytes."""
    folder = tmp_path_factory.mktemp("documents")
    rng = np.random.default_rng(0)
    for i in range(1, 11):
        words = " ".join(f"{word:x}" for word in rng.integers(10**6, size=200))
        (folder / f"{i:02d}.txt").write_text(words[: 100 * i])
    store = pack([folder], ByteTokenizer(), folder / "store", processes=1)
    return Documents(store, np.arange(len(store)))


class Copier(torch.nn.Module):
    """Predicts what followed the last four tokens where they stood first among the last `sees`."""

    device = torch.device("cpu")

    def __init__(self, sees=10**6):
        super().__init__()
        self.sees, self.config = sees, SimpleNamespace(final_logit_softcapping=None)
        self.base_model = self._hidden

    def _hidden(self, input_ids, use_cache):
        return (torch.stack([self._row(ids.tolist()) for ids in input_ids]),)

    def _row(self, ids):
        hidden = torch.zeros(len(ids), 257)
        for i in range(4, len(ids)):
            key = ids[i - 3 : i + 1]
            for j in range(max(4, i - self.sees), i):
                if ids[j - 4 : j] == key:
                    hidden[i, ids[j]] = 50.0
                    break
        return hidden

    def get_output_embeddings(self):
        return torch.nn.Identity()

    def generate(self, ids, max_new_tokens, **_):
        for _ in range(max_new_tokens):
            ids = torch.cat([ids, self._hidden(ids, False)[0][:, -1:].argmax(-1)], 1)
        return ids


@pytest.fixture
def copier():
    return Copier
