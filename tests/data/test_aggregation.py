import re
from collections import Counter

import numpy as np
import pytest

from lit_sparse.data import ByteTokenizer, CommonWord, HFTokenizer

TOKENIZER = ByteTokenizer()


def read(ids, start):
    """The listed words of a prompt, how often each, and the answer."""
    text = TOKENIZER.decode(ids)
    listed = re.fullmatch(r"\n# words:((?: [a-z]+)+)\n# most common word: ([a-z]+)", text)
    assert listed is not None, text
    assert TOKENIZER.decode(ids[start:]) == f" {listed[2]}"
    return Counter(listed[1].split()), listed[2]


@pytest.mark.parametrize("length", [300, 1001, 4096])
def test_the_answer_is_the_most_common_word_by_far(length):
    task = CommonWord(TOKENIZER)
    ids, start, answers = task.prompts(length, 6, np.random.default_rng(0))
    assert ids.dtype == np.int64
    assert length - task.word_tokens < ids.shape[1] <= length
    assert np.array_equal(ids[:, start:], answers)
    for row in ids:
        counts, answer = read(row, start)
        (first, most), (_, second) = counts.most_common(2)
        assert first == answer
        assert most >= 2 * second
        assert len(counts) == 16
        assert most / sum(counts.values()) == pytest.approx(0.25, abs=0.02)
        # Others are equally frequent: none but the answer can be told by counting a part.
        assert second - min(counts.values()) <= 1
    assert len({tuple(answer) for answer in answers}) > 3
    again, _, _ = task.prompts(length, 6, np.random.default_rng(0))
    assert np.array_equal(ids, again)


def test_the_list_is_mixed():
    """A selection must not find the answer by keeping one part of the list."""
    task = CommonWord(TOKENIZER)
    ids, start, (answer,) = task.prompts(4096, 1, np.random.default_rng(1))
    words = TOKENIZER.decode(ids[0, :start]).split(":")[1].split()
    places = np.flatnonzero(np.array(words) == TOKENIZER.decode(answer).strip())
    quarters = np.bincount(places * 4 // len(words), minlength=4)
    assert quarters.min() > 0.15 * len(places)


def test_any_tokenizer_whose_words_have_differing_sizes(tmp_path):
    """Words that one tokenizer reads as one token are several to another."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", "</s>", "#", ":", "words", "most", "common", "word", "bank", "bear"]
    pieces += ["ca", "##ll", "##rd", "co", "##ld", "##at", "##ok", "##rn", "da", "##rk", "ha"]
    pieces += ["##nd", "##ir", "wa", "##rm", "##ve", "sa", "##nd", "ri", "##ng"]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    pair = Tokenizer(models.WordPiece(vocabulary, unk_token="<unk>"))
    pair.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    PreTrainedTokenizerFast(
        tokenizer_object=pair, eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(tmp_path)
    task = CommonWord(HFTokenizer(tmp_path), words=8)
    assert task.word_tokens == 2
    ids, start, answers = task.prompts(200, 3, np.random.default_rng(0))
    for row, answer in zip(ids, answers, strict=True):
        # "# words :" before the list, "# most common word :" after it.
        pairs = Counter(map(tuple, row[3 : start - 5].reshape(-1, 2).tolist()))
        assert pairs.most_common(1)[0][0] == tuple(answer.tolist())
        assert vocabulary["<unk>"] not in row
    with pytest.raises(ValueError, match=r"words = 60, but only \d+ of its words"):
        CommonWord(HFTokenizer(tmp_path), words=60)


def test_what_cannot_be_asked_says_so():
    with pytest.raises(ValueError, match="words must be >= 2, got 1"):
        CommonWord(TOKENIZER, words=1)
    with pytest.raises(ValueError, match=r"share must be at least 2 / \(words \+ 1\) = 0.1176"):
        CommonWord(TOKENIZER, share=0.11)
    assert CommonWord(TOKENIZER, share=0.12).shortest > 0
    task = CommonWord(TOKENIZER)
    with pytest.raises(ValueError, match=f"at least {task.shortest} tokens, got length = 60"):
        task.prompts(60, 1, np.random.default_rng(0))
    ids, start, _ = task.prompts(task.shortest, 1, np.random.default_rng(0))
    read(ids[0], start)
