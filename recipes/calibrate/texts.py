"""Which documents a calibration reads: different ones at every length, others for the check."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lit_sparse.data import Documents, Tokenizer, load_tokenizer
from lit_sparse.data.corpora import choose_tokenizer, is_store, open_stores
from lit_sparse.data.tokenizer import has_tokenizer
from lit_sparse.recipes.benchmark.report import BadArgument

_SAMPLE = "Attention, 1234 words:\n\tdef f(x): return x  # naïve\n"


@dataclass(frozen=True)
class Texts:
    """Documents cut to a length; no document is read twice."""

    documents: Documents
    fitted: dict[int, list[int]]
    """Length in tokens -> the documents that are measured at it."""
    held_out: list[int]
    """Those of the check."""

    def read(self, document: int, length: int) -> Tensor:
        """The first tokens of a document, int64 [1, length]."""
        tokens = self.documents.read(document, 0, length)
        return torch.from_numpy(tokens.astype(np.int64))[None]

    def names(self, documents: Sequence[int]) -> list[str]:
        return [self.documents.name(document) for document in documents]

    @property
    def text(self) -> Documents:
        """The documents of the check as a store of their own, to take text for tasks from."""
        return Documents(self.documents.store, self.documents.numbers[self.held_out])


def open_documents(model: Path, data: str, vocabulary: int) -> tuple[Documents, Tokenizer]:
    """All documents of a store or corpus, in tokens of a model that knows so many.

    A corpus that is not packed is read by the model's own tokenizer, as bytes if it has none.

    Raises:
        BadArgument: there is nothing to read, or not in the model's tokens.
    """
    own = str(model) if has_tokenizer(model) else None
    try:
        tokenizer = choose_tokenizer(data, None if is_store(data) else own)
        (store,) = open_stores(data, tokenizer).values()
    except ValueError as error:
        raise BadArgument(str(error).replace("data.path =", "--data", 1)) from error
    if tokenizer.vocab_size > vocabulary:
        raise BadArgument(
            f"--data {data} is in the {tokenizer.vocab_size} tokens of {tokenizer.name}, the model "
            f"{model} knows {vocabulary}"
        )
    # By what it gives: bytes saved for Hugging Face are another tokenizer with the same ids.
    if own and not np.array_equal(tokenizer.encode(_SAMPLE), load_tokenizer(own).encode(_SAMPLE)):
        raise BadArgument(
            f"--data {data} was packed with another tokenizer ({tokenizer.name}) than the "
            f"model {model} has: pack the text with --tokenizer {model}"
        )
    return Documents(store, np.arange(len(store))), tokenizer


def choose_texts(
    documents: Documents, lengths: Sequence[int], count: int, checked: int, seed: int
) -> Texts:
    """Draw `count` documents for each length, and `checked` of twice the longest.

    Raises:
        BadArgument: too few are long enough; the message says how many are.
    """
    sizes = documents.text_lengths
    wanted = {2 * max(lengths): checked} | dict.fromkeys(sorted(lengths, reverse=True), count)
    needed, short = 0, []
    for length, own in wanted.items():
        needed += own
        if (there := int((sizes >= length).sum())) < needed:
            short.append(f"{there} of the {needed} that must have {length} tokens or more")
    if short:
        raise BadArgument(
            f"the documents are too few or too short: of {len(documents)} there are "
            f"{', '.join(short)} (a document is read at one length only, {count} at each, "
            f"{checked} are held out). Give shorter --lengths, fewer --documents, or more --data"
        )
    free = np.random.default_rng(seed).permutation(len(documents))
    chosen = {}
    for length, own in wanted.items():
        chosen[length] = free[sizes[free] >= length][:own]
        free = free[~np.isin(free, chosen[length])]
    held_out = chosen.pop(2 * max(lengths)).tolist()
    return Texts(documents, {n: chosen[n].tolist() for n in sorted(chosen)}, held_out)
