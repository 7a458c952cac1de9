"""lit-sparse pack: tokenise text, code, tables or conversations once, into a store to train from.

INPUT is a text file, a .jsonl or .parquet file, a Hugging Face dataset on disk, a folder that holds
any of these, or 'stdlib' (Python's own source). A packing that was interrupted continues when the
same command is given again.
"""

from __future__ import annotations

import argparse
import os
import sys
import time

from lit_sparse.data.stores.workers import Progress, usable_cores

_LOG_SECONDS = 10


def main(argv: list[str]) -> int:
    """Pack, describe or verify. 2 where the command line or the input is wrong, 1 for a damaged
    store.
    """
    parser = _parser()
    options = parser.parse_args(argv)
    try:
        if options.describe is not None:
            return _describe(options.describe)
        if options.verify is not None:
            return _verify(options.verify)
        for name in ("tokenizer", "out"):
            if getattr(options, name) is None:
                parser.error(f"--{name} is needed to pack")
        if not options.inputs:
            parser.error("give at least one INPUT: a file, a folder, or 'stdlib'")
        return _pack(options)
    except (ValueError, OSError) as error:  # a full disk, too, is no reason for a traceback
        if os.environ.get("LIT_SPARSE_TRACEBACK"):
            raise
        print(f"lit-sparse: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nInterrupted. The same command continues.", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lit-sparse pack",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("inputs", nargs="*", metavar="INPUT")
    parser.add_argument(
        "--tokenizer", metavar="DIR", help="local Hugging Face directory, or 'bytes'"
    )
    parser.add_argument("--out", metavar="STORE", help="directory of the store")
    parser.add_argument(
        "--field", default="text", help="key or column of the text (default: %(default)s)"
    )
    parser.add_argument(
        "--chat",
        action="store_true",
        help="documents are conversations; the loss is on what the assistant says",
    )
    parser.add_argument(
        "--messages", default="messages", help="key or column of them (default: %(default)s)"
    )
    parser.add_argument("--split", help="of a Hugging Face dataset that has several")
    parser.add_argument(
        "--processes",
        type=int,
        # With two threads of the tokenizer in each.
        default=max(1, usable_cores() // 2),
        help="that tokenise, with as many threads each as cores are left (default: %(default)s)",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="make a store again that is there already"
    )
    parser.add_argument(
        "--strict", action="store_true", help="a document that cannot be read is an error"
    )
    parser.add_argument("--describe", metavar="STORE", help="print facts and document lengths")
    parser.add_argument("--verify", metavar="STORE", help="check all checksums; status 1 if wrong")
    return parser


def _pack(options: argparse.Namespace) -> int:
    from lit_sparse.data.stores.pack import pack
    from lit_sparse.data.tokenizer import load_tokenizer

    try:
        tokenizer = load_tokenizer(options.tokenizer)
    except ValueError as error:
        raise ValueError(str(error).replace("data.tokenizer =", "--tokenizer", 1)) from error
    progress = _Bar()
    try:
        store = pack(
            options.inputs,
            tokenizer,
            options.out,
            field=options.field,
            chat=options.chat,
            messages=options.messages,
            split=options.split,
            processes=options.processes,
            overwrite=options.overwrite,
            strict=options.strict,
            progress=progress,
        )
    finally:
        progress.close()
    if not progress.started:
        print(f"{store.path} is there already, made from the same: nothing to do.")
        return 0
    print(f"{store.path}: {len(store):,} documents, {store.tokens:,} tokens{progress.rates()}")
    if store.manifest.skipped.total:
        print(store.manifest.skipped)
    print(f"Train from it:  lit-sparse fit --config NAME --data.path {store.path}")
    return 0


def _describe(path: str) -> int:
    from lit_sparse.data.stores.store import TokenStore

    print(TokenStore.open(path).describe())
    return 0


def _verify(path: str) -> int:
    from lit_sparse.data.stores.store import TokenStore

    try:
        store = TokenStore.open(path)
        store.verify()
    except ValueError as error:
        print(f"lit-sparse: error: {error}", file=sys.stderr)
        return 1
    print(f"{store.path}: every checksum holds.")
    return 0


class _Bar(Progress):
    """A bar on a terminal, a line now and then in a log. Rates are those of this run."""

    def __init__(self) -> None:
        self.started = False
        self._documents = self._tokens = 0
        self._bar = None

    def start(self, total: int, resumed: int, documents: int) -> None:
        self.started = True
        self._begin = self._said = time.monotonic()
        self._total, self._done = total, resumed
        if resumed:
            share = resumed / max(total, 1)
            print(f"Continuing: {documents:,} documents ({share:.0%}) are there.", file=sys.stderr)
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=total, initial=resumed, unit="B", unit_scale=True, dynamic_ncols=True
            )

    def advance(self, size: int, documents: int, tokens: int) -> None:
        self._done += size
        self._documents += documents
        self._tokens += tokens
        if self._bar is not None:
            self._bar.set_postfix_str(self._speeds(), refresh=False)
            self._bar.update(size)
        elif time.monotonic() - self._said >= _LOG_SECONDS:
            self._said = time.monotonic()
            share = self._done / max(self._total, 1)
            print(f"{share:4.0%}  {self._speeds()}", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def rates(self) -> str:
        """For example ", 12 s, 1,234 documents/s, 567,890 tokens/s"."""
        seconds = time.monotonic() - self._begin
        return f", {seconds:.1f} s, {self._speeds()}" if self._tokens else ""

    def _speeds(self) -> str:
        seconds = max(time.monotonic() - self._begin, 1e-9)
        return (
            f"{self._documents / seconds:,.0f} documents/s, {self._tokens / seconds:,.0f} tokens/s"
        )
