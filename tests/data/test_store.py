import math

import numpy as np
import pytest

from lit_sparse.data import ByteTokenizer, Corpus, TokenStore, unigram_bits


def store_of(**texts: str) -> TokenStore:
    return TokenStore.build(Corpus(list(texts), list(texts.values())), ByteTokenizer())


def test_documents_stand_whole_and_end_with_eos():
    store = store_of(a="xyz", b="ä")
    assert store.tokens.tolist() == [120, 121, 122, 256, 0xC3, 0xA4, 256]
    assert store.offsets.tolist() == [0, 4, 7]
    assert store.document(1).tolist() == [0xC3, 0xA4, 256]
    assert store.tokens.dtype == np.uint16


def test_a_large_vocabulary_does_not_overflow():
    class Wide(ByteTokenizer):
        vocab_size = 1 << 17
        eos_id = (1 << 17) - 1

    store = TokenStore.build(Corpus(["a"], ["x"]), Wide())
    assert store.tokens.tolist() == [120, (1 << 17) - 1]


def test_the_split_keeps_documents_apart_and_stays_when_the_corpus_grows():
    names = [f"{i}.txt" for i in range(400)]
    corpus = Corpus(names, names)
    train, validation = TokenStore.build(corpus, ByteTokenizer()).split(0.2, seed=1)
    assert sorted(train.names + validation.names) == sorted(names)
    assert 40 < len(validation) < 120
    for side in (train, validation):
        assert all(
            side.document(i)[:-1].tobytes().replace(b"\0", b"").decode() == name
            for i, name in enumerate(side.names)
        )
    grown = Corpus(["new", *names], ["new", *names])
    grown_train, _ = TokenStore.build(grown, ByteTokenizer()).split(0.2, seed=1)
    assert set(grown_train.names) - {"new"} == set(train.names)
    other, _ = TokenStore.build(corpus, ByteTokenizer()).split(0.2, seed=2)
    assert set(other.names) != set(train.names)


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
def test_neither_side_of_the_split_is_empty(fraction):
    train, validation = store_of(a="1", b="2", c="3").split(fraction, seed=0)
    assert len(train) >= 1
    assert len(validation) >= 1


def test_one_document_cannot_be_split():
    with pytest.raises(ValueError, match=r"data\.path holds 1 document"):
        store_of(a="1").split(0.5, seed=0)
    with pytest.raises(ValueError, match=r"data\.validation_fraction"):
        store_of(a="1", b="2").split(1.0, seed=0)


def test_unigram_bits():
    # 3 a, 1 b, and one added to each of the 256 bytes; the ends of documents do not count.
    train, validation = store_of(x="aaab"), store_of(y="ab", z="c")
    expected = -(math.log2(4 / 260) + math.log2(2 / 260) + math.log2(1 / 260)) / 3
    assert unigram_bits(train, validation) == pytest.approx(expected)
    everything = store_of(x="".join(map(chr, range(128))) * 1000)
    assert unigram_bits(everything, everything) == pytest.approx(7, abs=0.01)
