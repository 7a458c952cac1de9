"""Texts to ids by the `tokenizers` library alone: fast, and long texts in windows."""

from __future__ import annotations

import json
from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np

WINDOW = 1 << 20
"""Characters that are tokenised at once: some tokenizers hang on more (llm-foundry#1240)."""
OVERLAP = 1 << 12
"""Characters that two neighbouring windows share."""
# Tokens on both sides of a seam that two windows must agree on.
_MARGIN = 8


class TextEncoder:
    """Encodes without special tokens; one that is spelled out in a text is read as text.

    It pickles as its definition and needs no transformers, so that processes start fast.

    A text longer than `window` is tokenised in windows that overlap, with the ids of the whole.
    Two windows are joined where both cut the text, and agree on the tokens around the cut:

    - between two words of the pre-tokenizer. Its rules look ahead but keep no memory of words
      that are over, so both windows go on from there in the same way.
    - inside a word, for BPE without a splitting pre-tokenizer. A sequence of BPE tokens is the
      encoding of a text exactly if each two neighbours are the encoding of their own text (the
      criterion behind https://github.com/github/rust-gems, crate bpe), and the two at the seam
      are neighbours in both windows.

    Where there is no such place the window grows, up to the whole text.

    Args:
        definition: JSON of a `tokenizers.Tokenizer` that neither pads nor truncates.
        window: characters of a window.
        overlap: characters that two windows share.
    """

    def __init__(self, definition: str, window: int = WINDOW, overlap: int = OVERLAP) -> None:
        from tokenizers import Tokenizer

        self.definition, self.window, self.overlap = definition, window, overlap
        self._backend = Tokenizer.from_str(definition)
        self._backend.encode_special_tokens = True
        parts = json.loads(definition)
        splits = _splits(parts.get("pre_tokenizer"))
        bpe = parts["model"].get("type") == "BPE" and not parts["model"].get("dropout")
        self._inside_words = bpe and not splits
        self._joins = bpe or splits

    def __reduce__(self) -> tuple:
        return TextEncoder, (self.definition, self.window, self.overlap)

    def encode_many(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, uint32; by several threads where TOKENIZERS_PARALLELISM allows."""
        long = {
            i: self._in_windows(text)
            for i, text in enumerate(texts)
            if self._joins and len(text) > self.window
        }
        rest = [text for i, text in enumerate(texts) if i not in long]
        encoded = iter(self._backend.encode_batch_fast(rest, add_special_tokens=False))
        return [long[i] if i in long else _ids(next(encoded)) for i in range(len(texts))]

    def _in_windows(self, text: str) -> np.ndarray:
        parts = []
        start, stop, first = 0, self.window, 0  # `first`: token of the window to go on with
        window = self._encode(text[:stop])
        while stop < len(text):
            next_start = stop - self.overlap
            next_stop = min(next_start + self.window, len(text))
            following = self._encode(text[next_start:next_stop])
            seam = self._seam(window, start, following, next_start, stop)
            if seam is None:
                stop = min(2 * stop - start, len(text))
                window = self._encode(text[start:stop])
            else:
                parts.append(_ids(window)[first : seam[0]])
                window, start, stop, first = following, next_start, next_stop, seam[1]
        parts.append(_ids(window)[first:])
        return np.concatenate(parts)

    def _encode(self, text: str) -> Any:
        return self._backend.encode(text, add_special_tokens=False)

    def _seam(
        self, left: Any, left_start: int, right: Any, right_start: int, left_stop: int
    ) -> tuple[int, int] | None:
        """Token of the left and of the right window with which the right one takes over."""
        left_tokens = _tokens(left, left_start, range(len(left) - 1, -1, -1), right_start, None)
        left_first = len(left) - len(left_tokens)
        left_tokens.reverse()
        right_tokens = _tokens(right, right_start, range(len(right)), None, left_stop)
        place = {token[:3]: j for j, token in enumerate(right_tokens)}
        middle = len(left_tokens) // 2
        for i in sorted(range(1, len(left_tokens)), key=lambda i: abs(i - middle)):
            j = place.get(left_tokens[i][:3], 0)
            if min(i, j) < _MARGIN or max(i - len(left_tokens), j - len(right_tokens)) > -_MARGIN:
                continue
            around = zip(
                left_tokens[i - _MARGIN : i + _MARGIN],
                right_tokens[j - _MARGIN : j + _MARGIN],
                strict=True,
            )
            if all(a[:3] == b[:3] for a, b in around) and (
                self._between(left_tokens, i) and self._between(right_tokens, j)
            ):
                return left_first + i, j
        return None

    def _between(self, tokens: list[tuple], i: int) -> bool:
        """Whether the text may be cut before token i."""
        (_, _, end, word), (_, start, _, next_word) = tokens[i - 1], tokens[i]
        return end <= start and (self._inside_words or word != next_word)


def _tokens(
    encoding: Any, offset: int, order: range, first: int | None, last: int | None
) -> list[tuple]:
    """(id, start, end, word) of the tokens in this order, while they start in [first, last)."""
    ids, tokens = encoding.ids, []
    for i in order:
        span = encoding.token_to_chars(i)
        start, end = span[0] + offset, span[1] + offset
        if (first is not None and start < first) or (last is not None and start >= last):
            break
        tokens.append((ids[i], start, end, encoding.token_to_word(i)))
    return tokens


def _ids(encoding: Any) -> np.ndarray:
    # Four times as fast as np.array of a list.
    return np.frombuffer(array("I", encoding.ids), dtype=np.uint32)


def _splits(pre_tokenizer: dict | None) -> bool:
    """Whether it cuts text into words, by its JSON."""
    if pre_tokenizer is None:
        return False
    if pre_tokenizer["type"] == "Sequence":
        return any(map(_splits, pre_tokenizer["pretokenizers"]))
    if pre_tokenizer["type"] == "Metaspace":
        return pre_tokenizer.get("split", True)
    if pre_tokenizer["type"] == "ByteLevel":
        return pre_tokenizer.get("use_regex", True)
    return True
