"""Writes token stores: a shard at a time, then the index and the manifest over all of them."""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lit_sparse.data.stores.manifest import (
    BATCH_FIELDS,
    BATCHES,
    COUNTS,
    INDEX,
    KEYS,
    LENGTHS,
    MANIFEST,
    OFFSETS,
    PLAN,
    File,
    Manifest,
    Skipped,
    arrow_schema,
)

_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"

BATCH_TOKENS = 1 << 20
"""A record batch is closed when it holds as many. A document never spans two."""


@dataclass(frozen=True)
class Header:
    """What all shards of a store share: kind "text" or "chat", and facts of the tokenizer."""

    kind: str
    tokenizer: str
    tokenizer_fingerprint: str
    vocab_size: int
    eos_id: int

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)


@dataclass(frozen=True)
class Unit:
    """A shard that is written, and what came with it. Its arrays lie beside it until `finish`."""

    number: int
    shard: File | None
    text_bytes: int
    skipped: Skipped

    @classmethod
    def load(cls, folder: Path, number: int) -> Unit | None:
        """The unit if it is complete, else None."""
        try:
            with np.load(_arrays(folder, number), allow_pickle=False) as arrays:
                facts = json.loads(arrays["facts"].tobytes())
        except FileNotFoundError:
            return None
        shard = File(**facts["shard"]) if facts["shard"] else None
        if shard and (folder / shard.name).stat().st_size != shard.size:
            return None
        return cls(number, shard, facts["text_bytes"], Skipped(**facts["skipped"]))


class ShardWriter:
    """Writes one shard under a temporary name and, in `close`, gives it its own.

    Args:
        folder: the store in the making.
        number: of the unit; numbers order the shards.
        header: kind and tokenizer.
    """

    def __init__(self, folder: Path, number: int, header: Header) -> None:
        self._folder, self._number, self._header = folder, number, header
        self._schema = arrow_schema(header.kind, header.dtype.name)
        self._end = np.array([header.eos_id], dtype=header.dtype)
        self._temporary = folder / f"{_name(number)}.{os.getpid()}.tmp"
        self._file = self._temporary.open("wb")
        self._file.write(self._schema.serialize())
        self._names: list[str] = []
        self._ids: list[np.ndarray] = []
        self._loss: list[np.ndarray] = []
        self._pending = 0
        self._lengths, self._keys = array("q"), array("Q")
        self._batches: list[tuple[int, ...]] = []
        self._counts = np.zeros(header.vocab_size, dtype=np.int64)
        self.tokens = 0
        """Tokens that were added."""

    @property
    def documents(self) -> int:
        """Documents that were added."""
        return len(self._lengths)

    def add(self, name: str, ids: np.ndarray, loss: np.ndarray | None = None) -> None:
        """Append a document.

        Args:
            name: stable name; its hash decides about the validation split.
            ids: one dimension. The end of a document of kind "text" is put behind them.
            loss: bool [len(ids)], for kind "chat".
        """
        self._names.append(name)
        self._ids.append(ids)
        size = len(ids)
        if loss is None:
            self._ids.append(self._end)
            size += 1
        else:
            self._loss.append(loss)
        digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
        self._keys.append(int.from_bytes(digest, "little"))
        self._lengths.append(size)
        self.tokens += size
        self._pending += size
        if self._pending >= BATCH_TOKENS:
            self._flush()

    def close(self, text_bytes: int, skipped: Skipped) -> Unit:
        """Complete the shard. A shard without documents leaves no file."""
        if self._names:
            self._flush()
        self._file.write(_END_OF_STREAM)
        _sync(self._file)
        shard = None
        if self.documents:
            name = f"{_name(self._number)}.arrow"
            os.replace(self._temporary, self._folder / name)
            shard = File.of(self._folder, name, self.documents, self.tokens)
        else:
            self._temporary.unlink()
        unit = Unit(self._number, shard, text_bytes, skipped)
        used = np.flatnonzero(self._counts)
        facts = {key: value for key, value in asdict(unit).items() if key != "number"}
        temporary = self._temporary.with_suffix(".npz.tmp")
        with temporary.open("wb") as file:
            np.savez(
                file,
                facts=np.frombuffer(json.dumps(facts).encode(), dtype=np.uint8),
                lengths=np.frombuffer(self._lengths, dtype=np.int64),
                keys=np.frombuffer(self._keys, dtype=np.uint64),
                batches=np.array(self._batches, dtype=BATCH_FIELDS),
                ids=used.astype(np.uint32),
                counts=self._counts[used],
            )
            _sync(file, close=False)
        os.replace(temporary, _arrays(self._folder, self._number))
        return unit

    def _flush(self) -> None:
        import pyarrow as pa

        documents = len(self._names)
        first = self.documents - documents
        lengths = np.frombuffer(self._lengths[first:], dtype=np.int64)
        offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]))
        ids = np.concatenate(self._ids).astype(self._header.dtype, copy=False)
        counts = np.bincount(ids, minlength=len(self._counts))
        if len(counts) > len(self._counts):
            raise ValueError(
                f"the tokenizer gave the id {len(counts) - 1}, but its vocab_size is "
                f"{len(self._counts)}"
            )
        self._counts += counts
        columns = [
            pa.array(self._names, pa.string()),
            pa.LargeListArray.from_arrays(offsets, pa.array(ids)),
        ]
        if self._header.kind == "chat":
            loss = pa.array(np.concatenate(self._loss).astype(np.uint8))
            columns.append(pa.LargeListArray.from_arrays(offsets, loss))
        # A message of Arrow's stream format; written here, its bytes are known.
        message = pa.record_batch(columns, schema=self._schema).serialize()
        start = self._file.tell()
        self._file.write(message)
        place = (0, first, self.tokens - self._pending, start, start + message.size)
        self._batches.append((*place, zlib.crc32(message)))
        self._names, self._ids, self._loss, self._pending = [], [], [], 0


def finish(folder: Path, header: Header, units: Sequence[Unit], plan: Mapping[str, Any]) -> None:
    """Make a store of the complete units of a folder: index, Hugging Face's files, manifest.

    The manifest is written last, without it nothing opens the folder. Memory does not grow with
    the number of documents.
    """
    shards = [unit.shard for unit in units if unit.shard]
    documents, tokens = (sum(getattr(s, key) for s in shards) for key in ("documents", "tokens"))
    skipped = Skipped()
    for unit in units:
        skipped.update(unit.skipped)
    (folder / INDEX).mkdir(exist_ok=True)
    written = [unit for unit in units if unit.shard]
    counts = np.zeros(header.vocab_size, dtype=np.int64)
    for unit in written:
        with np.load(_arrays(folder, unit.number)) as arrays:
            counts[arrays["ids"]] += arrays["counts"]

    def each(key: str) -> Iterator[np.ndarray]:
        for unit in written:
            with np.load(_arrays(folder, unit.number)) as arrays:
                yield arrays[key]

    index = [
        _write_array(folder, LENGTHS, each("lengths"), np.int64, documents),
        _write_array(folder, OFFSETS, _running(each("lengths")), np.int64, documents + 1),
        _write_array(folder, KEYS, each("keys"), np.uint64, documents),
        _write_array(folder, COUNTS, [counts], np.int64, header.vocab_size),
        _write_array(folder, BATCHES, [_joined(each("batches"), shards)], BATCH_FIELDS),
    ]
    manifest = Manifest(
        **asdict(header),
        dtype=header.dtype.name,
        documents=documents,
        tokens=tokens,
        text_bytes=sum(unit.text_bytes for unit in units),
        skipped=skipped,
        shards=tuple(shards),
        index=tuple(index),
        plan=plan,
    )
    _write_for_datasets(folder, manifest)
    write_text(folder / MANIFEST, manifest.to_json())


def write_text(path: Path, text: str) -> None:
    """Write a file through a temporary name, so that it is there whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        _sync(file, close=False)
    os.replace(temporary, path)


def _running(lengths: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """Offsets of documents of these lengths, in parts."""
    total = 0
    yield np.zeros(1, np.int64)
    for part in lengths:
        yield total + np.cumsum(part)
        total += int(part.sum())


def _joined(batches: Iterator[np.ndarray], shards: Sequence[File]) -> np.ndarray:
    """The table of all record batches from those of the shards."""
    parts = []
    document = token = 0
    for number, (part, shard) in enumerate(zip(batches, shards, strict=True)):
        part["shard"] = number
        part["document"] += document
        part["token"] += token
        document, token = document + shard.documents, token + shard.tokens
        parts.append(part)
    return np.concatenate(parts)


def _write_array(
    folder: Path, name: str, parts: Any, dtype: Any, length: int | None = None
) -> File:
    """Write an .npy file part by part."""
    if length is None:
        length = sum(map(len, parts))
    header = {
        "descr": np.lib.format.dtype_to_descr(np.dtype(dtype)),
        "fortran_order": False,
        "shape": (length,),
    }
    file_name = f"{INDEX}/{name}.npy"
    with (folder / file_name).open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for part in parts:
            file.write(np.ascontiguousarray(part).astype(dtype, copy=False).tobytes())
        _sync(file, close=False)
    return File.of(folder, file_name)


def _write_for_datasets(folder: Path, manifest: Manifest) -> None:
    """What `datasets.load_from_disk` looks for."""

    def ids(dtype: str) -> dict:
        return {"feature": {"dtype": dtype, "_type": "Value"}, "_type": "LargeList"}

    features = {"name": {"dtype": "string", "_type": "Value"}, "input_ids": ids(manifest.dtype)}
    if manifest.kind == "chat":
        features["loss"] = ids("uint8")
    info = {"citation": "", "description": "", "features": features, "homepage": "", "license": ""}
    state: dict[str, Any] = {
        "_data_files": [{"filename": shard.name} for shard in manifest.shards],
        "_fingerprint": manifest.fingerprint[:16],
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    write_text(folder / "dataset_info.json", json.dumps(info, indent=1))
    write_text(folder / "state.json", json.dumps(state, indent=1))


def _name(number: int) -> str:
    return f"shard-{number:05d}"


def _arrays(folder: Path, number: int) -> Path:
    return folder / PLAN / f"{_name(number)}.npz"


def _sync(file: Any, close: bool = True) -> None:
    file.flush()
    os.fsync(file.fileno())
    if close:
        file.close()
