"""The copy: what a piece holds of it, and what it is made of."""

import numpy as np
import pytest

from lit_sparse.data.tasks import Copy


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_recalls_are_shorter_runs_repeated_to_the_end(tokenizers, kind):
    task, piece = Copy(tokenizers[kind]), np.zeros(300, dtype=np.int64)
    periods = set()
    for seed in range(40):
        planted = task.plant(piece, np.random.default_rng(seed), recalls=4)
        period = int(planted.answer.argmax())
        assert np.array_equal(planted.ids[period:], planted.ids[:-period])
        assert not planted.answer[:period].any()
        assert planted.answer[period:].all()
        periods.add(period)
    assert periods == {150, 100, 75, 60, 50}


def test_a_tokenizer_needs_characters_of_its_own(tokenizers):
    class Joined:
        def encode(self, text):
            return np.array([1, 2])

    with pytest.raises(ValueError, match="at least 8 characters that are one token"):
        Copy(Joined())
