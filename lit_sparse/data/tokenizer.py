"""Tokenizers: raw bytes (nothing to download) or a local Hugging Face directory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from lit_sparse.data.encoder import TextEncoder

END_OF_DOCUMENT = "<|endoftext|>"

FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


class Encoder(Protocol):
    """The part of a tokenizer that worker processes need. It pickles."""

    def encode_many(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, one dimension, without special tokens."""


class Tokenizer(Protocol):
    """What the package asks of a tokenizer. Ids, `eos_id` too, are below `vocab_size`."""

    @property
    def eos_id(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def name(self) -> str:
        """What `load_tokenizer` was given."""

    @property
    def fingerprint(self) -> str:
        """Hash of all that decides about ids, wherever the tokenizer lies."""

    @property
    def vocabulary(self) -> dict[str, int]:
        """Ids of the tokens, as Hugging Face writes them."""

    @property
    def encoder(self) -> Encoder:
        """Does what `encode_many` does, in another process."""

    def encode(self, text: str | bytes) -> np.ndarray:
        """Ids of a text, one dimension, without special tokens."""

    def encode_many(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of each text, in parallel where the tokenizer can."""

    def decode(self, ids: Iterable[int]) -> str: ...
    def save_pretrained(self, directory: str | Path) -> None:
        """Write a directory that `AutoTokenizer.from_pretrained` loads."""


class ByteTokenizer:
    """Ids 0 to 255 are the bytes of the UTF-8 text, 256 ends a document."""

    eos_id = 256
    vocab_size = 257
    name = fingerprint = "bytes"

    @property
    def vocabulary(self) -> dict[str, int]:
        bytes_ = {character: byte for byte, character in enumerate(_byte_characters())}
        return {**bytes_, END_OF_DOCUMENT: self.eos_id}

    @property
    def encoder(self) -> Encoder:
        return self

    def encode(self, text: str | bytes) -> np.ndarray:
        """Bytes of the text, uint16 [bytes]. A lone surrogate, no UTF-8, becomes "?"."""
        raw = text.encode("utf-8", errors="replace") if isinstance(text, str) else text
        return np.frombuffer(raw, dtype=np.uint8).astype(np.uint16)

    def encode_many(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids. Broken UTF-8 becomes U+FFFD, the end of a document `END_OF_DOCUMENT`."""
        array = _as_array(ids)
        ends = np.flatnonzero(array == self.eos_id)
        parts = np.split(array, ends)
        texts = [part[part != self.eos_id].astype(np.uint8).tobytes() for part in parts]
        return END_OF_DOCUMENT.join(text.decode("utf-8", errors="replace") for text in texts)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write the same tokenizer for Hugging Face: byte-level BPE without a single merge."""
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        bytes_ = {token: i for token, i in self.vocabulary.items() if i != self.eos_id}
        bytelevel = Tokenizer(models.BPE(vocab=bytes_, merges=[]))
        bytelevel.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        bytelevel.decoder = decoders.ByteLevel()
        bytelevel.add_special_tokens([AddedToken(END_OF_DOCUMENT, special=True, normalized=False)])
        PreTrainedTokenizerFast(
            tokenizer_object=bytelevel,
            eos_token=END_OF_DOCUMENT,
            pad_token=END_OF_DOCUMENT,
            clean_up_tokenization_spaces=False,
        ).save_pretrained(directory)


class HFTokenizer:
    """A tokenizer from a local Hugging Face directory. Nothing is downloaded, no code of it is run.

    Args:
        path: the directory.

    Raises:
        ValueError: it is no tokenizer, or has no end-of-sequence token; the message names
            `data.tokenizer`.
    """

    def __init__(self, path: str | Path) -> None:
        from transformers import AutoTokenizer

        try:
            self.inner: Any = AutoTokenizer.from_pretrained(
                str(path), local_files_only=True, trust_remote_code=False
            )
        except (
            Exception
        ) as error:  # transformers raises many kinds for a directory that is no tokenizer
            raise ValueError(f"data.tokenizer = {str(path)!r} cannot be loaded: {error}") from error
        if self.inner.eos_token_id is None:
            raise ValueError(
                f"data.tokenizer = {str(path)!r} has no eos_token, which is put at the end of each "
                "document; set one in its tokenizer_config.json"
            )
        self.name = str(path)
        self.eos_id = int(self.inner.eos_token_id)
        self.vocabulary: dict[str, int] = self.inner.get_vocab()
        self.vocab_size = 1 + max(self.eos_id, *self.vocabulary.values())
        """Ids are below it, added tokens included; the embedding of a model may have more rows."""
        backend = getattr(self.inner, "backend_tokenizer", None)
        if backend is None:
            definition = json.dumps([type(self.inner).__name__, sorted(self.vocabulary.items())])
            self.encoder: Encoder = _SlowEncoder(self.inner)
        else:
            # Padding and truncation are settings of the last call, no part of the tokenizer.
            backend = type(backend).from_str(backend.to_str())
            backend.no_padding()
            backend.no_truncation()
            definition = backend.to_str()
            self.encoder = TextEncoder(definition)
        parts = [definition, str(self.eos_id)]
        self.fingerprint = hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def encode(self, text: str | bytes) -> np.ndarray:
        if isinstance(text, bytes):
            text = text.decode("utf-8", errors="replace")
        return self.encode_many([text])[0]

    def encode_many(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, int64. A special token spelled out in a text is read as text."""
        return [ids.astype(np.int64) for ids in self.encoder.encode_many(texts)]

    def decode(self, ids: Iterable[int]) -> str:
        return self.inner.decode(_as_array(ids).tolist(), clean_up_tokenization_spaces=False)

    def save_pretrained(self, directory: str | Path) -> None:
        self.inner.save_pretrained(str(directory))


class _SlowEncoder:
    """Encodes by a tokenizer of transformers that is written in Python, each text as a whole."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def encode_many(self, texts: Sequence[str]) -> list[np.ndarray]:
        encoded = [
            self._inner(
                text,
                add_special_tokens=False,
                split_special_tokens=True,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,
            )["input_ids"]
            for text in texts
        ]
        return [np.asarray(ids, dtype=np.uint32) for ids in encoded]


def load_tokenizer(name_or_dir: str | Path) -> Tokenizer:
    """The tokenizer of a config: "bytes", or the path of a local Hugging Face directory.

    Raises:
        ValueError: it is neither, or the directory cannot be loaded; the message names
            `data.tokenizer`.
    """
    if name_or_dir == "bytes":
        return ByteTokenizer()
    if Path(name_or_dir).is_dir():
        return HFTokenizer(name_or_dir)
    raise ValueError(
        f"data.tokenizer = {str(name_or_dir)!r} is neither 'bytes' nor a directory; nothing is "
        "downloaded, so give the path of a local Hugging Face tokenizer"
    )


def other_vocabulary(tokenizer: Tokenizer, other: Tokenizer) -> str | None:
    """In words, the first id that is one token here and another one there; None where there is
    none. Tokens that only one of them has, as chat models add to those of their base, do not count.
    """
    if tokenizer.fingerprint == other.fingerprint:
        return None
    tokens = {number: token for token, number in other.vocabulary.items()}
    for token, number in sorted(tokenizer.vocabulary.items(), key=lambda item: item[1]):
        if tokens.get(number, token) != token:
            return f"id {number} is {token!r} there and {tokens[number]!r} here"
    return None


def has_tokenizer(directory: str | Path) -> bool:
    """Whether a Hugging Face directory brings a tokenizer."""
    return any((Path(directory) / name).is_file() for name in FILES)


def _as_array(ids: Iterable[int]) -> np.ndarray:
    return np.asarray(ids if hasattr(ids, "__len__") else list(ids), dtype=np.int64).reshape(-1)


def _byte_characters() -> list[str]:
    """The character that byte-level BPE writes for a byte: itself if visible, else one from 256."""
    visible = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    characters, spare = [], 256
    for byte in range(256):
        if byte in visible:
            characters.append(chr(byte))
        else:
            characters.append(chr(spare))
            spare += 1
    return characters
