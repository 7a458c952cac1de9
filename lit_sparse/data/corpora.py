"""From `data.path` to token stores: opens what is packed, packs what is not, checks them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from lit_sparse.data.cache import cached
from lit_sparse.data.rows.mixture import check_weights
from lit_sparse.data.stores.manifest import MANIFEST, TOKENIZER, UNFINISHED
from lit_sparse.data.stores.pack import pack
from lit_sparse.data.stores.sources import inputs_fingerprint
from lit_sparse.data.stores.store import TokenStore
from lit_sparse.data.tokenizer import (
    FILES,
    Tokenizer,
    has_tokenizer,
    load_tokenizer,
    other_vocabulary,
)
from lit_sparse.training.curriculum import Curriculum

_VERSION = 1
"""Part of the cache key: raise it when the same text gives other tokens."""


def paths_of(path: str | Mapping[str, float]) -> list[str]:
    """The stores and corpora that `data.path` names."""
    return [path] if isinstance(path, str) else list(path)


def is_store(path: str) -> bool:
    """Whether a path is a token store, one that is not finished included."""
    return (Path(path) / MANIFEST).is_file() or path.rstrip("/").endswith(UNFINISHED)


def choose_tokenizer(
    path: str | Mapping[str, float], name: str | None, pretrained: str | None = None
) -> Tokenizer:
    """The tokenizer of a config: the one named, else that of the first store, else that of the
    pretrained model, and for a new model bytes.

    Raises:
        ValueError: it cannot be loaded, there is none, or it gives other tokens the ids that those
            of the pretrained model have, where the config does not ask for it by name; the message
            names `data.tokenizer`.
    """
    if name is not None:
        return load_tokenizer(name)
    own = None if pretrained is None or not has_tokenizer(pretrained) else pretrained
    for part in paths_of(path):
        if is_store(part):
            kept = Path(part) / TOKENIZER
            tokenizer = load_tokenizer(kept if kept.is_dir() else "bytes")
            if own and (differing := other_vocabulary(load_tokenizer(own), tokenizer)):
                raise ValueError(
                    f"data.path: {part} was made with another tokenizer ({tokenizer.name}) than "
                    f"that of model.pretrained {pretrained}: {differing}; pack it again with "
                    f"--tokenizer {pretrained}, or name the store's in data.tokenizer if the model "
                    "shall learn it"
                )
            return tokenizer
    if own is not None:
        return load_tokenizer(own)
    if pretrained is not None:
        raise ValueError(
            f"data.tokenizer: model.pretrained {pretrained} brings no tokenizer (no "
            f"{' nor '.join(FILES[:2])}), and data.path is not packed yet: name the model's "
            "tokenizer, a directory or bytes"
        )
    return load_tokenizer("bytes")


def open_stores(
    path: str | Mapping[str, float],
    tokenizer: Tokenizer,
    field: str = "text",
    cache: str | Path | None = None,
) -> dict[str, TokenStore]:
    """Name -> store, in the order of `data.path`; a corpus is packed into the cache first.

    Raises:
        ValueError: there is nothing to read, a store is damaged, or was made with another
            tokenizer; the message names `data.path` or `data.tokenizer`.
    """
    stores = {}
    for part in paths_of(path):
        if is_store(part):
            store = TokenStore.open(part)
            if store.manifest.tokenizer_fingerprint != tokenizer.fingerprint:
                raise ValueError(
                    f"data.tokenizer: {part} was made with another tokenizer "
                    f"({store.manifest.tokenizer}, {store.vocab_size} ids) than {tokenizer.name} "
                    f"({tokenizer.vocab_size} ids), and a run has one; data.tokenizer = null is "
                    "that of the first store, and what was made with another has to be packed again"
                )
        else:
            store = _packed(part, tokenizer, field, cache)
        stores[part] = store
    return stores


def stage_weights(path: str | Mapping[str, float], curriculum: Curriculum) -> np.ndarray:
    """Share of each store in the tokens of each stage: float [stages, stores].

    Raises:
        ValueError: a weight is negative, all are zero, or a stage names a store that `data.path`
            does not.
    """
    names = paths_of(path)
    common = check_weights(
        dict.fromkeys(names, 1.0) if isinstance(path, str) else path, "data.path"
    )
    weights = np.empty((len(curriculum.stages), len(names)))
    for i, stage in enumerate(curriculum.stages):
        shares = common
        if stage.mixture is not None:
            where = f"curriculum.stages[{i}].mixture"
            if unknown := [name for name in stage.mixture if name not in names]:
                raise ValueError(
                    f"{where} names {', '.join(map(repr, unknown))}, but data.path has "
                    f"{', '.join(map(repr, names))}"
                )
            shares = check_weights(stage.mixture, where)
        weights[i] = [shares.get(name, 0.0) for name in names]
    return weights


def divide(total: int, shares: Sequence[float]) -> list[int]:
    """Whole numbers of sum `total` nearest to the shares, at least 1 where a share is not 0."""
    wanted = np.asarray(shares, dtype=float) / sum(shares) * total
    parts = np.floor(wanted).astype(int)
    left = total - int(parts.sum())
    parts[np.argsort(parts - wanted, kind="stable")[:left]] += 1
    return np.maximum(parts, np.asarray(shares) > 0).tolist()


def _packed(path: str, tokenizer: Tokenizer, field: str, cache: str | Path | None) -> TokenStore:
    try:
        key = {
            "version": _VERSION,
            "inputs": inputs_fingerprint([path]),
            "field": field,
            "tokenizer": tokenizer.fingerprint,
        }
        folder = cached("stores", key, lambda out: pack([path], tokenizer, out, field=field), cache)
    except ValueError as error:
        raise ValueError(f"data.path = {path!r}: {error}") from error
    return TokenStore.open(folder)
