"""Where in a step a number first was not finite: in a layer's output, or in a gradient."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from pytorch_lightning import Trainer
from torch import Tensor, nn

from lit_sparse.distributed.gradients import own_gradient


def watched_layers(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The layers of any model, by name, in the order in which they are registered: the members of
    its lists (the blocks of a transformer), and the modules without children outside of these.
    """

    def visit(name: str, current: nn.Module, in_list: bool) -> Iterator[tuple[str, nn.Module]]:
        children = list(current.named_children())
        is_list = isinstance(current, nn.ModuleList | nn.Sequential)
        if name and not is_list and (in_list or not children):
            yield name, current
            return
        for child_name, child in children:
            yield from visit(f"{name}.{child_name}" if name else child_name, child, is_list)

    return visit("", module, False)


class OutputWatch:
    """Remembers of each layer whether all of its outputs were finite, on the device: nothing waits
    for it before `first_bad` is asked.

    One sum over each layer's output: NaN and infinities survive it, and the additions to those of
    further micro-batches. Nothing is kept of the outputs.
    """

    def __init__(self, module: nn.Module) -> None:
        self.layers = dict(watched_layers(module))
        self._sums: dict[str, Tensor] = {}
        self._hooks = [
            layer.register_forward_hook(self._hook(name)) for name, layer in self.layers.items()
        ]

    def _hook(self, name: str) -> Any:
        def add(module: nn.Module, args: Any, output: Any) -> None:
            if not module.training:
                return
            # What activation checkpointing computes again is added again, and changes nothing.
            for tensor in _tensors(output):
                total = tensor.detach().sum(dtype=torch.float32)
                self._sums[name] = self._sums[name] + total if name in self._sums else total

        return add

    def first_bad(self) -> str | None:
        """The first layer, in the order in which they ran, with an output that is not finite since
        `forget`; None too if no hook ran (a graph that was compiled before). Waits for the device.
        """
        return next((name for name, x in self._sums.items() if not bool(x.isfinite())), None)

    def forget(self) -> None:
        """Begin a new step."""
        self._sums = {}

    def remove(self) -> None:
        """Watch no more."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, (dict, list, tuple)):  # torch.compile knows no dict | list
        for part in output.values() if isinstance(output, dict) else output:
            yield from _tensors(part)


def gradient_norm(gradients: Iterable[tuple[str, Tensor]]) -> Tensor:
    """L2 norm of all gradients, 0 where there are none; not finite if one of them is not."""
    return torch.nn.utils.get_total_norm([values for _, values in gradients])


def last_bad_gradient(gradients: Iterable[tuple[str, Tensor]]) -> str | None:
    """The last one, in the order in which the parameters are registered, that is not finite.

    Backward runs from the last layer to the first: that is where it came up.
    """
    bad = [name for name, values in gradients if not bool(values.isfinite().all())]
    return bad[-1] if bad else None


def own_gradients(trainer: Trainer, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Name of each parameter that this rank has something of the gradient of, and what it has, see
    `own_gradient`.
    """
    for name, parameter in module.named_parameters():
        if (gradient := own_gradient(trainer, parameter)) is not None:
            yield name, gradient
