"""Liger's Triton kernels (arXiv 2410.10989): fused linear cross entropy, RMSNorm, RoPE, SwiGLU."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from lit_sparse.models.head import CappedHead
from lit_sparse.training.loss import IGNORED, differentiable


def use_liger_kernels(model: nn.Module) -> None:
    """Run RMSNorm, RoPE and SwiGLU of a transformers model by Liger's kernels, for CUDA.

    Attention and the frequencies of RoPE stay as they are. Liger also replaces, for this process,
    the function that rotates queries and keys in all models of the same type, and the classes that
    later ones are built from.

    Raises:
        ValueError: no liger-kernel, no GPU, or a type of model that Liger does not know.
    """
    require_liger("model.liger_kernels", torch.cuda.is_available())
    from liger_kernel.transformers import monkey_patch

    kind = cast(Any, model).config.model_type
    if kind not in monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise ValueError(f"model.liger_kernels: Liger has no kernels for model_type {kind}")
    kernels = {"rms_norm": True, "rope": True, "swiglu": True}
    losses = {"cross_entropy": False, "fused_linear_cross_entropy": False}
    monkey_patch._apply_liger_kernel_to_instance(model, **kernels, **losses)


def liger_cross_entropy(hidden: Tensor, head: nn.Module, labels: Tensor) -> Tensor:
    """Summed cross entropy, in nats, of labels that are already shifted; see `summed_loss`.

    Gradients are computed in the forward and scaled in the backward, those of the head too.

    Args:
        hidden: [..., D], last hidden states, on CUDA.
        head: the language-model head, a linear layer, with a cap of its logits or without.
        labels: int64 [...]; -100 is not counted.

    Raises:
        ValueError: no liger-kernel, or tensors that are not on a GPU.
        NotImplementedError: a head that is more than a linear layer, such as an adapter's.
    """
    require_liger("model.loss: liger", hidden.is_cuda)
    cap = None
    if isinstance(head, CappedHead):
        head, cap = head.head, head.cap
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    if not isinstance(head, nn.Linear):
        raise NotImplementedError(
            f"model.loss: liger takes a head that is a linear layer, got {type(head).__name__}: "
            "use model.loss: chunked"
        )
    fused = LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORED, reduction="sum", softcap=cap)
    rows, targets = differentiable(hidden.flatten(0, -2), head.parameters()), labels.flatten()

    def forward(rows: Tensor) -> Tensor:
        return fused(head.weight, rows, targets, head.bias)

    # Through the layer's own call, around which ZeRO gathers its parameters.
    with _replaced_forward(head, forward):
        return head(rows)


@contextmanager
def _replaced_forward(module: nn.Module, forward: Callable[..., Tensor]) -> Iterator[None]:
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def require_liger(key: str, on_cuda: bool) -> None:
    """ValueError, which names the setting, without Liger or without a GPU to run it on."""
    # Triton's interpreter runs the kernels on a CPU, slowly: for tests.
    if not on_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"{key} runs on CUDA GPUs only, and this model is not on one: use model.loss: chunked "
            "and model.liger_kernels: false"
        )
    try:
        import liger_kernel.transformers  # noqa: F401
    except ImportError as error:
        raise ValueError(f"{key} needs liger-kernel: pip install 'lit-sparse[liger]'") from error
