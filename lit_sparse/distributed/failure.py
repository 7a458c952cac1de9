"""What a rank sees when another one has ended or hangs."""

from __future__ import annotations

import re

import torch

_SIGNS = re.compile(
    r"gloo|nccl|connection (closed|reset|refused)|broken pipe|socket|timed out|timeout",
    re.IGNORECASE,
)

_LONGEST = 500
"""Characters of an error that are repeated: NCCL's reason stands behind the place in its source."""


def lost_contact(error: BaseException) -> str | None:
    """A line that says so if an error is of the communication between ranks, else None.

    The rank that failed first says why in its own output; the others only notice.
    """
    network = (torch.distributed.DistNetworkError, torch.distributed.DistBackendError)
    seen: BaseException | None = error
    while seen is not None:
        # gloo raises plain RuntimeErrors.
        if isinstance(seen, network) or (type(seen) is RuntimeError and _signed(seen)):
            return _line(seen)
        seen = seen.__cause__ or seen.__context__
    return None


def _signed(error: BaseException) -> bool:
    return torch.distributed.is_initialized() and bool(_SIGNS.search(str(error)))


def _line(error: BaseException) -> str:
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else "?"
    hung = re.search(r"timed out|timeout", str(error), re.IGNORECASE)
    what = "waited in vain for" if hung else "lost contact with"
    # NCCL raises the same where this rank is what is wrong (its device, its network).
    seen = " ".join(str(error).split())
    seen = seen if len(seen) <= _LONGEST else f"{seen[:_LONGEST]}..."
    return (
        f"rank {rank} {what} another rank, and ends. The one that failed first says why in its own "
        "output (nothing, if it was killed: out of memory, or by the scheduler). Go on from the "
        f"last checkpoint with --ckpt_path last. What rank {rank} saw: {seen}"
    )
