"""Long texts get, window by window, the ids that they get at once."""

import pickle
import random

import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from lit_sparse.data.encoder import TextEncoder

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CORPUS = ["def value(self, other):\n    return self.value + other  # don't, it's naïve\n"] * 3 + [
    "the cat's hat, 12345 hats; été 日本語 abc abcd abcde bcd\n\n\tfor x in range(100): print(x)\n"
]
RANDOM = random.Random(0)


def byte_level(**options):
    return pre_tokenizers.ByteLevel(add_prefix_space=False, **options)


def bpe(pre_tokenizer=None, normalizer=None, **options) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(**options))
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if options:
        special = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
        trainer = trainers.BpeTrainer(
            vocab_size=500, special_tokens=special, max_token_length=9, show_progress=False
        )
    else:
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=400, initial_alphabet=alphabet, show_progress=False
        )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def unigram(scheme: str) -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    runs = normalizers.Replace(Regex(" {2,}"), " ")
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), runs])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def wordpiece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]", max_input_chars_per_word=50))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=300, special_tokens=["[UNK]"], show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def unsplit_unigram() -> Tokenizer:
    tokenizer = unigram("always")
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    return tokenizer


SENTENCEPIECE = {"unk_token": "<unk>", "byte_fallback": True, "fuse_unk": True}
MARK = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
SPLIT = pre_tokenizers.Split(Regex(LLAMA3), "isolated")
TOKENIZERS = {
    "gpt2": lambda: bpe(byte_level()),
    "llama3": lambda: bpe(pre_tokenizers.Sequence([SPLIT, byte_level(use_regex=False)])),
    "bytes without words": lambda: bpe(byte_level(use_regex=False)),
    "llama2": lambda: bpe(normalizer=MARK, **SENTENCEPIECE),
    "metaspace": lambda: bpe(pre_tokenizers.Metaspace(split=False), **SENTENCEPIECE),
    "unigram": lambda: unigram("always"),
    "unigram, first": lambda: unigram("first"),
    "unigram without words": unsplit_unigram,
    "wordpiece": wordpiece,
}


def some(pieces, count: int) -> str:
    return "".join(RANDOM.choice(pieces) for _ in range(count))


TEXTS = {
    "code": "".join(CORPUS) * 20,
    "unicode": some("ab  \n\n\té ñ日本語🙂e\u0301'\u00a0.,!_019A\u2028\r\u0600ة", 5000),
    "spaces": some(["word", "words", *(c * n for c in " \n\t" for n in (1, 2, 300))], 200),
    "digits": "x " + some("0123456789", 2001) + " y " * 700,
    "one line": some("abcdefgh", 6000),
    "one letter": "a" * 2501 + "ab" * 700 + "def f" * 200,
    "a word that grows": " ".join("ab" * n for n in range(1, 70)) + " end of it",
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_windows_give_the_ids_of_the_whole(kind):
    tokenizer = TOKENIZERS[kind]()
    for name, text in TEXTS.items():
        whole = tokenizer.encode(text, add_special_tokens=False).ids
        for window, overlap in ((400, 100), (1000, 200)):
            encoder = TextEncoder(tokenizer.to_str(), window, overlap)
            assert encoder.encode_many([text])[0].tolist() == whole, (kind, name, window)


@pytest.mark.parametrize("kind", ["gpt2", "llama2", "unigram", "wordpiece"])
def test_ordinary_text_is_never_encoded_in_one_go(kind):
    encoder = TextEncoder(TOKENIZERS[kind]().to_str(), window=400, overlap=100)
    sizes = []
    encode = encoder._encode
    encoder._encode = lambda text: sizes.append(len(text)) or encode(text)
    encoder.encode_many([TEXTS["code"]])
    assert max(sizes) <= 800
    assert len(sizes) > 10


def test_long_and_short_texts_keep_their_places_and_the_encoder_pickles():
    encoder = TextEncoder(TOKENIZERS["gpt2"]().to_str(), window=400, overlap=100)
    texts = ["def", TEXTS["code"], "", TEXTS["digits"], "x"]
    one_by_one = [encoder.encode_many([text])[0].tolist() for text in texts]
    copy = pickle.loads(pickle.dumps(encoder))
    assert [ids.tolist() for ids in copy.encode_many(texts)] == one_by_one
    assert (copy.window, copy.overlap) == (400, 100)
