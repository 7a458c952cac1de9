"""The planted passkey: a number stated somewhere in a long text and asked for at its end.

Source of the task: Mohtashami and Jaggi, "Landmark Attention" (arXiv 2305.16300). Here
it also goes into training documents, so that there is something to learn that only far attention
can answer.
"""

from __future__ import annotations

from dataclasses import InitVar, dataclass, field

import numpy as np

from lit_sparse.data.documents import Documents
from lit_sparse.data.tokenizer import Tokenizer


@dataclass
class Passkey:
    """A passkey in the tokens of one tokenizer.

    A statement is `prefix`, the answer and `suffix`; the question is `prefix` once more, and the
    answer follows it. The answer is encoded digit by digit, every digit with `separator` before it,
    and all ten digits must take equally many tokens: so all answers have the same length in tokens,
    and the tokens of the answer are the same in the statement and after the question.

    Args:
        tokenizer: encodes the texts; not kept.
        prefix: text before the key, in the statement and in the question.
        digits: digits of a key.
        suffix: text after the key of a statement.
        separator: text before each digit. None chooses nothing if the tokenizer takes digits apart
            by itself (bytes, Qwen), else a space (GPT-2, Llama 3 join up to three digits).
        recalls: how often the statement is repeated between itself and the question.

    Raises:
        ValueError: the digits take differing numbers of tokens.
    """

    tokenizer: InitVar[Tokenizer]
    prefix: str = "\n# passkey: "
    digits: int = 5
    suffix: str = "\n"
    separator: str | None = None
    recalls: int = 0
    answer_tokens: int = field(init=False)
    """Tokens of an answer."""
    statement_tokens: int = field(init=False)
    question_tokens: int = field(init=False)
    """Tokens of the question and its answer."""

    def __post_init__(self, tokenizer: Tokenizer) -> None:
        if self.digits < 1:
            raise ValueError(f"passkey.digits must be >= 1, got {self.digits}")
        if self.recalls < 0:
            raise ValueError(f"passkey.recalls must be >= 0, got {self.recalls}")
        if self.separator is None:
            self.separator = "" if _apart(tokenizer, "") else " "
        self._digit_ids = [tokenizer.encode(self.separator + digit) for digit in "0123456789"]
        sizes = {len(ids) for ids in self._digit_ids}
        if len(sizes) > 1 or 0 in sizes:
            raise ValueError(
                f"passkey.separator = {self.separator!r}: the ten digits take "
                f"{sorted(sizes)} tokens with this tokenizer; choose a separator with which "
                "all take the same number"
            )
        self._prefix_ids = tokenizer.encode(self.prefix)
        self._suffix_ids = tokenizer.encode(self.suffix)
        self.answer_tokens = self.digits * len(self._digit_ids[0])
        self.question_tokens = len(self._prefix_ids) + self.answer_tokens
        self.statement_tokens = self.question_tokens + len(self._suffix_ids)

    @property
    def shortest(self) -> int:
        """Tokens of the shortest piece that can carry the task."""
        n = self.statement_tokens + self.question_tokens
        while 3 * n // 4 < self.statement_tokens:
            n += 1
        return n

    def answer(self, rng: np.random.Generator) -> np.ndarray:
        """Tokens of a random key [answer_tokens]; every digit is as likely as any other."""
        return np.concatenate([self._digit_ids[d] for d in rng.integers(10, size=self.digits)])

    def plant(self, tokens: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """A copy of a piece with the task in it: same length, text overwritten.

        The statement stands at a random place inside the first three quarters, the question and its
        answer at the end, so that the last `answer_tokens` tokens are the answer. `recalls`
        statements more stand at random places between the two, as many as fit. A piece shorter than
        `shortest` comes back as it is.
        """
        n = len(tokens)
        if n < self.shortest:
            return tokens
        planted = tokens.copy()
        answer = self.answer(rng)
        statement = np.concatenate([self._prefix_ids, answer, self._suffix_ids])
        size = self.statement_tokens
        question = n - self.question_tokens
        last = min(3 * n // 4, question) - size
        after = int(rng.integers(last + 1))
        planted[after : after + size] = statement
        after += size
        recalls = min(self.recalls, (question - after) // size)
        # Sorted draws from the room that is left, each pushed on by the statements before it: any
        # arrangement without overlap is as likely as any other.
        room = question - after - recalls * size
        for i, place in enumerate(np.sort(rng.integers(room + 1, size=recalls))):
            start = after + int(place) + i * size
            planted[start : start + size] = statement
        planted[question:] = np.concatenate([self._prefix_ids, answer])
        return planted

    def depths(self, count: int) -> np.ndarray:
        """Where `prompts` puts statements: the middles of `count` equal parts, in (0, 1)."""
        return (np.arange(count) + 0.5) / count

    def prompts(
        self, documents: Documents, length: int, count: int, rng: np.random.Generator
    ) -> tuple[np.ndarray, int, np.ndarray]:
        """Prompts to evaluate retrieval on: real text with one statement, then question and answer.

        The text of a prompt is a window of one document where one is long enough, else of several
        documents one after the other (their end tokens left out).

        Args:
            documents: where the text comes from.
            length: tokens of a prompt, the answer included.
            count: prompts; statement i stands at the share `depths(count)[i]` of the text.
            rng: draws text and keys.

        Returns:
            ids: int64 [count, length].
            answer_start: the answer is `ids[:, answer_start:]`.
            answers: int64 [count, answer_tokens].

        Raises:
            ValueError: a prompt is too short for the task, or they hold too little text.
        """
        text_tokens = length - self.statement_tokens - self.question_tokens
        if text_tokens < 0:
            raise ValueError(
                f"a passkey prompt needs at least {length - text_tokens} tokens, got "
                f"length = {length}"
            )
        ids = np.empty((count, length), dtype=np.int64)
        answers = np.empty((count, self.answer_tokens), dtype=np.int64)
        for i, depth in enumerate(self.depths(count)):
            text = _text(documents, text_tokens, rng)
            answers[i] = self.answer(rng)
            cut = round(float(depth) * text_tokens)
            statement = [self._prefix_ids, answers[i], self._suffix_ids]
            question = [self._prefix_ids, answers[i]]
            ids[i] = np.concatenate([text[:cut], *statement, text[cut:], *question])
        return ids, length - self.answer_tokens, answers


def _apart(tokenizer: Tokenizer, separator: str) -> bool:
    """Whether the tokenizer writes a number as its digits one by one would be written."""
    digits = "7390142865"
    parts = [tokenizer.encode(separator + digit) for digit in digits]
    return np.array_equal(np.concatenate(parts), tokenizer.encode(separator.join(["", *digits])))


def _text(documents: Documents, tokens: int, rng: np.random.Generator) -> np.ndarray:
    """A run of `tokens` tokens of text, document ends left out."""
    sizes = documents.lengths - 1
    windows = np.maximum(sizes - tokens + 1, 0)
    if windows.any():
        # Every window is as likely as any other.
        window = int(rng.integers(windows.sum()))
        document = int(np.searchsorted(np.cumsum(windows), window, side="right"))
        return documents.read(document, window - int(windows[:document].sum()), tokens)
    if sizes.sum() < tokens:
        raise ValueError(
            f"a passkey prompt needs {tokens} tokens of text, but the documents hold "
            f"{int(sizes.sum())}; ask for a shorter length or add documents"
        )
    parts: list[np.ndarray] = []
    missing = tokens
    for document in rng.permutation(len(documents)):
        parts.append(documents.read(document, 0, int(min(sizes[document], missing))))
        missing -= len(parts[-1])
        if not missing:
            break
    return np.concatenate(parts)
