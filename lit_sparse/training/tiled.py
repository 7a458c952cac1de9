"""DeepSpeed's tiled MLP and loss: a part of a row at a time, in the forward and in the backward.

Activations inside an MLP and logits exist for one tile (ALST, arXiv 2506.13996). The forward keeps
nothing but the input; the backward computes each tile again and runs a backward of its own for it.
A parameter so gets a gradient once a tile: ZeRO is told to wait for the last one
(`ds_grad_is_ready`), which other wrappers that react to gradients cannot be.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from pytorch_lightning import Trainer
from pytorch_lightning.strategies import DeepSpeedStrategy
from torch import Tensor, nn

from lit_sparse.models.support import require_known
from lit_sparse.training.loss import differentiable, sum_cross_entropy


def tile_mlps(model: nn.Module, tiles: int) -> None:
    """Compute the MLP of every decoder layer in tiles; gradients are the same.

    Args:
        model: a supported transformers model. Its MLPs are changed, not their class.
        tiles: of the tokens of a forward.

    Raises:
        ValueError: no number of tiles, a model whose layers are not known, no deepspeed.
        NotImplementedError: an MLP of experts.
    """
    if isinstance(tiles, bool) or not isinstance(tiles, int) or tiles < 1:
        raise ValueError(f"model.tiled_mlp must be null or a number of tiles >= 1, got {tiles!r}")
    require_known(model)
    require_deepspeed("model.tiled_mlp")
    for i, layer in enumerate(cast(Any, model).base_model.layers):
        if hasattr(layer.mlp, "experts"):
            raise NotImplementedError(
                f"model.tiled_mlp: layers.{i}.mlp sends tokens to experts, each of which has "
                "a part of the row already: set model.tiled_mlp: null"
            )
        layer.mlp.forward = partial(_tiled_mlp, layer.mlp, layer.mlp.forward, tiles)


def tiled_cross_entropy(
    hidden: Tensor,
    head: nn.Module,
    labels: Tensor,
    chunk: int = 1024,
    tied: bool = False,
) -> Tensor:
    """Summed cross entropy, in nats, of labels that are already shifted; see `summed_loss`.

    Args:
        hidden: [..., D], last hidden states.
        head: the language-model head, [N, D] -> logits [N, vocabulary].
        labels: int64 [...]; -100 is not counted.
        chunk: tokens whose logits exist at a time, at most.
        tied: the weight of the head is that of the embedding.
    """
    ulysses = require_deepspeed("model.loss: tiled")
    parameters = list(head.parameters())
    hidden, labels = differentiable(hidden.flatten(0, -2), parameters), labels.flatten()
    if tied and hidden.requires_grad and torch.is_grad_enabled():
        # The backward comes to the embedding last: only there the weight's gradient is complete.
        _set_ready(parameters, False)
        hidden.register_hook(lambda _: _set_ready(parameters, True))
    autocast = _autocast(hidden.device)

    def tile(hidden: Tensor, labels: Tensor) -> Tensor:
        with autocast():
            return sum_cross_entropy(hidden[0], head, labels[0])

    # Not TiledFusedLogitsLoss: it gives the head its gradient in the forward. A factor applied to
    # the loss does not reach it, nor does fp16's, and Lightning's zero_grad, which comes between
    # forward and backward, erases it.
    return ulysses.sequence_tiled_compute(
        tile,
        seqlen=len(hidden),
        shards=-(-len(hidden) // chunk),
        kwargs_to_shard={"hidden": hidden[None], "labels": labels[None]},
        kwargs_to_pass={},
        grad_requiring_tensor_key="hidden",
        compute_params=[] if tied else parameters,
        output_unshard_dimension=0,
        output_reduction="sum",
    )


def check_tiling(trainer: Trainer, key: str) -> None:
    """Refuse to train tiled computations under a wrapper that counts gradients by itself.

    Args:
        key: the setting that asks for them.

    Raises:
        ValueError: several processes without DeepSpeed.
    """
    if not isinstance(trainer.strategy, DeepSpeedStrategy):
        refuse_tiling(key, trainer.world_size, type(trainer.strategy).__name__)


def refuse_tiling(key: str, processes: int, strategy: str) -> None:
    """See `check_tiling`; of a strategy, by its name, that is not DeepSpeed."""
    if processes > 1:
        raise ValueError(
            f"{key} trains on {processes} processes under DeepSpeed only: a parameter gets a "
            f"gradient once a tile, and {strategy} takes the first for the whole; set "
            "trainer.strategy to a DeepSpeed one, or model.tiled_mlp: null and model.loss: chunked"
        )


def require_deepspeed(key: str) -> Any:
    """DeepSpeed's module of tiled computations; ValueError, which names the setting, without it."""
    try:
        from deepspeed.runtime.sequence_parallel import ulysses_sp
    except ImportError as error:
        raise ValueError(f"{key} needs DeepSpeed: pip install 'deepspeed>=0.19'") from error
    return ulysses_sp


def _tiled_mlp(mlp: nn.Module, forward: Callable[[Tensor], Tensor], tiles: int, x: Tensor) -> Any:
    parameters = list(mlp.parameters())
    rows = differentiable(x.flatten(0, -2), parameters)
    size = -(-len(rows) // tiles)
    autocast = _autocast(x.device)

    def tile(_: nn.Module, part: Tensor) -> Tensor:
        with autocast():
            return forward(part)

    # With fewer parts than it was told of, TiledMLP would never say that the last is done.
    parts = -(-len(rows) // size)
    out = require_deepspeed("model.tiled_mlp").TiledMLP.apply(tile, mlp, rows, parts, parameters)
    return out.view(x.shape)


def _set_ready(parameters: list[nn.Parameter], ready: bool) -> None:
    for parameter in parameters:
        cast(Any, parameter).ds_grad_is_ready = ready


def _autocast(device: torch.device) -> Callable[[], torch.autocast]:
    """The autocast around the forward: the backward is outside of it."""
    kind = device.type
    enabled = torch.is_autocast_enabled(kind)
    return partial(torch.autocast, kind, torch.get_autocast_dtype(kind), enabled)
