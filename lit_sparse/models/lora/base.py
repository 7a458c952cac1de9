"""The weights that adapters were trained on: where they were, and whether they still are these."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_sparse.models.build import weight_files

_SAMPLE = 4096
"""Bytes of each tensor that a fingerprint reads."""


@dataclass(frozen=True)
class Base:
    """The directory that a model's frozen weights came from."""

    directory: str
    fingerprint: str
    """See `weights_fingerprint`."""

    @classmethod
    def of(cls, directory: str | Path) -> Base:
        """ValueError where there are no weights."""
        return cls(str(Path(directory).absolute()), weights_fingerprint(directory))

    def check(self, key: str, directory: str | Path) -> None:
        """ValueError, which names the setting, unless a directory holds these weights."""
        if weights_fingerprint(directory) != self.fingerprint:
            raise ValueError(
                f"{key}: the weights in {directory} are not those that the adapters were trained "
                f"on, which were in {self.directory}: they have changed since, or are of another "
                "model"
            )


def weights_fingerprint(directory: str | Path) -> str:
    """SHA-256 of name, dtype, shape and first 4 KiB of each tensor of a model's directory.

    However they are divided into files; a model of the same shapes has another one. Reads a few
    MiB.

    Raises:
        ValueError: there are none, or a file is damaged.
    """
    sums: dict[str, bytes] = {}
    for path in weight_files(directory):
        try:
            with open(path, "rb") as file:
                size = int.from_bytes(file.read(8), "little")
                header: dict[str, Any] = json.loads(file.read(size))
                header.pop("__metadata__", None)
                for name, about in header.items():
                    start, end = about["data_offsets"]
                    file.seek(8 + size + start)
                    what = f"{name} {about['dtype']} {about['shape']}\n".encode()
                    sums[name] = hashlib.sha256(
                        what + file.read(min(end - start, _SAMPLE))
                    ).digest()
        except (ValueError, KeyError, TypeError, AttributeError, MemoryError) as error:
            raise ValueError(f"model.pretrained: {path} is damaged: {error}") from error
    return hashlib.sha256(b"".join(sums[name] for name in sorted(sums))).hexdigest()
