"""What the long-range tasks have in common: planted into a piece of text, asked as prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np

from lit_sparse.data.documents import Documents
from lit_sparse.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Planted:
    """A piece of text with a task in it, as long as the text was."""

    ids: np.ndarray
    """int64 [n]."""
    answer: np.ndarray
    """bool [n]: the tokens that only what was planted tells, in the answers to all questions. The
    last question's answer ends the piece; without recalls there is no other.
    """
    depth: float | None
    """Where the evidence stands: share of the text before the question, in [0, 1]. None: it is
    spread over all of it.
    """


class Task(Protocol):
    """A question at the end of a text that only something planted before it answers.

    Made for one tokenizer, any: what an answer consists of takes the same tokens where it is stated
    and where it is asked for, and all answers of a task take equally many.
    """

    name: ClassVar[str]
    has_depth: ClassVar[bool]
    """Whether the evidence stands in one place, which `plant` can be told."""

    def __init__(self, tokenizer: Tokenizer) -> None: ...

    @property
    def shortest(self) -> int:
        """Tokens of the shortest piece that can carry it."""

    def plant(
        self,
        tokens: np.ndarray,
        rng: np.random.Generator,
        depth: float | None = None,
        recalls: int = 0,
    ) -> Planted:
        """A copy of a piece with the task in it; text is overwritten.

        Args:
            tokens: integers [n], n >= `shortest`.
            rng: draws what is planted and where.
            depth: where the evidence stands, in [0, 1]; None draws it. Has no meaning, and no
                effect, where `has_depth` is False.
            recalls: how many statements, or questions with their answers, more stand before the
                question, as many of them as fit: something to learn in the middle of a piece.

        Raises:
            ValueError: the piece is too short, or the depth is not in [0, 1].
        """


@dataclass(frozen=True)
class Prompts:
    """Prompts to evaluate a task on; the answer stands at the same places in each, and ends it."""

    ids: np.ndarray
    """int64 [count, length]."""
    answer: np.ndarray
    """bool [count, length]: the answer's tokens, as in `Planted`."""
    depths: np.ndarray
    """float64 [count]: where the evidence was asked to stand; nan for a task without depth."""

    @property
    def answer_start(self) -> int:
        """Place of the answer's first token: what is generated begins here."""
        return int(self.answer[0].argmax())


def prompts(
    task: Task, documents: Documents, length: int, count: int, rng: np.random.Generator
) -> Prompts:
    """Plant a task into real text, to evaluate it.

    The text of a prompt is a window of one document where one is long enough, else of several
    documents one after the other (their end tokens left out).

    Args:
        task: what is asked.
        documents: where the text comes from.
        length: tokens of a prompt, the answer included.
        count: prompts; the evidence of prompt i stands at the depth (i + 1/2) / count.
        rng: draws text and task.

    Raises:
        ValueError: a prompt is too short for the task, or the documents hold too little text.
    """
    if length < task.shortest:
        raise ValueError(
            f"a prompt of the task {task.name} needs at least {task.shortest} tokens, got "
            f"length = {length}"
        )
    depths = (np.arange(count) + 0.5) / count if task.has_depth else np.full(count, np.nan)
    planted = [
        task.plant(_text(documents, length, rng), rng, float(depth) if task.has_depth else None)
        for depth in depths
    ]
    return Prompts(
        np.stack([one.ids for one in planted]), np.stack([one.answer for one in planted]), depths
    )


@dataclass(frozen=True)
class Note:
    """A run of tokens that a task writes over the text."""

    ids: np.ndarray
    answer: np.ndarray
    """bool: which of them are of an answer."""

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def of(cls, *parts: np.ndarray, answer: Sequence[int] = ()) -> Note:
        """Parts one after the other, those with the numbers `answer` being of an answer."""
        told = [np.full(len(part), number in answer) for number, part in enumerate(parts)]
        return cls(np.concatenate(parts).astype(np.int64), np.concatenate(told))


def spread(sizes: Sequence[int], start: int, stop: int, rng: np.random.Generator) -> list[int]:
    """Random places in [start, stop) for notes of these sizes, in order and without overlap."""
    # Sorted draws from the room that is left, each pushed on by the notes before it.
    room = stop - start - sum(sizes)
    draws = np.sort(rng.integers(room + 1, size=len(sizes)))
    return [int(place) for place in start + draws + np.cumsum([0, *sizes])[:-1]]


def write(
    tokens: np.ndarray, notes: Sequence[Note], places: Sequence[int], depth: float | None = None
) -> Planted:
    """A copy of a piece with notes written over the text at these places."""
    ids, answer = tokens.astype(np.int64), np.zeros(len(tokens), dtype=bool)
    for note, place in zip(notes, places, strict=True):
        ids[place : place + len(note)] = note.ids
        answer[place : place + len(note)] = note.answer
    return Planted(ids, answer, depth)


def check(task: Task, tokens: np.ndarray, depth: float | None) -> None:
    """Raise ValueError for a piece that is too short for a task, or a depth that is none."""
    if len(tokens) < task.shortest:
        raise ValueError(
            f"the task {task.name} needs pieces of at least {task.shortest} tokens, got "
            f"{len(tokens)}"
        )
    if depth is not None and not 0 <= depth <= 1:
        raise ValueError(f"depth must be in [0, 1], got {depth}")


def _text(documents: Documents, tokens: int, rng: np.random.Generator) -> np.ndarray:
    """A run of `tokens` tokens of text, document ends left out."""
    sizes = documents.text_lengths
    windows = np.maximum(sizes - tokens + 1, 0)
    if windows.any():
        # Every window is as likely as any other.
        window = int(rng.integers(windows.sum()))
        document = int(np.searchsorted(np.cumsum(windows), window, side="right"))
        return documents.read(document, window - int(windows[:document].sum()), tokens)
    if sizes.sum() < tokens:
        raise ValueError(
            f"a prompt needs {tokens} tokens of text, but the documents hold "
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
