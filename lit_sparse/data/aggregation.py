"""The common word: a long list of words, and the question which of them it holds most often.

A passkey stands in one place, which a top-k selection finds; here every word of the list counts a
little, and a selection that drops most of them drops the answer's evidence. After the "common words
extraction" of RULER (arXiv 2404.06654).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import InitVar, dataclass, field

import numpy as np

from lit_sparse.data.tokenizer import Tokenizer

WORDS = """
able back ball bank bear bird blue boat book burn call card city coat cold cook corn dark desk
door down drum farm fast fire fish five food foot four game girl gold good hair hand hard head
high hill home hope iron jump king lake land lamp leaf long moon nine north note open page
rain read ring road rock roof room rose sand ship shop sing snow soft song star stone table
tall tree walk wall warm wave west wind wine wood word work yard year
"""
"""What lists are made of, with spaces between; a tokenizer decides which of them."""


@dataclass
class CommonWord:
    """The task in the tokens of one tokenizer.

    A prompt is `prefix`, the list and `question`; the answer is the word that the list holds most
    often. Each word is encoded with a space before it. All words of a task take equally many
    tokens, so answers have one length: of `WORDS`, those with the most frequent number of tokens.

    Args:
        tokenizer: encodes the texts; not kept.
        prefix, question: text before and after the list.
        words: distinct words of a list.
        share: share of the list that is the answer; the others are equally frequent, to one.

    Raises:
        ValueError: a value out of its range, or a tokenizer to which too few words are alike.
    """

    tokenizer: InitVar[Tokenizer]
    prefix: str = "\n# words:"
    question: str = "\n# most common word:"
    words: int = 16
    share: float = 0.25
    word_tokens: int = field(init=False)
    """Tokens of a word, and of an answer."""

    def __post_init__(self, tokenizer: Tokenizer) -> None:
        if self.words < 2:
            raise ValueError(f"CommonWord words must be >= 2, got {self.words}")
        least = 2 / (self.words + 1)
        if not least <= self.share < 1:
            raise ValueError(
                f"CommonWord share must be at least 2 / (words + 1) = {least:.4g}, twice that of "
                f"any other word, and below 1, got {self.share}"
            )
        # Distinct ones: what a tokenizer does not know it may read as one and the same token.
        ids = {tuple(tokenizer.encode(f" {word}").tolist()) for word in WORDS.split()}
        sizes = Counter(map(len, ids))
        self.word_tokens = max(sizes, key=lambda size: (sizes[size], -size))
        alike = np.array(sorted(own for own in ids if len(own) == self.word_tokens))
        if len(alike) < self.words:
            raise ValueError(
                f"CommonWord words = {self.words}, but only {len(alike)} of its words have equally "
                f"many tokens ({self.word_tokens}) with this tokenizer"
            )
        self._word_ids = alike
        self._prefix_ids = tokenizer.encode(self.prefix).astype(np.int64)
        self._question_ids = tokenizer.encode(self.question).astype(np.int64)

    @property
    def shortest(self) -> int:
        """Tokens of the shortest prompt: the answer stands at least twice as often as any other."""
        count = self.words
        while self._counts(count)[0] < 2 * self._counts(count)[1]:
            count += 1
        return self._length(count)

    def prompts(
        self, length: int, count: int, rng: np.random.Generator
    ) -> tuple[np.ndarray, int, np.ndarray]:
        """Prompts to evaluate aggregation on: a list, the question, the answer.

        Args:
            length: tokens of a prompt at most, the answer included; less than a word is left over.
            count: prompts.
            rng: draws words and their order.

        Returns:
            ids: int64 [count, tokens].
            answer_start: the answer is `ids[:, answer_start:]`.
            answers: int64 [count, word_tokens].

        Raises:
            ValueError: a prompt is too short for the task.
        """
        if length < self.shortest:
            raise ValueError(
                f"a common-word prompt needs at least {self.shortest} tokens, got length = {length}"
            )
        slots = (length - self._length(0)) // self.word_tokens
        copies = self._counts(slots)
        ids, answers = [], []
        for _ in range(count):
            chosen = rng.choice(self._word_ids, self.words, replace=False)
            listed = rng.permutation(np.repeat(chosen, copies, axis=0)).ravel()
            answers.append(chosen[0])
            ids.append([self._prefix_ids, listed, self._question_ids, chosen[0]])
        prompts = np.stack([np.concatenate(parts) for parts in ids])
        return prompts, prompts.shape[1] - self.word_tokens, np.stack(answers)

    def _length(self, slots: int) -> int:
        """Tokens of a prompt with a list of so many words."""
        return len(self._prefix_ids) + len(self._question_ids) + (slots + 1) * self.word_tokens

    def _counts(self, slots: int) -> list[int]:
        """How often each word stands in a list, the answer first."""
        answer = round(self.share * slots)
        each, more = divmod(slots - answer, self.words - 1)
        return [answer, *(each + (i < more) for i in range(self.words - 1))]
