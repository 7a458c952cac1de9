"""Low-rank adapters (LoRA) in a transformers model, by peft: what trains is small.

The model stays the transformers model that it was, with other layers inside: attention layers,
sparse attention and RoPE are found and changed as before. `merge` has what becomes of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from lit_sparse.models.lora.base import Base

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ADAPTER = "default"
"""peft's name of our adapter."""

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj")
"""What is adapted where nothing is said: the projections of attention, those that a model has."""

_STATE = "lit_sparse_lora"


@dataclass(frozen=True)
class LoRA:
    """Which layers get adapters: W x becomes W x + alpha / rank B A x, with W frozen.

    LoRA (arXiv 2106.09685). For long contexts LongLoRA (arXiv 2309.12307, section 3.3) found that
    adapters of attention alone stay behind full fine-tuning whatever their rank, and that most of
    the difference goes if norms and embeddings, a small part of the weights, are trained too.

    Args:
        rank: rows of A [rank, in] and columns of B [out, rank]. B starts at 0.
        alpha: see above; while it stays, another rank hardly needs another learning rate.
        dropout: of the input of A, in training.
        targets: last parts of the names of the linear layers to adapt, e.g. [q_proj, v_proj];
            "all-linear" for all but the head; None for `PROJECTIONS`. Experts that are
            held in one tensor are no linear layers, and stay as they are.
        train_norms: train the weights of all norms too.
        train_embeddings: train the input embeddings too, and with them a head that shares their
            weight.

    Raises:
        ValueError: a value is out of its range; the message names model.lora and the key.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: list[str] | str | None = None
    train_norms: bool = False
    train_embeddings: bool = False

    def __post_init__(self) -> None:
        for key, value, wanted, holds in (
            ("rank", self.rank, "a whole number >= 1", _is_count(self.rank)),
            ("alpha", self.alpha, "a finite number > 0", 0 < self.alpha < float("inf")),
            ("dropout", self.dropout, "at least 0 and below 1", 0 <= self.dropout < 1),
            (
                "targets",
                self.targets,
                "null, all-linear or a list of names such as [q_proj, v_proj]",
                self.targets in (None, "all-linear") or _are_names(self.targets),
            ),
        ):
            if not holds:
                raise ValueError(f"model.lora.{key} must be {wanted}, got {value!r}")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and value != [] and all(isinstance(n, str) and n for n in value)


@dataclass(frozen=True)
class Adapted:
    """What `add_lora` did to a model."""

    lora: LoRA
    base: Base | None


def add_lora(model: PreTrainedModel, lora: LoRA, base: Base | None = None) -> PreTrainedModel:
    """Inject adapters into a model, in place, and freeze all else.

    The adapters are drawn from the seed of torch's global generator, not from its state, which
    stays: ranks that have loaded their weights in different ways have the same ones. What trains is
    float32 whatever the other weights are, since small steps are lost to the rounding of
    bfloat16; but in a model that ZeRO 3 has sharded, which has one dtype, and whose
    optimizer keeps float32 copies. Norms and embeddings in float32 amid bfloat16 run under autocast
    only.

    Args:
        model: weights may be sharded by ZeRO 3 or on the meta device.
        lora: what to adapt.
        base: where the weights came from, if checkpoints shall leave them out.

    Returns:
        The same model.

    Raises:
        ValueError: a target that no linear layer matches (the message lists those that there are),
            a head that shares the embeddings' weight, or a model with adapters.
    """
    from peft import LoraConfig

    if adapted(model) is not None or getattr(model, "peft_config", None):
        raise ValueError(f"model.lora: this {type(model).__name__} has adapters already")
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=cast(int, lora.alpha),  # peft divides it by the rank, whatever it is
        lora_dropout=lora.dropout,
        target_modules=_find_targets(model, lora.targets),
        task_type="CAUSAL_LM",
    )
    # Without memory where the model has none: its size may be more than this machine has.
    on_meta = all(parameter.is_meta for parameter in model.parameters())
    with _drawing_from_the_seed("meta" if on_meta else "cpu"):
        model.add_adapter(config, ADAPTER)
    config.base_model_name_or_path = None if base is None else base.directory
    # Not peft's modules_to_save: it trains copies of the modules, which takes their memory twice,
    # and a head that is tied to the embedding would stay behind with the old weight.
    if lora.train_norms:
        for module in model.modules():
            if "norm" in type(module).__name__.lower():
                module.requires_grad_(True)
    if lora.train_embeddings:
        model.get_input_embeddings().requires_grad_(True)
    if not any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(
                    torch.promote_types(parameter.dtype, torch.float32)
                )
    setattr(model, _STATE, Adapted(lora, base))
    return model


def _find_targets(model: PreTrainedModel, targets: list[str] | str | None) -> list[str]:
    """The targets as peft takes them: each is the end of the name of some linear layer."""
    linear = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    ends = sorted({name.rpartition(".")[2] for name in linear})
    if targets == "all-linear":
        return sorted({n.rpartition(".")[2] for n, m in linear.items() if m is not head})
    wanted = [name for name in PROJECTIONS if name in ends] if targets is None else list(targets)
    for target in wanted:
        found = [m for n, m in linear.items() if n == target or n.endswith(f".{target}")]
        if not found:
            advice = " (embeddings: train_embeddings: true)" if "embed" in target else ""
            raise ValueError(
                f"model.lora.targets: no linear layer of this {type(model).__name__} is named "
                f"{target!r}; there are {', '.join(ends)}{advice}"
            )
        if any(module.weight is embeddings.weight for module in found):
            raise ValueError(
                f"model.lora.targets: {target} shares its weight with the embeddings, and merged "
                "adapters would change both: set model.lora.train_embeddings: true instead"
            )
    if not wanted:
        raise ValueError(
            f"model.lora.targets: this {type(model).__name__} has none of {', '.join(PROJECTIONS)};"
            f" name some of its linear layers: {', '.join(ends)}"
        )
    return wanted


@contextmanager
def _drawing_from_the_seed(device: str) -> Iterator[None]:
    """Inside, layers get the same values wherever this is called: on this device, in float32
    (Lightning changes both around `configure_model`), whatever was drawn before.
    """
    generator, dtype = torch.default_generator, torch.get_default_dtype()
    state = generator.get_state()
    generator.manual_seed(generator.initial_seed())
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(dtype)
        generator.set_state(state)


def adapted(model: nn.Module) -> Adapted | None:
    """What `add_lora` did to a model, or None."""
    return getattr(model, _STATE, None)


def base_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of a model's frozen weights."""
    return next(p.dtype for p in model.parameters() if not p.requires_grad)
