"""Reads documents: an entry of an input is cut into pieces, a piece gives names and texts."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_sparse.data.stores.manifest import Skipped
from lit_sparse.data.stores.sources import Entry, Reading

# Rows read at once.
_ROWS = 256


@dataclass(frozen=True)
class Piece:
    """A part of an entry: bytes of JSON lines, row groups of Parquet, rows of a dataset.

    Args:
        kind, path, name: of the entry.
        size: bytes of it, roughly; what progress is measured in.
        start, stop: byte, row group or row; 0, 0 for all of a file.
        first: number of the first line or row.
    """

    kind: str
    path: str
    name: str
    size: int
    start: int = 0
    stop: int = 0
    first: int = 0


def cut(entry: Entry, size: int, reading: Reading) -> Iterator[Piece]:
    """Pieces of an entry of about `size` bytes, in order. A document is never cut.

    Raises:
        ValueError: a table has no column of that name.
    """
    if entry.kind == "parquet":
        yield from _cut_parquet(entry, reading)
    elif entry.kind == "dataset":
        rows = len(_load_dataset(entry.path, reading.field))
        step = max(1, rows * size // max(entry.size, 1))
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            part = entry.size * (stop - start) // rows
            yield Piece(entry.kind, entry.path, entry.name, part, start, stop, start)
    elif entry.kind == "jsonl" and entry.size > size:
        yield from _cut_lines(entry, size)
    else:
        yield Piece(entry.kind, entry.path, entry.name, entry.size, 0, entry.size, 1)


def documents(piece: Piece, reading: Reading, skipped: Skipped) -> Iterator[tuple[str, Any]]:
    """Names and texts (or lists of messages) of a piece; what cannot be read goes to `skipped`."""
    read = {"text": _text, "jsonl": _lines, "parquet": _parquet_rows, "dataset": _dataset_rows}
    for name, value in read[piece.kind](piece, reading, skipped):
        if reading.chat:
            if not isinstance(value, list):
                skipped.add(f"field {reading.field!r} no list of messages", name)
            elif not value:
                skipped.add("empty", name)
            else:
                yield name, value
        elif not isinstance(value, str):
            skipped.add(f"field {reading.field!r} no string", name)
        elif not value or value.isspace():
            skipped.add("empty", name)
        else:
            yield name, value


def _text(piece: Piece, reading: Reading, skipped: Skipped) -> Iterator[tuple[str, str]]:
    try:
        raw = _regular(piece.path).read_bytes()
    except OSError:
        skipped.add("unreadable", piece.name)
        return
    if b"\0" in raw:
        skipped.add("binary", piece.name)
        return
    if reading.chat:
        skipped.add("no table of conversations", piece.name)
        return
    try:
        yield piece.name, raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        skipped.add("not UTF-8", piece.name)


def _lines(piece: Piece, reading: Reading, skipped: Skipped) -> Iterator[tuple[str, Any]]:
    try:
        with _regular(piece.path).open("rb") as file:
            file.seek(piece.start)
            left = piece.stop - piece.start
            # Cut at newlines only: U+2028, where str.splitlines cuts too, may stand in a string.
            for number, line in enumerate(file, start=piece.first):
                if left <= 0:
                    return
                left -= len(line)
                name = f"{piece.name}#{number}"
                line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                if line.strip():
                    yield from _record(name, line, reading.field, skipped)
    except OSError:
        skipped.add("unreadable", piece.name)


def _record(name: str, line: bytes, field: str, skipped: Skipped) -> Iterator[tuple[str, Any]]:
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError:
        skipped.add("not UTF-8", name)
    except (ValueError, RecursionError):
        skipped.add("broken JSON line", name)
    else:
        if isinstance(record, dict) and field in record:
            yield name, _encodable(record[field])
        else:
            skipped.add(f"without field {field!r}", name)


def _parquet_rows(piece: Piece, reading: Reading, skipped: Skipped) -> Iterator[tuple[str, Any]]:
    import pyarrow as pa

    number = piece.first
    try:
        groups = list(range(piece.start, piece.stop))
        for batch in _parquet(piece.path).iter_batches(_ROWS, groups, [reading.field]):
            for value in batch.column(0):
                name = f"{piece.name}#{number}"
                number += 1
                try:
                    yield name, value.as_py()
                except UnicodeDecodeError:
                    skipped.add("not UTF-8", name)
    except (pa.ArrowException, OSError):
        skipped.add("unreadable", f"{piece.name}#{number}")


def _dataset_rows(piece: Piece, reading: Reading, skipped: Skipped) -> Iterator[tuple[str, Any]]:
    dataset = _load_dataset(piece.path, reading.field)
    for start in range(piece.start, piece.stop, _ROWS):
        values = dataset[start : min(start + _ROWS, piece.stop)][reading.field]
        for number, value in enumerate(values, start=start):
            yield f"{piece.name}#{number}", value


def _cut_parquet(entry: Entry, reading: Reading) -> Iterator[Piece]:
    import pyarrow as pa

    try:
        file = _parquet(entry.path)
    except (pa.ArrowException, OSError):
        # Reading it fails again and is counted.
        yield Piece(entry.kind, entry.path, entry.name, entry.size)
        return
    names = file.schema_arrow.names
    _require_column(entry.path, names, reading.field)
    first = 0
    for group in range(file.metadata.num_row_groups):
        rows = file.metadata.row_group(group)
        columns = (rows.column(i) for i in range(rows.num_columns))
        size = sum(
            column.total_uncompressed_size
            for column in columns
            if column.path_in_schema.split(".")[0] == reading.field
        )
        yield Piece(entry.kind, entry.path, entry.name, size, group, group + 1, first)
        first += rows.num_rows


def _cut_lines(entry: Entry, size: int) -> Iterator[Piece]:
    start, first = 0, 1
    try:
        with _regular(entry.path).open("rb") as file:
            while start < entry.size:
                missing, lines, part = size, 0, b""
                while missing and (part := file.read(min(missing, 1 << 20))):
                    missing -= len(part)
                    lines += part.count(b"\n")
                if not part.endswith(b"\n"):
                    lines += file.readline().endswith(b"\n")
                stop = file.tell()
                yield Piece(entry.kind, entry.path, entry.name, stop - start, start, stop, first)
                start, first = stop, first + lines
    except OSError:
        # Reading it fails again and is counted.
        yield Piece(entry.kind, entry.path, entry.name, entry.size, start, entry.size, first)


def _parquet(path: str) -> Any:
    from pyarrow.parquet import ParquetFile

    return ParquetFile(_regular(path))


def _regular(path: str) -> Path:
    """The path of a file. Anything else is an OSError: a pipe would be waited for, for ever."""
    if not os.path.isfile(path):
        raise OSError(f"{path} is no file")
    return Path(path)


def _load_dataset(path: str, field: str) -> Any:
    from datasets import load_from_disk

    dataset = load_from_disk(path)
    _require_column(path, dataset.column_names, field)
    return dataset.select_columns([field]).with_format(None)


def _require_column(path: str, names: Sequence[str], field: str) -> None:
    if field not in names:
        raise ValueError(
            f"INPUT {path} has no column {field!r} but {', '.join(names)}; choose one with "
            "--field (--messages for --chat)"
        )


def _encodable(value: Any) -> Any:
    """JSON can spell a lone surrogate, which no tokenizer takes: it becomes "?"."""
    if isinstance(value, str):
        return value if value.isascii() else value.encode(errors="replace").decode()
    if isinstance(value, list):
        return [_encodable(item) for item in value]
    if isinstance(value, dict):
        return {key: _encodable(item) for key, item in value.items()}
    return value
