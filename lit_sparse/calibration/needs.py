"""What was measured: the needs of rows of many documents, layers and heads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

FIELDS = ("keys", "block_keys", "support", "logit_range", "logit_std")


class RowsOfLayer(Protocol):
    """Rows of one document in one layer, as `attention.need.RowNeed` has them: context [R], the
    others [R, H]."""

    @property
    def context(self) -> Tensor: ...
    @property
    def keys(self) -> Tensor: ...
    @property
    def block_keys(self) -> Tensor: ...
    @property
    def support(self) -> Tensor: ...
    @property
    def logit_range(self) -> Tensor: ...
    @property
    def logit_std(self) -> Tensor: ...


@dataclass(frozen=True)
class Needs:
    """Needs of N measured rows; the tensors of `FIELDS` are [N, layers, heads], on the host.

    Documents of different lengths must be different ones: rows of one document at many contexts
    confound where a row stands with what it is about.

    Args:
        document: int64 [N], which document a row belongs to.
        context: int64 [N], keys that the row sees (n).
        keys, block_keys: keys that it needs, those always kept included.
        support: exp(entropy) of the rest, what is not always kept.
        logit_range, logit_std: of the rest, in nats.
        missed: share of the rest's mass that `keys` and `block_keys` may miss.
        block: keys of a block.
        sink, local: tokens that are always kept.
        layers: number of each layer in the model; those with a sliding window of their own are not
            measured. By default from 0.

    Raises:
        ValueError: shapes do not agree, or a value is not finite.
    """

    document: Tensor
    context: Tensor
    keys: Tensor
    block_keys: Tensor
    support: Tensor
    logit_range: Tensor
    logit_std: Tensor
    missed: float = 0.05
    block: int = 64
    sink: int = 64
    local: int = 64
    layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        rows = tuple(self.document.shape)
        if len(rows) != 1 or tuple(self.context.shape) != rows:
            raise ValueError(
                "Needs: document and context must be [rows], got "
                f"{list(rows)} and {list(self.context.shape)}"
            )
        for name in FIELDS:
            value = getattr(self, name)
            if value.dim() != 3 or value.shape[0] != rows[0] or value.shape != self.keys.shape:
                raise ValueError(
                    f"Needs: {name} must be [{rows[0]} rows, layers, heads], as the others are, "
                    f"got {list(value.shape)}"
                )
            if not bool(value.isfinite().all()):
                raise ValueError(f"Needs: {name} has values that are not finite")
        count = self.keys.shape[1]
        if len(layers := self.layers or tuple(range(count))) != count:
            raise ValueError(f"Needs: layers names {len(layers)} layers, keys has {count}")
        object.__setattr__(self, "layers", layers)

    def rest(self, which: str) -> Tensor:
        """int64 [N]: how many keys are a choice, of "keys" or of whole blocks."""
        if which == "keys":
            return (self.context - self.sink - self.local).clamp(min=0)
        last = (self.context - self.local).clamp(min=0) // self.block
        return self.block * (last - -(-self.sink // self.block)).clamp(min=0)

    @classmethod
    def gather(
        cls,
        measured: Iterable[tuple[int, Sequence[RowsOfLayer]]],
        *,
        missed: float = 0.05,
        block: int = 64,
        sink: int = 64,
        local: int = 64,
        layers: Sequence[int] = (),
    ) -> Needs:
        """From (document, one `RowNeed` for each layer, of the same rows) of every document.

        The options are those that `rows_need` was called with; `layers` are the layers' numbers.
        """
        documents, contexts = [], []
        found: dict[str, list[Tensor]] = {name: [] for name in FIELDS}
        for document, needs in measured:
            context = needs[0].context.cpu()
            documents.append(torch.full_like(context, document))
            contexts.append(context)
            for name, values in found.items():
                values.append(torch.stack([getattr(need, name).cpu() for need in needs], 1))
        if not documents:
            raise ValueError("Needs.gather: no documents were measured")
        return cls(
            torch.cat(documents),
            torch.cat(contexts),
            keys=torch.cat(found["keys"]),
            block_keys=torch.cat(found["block_keys"]),
            support=torch.cat(found["support"]),
            logit_range=torch.cat(found["logit_range"]),
            logit_std=torch.cat(found["logit_std"]),
            missed=missed,
            block=block,
            sink=sink,
            local=local,
            layers=tuple(layers),
        )
