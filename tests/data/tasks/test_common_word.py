import re
from collections import Counter

import numpy as np
import pytest

from lit_sparse.data import ByteTokenizer, CommonWord, HFTokenizer

TOKENIZER = ByteTokenizer()


@pytest.mark.parametrize("length", [300, 1001, 4096])
def test_the_list_takes_the_piece_and_no_word_but_the_answer_stands_out(length):
    task = CommonWord(TOKENIZER)
    planted = task.plant(np.full(length, ord("~")), np.random.default_rng(0))
    text = TOKENIZER.decode(planted.ids)
    found = re.fullmatch(r"~{0,4}\n# words:((?: [a-z]+)+)\n# most common word: ([a-z]+)", text)
    assert found is not None, text
    counts = Counter(found[1].split())
    (first, most), (_, second) = counts.most_common(2)
    assert first == found[2]
    assert most >= 2 * second
    assert len(counts) == 16
    assert most / sum(counts.values()) == pytest.approx(0.25, abs=0.02)
    # Others are equally frequent: none but the answer can be told by counting a part.
    assert second - min(counts.values()) <= 1


def test_the_list_is_mixed():
    """A selection must not find the answer by keeping one part of the list."""
    planted = CommonWord(TOKENIZER).plant(np.zeros(4096, int), np.random.default_rng(1))
    words = TOKENIZER.decode(planted.ids[~planted.answer]).split(":")[1].split()
    answer = TOKENIZER.decode(planted.ids[planted.answer]).strip()
    places = np.flatnonzero(np.array(words) == answer)
    quarters = np.bincount(places * 4 // len(words), minlength=4)
    assert quarters.min() > 0.15 * len(places)


def test_recalls_are_lists_of_their_own():
    task = CommonWord(TOKENIZER)
    planted = task.plant(np.zeros(900, int), np.random.default_rng(0), recalls=2)
    lists = TOKENIZER.decode(planted.ids).split("\n# words:")[1:]
    assert len(lists) == 3
    assert len({text.rpartition(" ")[2].strip("\0") for text in lists}) == 3
    assert min(map(len, lists)) + len("\n# words:") >= task.shortest
    # As many as fit.
    planted = task.plant(np.zeros(task.shortest * 2, int), np.random.default_rng(0), recalls=9)
    assert TOKENIZER.decode(planted.ids).count("# words:") == 2


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
    planted = task.plant(np.zeros(199, int), np.random.default_rng(0))
    # Text that is left over, "# words :" before the list, "# most common word :" after it.
    text, listed = planted.ids[:1], planted.ids[4:-7]
    assert text == [0]
    pairs = Counter(map(tuple, listed.reshape(-1, 2).tolist()))
    assert pairs.most_common(1)[0][0] == tuple(planted.ids[planted.answer])
    assert len(pairs) == 8
    assert vocabulary["<unk>"] not in planted.ids[1:]
    with pytest.raises(ValueError, match=r"60 words are needed, but only \d+ of the"):
        CommonWord(HFTokenizer(tmp_path), words=60)


def test_what_cannot_be_asked_says_so():
    with pytest.raises(ValueError, match="words must be >= 2, got 1"):
        CommonWord(TOKENIZER, words=1)
    with pytest.raises(ValueError, match=r"share must be at least 2 / \(words \+ 1\) = 0.1176"):
        CommonWord(TOKENIZER, share=0.11)
    assert CommonWord(TOKENIZER, share=0.12).shortest > 0
