"""DeepSpeed's backward and step, with the gradient accumulation counted once."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pytorch_lightning.plugins.precision import DeepSpeedPrecision

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule


class SparsePrecision(DeepSpeedPrecision):
    """Lightning's plugin but for three things, which are right with accumulation as well.

    The engine does not divide the loss by the accumulation, since Lightning's closure has done so.
    `on_before_optimizer_step` and clipping are called where an optimizer step follows, not with
    each micro-batch. A step can be discarded, see `DeepSpeedSparseStrategy.discard_step`.
    """

    def backward(  # type: ignore[override]
        self, tensor: Any, model: LightningModule, optimizer: Any, *args: Any, **kwargs: Any
    ) -> None:
        super().backward(tensor, model, optimizer, *args, scale_wrt_gas=False, **kwargs)

    def optimizer_step(  # type: ignore[override]
        self, optimizer: Any, model: LightningModule, closure: Callable[[], Any], **kwargs: Any
    ) -> Any:
        strategy: Any = model.trainer.strategy
        engine = strategy.deepspeed_engine
        if closure() is None and model.automatic_optimization:
            raise ValueError(
                f"{type(model).__name__}.training_step returned None: under DeepSpeed every rank "
                "has to run each backward; return a loss of 0 instead"
            )
        if engine.is_gradient_accumulation_boundary():
            self._after_closure(model, optimizer)
        with strategy.discarding():
            return engine.step(**kwargs)
