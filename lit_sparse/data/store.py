"""The tokens of a corpus in one flat array, and its split into training and validation."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lit_sparse.data.corpus import Corpus
from lit_sparse.data.tokenizer import Tokenizer

# Documents tokenised at once: enough to keep a parallel tokenizer busy, little enough that the
# Python lists of ids it returns stay small.
_BATCH = 256
# Tokens counted at once: numpy widens them to int64 first.
_COUNTED = 1 << 24


@dataclass(frozen=True)
class TokenStore:
    """Documents as token ids, one after the other, `eos_id` at the end of each.

    Args:
        tokens: uint16 or uint32 [tokens].
        offsets: int64 [documents + 1]; document d is `tokens[offsets[d]:offsets[d + 1]]`.
        names: stable names of the documents.
        vocab_size: ids are below it.
        eos_id: the id at the end of each document.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    names: tuple[str, ...]
    vocab_size: int
    eos_id: int

    @classmethod
    def build(cls, corpus: Corpus, tokenizer: Tokenizer) -> TokenStore:
        """Tokenise a corpus."""
        dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
        end = np.array([tokenizer.eos_id], dtype=dtype)
        parts: list[np.ndarray] = []
        lengths: list[int] = []
        for first in range(0, len(corpus), _BATCH):
            for ids in tokenizer.encode_many(corpus.texts[first : first + _BATCH]):
                parts += [ids.astype(dtype), end]
                lengths.append(len(ids) + 1)
        return cls(
            tokens=np.concatenate(parts) if parts else np.zeros(0, dtype),
            offsets=_offsets(lengths),
            names=tuple(corpus.names),
            vocab_size=tokenizer.vocab_size,
            eos_id=tokenizer.eos_id,
        )

    def __len__(self) -> int:
        """Documents."""
        return len(self.names)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, its end included: int64 [documents]."""
        return np.diff(self.offsets)

    def document(self, index: int) -> np.ndarray:
        """Tokens of one document, a view."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    def subset(self, documents: Sequence[int]) -> TokenStore:
        """A store of some documents, copied."""
        parts = [self.document(index) for index in documents]
        return TokenStore(
            tokens=np.concatenate(parts) if parts else self.tokens[:0],
            offsets=_offsets([len(part) for part in parts]),
            names=tuple(self.names[index] for index in documents),
            vocab_size=self.vocab_size,
            eos_id=self.eos_id,
        )

    def split(self, fraction: float, seed: int) -> tuple[TokenStore, TokenStore]:
        """Training and validation documents, by a hash of the document's name.

        A document's side depends on its own name only, so that a corpus may grow without moving
        others. The exception is a corpus so small that one side would be empty: it gets the one
        document whose hash is nearest.

        Args:
            fraction: share of the documents that is kept for validation, in (0, 1).
            seed: another seed, another split.

        Raises:
            ValueError: there are fewer than two documents; the message names `data.path`.
        """
        if not 0 < fraction < 1:
            raise ValueError(f"data.validation_fraction must be in (0, 1), got {fraction}")
        if len(self) < 2:
            raise ValueError(
                f"data.path holds {len(self)} document(s), but training and validation are split "
                "by document and need at least 2; cut the text into several files or JSON lines"
            )
        places = np.array([_place(name, seed) for name in self.names])
        held_out = places < fraction
        if not held_out.any():
            held_out[places.argmin()] = True
        elif held_out.all():
            held_out[places.argmax()] = False
        train, validation = np.flatnonzero(~held_out), np.flatnonzero(held_out)
        return self.subset(train.tolist()), self.subset(validation.tolist())


def unigram_bits(train: TokenStore, validation: TokenStore) -> float:
    """What a model without any context needs: bits per validation token under training frequencies.

    Cross entropy of the add-one smoothed unigram model; document ends do not count. With a byte
    tokenizer this is bits per byte. A language model that stays above has learnt nothing. NaN if
    the validation documents hold no token but their ends.
    """
    seen, asked = _counts(train), _counts(validation)
    smoothed = seen + 1.0
    smoothed[train.eos_id] = 0.0  # the smoothing must not give it mass
    used = np.flatnonzero(asked)
    if not len(used):
        return float("nan")
    bits = -np.log2(smoothed[used] / smoothed.sum())
    return float((asked[used] * bits).sum() / asked.sum())


def bytes_per_token(store: TokenStore, tokenizer: Tokenizer) -> float:
    """UTF-8 bytes of the store's text / its tokens, over at most the first 2^20 tokens; NaN if
    empty.

    Document ends do not count. Bits per token over this are bits per byte, which compare across
    tokenizers.
    """
    tokens = store.tokens[: 1 << 20]
    text = tokens[tokens != store.eos_id]
    return len(tokenizer.decode(text).encode()) / len(text) if len(text) else float("nan")


def _counts(store: TokenStore) -> np.ndarray:
    counts = np.zeros(store.vocab_size, dtype=np.int64)
    for first in range(0, len(store.tokens), _COUNTED):
        counts += np.bincount(store.tokens[first : first + _COUNTED], minlength=store.vocab_size)
    counts[store.eos_id] = 0
    return counts


def _offsets(lengths: Sequence[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)


def _place(name: str, seed: int) -> float:
    """A number in [0, 1) that depends on nothing but the seed and the name."""
    digest = hashlib.sha256(f"{seed}\0{name}".encode("utf-8", errors="surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
