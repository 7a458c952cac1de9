"""The processes that tokenise units of a packing."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.connection import wait as wait_for
from pathlib import Path
from typing import Any

from lit_sparse.data.stores.manifest import Skipped
from lit_sparse.data.stores.reading import Piece, documents
from lit_sparse.data.stores.sources import Reading
from lit_sparse.data.stores.writer import Header, ShardWriter, Unit

# A batch for the tokenizer: enough to keep its threads busy, little enough to keep memory flat.
_CHARACTERS, _DOCUMENTS = 1 << 20, 1024

Report = Callable[[int, int, int], None]


class Progress:
    """Is told how far a packing is; does nothing with it."""

    def start(self, total: int, resumed: int, documents: int) -> None:
        """Work begins: bytes of input in all, those done in an earlier run, documents of those."""

    def advance(self, size: int, documents: int, tokens: int) -> None:
        """So much more is done: bytes of input, documents, tokens."""


@dataclass(frozen=True)
class Job:
    """What all units of a packing share. It pickles.

    Args:
        folder: the store in the making.
        header: kind and tokenizer.
        reading: how documents are read.
        encoder: its `encode_many` gives an array of ids for each text; or, for conversations,
            something with `ids` and `loss`, or a ValueError for a bad one.
    """

    folder: Path
    header: Header
    reading: Reading
    encoder: Any


def tokenise(
    job: Job, units: Sequence[Sequence[Piece]], processes: int, progress: Progress
) -> list[Unit]:
    """Write the units that are not there yet; all of them, in order."""
    done: dict[int, Unit] = {}
    for number in range(len(units)):
        unit = Unit.load(job.folder, number)
        if unit:
            done[number] = unit
    progress.start(
        sum(map(_size, units)),
        sum(_size(units[number]) for number in done),
        sum(unit.shard.documents for unit in done.values() if unit.shard),
    )
    missing = {number: unit for number, unit in enumerate(units) if number not in done}
    processes = min(processes, len(missing))
    if processes > 1:
        done |= _in_processes(job, missing, processes, progress)
    else:
        for number, pieces in missing.items():
            done[number] = _tokenise_unit(job, number, pieces, progress.advance)
    return [done[number] for number in range(len(units))]


def _tokenise_unit(job: Job, number: int, pieces: Sequence[Piece], report: Report) -> Unit:
    writer = ShardWriter(job.folder, number, job.header)
    skipped = Skipped()
    text_bytes = told = 0
    size = _size(pieces)
    for batch in _batches(pieces, job.reading, skipped):
        documents, tokens = writer.documents, writer.tokens
        encoded = job.encoder.encode_many([value for _, value, _ in batch])
        for (name, _, in_bytes), result in zip(batch, encoded, strict=True):
            if isinstance(result, ValueError):
                skipped.add(str(result), name)
                continue
            if job.reading.chat:
                writer.add(name, result.ids, result.loss)
            else:
                writer.add(name, result)
            text_bytes += in_bytes
        # Text is about as large as the input that it comes from, compressed input excepted.
        advance = min(text_bytes, size) - told
        told += advance
        report(advance, writer.documents - documents, writer.tokens - tokens)
    report(size - told, 0, 0)
    return writer.close(text_bytes, skipped)


def _batches(
    pieces: Sequence[Piece], reading: Reading, skipped: Skipped
) -> Iterator[list[tuple[str, Any, int]]]:
    """Documents with the UTF-8 bytes of their text, a number of them at once."""
    batch: list[tuple[str, Any, int]] = []
    pending = 0
    for piece in pieces:
        for name, value in documents(piece, reading, skipped):
            batch.append((name, value, _text_bytes(value)))
            pending += batch[-1][2]
            if pending >= _CHARACTERS or len(batch) >= _DOCUMENTS:
                yield batch
                batch, pending = [], 0
    if batch:
        yield batch


def _text_bytes(value: Any) -> int:
    if isinstance(value, str):
        return len(value) if value.isascii() else len(value.encode(errors="replace"))
    if isinstance(value, Mapping):  # a message, or a part of its content
        return sum(_text_bytes(value.get(key)) for key in ("content", "value", "text"))
    return sum(map(_text_bytes, value)) if isinstance(value, list) else 0


def _size(pieces: Sequence[Piece]) -> int:
    return sum(piece.size for piece in pieces)


def _in_processes(
    job: Job, units: Mapping[int, Sequence[Piece]], processes: int, progress: Progress
) -> dict[int, Unit]:
    # A fork would inherit the locks of threads that it does not inherit.
    context = multiprocessing.get_context("spawn")
    counters = context.Array("q", 4)  # what `advance` takes, and whether to stop
    arguments = (job, counters, max(1, usable_cores() // processes))
    pool = ProcessPoolExecutor(processes, context, initializer=_start, initargs=arguments)
    done: dict[int, Unit] = {}
    told = [0, 0, 0]
    try:
        running: set[Future] = {pool.submit(_work, number, units[number]) for number in units}
        while running:
            finished, running = wait(running, timeout=0.2, return_when=FIRST_COMPLETED)
            now = counters[:3]
            progress.advance(*(new - old for new, old in zip(now, told, strict=True)))
            told = now
            for future in finished:
                unit = future.result()
                done[unit.number] = unit
    except BrokenProcessPool as error:
        raise ValueError(
            "a process that tokenised was killed, perhaps for want of memory; the same command "
            "continues, with fewer --processes if that was it"
        ) from error
    finally:
        counters[3] = 1
        pool.shutdown(cancel_futures=True)
    return done


_job: Job
_counters: Any


def usable_cores() -> int:
    """Cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _start(job: Job, counters: Any, threads: int) -> None:
    """Prepare a worker process, whose tokenizer uses some threads."""
    global _job, _counters
    _job, _counters = job, counters
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if threads > 1 else "false"
    os.environ["RAYON_NUM_THREADS"] = str(threads)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent says when to stop
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # A parent that was killed cannot say so, and nobody else would end this process.
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait_for([parent.sentinel])
        os._exit(1)


def _work(number: int, pieces: Sequence[Piece]) -> Unit:
    return _tokenise_unit(_job, number, pieces, _tell)


def _tell(*advance: int) -> None:
    with _counters.get_lock():
        if _counters[3]:
            raise RuntimeError("the packing was stopped")
        for i, amount in enumerate(advance):
            _counters[i] += amount
