"""Models that studies look into, and what they read: trained ones, the same with random weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lit_sparse.budget import Budget
from lit_sparse.data import Documents, Tokenizer
from lit_sparse.models import (
    RopeOrigin,
    architecture_of,
    build_model,
    law_layers,
    pretrained_config,
    sparsify,
    windows_everywhere,
)
from lit_sparse.recipes.benchmark.report import BadArgument
from lit_sparse.recipes.calibrate.texts import choose_texts, open_documents
from lit_sparse.recipes.study.base import base_model
from lit_sparse.recipes.study.findings import Settings

SEEN = (
    "The Python source is of the kind that the study's own model is trained on, and may have been "
    "among it."
)
"""A note of reports."""

PERIOD = 32
"""Tokens of the piece that a repeated text repeats."""


@dataclass(frozen=True)
class Subject:
    """A model that runs densely and can be observed.

    Args:
        path: its Hugging Face directory, or that of the model whose architecture it has.
        model: sparsified, with `Budget.dense()`.
        trained: whether the weights are those of the directory.
    """

    path: Path
    model: Any
    trained: bool = True

    @property
    def name(self) -> str:
        return name_of(self.path)

    @property
    def weights(self) -> str:
        return "trained" if self.trained else "random"

    @property
    def context(self) -> int:
        """Tokens that its positions reach."""
        return RopeOrigin.of(self.model).context

    @property
    def layers(self) -> list[int]:
        """Numbers of those without a sliding window."""
        return law_layers(self.model)

    @property
    def vocabulary(self) -> int:
        """Ids that it knows."""
        return self.model.get_input_embeddings().num_embeddings

    @cached_property
    def documents(self) -> tuple[Documents, Tokenizer]:
        """Python's own source in its tokens."""
        return open_documents(self.path, "stdlib", self.vocabulary)


def name_of(path: Path) -> str:
    """Of a model's directory; where that is named as every run names it, of the run."""
    path = path.absolute()
    return path.parent.name if path.name == "huggingface" else path.name


def given(settings: Settings) -> list[Path]:
    """Directories of the models that the user names, or of the one that the study trains.

    Raises:
        BadArgument: two have the same name, by which a report knows them.
    """
    if settings.models:
        names = [name_of(path) for path in settings.models]
        if twice := [name for name in names if names.count(name) > 1]:
            raise BadArgument(f"MODEL: two directories are named {twice[0]}; give one another name")
        return list(settings.models)
    return [base_model(settings)]


def trained(path: Path) -> Subject:
    """The model of a directory.

    Raises:
        BadArgument: it cannot be loaded, or has no layer that attends to all tokens.
    """
    return _subject(path, lambda: build_model(pretrained=path))


def untrained(path: Path, seed: int) -> Subject:
    """A model of the same architecture with random weights, as its config initialises them."""

    def build() -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return build_model(architecture=architecture_of(pretrained_config(path)))

    return _subject(path, build, trained=False)


def _subject(path: Path, build: Callable[[], Any], trained: bool = True) -> Subject:
    try:
        model = build().eval()
        if not law_layers(model):
            raise ValueError(windows_everywhere(model))
        return Subject(path, sparsify(model, Budget.dense()), trained)
    except (ValueError, NotImplementedError) as error:
        what = str(error).removeprefix("model.pretrained: ")
        raise BadArgument(f"MODEL {path}: {what}") from error


# -- what they read --


def read(kind: str, subject: Subject, lengths: Mapping[int, int], seed: int) -> list[Tensor]:
    """Texts of one of `KINDS`, int64 [length] each, in ascending lengths.

    Args:
        lengths: length in tokens -> how many texts.

    Raises:
        BadArgument: there is not so much text, or not in the model's tokens.
    """
    return _KINDS[kind](subject, dict(sorted(lengths.items())), seed)


def _source(subject: Subject, lengths: Mapping[int, int], seed: int) -> list[Tensor]:
    documents, _ = subject.documents
    texts: list[Tensor] = []
    # The longest first: choose_texts keeps long documents for the lengths that need them.
    chosen = choose_texts(documents, list(lengths), max(lengths.values()), 0, seed)
    for length, count in lengths.items():
        texts += [chosen.read(document, length)[0] for document in chosen.fitted[length][:count]]
    return texts


def _english(subject: Subject, lengths: Mapping[int, int], seed: int) -> list[Tensor]:
    from pydoc_data.topics import topics

    whole = subject.documents[1].encode("\n\n".join(topics[name] for name in sorted(topics)))
    return _pieces(torch.from_numpy(whole.astype(np.int64)), lengths, seed)


def _repeated(subject: Subject, lengths: Mapping[int, int], seed: int) -> list[Tensor]:
    texts = _source(subject, lengths, seed)
    return [text[:PERIOD].repeat(-(-len(text) // PERIOD))[: len(text)] for text in texts]


def _random(subject: Subject, lengths: Mapping[int, int], seed: int) -> list[Tensor]:
    drawn = torch.Generator().manual_seed(seed)
    return [
        torch.randint(subject.vocabulary, (length,), generator=drawn)
        for length, count in lengths.items()
        for _ in range(count)
    ]


def _pieces(whole: Tensor, lengths: Mapping[int, int], seed: int) -> list[Tensor]:
    """From random places; two may overlap."""
    if len(whole) < max(lengths):
        raise BadArgument(
            f"there are {len(whole)} tokens of English text, {max(lengths)} are asked"
        )
    drawn = torch.Generator().manual_seed(seed)
    texts = []
    for length, count in lengths.items():
        starts = torch.randint(len(whole) - length + 1, (count,), generator=drawn)
        texts += [whole[start : start + length] for start in starts.tolist()]
    return texts


_KINDS: dict[str, Callable[[Subject, Mapping[int, int], int], list[Tensor]]] = {
    "source": _source,
    "English": _english,
    "repeated": _repeated,
    "random tokens": _random,
}
KINDS = {
    "source": "Python source",
    "English": "English (Python's help topics)",
    "repeated": f"Python source, {PERIOD} tokens of it repeated",
    "random tokens": "tokens drawn evenly",
}
"""Name -> what it is."""
