"""The token store: documents as token ids in memory-mapped Arrow files. Written by `pack`."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lit_sparse.data.stores.describe import describe
from lit_sparse.data.stores.manifest import (
    BATCHES,
    COUNTS,
    INDEX,
    KEYS,
    LENGTHS,
    MANIFEST,
    OFFSETS,
    UNFINISHED,
    File,
    Manifest,
    arrow_schema,
    sha256,
)

# Documents hashed, or tokens counted, at once: keeps memory flat.
_CHUNK = 1 << 20
# Tokens of a sample that stands for the whole.
_SAMPLE = 1 << 24


@dataclass(frozen=True)
class _Batch:
    """A record batch that was checked: views of its mapped file."""

    first_document: int
    first_token: int
    names: Any  # pyarrow string array
    ids: np.ndarray
    loss: np.ndarray | None


class TokenStore:
    """Documents as token ids, read-only and memory-mapped; see `TokenStore.open`.

    Opening reads the manifest and nothing else. A shard is mapped when it is first touched, and
    a record batch (about a million tokens) is checked against its checksum when a process first
    touches it; the index is checked by `split`. A store pickles as its path.

    Attributes:
        path: the directory; `datasets.load_from_disk` opens it too.
        manifest: what the store says about itself.
        fingerprint: identity of the content, wherever the store lies.
        kind: "text" (every document ends with `eos_id`) or "chat" (tokens have loss flags).
        lengths: int64 [documents]: tokens of each document, its end included.
        offsets: int64 [documents + 1]: where documents start in the store.
        keys: uint64 [documents]: hash of the document's name.
        counts: int64 [vocab_size]: occurrences of each id.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path, self.manifest = path, manifest
        self.fingerprint = manifest.fingerprint
        self.kind, self.eos_id = manifest.kind, manifest.eos_id
        self.vocab_size = manifest.vocab_size
        documents = len(self)
        self.lengths = self._index(LENGTHS, documents)
        self.offsets = self._index(OFFSETS, documents + 1)
        self.keys = self._index(KEYS, documents)
        self.counts = self._index(COUNTS, self.vocab_size)
        self._batches = self._index(BATCHES)
        self._first_documents = np.ascontiguousarray(self._batches["document"])
        self._schema = arrow_schema(manifest.kind, manifest.dtype)
        self._index_holds = False
        self._shards: dict[int, np.ndarray] = {}
        self._checked: dict[int, _Batch] = {}

    @classmethod
    def open(cls, path: str | Path) -> TokenStore:
        """Open a store. Sizes are checked, contents when they are read; see `verify`.

        Raises:
            ValueError: there is no finished store, or a file of it is missing or has another size.
        """
        path = Path(path).resolve()
        if path.name.endswith(UNFINISHED):
            raise ValueError(
                f"{path} is a store that is not finished; run the `lit-sparse pack` command that "
                "began it again and it continues"
            )
        try:
            text = (path / MANIFEST).read_bytes()
        except OSError:
            raise ValueError(
                f"{path} is no token store: it holds no {MANIFEST}; make one with "
                "`lit-sparse pack INPUT --tokenizer DIR --out STORE`"
            ) from None
        try:
            manifest = Manifest.from_json(text)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path / MANIFEST} cannot be read ({error}); make the store again with "
                "`lit-sparse pack`"
            ) from error
        for file in (*manifest.shards, *manifest.index):
            found = (path / file.name).stat().st_size if (path / file.name).is_file() else None
            if found != file.size:
                state = "is missing" if found is None else f"has {found} bytes, not {file.size}"
                raise _damaged(path, file.name, state)
        return cls(path, manifest)

    def __reduce__(self) -> tuple:
        return TokenStore.open, (str(self.path),)

    def __repr__(self) -> str:
        return f"TokenStore({str(self.path)!r}: {len(self)} documents, {self.tokens} tokens)"

    def __len__(self) -> int:
        """Documents."""
        return self.manifest.documents

    @property
    def tokens(self) -> int:
        """Tokens of all documents, their ends included."""
        return self.manifest.tokens

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of the text / its tokens without the ends of documents; NaN if there are
        none. Bits per token over this are bits per byte, which compare across tokenizers.
        """
        ends = len(self) if self.kind == "text" else 0
        text = self.tokens - ends
        return self.manifest.text_bytes / text if text else float("nan")

    def read(self, document: int, start: int = 0, length: int | None = None) -> np.ndarray:
        """Tokens of a document from `start` on, at most `length`: a view, uint16 or uint32.

        Raises:
            ValueError: its part of the store is damaged.
        """
        batch = self._batch(document)
        return batch.ids[self._part(batch, document, start, length)]

    def loss_mask(
        self, document: int, start: int = 0, length: int | None = None
    ) -> np.ndarray | None:
        """Which of the tokens that `read` gives are to be learnt: a view, bool; None for all.

        Raises:
            ValueError: its part of the store is damaged.
        """
        batch = self._batch(document)
        if batch.loss is None:
            return None
        return batch.loss[self._part(batch, document, start, length)]

    def name(self, document: int) -> str:
        """Path of the document in the input, and "#line" or "#row" where a file holds several."""
        batch = self._batch(document)
        return batch.names[int(document) - batch.first_document].as_py()

    def split(self, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Training and validation documents, by a hash of the document's name and the seed.

        A document's side depends on nothing else, so that a corpus may grow without moving
        others. The exception is a corpus so small that one side would be empty: it gets the one
        document whose hash is nearest.

        Args:
            fraction: share of the documents that is kept for validation, in (0, 1).
            seed: another seed, another split.

        Returns:
            Document numbers, ascending: int64 [training documents], int64 [validation documents].

        Raises:
            ValueError: there are fewer than two documents; the message names `data.path`. Or the
                index is damaged: all that follows rests on it, so it is checked here, once.
        """
        if not 0 < fraction < 1:
            raise ValueError(f"data.validation_fraction must be in (0, 1), got {fraction}")
        if not self._index_holds:
            self._compare(self.manifest.index)
            self._index_holds = True
        if len(self) < 2:
            raise ValueError(
                f"data.path holds {len(self)} document(s), but training and validation are split "
                "by document and need at least 2; cut the text into several files or JSON lines"
            )
        held_out = np.empty(len(self), dtype=bool)
        nearest: list[tuple[np.uint64, int]] = []
        farthest: list[tuple[np.uint64, int]] = []
        # 1 - 2^-53 is the largest fraction below 1, so the limit fits.
        limit = np.uint64(int(fraction * 2**64))
        for first in range(0, len(self), _CHUNK):
            places = _places(self.keys[first : first + _CHUNK], seed)
            held_out[first : first + _CHUNK] = places < limit
            low, high = int(places.argmin()), int(places.argmax())
            nearest.append((places[low], first + low))
            farthest.append((places[high], first + high))
        if not held_out.any():
            held_out[min(nearest)[1]] = True
        elif held_out.all():
            held_out[max(farthest)[1]] = False
        return np.flatnonzero(~held_out), np.flatnonzero(held_out)

    def describe(self) -> str:
        """Facts and a histogram of the documents' lengths, as aligned text."""
        return describe(self)

    def verify(self) -> None:
        """Read every file and compare its checksum.

        Raises:
            ValueError: one differs; the message names it.
        """
        self._compare((*self.manifest.shards, *self.manifest.index))

    def _compare(self, files: Sequence[File]) -> None:
        for file in files:
            if sha256(self.path / file.name) != file.sha256:
                raise _damaged(self.path, file.name, "does not have the checksum of the manifest")

    def _index(self, name: str, length: int | None = None) -> np.ndarray:
        file = f"{INDEX}/{name}.npy"
        try:
            array = np.load(self.path / file, mmap_mode="r", allow_pickle=False)
        except Exception as error:  # numpy parses the header as Python, which fails in many ways
            raise _damaged(self.path, file, f"cannot be read ({error})") from error
        if array.ndim != 1 or (length is not None and len(array) != length):
            raise _damaged(self.path, file, f"has the shape {array.shape}")
        # A plain array is faster to index than np.memmap, and keeps the mapping alive.
        return array.view(np.ndarray)

    def _part(self, batch: _Batch, document: int, start: int, length: int | None) -> slice:
        first = int(self.offsets[document]) - batch.first_token
        size = int(self.lengths[document])
        start = min(start, size)
        stop = size if length is None else min(start + length, size)
        return slice(first + start, first + stop)

    def _batch(self, document: int) -> _Batch:
        if not 0 <= document < len(self):
            raise IndexError(f"document {document} of {len(self)}")
        number = int(self._first_documents.searchsorted(document, side="right")) - 1
        batch = self._checked.get(number)
        if batch is None:
            batch = self._checked[number] = self._check(number)
        return batch

    def _check(self, number: int) -> _Batch:
        import pyarrow as pa

        entry = self._batches[number]
        shard = self._shard(int(entry["shard"]))
        content = shard[entry["start"] : entry["stop"]]
        # Before Arrow reads it: what is damaged could crash the process.
        if zlib.crc32(content.data) != entry["crc"]:
            name = self.manifest.shards[entry["shard"]].name
            raise _damaged(self.path, name, f"does not have the checksum of record batch {number}")
        batch = pa.ipc.read_record_batch(pa.py_buffer(content), self._schema)
        columns = [column.values.to_numpy() for column in batch.columns[1:]]
        return _Batch(
            first_document=int(entry["document"]),
            first_token=int(entry["token"]),
            names=batch.column(0),
            ids=columns[0],
            loss=columns[1].view(bool) if self.kind == "chat" else None,
        )

    def _shard(self, number: int) -> np.ndarray:
        if number not in self._shards:
            path = self.path / self.manifest.shards[number].name
            self._shards[number] = np.memmap(path, np.uint8, mode="r").view(np.ndarray)
        return self._shards[number]


def unigram_bits(store: TokenStore, validation: np.ndarray) -> float:
    """What a model without any context needs: bits per validation token under training frequencies.

    Cross entropy of the add-one smoothed unigram model of the other documents; document ends do not
    count. With a byte tokenizer this is bits per byte. A language model that stays above has learnt
    nothing. NaN if the validation documents hold no token but their ends.

    Args:
        store: the documents.
        validation: int64, those of them that are kept for validation; the first 2^24 tokens stand
            for more.
    """
    asked = np.zeros(store.vocab_size, dtype=np.int64)
    missing = _SAMPLE
    for document in validation:
        ids = store.read(int(document), 0, missing)
        for first in range(0, len(ids), _CHUNK):  # numpy widens them to int64
            asked += np.bincount(ids[first : first + _CHUNK], minlength=store.vocab_size)
        missing -= len(ids)
        if not missing:
            break
    smoothed = store.counts - asked + 1.0
    # Ends do not count, and the smoothing must not give them mass.
    asked[store.eos_id] = smoothed[store.eos_id] = 0
    used = np.flatnonzero(asked)
    if not len(used):
        return float("nan")
    bits = -np.log2(smoothed[used] / smoothed.sum())
    return float((asked[used] * bits).sum() / asked.sum())


def _places(keys: np.ndarray, seed: int) -> np.ndarray:
    """Uniform uint64 of keys and a seed: splitmix64 (Steele et al., OOPSLA 2014) of their sum."""
    step = 0x9E3779B97F4A7C15
    mixed = keys + np.uint64((seed + 1) * step % 2**64)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def _damaged(store: Path, name: str, state: str) -> ValueError:
    return ValueError(
        f"the token store is damaged: {store / name} {state}; `lit-sparse pack --verify {store}` "
        "checks all of it; make it again with `lit-sparse pack ... --overwrite`"
    )
