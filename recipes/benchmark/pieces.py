"""Text for a model that is only measured: pieces of one length of validation documents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lit_sparse.models.export.serving import context_of
from lit_sparse.recipes.benchmark.report import BadArgument
from lit_sparse.recipes.benchmark.steps import SEED


def check_length(model: Any, length: int) -> None:
    """BadArgument unless the model was made for so many tokens."""
    if length > (longest := context_of(model.config.to_dict())):
        raise BadArgument(
            f"--length {length} is past the {longest} positions that the model was made for "
            "(max_position_embeddings)"
        )


def validation_pieces(
    model: Any, directory: Path, data: str, length: int, count: int
) -> tuple[list[Tensor], list[str]]:
    """Pieces of exactly `length` tokens of the validation documents, and where they stand.

    Args:
        model: what will read them, from `directory`, whose tokenizer is used if it has one, else
            bytes; a store has its own.
        data: a store, a folder, a file, or "stdlib".
        count: pieces, at most; int64 [length] each.

    Raises:
        BadArgument: no text, no document of that length, or more ids than the model knows.
    """
    from lit_sparse.data import PackedTextDataModule
    from lit_sparse.data.corpora import is_store
    from lit_sparse.data.tokenizer import has_tokenizer

    own = str(directory) if has_tokenizer(directory) else "bytes"
    tokenizer = None if is_store(data) else own
    try:
        # Its defaults make the split that a training run keeps for validation.
        module = PackedTextDataModule(path=data, tokenizer=tokenizer, row_tokens=length)
        (held,) = module.validation_documents
    except ValueError as error:
        raise BadArgument(str(error)) from error
    known = model.get_input_embeddings().num_embeddings
    if module.vocab_size > known:
        whose = {None: f"that of {data}", "bytes": "bytes, as the directory has none"}
        raise BadArgument(
            f"--model {directory} knows {known} tokens, its tokenizer "
            f"({whose.get(tokenizer, 'of the directory')}) {module.vocab_size}"
        )
    whole = held.lengths // length
    document = np.repeat(np.arange(len(whole)), whole)
    piece = np.arange(len(document)) - np.repeat(np.cumsum(whole) - whole, whole)
    if not len(document):
        raise BadArgument(
            f"--length {length}: the longest validation document of --data {data} has "
            f"{int(held.lengths.max(initial=0))} tokens"
        )
    chosen = np.random.default_rng(SEED).permutation(len(document))[:count]
    texts, names = [], []
    for at in chosen:
        begin = int(piece[at]) * length
        tokens = held.read(int(document[at]), begin, length)
        texts.append(torch.from_numpy(tokens.astype(np.int64)))
        names.append(f"{held.name(int(document[at]))}[{begin}:{begin + length}]")
    return texts, names
