"""What a token store says about itself: `lit_sparse.json`, and the names of its files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

MANIFEST = "lit_sparse.json"
INDEX = "index"
TOKENIZER = "tokenizer"
"""Folder of the store's own tokenizer; one of bytes needs none."""
BYTES = "bytes"
PLAN = "plan"
"""Folder of what only the making of a store needs."""
UNFINISHED = ".packing"
"""Ends the name of the folder that a store is made in."""
VERSION = 1

LENGTHS, OFFSETS, KEYS, COUNTS, BATCHES = "lengths", "offsets", "keys", "counts", "batches"
BATCH_FIELDS = [
    ("shard", "<i4"),
    ("document", "<i8"),
    ("token", "<i8"),
    ("start", "<i8"),
    ("stop", "<i8"),
    ("crc", "<u4"),
]
"""A record batch: its shard, its first document and token in the store, its bytes in the shard's
file from `start` to `stop`, and the crc32 of these."""

EXAMPLES = 3
"""Names of skipped documents kept for each reason."""


@dataclass
class Skipped:
    """Documents that were left out: how many for each reason, and the first few names."""

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, name: str) -> None:
        self.counts[reason] = self.counts.get(reason, 0) + 1
        names = self.examples.setdefault(reason, [])
        if len(names) < EXAMPLES:
            names.append(name)

    def update(self, later: Skipped) -> None:
        """Add those of documents that come after all that were added here."""
        for reason, count in later.counts.items():
            self.counts[reason] = self.counts.get(reason, 0) + count
            names = self.examples.setdefault(reason, [])
            names += later.examples[reason][: EXAMPLES - len(names)]

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def __str__(self) -> str:
        """For example "3 skipped: 2 empty (a.txt, b.txt), 1 not UTF-8 (c.txt)"."""
        if not self.total:
            return "0 skipped"
        parts = []
        for reason, count in sorted(self.counts.items()):
            more = ", ..." if count > EXAMPLES else ""
            parts.append(f"{count} {reason} ({', '.join(self.examples[reason])}{more})")
        return f"{self.total} skipped: " + ", ".join(parts)


@dataclass(frozen=True)
class File:
    """A file of a store. `documents` and `tokens` are 0 for one that holds none."""

    name: str
    size: int
    sha256: str
    documents: int = 0
    tokens: int = 0

    @classmethod
    def of(cls, folder: Path, name: str, documents: int = 0, tokens: int = 0) -> File:
        """Read a file's size and checksum."""
        path = folder / name
        return cls(name, path.stat().st_size, sha256(path), documents, tokens)


@dataclass(frozen=True)
class Manifest:
    """The facts of a store.

    Args:
        kind: "text", or "chat" where each token has a loss flag.
        tokenizer: its name and the fingerprint of its content.
        vocab_size: ids are below it.
        eos_id: ends each document of kind "text".
        dtype: of the ids, "uint16" or "uint32".
        documents, tokens: how many; a document's end is a token.
        text_bytes: UTF-8 bytes of the text that was tokenised.
        skipped: what was left out.
        shards: the Arrow files, in the order of their documents.
        index: the arrays beside them.
        plan: what the store was made from, to tell whether a command would make the same again.
    """

    kind: str
    tokenizer: str
    tokenizer_fingerprint: str
    vocab_size: int
    eos_id: int
    dtype: str
    documents: int
    tokens: int
    text_bytes: int
    skipped: Skipped
    shards: tuple[File, ...]
    index: tuple[File, ...]
    plan: Mapping[str, Any] = field(default_factory=dict)
    version: int = VERSION

    @property
    def fingerprint(self) -> str:
        """Identity of the tokens, wherever the store lies: 32 hex digits."""
        parts = [self.kind, self.tokenizer_fingerprint, *(shard.sha256 for shard in self.shards)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str | bytes) -> Manifest:
        """Read `to_json`. KeyError, TypeError or ValueError where the text is something else."""
        fields = json.loads(text)
        if fields["version"] != VERSION:
            raise ValueError(f"format {fields['version']}, but this version reads {VERSION}")
        np.dtype(fields["dtype"])
        fields["skipped"] = Skipped(**fields["skipped"])
        for key in ("shards", "index"):
            fields[key] = tuple(File(**entry) for entry in fields[key])
        return cls(**fields)


def arrow_schema(kind: str, dtype: str) -> Any:
    """Columns of a shard."""
    import pyarrow as pa

    ids = pa.large_list(pa.from_numpy_dtype(dtype))
    columns = [("name", pa.string()), ("input_ids", ids)]
    # Not bool, which Arrow packs into bits: numpy could not view it.
    return pa.schema(columns + [("loss", pa.large_list(pa.uint8()))] * (kind == "chat"))


def sha256(path: Path) -> str:
    """Checksum of a file's content, hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()
