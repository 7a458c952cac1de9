import re

import numpy as np

from lit_sparse.data import ByteTokenizer, HFTokenizer, Passkey

TOKENIZER = ByteTokenizer()
TEXT = TOKENIZER.encode("abcdefghij " * 100)


def keys(ids: np.ndarray) -> list[tuple[int, str]]:
    text = TOKENIZER.decode(ids)
    return [(m.start(), m.group(1)) for m in re.finditer(r"\n# passkey: (\d{5})", text)]


def test_the_statement_is_far_back_and_the_text_around_it_is_kept():
    passkey = Passkey(TOKENIZER)
    for seed in range(50):
        piece = TEXT[: 100 + 7 * seed]
        planted = passkey.plant(piece, np.random.default_rng(seed)).ids
        (start, key), (question, asked) = keys(planted)
        assert key == asked
        assert start + passkey.statement_tokens <= 3 * len(piece) // 4
        assert question == len(piece) - passkey.question_tokens
        kept = np.ones(len(piece), dtype=bool)
        kept[start : start + passkey.statement_tokens] = False
        kept[question:] = False
        assert np.array_equal(planted[kept], piece[kept])


def test_recalls_repeat_the_statement_without_overlap():
    passkey = Passkey(TOKENIZER)
    for seed in range(30):
        found = keys(passkey.plant(TEXT[:400], np.random.default_rng(seed), recalls=4).ids)
        assert len(found) == 6
        assert len({key for _, key in found}) == 1
        gaps = np.diff([start for start, _ in found])
        assert gaps.min() >= passkey.statement_tokens
    # Where not all fit, as many as do.
    piece = TEXT[: passkey.shortest + 5]
    found = keys(passkey.plant(piece, np.random.default_rng(0), recalls=4).ids)
    assert 2 <= len(found) <= 3


def test_a_tokenizer_that_joins_digits_gets_them_apart(tmp_path):
    """GPT-2 and Llama 3 read 739 as one token: answers would have differing lengths."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "</s>", "#", "passkey", ":", *"0123456789"]
    words += [f"{i}{j}" for i in range(10) for j in range(10)]
    word_level = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    word_level.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=word_level, eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(tmp_path)
    passkey = Passkey(HFTokenizer(tmp_path))
    assert passkey.separator == " "
    planted = passkey.plant(np.zeros(60, dtype=np.int64), np.random.default_rng(0))
    assert planted.answer.sum() == 5
    where = np.flatnonzero(planted.ids == words.index("passkey"))
    assert len(where) == 2
    assert np.array_equal(planted.ids[where[0] + 2 :][:5], planted.ids[-5:])
    assert set(planted.ids[-5:]) <= {words.index(digit) for digit in "0123456789"}
