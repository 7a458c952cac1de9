"""What is made once from data and found again: folders named by what they were made of."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

ROOT_VARIABLE = "LIT_SPARSE_CACHE"


def cache_root(root: str | Path | None = None) -> Path:
    """The cache folder: `root`, or $LIT_SPARSE_CACHE, or lit_sparse in the user's cache folder."""
    if root is not None:
        return Path(root)
    if named := os.environ.get(ROOT_VARIABLE):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lit_sparse"


def cached(
    kind: str,
    key: Mapping[str, Any],
    build: Callable[[Path], object],
    root: str | Path | None = None,
) -> Path:
    """The folder that `build` makes of `key`, built if it is not there.

    Processes that ask at the same time (the ranks of a run) wait for one of them. A folder appears
    under its name when it is whole; what an interrupted process left is built again.

    Args:
        kind: subfolder, for example "rows".
        key: all that the result depends on, in JSON types; saved beside the folder.
        build: makes the folder it is given.
        root: see `cache_root`.

    Raises:
        ValueError: the cache cannot be written; the message names `data.cache_dir`.
    """
    text = json.dumps(key, sort_keys=True)
    path = cache_root(root) / kind / hashlib.sha256(text.encode()).hexdigest()[:24]
    if path.is_dir():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.with_name(path.name + ".lock")
        lock.touch()
    except OSError as error:
        raise ValueError(
            f"data.cache_dir: {path.parent} cannot be written ({error.strerror}); choose another "
            f"--data.cache_dir, or set {ROOT_VARIABLE}"
        ) from error
    with FileLock(lock):
        if not path.is_dir():
            part = path.with_name(path.name + ".part")
            shutil.rmtree(part, ignore_errors=True)
            build(part)
            path.with_name(path.name + ".json").write_text(text + "\n")
            os.replace(part, path)
    return path
