"""What the operator is timed against, each peer optional: it may fail with a reason.

All work on the same packed tensors, as views: a copy in another layout would not fit at 1M tokens,
and [1, H, T, D] with the strides of [T, H, D] is what the dense kernels take without copying.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from lit_sparse.attention import Selection, select, sparse_attention
from lit_sparse.recipes.benchmark.clock import Clock, Part
from lit_sparse.recipes.benchmark.steps import Problem

NSA_GROUP = 16
"""Query heads that fla's NSA kernels want for each key-value head: a power of two from here on."""

OUT_OF_MEMORY = "out of memory"
"""The reason that `attempt` gives for it."""

Result = TypeVar("Result")
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]
Parts = dict[str, Part]
Whole = Literal["total", "kernels"]


@dataclass(frozen=True)
class Peer:
    """A contestant.

    Args:
        label: its name in the table.
        kind: "dense", or "blocks" for those that compute the selection's blocks.
        parts: which parts are timed; the parts of a peer compare with the operator's of the same
            name: "kernels" is forward and backward alone, "total" the whole way from q, k and v.
        make: the parts for a problem, and a remark for the notes or None; raises what it cannot do.
        modules: it needs one of these packages; empty: none.
    """

    label: str
    kind: Literal["dense", "blocks"]
    parts: tuple[str, ...]
    make: Callable[[Problem, Inputs, Selection], tuple[Parts, str | None]]
    modules: tuple[str, ...] = ()

    def missing(self) -> str | None:
        """Why it cannot run at all, or None."""
        if not self.modules or any(find_spec(name) is not None for name in self.modules):
            return None
        return f"not installed ({' or '.join(self.modules)})"


def attempt(
    action: Callable[[], Result], clock: Clock, only_memory: bool = False
) -> tuple[Result | None, str | None]:
    """(what it returned, None), or (None, why it failed), its memory given back.

    Args:
        only_memory: want of memory is the only failure that may pass.

    Raises:
        torch.AcceleratorError: the device itself is broken; nothing can be measured after that.
    """
    try:
        return action(), None
    except torch.OutOfMemoryError:
        reason = OUT_OF_MEMORY
    except torch.AcceleratorError:
        raise
    except Exception as error:
        if only_memory:
            raise
        first = (str(error).strip() or "no message").splitlines()[0]
        reason = f"{type(error).__name__}: {first}"
    clock.free()  # outside of the handler: the traceback holds the tensors
    return None, reason


def sparse_parts(
    problem: Problem, inputs: Inputs, selection: Selection, backend: str | None = None
) -> Parts:
    """The operator: its selection, its kernels, and all of it."""
    q, k, v, grad = inputs

    def choose() -> Selection:
        return select(q, k, problem.budget, block=problem.block, tile=problem.tile)

    def attend(chosen: Selection) -> Tensor:
        return sparse_attention(q, k, v, chosen, backend=backend)[0]

    given = _attention_parts(lambda: attend(selection), inputs, "kernels")
    total = Part(lambda _: torch.autograd.grad(attend(choose()), (q, k, v), grad))
    return {"total": total, "selection": Part(lambda _: choose()), **given}


def _attention_parts(
    attend: Callable[[], Tensor], inputs: Inputs, whole: Whole, forward_grad: bool = False
) -> Parts:
    """forward_grad: time the forward with gradients recorded; without, another one may compile."""
    q, k, v, grad = inputs

    def forward(_: Any) -> Tensor:
        with torch.set_grad_enabled(forward_grad):
            return attend()

    def backward(out: Tensor) -> object:
        return torch.autograd.grad(out, (q, k, v), grad)

    # A fresh graph for each backward: compiled backwards refuse to run twice on one.
    return {
        whole: Part(lambda _: backward(attend())),
        "forward": Part(forward),
        "backward": Part(backward, attend),
    }


def _heads_first(x: Tensor) -> Tensor:
    """[T, H, D] seen as [1, H, T, D]."""
    return x[None].transpose(1, 2)


def _sdpa(kernel: SDPBackend) -> Callable[[Problem, Inputs, Selection], tuple[Parts, str | None]]:
    def make(problem: Problem, inputs: Inputs, _: Selection) -> tuple[Parts, str | None]:
        q, k, v = inputs[:3]
        groups = problem.heads // problem.kv_heads

        def attend(tokens: int | None = None, expand: bool = False) -> Tensor:
            heads = (_heads_first(x[:tokens]) for x in (q, k, v))
            query, key, value = heads
            if expand:
                key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
            with sdpa_kernel(kernel):
                out = scaled_dot_product_attention(
                    query, key, value, is_causal=True, enable_gqa=groups > 1 and not expand
                )
            return out.transpose(1, 2)[0]

        expand = groups > 1 and not _works(lambda: attend(128))
        if expand:
            attend(128, expand=True)
        remark = "key-value heads expanded in each run (no grouped heads)" if expand else None
        return _attention_parts(lambda: attend(expand=expand), inputs, "total"), remark

    return make


def _works(action: Callable[[], object]) -> bool:
    try:
        action()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        return False
    return True


def flex(
    problem: Problem, inputs: Inputs, selection: Selection, compiled: bool = True
) -> tuple[Parts, str | None]:
    """FlexAttention on the selection's own blocks, its mask given or built in each run."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    q, k, v, grad = inputs
    groups = problem.heads // problem.kv_heads
    attention: Any = flex_attention
    if compiled:
        # What earlier lengths compiled only fills the cache and counts as recompilation.
        torch.compiler.reset()
        # Without autotuning Inductor has one backward configuration, and its blocks (64 and 128 on
        # Hopper) do not divide a tile: it would refuse.
        attention = torch.compile(
            flex_attention,
            dynamic=False,
            options={"max_autotune": True, "triton.cudagraphs": False},
        )
    # Kernel blocks must divide the mask's.
    options: Any = {
        "fwd_BLOCK_M": selection.tile,
        "fwd_BLOCK_N": selection.block,
        "bwd_BLOCK_N1": selection.block,
    }

    def attend(mask: BlockMask) -> Tensor:
        query, key, value = (_heads_first(x) for x in (q, k, v))
        out = attention(
            query, key, value, block_mask=mask, enable_gqa=groups > 1, kernel_options=options
        )
        return out.transpose(1, 2)[0]

    def build() -> BlockMask:
        chosen = select(q, k, problem.budget, block=problem.block, tile=problem.tile)
        return chosen.to_block_mask(groups)

    mask = selection.to_block_mask(groups)
    parts = _attention_parts(lambda: attend(mask), inputs, "kernels", forward_grad=True)
    parts["total"] = Part(lambda _: torch.autograd.grad(attend(build()), (q, k, v), grad))
    return parts, "autotuned; its total holds selection and mask building"


def nsa(problem: Problem, inputs: Inputs, selection: Selection) -> tuple[Parts, str | None]:
    """fla's NSA kernels for selected blocks: lists of each query, not of a tile."""
    try:
        from fla.ops.nsa import parallel_nsa

        gates: dict[str, Any] = {}
    except ImportError:
        from native_sparse_attention.ops import parallel_nsa

        ones = inputs[0].new_ones(1, problem.length, problem.heads)
        gates = {"g_cmp": None, "g_slc": ones, "g_swa": None}
    q, k, v, grad = inputs
    remark = None
    groups = problem.heads // problem.kv_heads
    if groups < NSA_GROUP or groups & (groups - 1):
        heads = problem.heads // NSA_GROUP
        if heads < 1 or problem.heads % NSA_GROUP or heads > problem.kv_heads:
            raise ValueError(f"NSA needs {NSA_GROUP} query heads (or 32, ...) a key-value head")
        k, v = (x.detach()[:, :heads].contiguous().requires_grad_() for x in (k, v))
        selection = select(q, k, problem.budget, block=problem.block, tile=selection.tile)
        remark = (
            f"as many keys kept, with {heads} key-value heads: it wants {NSA_GROUP} queries each"
        )
    indices, counts = query_lists(selection)

    def attend() -> Tensor:
        return parallel_nsa(
            q=q[None],
            k=k[None],
            v=v[None],
            block_indices=indices,
            block_counts=counts,
            block_size=selection.block,
            **gates,
        )[0]

    return _attention_parts(attend, (q, k, v, grad), "kernels"), remark


def query_lists(selection: Selection) -> tuple[Tensor, Tensor]:
    """The blocks that each query of one document attends to, and how many slots its list has.

    Returns block numbers int32 [1, T, Hkv, S], -1 where a slot is empty or not yet seen by the row,
    S a power of two, and int32 [1, T, Hkv].
    """
    plan, device = selection.plan, selection.columns.device
    lengths = selection.offsets.diff()
    slots = 1 << (int(lengths.max()) - 1).bit_length()
    row = torch.arange(plan.queries[-1], device=device)
    first = selection.offsets[:-1].to(device)[row // selection.tile]
    length = lengths.to(device)[row // selection.tile]
    indices = torch.full((len(row), len(selection.columns), slots), -1, dtype=torch.int32)
    indices = indices.to(device)
    # Slot by slot: all at once would need int64 copies of everything.
    for slot in range(int(lengths.max())):
        at = (first + slot).clamp(max=selection.columns.shape[1] - 1)
        seen = (slot < length) & (selection.entry[:, at] <= row % selection.tile)
        indices[..., slot] = torch.where(seen, selection.columns[:, at], -1).T
    counts = length.to(torch.int32)[:, None].expand(-1, len(selection.columns)).contiguous()
    return indices[None], counts[None]


PEERS: dict[str, Peer] = {
    "flash": Peer(
        "SDPA flash", "dense", ("total", "forward", "backward"), _sdpa(SDPBackend.FLASH_ATTENTION)
    ),
    "cudnn": Peer(
        "SDPA cuDNN", "dense", ("total", "forward", "backward"), _sdpa(SDPBackend.CUDNN_ATTENTION)
    ),
    "flex": Peer("FlexAttention", "blocks", ("kernels", "forward", "backward", "total"), flex),
    "nsa": Peer(
        "fla NSA",
        "blocks",
        ("kernels", "forward", "backward"),
        nsa,
        ("fla", "native_sparse_attention"),
    ),
}
