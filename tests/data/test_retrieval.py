import re

import numpy as np
import pytest

from lit_sparse.data import ByteTokenizer, HFTokenizer, Passkey

TOKENIZER = ByteTokenizer()
TEXT = TOKENIZER.encode("abcdefghij " * 100)


def keys(ids: np.ndarray) -> list[tuple[int, str]]:
    text = TOKENIZER.decode(ids)
    return [(m.start(), m.group(1)) for m in re.finditer(r"\n# passkey: (\d{5})", text)]


def test_a_planted_piece_keeps_its_length_and_ends_with_the_key_it_states():
    passkey = Passkey(TOKENIZER)
    seen = set()
    for seed in range(50):
        piece = TEXT[: 100 + 7 * seed]
        planted = passkey.plant(piece, np.random.default_rng(seed))
        assert len(planted) == len(piece)
        (start, key), (question, asked) = keys(planted)
        assert key == asked
        assert start + passkey.statement_tokens <= 3 * len(piece) // 4
        assert question == len(piece) - passkey.question_tokens
        assert TOKENIZER.decode(planted[-passkey.answer_tokens :]) == key
        # Text that is neither statement nor question is as it was.
        kept = np.ones(len(piece), dtype=bool)
        kept[start : start + passkey.statement_tokens] = False
        kept[question:] = False
        assert np.array_equal(planted[kept], piece[kept])
        seen.add(key)
    assert len(seen) > 45, "keys are drawn"
    assert np.array_equal(TEXT, TOKENIZER.encode("abcdefghij " * 100)), (
        "the store is not written to"
    )


def test_recalls_repeat_the_statement_without_overlap():
    passkey = Passkey(TOKENIZER, recalls=4)
    for seed in range(30):
        found = keys(passkey.plant(TEXT[:400], np.random.default_rng(seed)))
        assert len(found) == 6
        assert len({key for _, key in found}) == 1
        gaps = np.diff([start for start, _ in found])
        assert gaps.min() >= passkey.statement_tokens
    # Where not all fit, as many as do.
    found = keys(passkey.plant(TEXT[: passkey.shortest + 5], np.random.default_rng(0)))
    assert 2 <= len(found) <= 3


def test_short_pieces_are_left_alone():
    passkey = Passkey(TOKENIZER)
    rng = np.random.default_rng(0)
    short = TEXT[: passkey.shortest - 1]
    assert np.array_equal(passkey.plant(short, rng), short)
    assert len(keys(passkey.plant(TEXT[: passkey.shortest], rng))) == 2


@pytest.mark.parametrize("texts", [["lorem ipsum " * 200], ["dolor sit "] * 90])
def test_prompts_state_the_key_at_even_depths_and_end_with_it(documents_of, texts):
    passkey = Passkey(TOKENIZER)
    documents = documents_of(*texts)
    ids, start, answers = passkey.prompts(documents, 500, 8, np.random.default_rng(0))
    assert ids.shape == (8, 500)
    assert start == 500 - passkey.answer_tokens
    assert np.array_equal(ids[:, start:], answers)
    assert TOKENIZER.eos_id not in ids
    text_tokens = 500 - passkey.statement_tokens - passkey.question_tokens
    for i, row in enumerate(ids):
        (place, key), (_, asked) = keys(row)
        assert key == asked == TOKENIZER.decode(answers[i])
        assert place == round((i + 0.5) / 8 * text_tokens)
    assert len({tuple(answer) for answer in answers}) == 8


def test_prompts_that_cannot_be_made_say_so(documents_of):
    passkey = Passkey(TOKENIZER)
    with pytest.raises(ValueError, match=r"needs at least \d+ tokens, got length = 10"):
        passkey.prompts(documents_of("x" * 100), 10, 1, np.random.default_rng(0))
    with pytest.raises(ValueError, match="documents hold 100"):
        passkey.prompts(documents_of("x" * 60, "y" * 40), 1000, 1, np.random.default_rng(0))


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
    assert passkey.answer_tokens == 5
    planted = passkey.plant(np.zeros(60, dtype=np.int64), np.random.default_rng(0))
    where = np.flatnonzero(planted == words.index("passkey"))
    assert len(where) == 2
    assert np.array_equal(planted[where[0] + 2 :][:5], planted[-5:])
    assert set(planted[-5:]) <= {words.index(digit) for digit in "0123456789"}
