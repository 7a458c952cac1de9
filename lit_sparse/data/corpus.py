"""Reads the documents of a corpus: Python's own source, a file, a folder, or JSON lines."""

from __future__ import annotations

import json
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

_TEXT = """
.txt .text .md .markdown .rst .org .tex .bib .html .htm .xml .css .csv .tsv .yaml .yml .toml .ini
.cfg .py .pyi .pyx .c .h .cc .cpp .cxx .hpp .cu .cuh .js .jsx .ts .tsx .java .kt .go .rs .rb .php
.pl .lua .sh .sql .r .jl .scala .swift .m .hs .ml .lean .v
"""
TEXT_EXTENSIONS = frozenset(_TEXT.split())
"""Files of a folder that are one document each. A `.jsonl` file holds one document a line."""

EXAMPLES = 3
"""Names of skipped documents kept for each reason."""


@dataclass
class Skipped:
    """Documents that were not read: how many for each reason, and the first few names."""

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, name: str) -> None:
        self.counts[reason] = self.counts.get(reason, 0) + 1
        names = self.examples.setdefault(reason, [])
        if len(names) < EXAMPLES:
            names.append(name)

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


@dataclass
class Corpus:
    """Documents in a fixed order.

    Args:
        names: stable names: the path relative to the corpus, and "#line" (from 1) for JSON lines.
        texts: the documents, none of them empty.
        skipped: what was not read. The reasons are "empty", "not UTF-8", "unreadable" (the
            operating system refused), "broken JSON line" and "without text field".
    """

    names: list[str]
    texts: list[str]
    skipped: Skipped = field(default_factory=Skipped)

    def __len__(self) -> int:
        return len(self.names)


def read_corpus(path: str | Path, text_field: str = "text") -> Corpus:
    """Read all documents of a corpus into memory.

    Args:
        path: "stdlib" for the source of the running interpreter's standard library (without its
            tests), a folder (read recursively, hidden folders excepted; see `TEXT_EXTENSIONS`), or
            one file of text or JSON lines. A folder that is called stdlib is "./stdlib".
        text_field: key of the text in a line of a `.jsonl` file.

    What cannot be read is skipped, counted and, outside "stdlib", warned about once.

    Raises:
        ValueError: there is no such path, or no readable document; the message names `data.path`.
    """
    corpus = Corpus([], [])
    root, files = _stdlib_files() if path == "stdlib" else _files(Path(path))
    for relative in files:
        for name, text in _documents(root, relative, text_field, corpus.skipped):
            if text.strip():
                corpus.names.append(name)
                corpus.texts.append(text)
            else:
                corpus.skipped.add("empty", name)
    if not corpus.texts:
        raise ValueError(
            f"data.path = {str(path)!r} holds no readable document ({corpus.skipped}); read are "
            f".jsonl files with the text under {text_field!r} (data.text_field) and text files "
            "that end in " + " ".join(sorted(TEXT_EXTENSIONS))
        )
    # Nobody can mend the standard library, so its empty files are not worth a warning.
    if corpus.skipped.total and path != "stdlib":
        from pytorch_lightning.utilities.rank_zero import rank_zero_warn

        rank_zero_warn(f"data.path = {str(path)!r}: {len(corpus)} documents read, {corpus.skipped}")
    return corpus


def _stdlib_files() -> tuple[Path, list[str]]:
    root = Path(sysconfig.get_path("stdlib"))
    apart = {"site-packages", "dist-packages", "test", "tests"}
    return root, _walk(root, {".py"}, apart)


def _files(path: Path) -> tuple[Path, list[str]]:
    if path.is_dir():
        return path, _walk(path, TEXT_EXTENSIONS | {".jsonl"}, set())
    if path.exists():
        return path.parent, [path.name]
    raise ValueError(
        f"data.path = {str(path)!r} does not exist; give a folder, a file, or 'stdlib' "
        "(Python's own source)"
    )


def _walk(root: Path, extensions: set[str] | frozenset[str], apart: set[str]) -> list[str]:
    """Relative posix paths, sorted, so that the order is the same on every file system."""
    found = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [
            name
            for name in subfolders
            if not name.startswith(".") and name != "__pycache__" and name not in apart
        ]
        for name in files:
            if Path(name).suffix.lower() in extensions and not name.startswith("."):
                found.append((Path(folder) / name).relative_to(root).as_posix())
    return sorted(found)


def _documents(
    root: Path, relative: str, text_field: str, skipped: Skipped
) -> Iterator[tuple[str, str]]:
    try:
        raw = (root / relative).read_bytes()
    except OSError:
        skipped.add("unreadable", relative)
        return
    if not relative.lower().endswith(".jsonl"):
        try:
            yield relative, raw.decode("utf-8-sig")
        except UnicodeDecodeError:
            skipped.add("not UTF-8", relative)
        return
    # Split on the byte: str.splitlines would also cut at U+2028, which JSON allows inside a string.
    for number, line in enumerate(raw.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        name = f"{relative}#{number}"
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError:
            skipped.add("not UTF-8", name)
            continue
        except (ValueError, RecursionError):
            skipped.add("broken JSON line", name)
            continue
        text = record.get(text_field) if isinstance(record, dict) else None
        if isinstance(text, str):
            # JSON can spell a lone surrogate, which no tokenizer takes.
            yield name, text.encode("utf-8", errors="replace").decode("utf-8")
        else:
            skipped.add("without text field", name)
