"""Makes token stores: inputs are cut into units, processes tokenise them, `finish` joins them.

Everything is written beside the store, in STORE.packing, and renamed at the end. A unit counts when
its arrays are in place, so a packing that was killed continues with the units that are missing.
What a unit holds does not depend on the processes, and neither does the store.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple
from hashlib import sha256
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lit_sparse.data.stores.manifest import BYTES, MANIFEST, PLAN, TOKENIZER, UNFINISHED, Skipped
from lit_sparse.data.stores.reading import Piece, cut
from lit_sparse.data.stores.sources import Entry, Input, Reading
from lit_sparse.data.stores.store import TokenStore
from lit_sparse.data.stores.workers import Job, Progress, tokenise
from lit_sparse.data.stores.writer import Header, Unit, finish, write_text
from lit_sparse.data.tokenizer import Tokenizer

UNIT_BYTES = 4 << 20
"""Input of a unit, at least: enough to make starting it negligible."""
UNITS = 4096
"""Larger inputs have larger units, so that there are about as many at most."""

_LOCK = "lock"


def pack(
    inputs: Sequence[str | Path],
    tokenizer: Tokenizer,
    out: str | Path,
    *,
    field: str = "text",
    chat: bool = False,
    messages: str = "messages",
    split: str | None = None,
    processes: int = 1,
    overwrite: bool = False,
    strict: bool = False,
    progress: Progress | None = None,
) -> TokenStore:
    """Tokenise inputs into a store. A store of the same inputs and options is opened, not made.

    Args:
        inputs: "stdlib", files and folders; see `lit_sparse.data.stores.sources`.
        tokenizer: its `eos_id` ends each document.
        out: directory of the store.
        field: key or column of the text.
        chat: documents are conversations, written by the tokenizer's chat template.
        messages: key or column of a conversation's messages.
        split: of a Hugging Face dataset that has several.
        processes: that tokenise. With one, the tokenizer's own threads are used.
        overwrite: whether to make a store again that is there. No other folder is ever replaced.
        strict: whether a document that cannot be read is an error.
        progress: is told how far it is.

    Raises:
        ValueError: an input, or `out`, cannot be used; or there is no document. The message says
            what to do.
    """
    out = Path(os.path.abspath(out))
    if processes < 1:
        raise ValueError(f"--processes must be >= 1, got {processes}")
    if not inputs:
        raise ValueError("give at least one INPUT: a file, a folder, or 'stdlib'")
    if out.name.endswith(UNFINISHED):
        raise ValueError(f"--out must not end in {UNFINISHED!r}, which marks unfinished stores")
    reading = Reading(messages if chat else field, chat, split)
    header = Header(
        kind="chat" if chat else "text",
        tokenizer=tokenizer.name,
        tokenizer_fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
    )
    sources = [Input(path, reading) for path in inputs]
    entries = [entry for source in sources for entry in source.entries]
    _check_once(entries)
    plan = _plan(sources, tokenizer, reading)
    if (store := _found(out, plan, overwrite)) is not None:
        return store
    folder = out.with_name(out.name + UNFINISHED)
    with _locked(folder):
        if (store := _found(out, plan, overwrite)) is not None:  # another process made it meanwhile
            shutil.rmtree(folder)
            return store
        pieces = _begin(folder, plan, entries)
        job = Job(folder, header, reading, _encoder(tokenizer, chat))
        units = tokenise(job, pieces, processes, progress or Progress())
        _check(units, inputs, folder, strict)
        if tokenizer.name != BYTES:
            tokenizer.save_pretrained(folder / TOKENIZER)
        finish(folder, header, units, plan)
        _put(folder, out)
    return TokenStore.open(out)


def _check_once(entries: Sequence[Entry]) -> None:
    seen: set[str] = set()
    for path in (os.path.abspath(entry.path) for entry in entries):
        if path in seen:
            raise ValueError(f"INPUT holds {path} twice; give each file, or a folder of it, once")
        seen.add(path)


def _plan(sources: Sequence[Input], tokenizer: Tokenizer, reading: Reading) -> dict[str, Any]:
    """All that decides about a store's content, as JSON gives it back."""
    plan: dict[str, Any] = {
        "kind": "chat" if reading.chat else "text",
        "tokenizer": tokenizer.fingerprint,
        "field": reading.field,
        "split": reading.split,
        "inputs": [source.fingerprint() for source in sources],
    }
    if reading.chat:
        template = getattr(getattr(tokenizer, "inner", None), "chat_template", None)
        plan["chat template"] = sha256(json.dumps(template).encode()).hexdigest()
    return plan


def _difference(made: Mapping[str, Any], plan: Mapping[str, Any]) -> str:
    """What tells two plans apart, in words."""
    differing = [key for key in plan if made.get(key) != plan[key] and key != "inputs"]
    parts = [f"{key} {str(made.get(key))[:16]}, not {str(plan[key])[:16]}" for key in differing]
    before, now = made.get("inputs", []), plan["inputs"]
    if [entry["path"] for entry in before] != [entry["path"] for entry in now]:
        parts.append("INPUT " + ", ".join(entry["path"] for entry in before))
    else:
        for old, new in zip(before, now, strict=True):
            if old != new:
                sizes = [
                    f"{entry['files']} files of {entry['bytes']} bytes" for entry in (old, new)
                ]
                parts.append(f"{new['path']} before it changed (was {sizes[0]}, is {sizes[1]})")
    return "; ".join(parts)


def _found(out: Path, plan: Mapping[str, Any], overwrite: bool) -> TokenStore | None:
    """The store that the plan makes, if `out` is one; None if it may be made."""
    if not os.path.lexists(out):
        return None
    if (out / MANIFEST).is_file():
        if overwrite:
            return None
        store = TokenStore.open(out)
        if store.manifest.plan == plan:
            return store
        raise ValueError(
            f"--out {out} is a store of something else: {_difference(store.manifest.plan, plan)}; "
            "choose another --out, or replace the store with --overwrite"
        )
    if out.is_dir() and not any(out.iterdir()):
        return None
    raise ValueError(f"--out {out} holds something else than a token store; choose another --out")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Make the folder, and let no other process work in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out cannot be written: {error}") from error
    lock = FileLock(folder / _LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(f"another process is packing into {folder}; wait for it") from None
    try:
        yield
    finally:
        lock.release()


def _begin(folder: Path, plan: Mapping[str, Any], entries: Sequence[Entry]) -> list[list[Piece]]:
    """Units of the plan: those that the folder holds, or new ones."""
    plan_file, units_file = folder / PLAN / "plan.json", folder / PLAN / "units.jsonl"
    if plan_file.is_file():
        made = json.loads(plan_file.read_text())
        if made != plan:
            raise ValueError(
                f"{folder} holds an unfinished store of something else: "
                f"{_difference(made, plan)}; delete that folder, or choose another --out"
            )
    else:
        if {path.name for path in folder.iterdir()} - {_LOCK, PLAN}:
            raise ValueError(f"{folder} holds something else; delete it, or choose another --out")
        reading = Reading(plan["field"], plan["kind"] == "chat", plan["split"])
        lines = [json.dumps([astuple(p) for p in unit]) for unit in _units(entries, reading)]
        (folder / PLAN).mkdir(exist_ok=True)
        write_text(units_file, "\n".join(lines))
        write_text(plan_file, json.dumps(plan, indent=1))
    lines = units_file.read_text(encoding="utf-8").splitlines()
    return [[Piece(*piece) for piece in json.loads(line)] for line in lines]


def _units(entries: Sequence[Entry], reading: Reading) -> Iterator[list[Piece]]:
    target = max(UNIT_BYTES, sum(entry.size for entry in entries) // UNITS)
    unit: list[Piece] = []
    size = 0
    for entry in entries:
        for piece in cut(entry, target, reading):
            unit.append(piece)
            size += piece.size
            if size >= target:
                yield unit
                unit, size = [], 0
    if unit:
        yield unit


def _encoder(tokenizer: Tokenizer, chat: bool) -> Any:
    if not chat:
        return tokenizer.encoder
    from lit_sparse.data.stores.chat import ChatEncoder

    return ChatEncoder(tokenizer)


def _check(units: Sequence[Unit], inputs: Sequence[Any], folder: Path, strict: bool) -> None:
    skipped = Skipped()
    for unit in units:
        skipped.update(unit.skipped)
    names = ", ".join(map(str, inputs))
    if not any(unit.shard for unit in units):
        shutil.rmtree(folder)
        raise ValueError(
            f"INPUT {names} holds no readable document ({skipped}); read are text files, .jsonl "
            "and .parquet files with --field (--messages with --chat), and Hugging Face datasets"
        )
    if strict and skipped.total:
        raise ValueError(
            f"--strict: INPUT {names}: {skipped}; mend the input and delete {folder}, or leave out "
            "--strict to continue without these documents"
        )


def _put(folder: Path, out: Path) -> None:
    """Rename the finished folder to the store, and remove what only the making needed."""
    for path in folder.glob("*.tmp"):  # of processes that were killed
        path.unlink()
    replaced = out.with_name(f"{out.name}.replaced") if (out / MANIFEST).is_file() else None
    if replaced:
        shutil.rmtree(replaced, ignore_errors=True)
        os.rename(out, replaced)
    os.rename(folder, out)  # onto an empty folder, too
    if replaced:
        shutil.rmtree(replaced)
    shutil.rmtree(out / PLAN)
    (out / _LOCK).unlink(missing_ok=True)
