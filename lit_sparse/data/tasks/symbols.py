"""What answers are made of: numbers and words that are the same tokens wherever they stand."""

from __future__ import annotations

from collections import Counter

import numpy as np

from lit_sparse.data.tokenizer import Tokenizer

WORDS = """
able back ball bank bear bird blue boat book burn call card city coat cold cook corn dark desk
door down drum farm fast fire fish five food foot four game girl gold good hair hand hard head
high hill home hope iron jump king lake land lamp leaf long moon nine north note open page
rain read ring road rock roof room rose sand ship shop sing snow soft song star stone table
tall tree walk wall warm wave west wind wine wood word work yard year
"""
"""What lists and names are made of, with spaces between; a tokenizer decides which of them."""


class Numbers:
    """Numbers of so many digits, each of equally many tokens.

    They are encoded digit by digit, every digit with `separator` before it.

    Args:
        tokenizer: encodes the digits; not kept.
        digits: of each number.
        separator: text before each digit. None chooses nothing if the tokenizer takes digits apart
            by itself (bytes, Qwen), else a space (GPT-2, Llama 3 join up to three digits).

    Raises:
        ValueError: the digits take differing numbers of tokens.
    """

    def __init__(self, tokenizer: Tokenizer, digits: int, separator: str | None = None) -> None:
        if digits < 1:
            raise ValueError(f"digits must be >= 1, got {digits}")
        if separator is None:
            separator = "" if _apart(tokenizer, "") else " "
        ids = [tokenizer.encode(separator + digit) for digit in "0123456789"]
        sizes = {len(own) for own in ids}
        if len(sizes) > 1 or 0 in sizes:
            raise ValueError(
                f"separator = {separator!r}: the ten digits take {sorted(sizes)} tokens with this "
                "tokenizer; choose a separator with which all take the same number"
            )
        self.separator = separator
        self.digits = digits
        self.tokens = digits * len(ids[0])
        """Tokens of a number."""
        self._ids = np.array(ids, dtype=np.int64)

    def draw(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Random numbers [count, tokens]; every digit is as likely as any other."""
        return self._ids[rng.integers(10, size=(count, self.digits))].reshape(count, self.tokens)


class Words:
    """The words of `WORDS`, each with a space before it, that take equally many tokens: of all
    numbers of tokens the one that most of them have.

    Args:
        tokenizer: encodes them; not kept.
        least: how many there have to be.

    Raises:
        ValueError: to the tokenizer too few words are alike.
    """

    def __init__(self, tokenizer: Tokenizer, least: int) -> None:
        # Distinct ones: what a tokenizer does not know it may read as one and the same token.
        ids = {tuple(tokenizer.encode(f" {word}").tolist()) for word in WORDS.split()}
        sizes = Counter(map(len, ids))
        self.tokens = max(sizes, key=lambda size: (sizes[size], -size))
        """Tokens of a word."""
        self._ids = np.array(sorted(own for own in ids if len(own) == self.tokens))
        if len(self._ids) < least:
            raise ValueError(
                f"{least} words are needed, but only {len(self._ids)} of the known ones have "
                f"equally many tokens ({self.tokens}) with this tokenizer"
            )

    def draw(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Distinct random words [count, tokens]."""
        return rng.choice(self._ids, count, replace=False)


def _apart(tokenizer: Tokenizer, separator: str) -> bool:
    """Whether the tokenizer writes a number as its digits one by one would be written."""
    digits = "7390142865"
    parts = [tokenizer.encode(separator + digit) for digit in digits]
    return np.array_equal(np.concatenate(parts), tokenizer.encode(separator.join(["", *digits])))
