"""A token store in words: its facts and a histogram of its documents' lengths."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from lit_sparse.data.stores.store import TokenStore

_CHUNK = 1 << 20
_BAR = 40


def length_histogram(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Documents, and tokens, of each length class.

    Args:
        lengths: int64 [documents], at least one.

    Returns:
        int64 [classes] twice; class c holds the lengths from 2^c to 2^(c+1) - 1.
    """
    documents, tokens = np.zeros(64, np.int64), np.zeros(64, np.int64)
    for first in range(0, len(lengths), _CHUNK):
        part = lengths[first : first + _CHUNK]
        classes = np.frexp(np.maximum(part, 1))[1] - 1
        documents += np.bincount(classes, minlength=64)
        # Exact up to 2^53 tokens in a chunk.
        tokens += np.bincount(classes, weights=part, minlength=64).astype(np.int64)
    used = slice(0, int(np.flatnonzero(documents)[-1]) + 1)
    return documents[used], tokens[used]


def describe(store: TokenStore) -> str:
    """Facts and histogram as aligned text."""
    manifest = store.manifest
    size = sum(file.size for file in (*manifest.shards, *manifest.index))
    inputs = manifest.plan.get("inputs", [])
    facts = [
        ("store", str(store.path)),
        ("kind", store.kind),
        ("documents", f"{len(store):,}"),
        ("tokens", f"{store.tokens:,} ({manifest.dtype})"),
        ("text", f"{manifest.text_bytes:,} bytes, {store.bytes_per_token:.2f} a token"),
        ("files", f"{size / 2**20:,.1f} MiB in {len(manifest.shards)} shards"),
        ("tokenizer", f"{manifest.tokenizer} ({store.vocab_size:,} ids, end {store.eos_id})"),
        ("fingerprint", store.fingerprint),
        *(("input", f"{i['path']} ({i['files']:,} files)") for i in inputs),
        ("skipped", str(manifest.skipped)),
    ]
    lines = [f"{key:12} {value}" for key, value in facts]
    return "\n".join([*lines, "", *_histogram(store.lengths)])


def _histogram(lengths: np.ndarray) -> list[str]:
    documents, tokens = length_histogram(lengths)
    first = int(np.flatnonzero(documents)[0])
    most = max(tokens.max(), 1)
    rows = [("length", "documents", "", "tokens", "", "")]
    for c in range(first, len(documents)):
        rows.append(
            (
                f"{2**c:,} to {2 ** (c + 1) - 1:,}",
                f"{documents[c]:,}",
                f"{documents[c] / documents.sum():.1%}",
                f"{tokens[c]:,}",
                f"{tokens[c] / max(tokens.sum(), 1):.1%}",
                "#" * round(_BAR * tokens[c] / most),
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    return [
        "  ".join([*(cell.rjust(w) for cell, w in zip(row, widths, strict=False)), row[5]]).rstrip()
        for row in rows
    ]
