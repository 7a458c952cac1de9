import numpy as np
import pytest

from lit_sparse.data.tokenizer import ByteTokenizer, HFTokenizer, load_tokenizer

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


def test_a_fingerprint_is_that_of_the_content(saved, tmp_path):
    tokenizer = load_tokenizer(saved)
    tokenizer.save_pretrained(tmp_path / "moved")
    moved = load_tokenizer(tmp_path / "moved")
    assert (moved.fingerprint, moved.name) == (tokenizer.fingerprint, str(tmp_path / "moved"))
    moved.inner("padded", padding="max_length", max_length=9, truncation=True)
    moved.save_pretrained(tmp_path / "padding")
    assert load_tokenizer(tmp_path / "padding").fingerprint == tokenizer.fingerprint
    tokenizer.inner.add_tokens(["<new>"])
    tokenizer.save_pretrained(tmp_path / "other")
    assert load_tokenizer(tmp_path / "other").fingerprint != tokenizer.fingerprint
    assert ByteTokenizer().fingerprint != tokenizer.fingerprint


def test_ids_with_gaps_are_below_the_vocabulary_size(tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({"a": 0, "b": 70000, "</s>": 1}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>").save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.vocab_size == 70001
    assert tokenizer.encode("b").tolist() == [70000]


def test_what_is_no_tokenizer_names_its_key(tmp_path):
    with pytest.raises(ValueError, match=r"data\.tokenizer.*gpt2"):
        load_tokenizer("gpt2")
    with pytest.raises(ValueError, match=r"data\.tokenizer"):
        load_tokenizer(tmp_path)
