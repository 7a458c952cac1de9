import numpy as np
import pytest

from lit_sparse.data import ByteTokenizer, HFTokenizer, load_tokenizer
from lit_sparse.data import tokenizer as tokenizer_module

TEXT = "naïve 日本語 🙂\r\n\ttab \x00 \u00a0 don't  stop\n\n"


@pytest.fixture
def saved(tmp_path):
    ByteTokenizer().save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def test_bytes_are_their_own_ids():
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(TEXT)
    assert ids.tolist() == list(TEXT.encode())
    assert tokenizer.encode(TEXT.encode()).tolist() == ids.tolist()
    assert tokenizer.decode(ids) == TEXT
    assert tokenizer.decode([0xFF, 0x41]) == "\ufffdA"
    assert tokenizer.decode([65, 256, 66]) == "A<|endoftext|>B"
    assert tokenizer.encode("a\ud800b").tolist() == list(b"a?b")


def test_saved_bytes_load_in_transformers_with_the_same_ids(saved):
    from transformers import AutoTokenizer

    inner = AutoTokenizer.from_pretrained(saved, local_files_only=True)
    every_byte = "".join(map(chr, range(0x250)))
    for text in (TEXT, every_byte, ""):
        ids = inner(text)["input_ids"]
        assert ids == list(text.encode())
        assert inner.decode(ids) == text
    assert inner.eos_token_id == inner.pad_token_id == 256
    assert inner("a<|endoftext|>b")["input_ids"] == [97, 256, 98]


def test_hf_tokenizer_has_the_same_interface(saved, tmp_path):
    tokenizer = load_tokenizer(str(saved))
    assert isinstance(tokenizer, HFTokenizer)
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (257, 256)
    assert np.array_equal(tokenizer.encode(TEXT), ByteTokenizer().encode(TEXT))
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    many = tokenizer.encode_many(["ab", "", "ç"])
    assert [ids.tolist() for ids in many] == [[97, 98], [], list("ç".encode())]
    tokenizer.save_pretrained(tmp_path / "again")
    assert np.array_equal(load_tokenizer(tmp_path / "again").encode(TEXT), tokenizer.encode(TEXT))


def test_a_document_cannot_smuggle_in_a_control_token(saved):
    spelled = "a<|endoftext|>b"
    assert load_tokenizer(saved).encode(spelled).tolist() == list(spelled.encode())


def test_a_huge_document_is_tokenised_in_chunks_that_lose_nothing(saved, monkeypatch):
    monkeypatch.setattr(tokenizer_module, "CHUNK", 50)
    text = "def f(x):\n    return x\n\nclass A:\n    pass\n" * 9 + "x" * 170 + "\n" + TEXT
    chunks = list(tokenizer_module._chunks(text))
    assert "".join(chunks) == text
    assert max(map(len, chunks)) <= 50
    assert chunks[0].endswith("\n")
    assert not chunks[1][0].isspace()
    assert load_tokenizer(saved).encode(text).tolist() == list(text.encode())


def test_what_is_no_tokenizer_names_its_key(tmp_path):
    with pytest.raises(ValueError, match=r"data\.tokenizer.*gpt2"):
        load_tokenizer("gpt2")
    with pytest.raises(ValueError, match=r"data\.tokenizer"):
        load_tokenizer(tmp_path)
