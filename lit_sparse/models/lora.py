"""Low-rank adapters (LoRA) in a transformers model, by peft: what trains is small.

The model stays the transformers model that it was, with other layers inside: attention layers,
sparse attention and RoPE are found and changed as before. `merge` has what becomes of it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from lit_sparse.models.build import weight_files
from lit_sparse.models.support import named_models

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ADAPTER = "default"
"""peft's name of our adapter."""

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj")
"""What is adapted where nothing is said: the projections of attention, those that a model has."""

_STATE = "lit_sparse_lora"
_SAMPLE = 4096
"""Bytes of each tensor that a fingerprint reads."""


@dataclass(frozen=True)
class LoRA:
    """Which layers get adapters: W x becomes W x + alpha / rank B A x, with W frozen.

    LoRA (arXiv 2106.09685). For long contexts LongLoRA (arXiv 2309.12307, section 3.3) found that
    adapters of attention alone stay behind full fine-tuning whatever their rank, and that most of
    the difference goes if norms and embeddings, a small part of the weights, are trained too.

    Args:
        rank: rows of A [rank, in] and columns of B [out, rank]. B starts at 0.
        alpha: see above: with it fixed, a higher rank needs no other learning rate.
        dropout: of the input of A, in training.
        targets: last parts of the names of the linear layers to adapt, e.g. [q_proj, v_proj];
            "all-linear" for all but the head; None for `PROJECTIONS`.
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
            ("alpha", self.alpha, "> 0", self.alpha > 0),
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


@dataclass(frozen=True)
class Adapted:
    """What `add_lora` did to a model."""

    lora: LoRA
    base: Base | None


def add_lora(model: PreTrainedModel, lora: LoRA, base: Base | None = None) -> PreTrainedModel:
    """Inject adapters into a model, in place, and freeze all else.

    The adapters are drawn from the seed of torch's global generator, not from its state, which
    stays: ranks that have loaded their weights in different ways have the same ones. What trains is
    float32 whatever the other weights are, since steps of a usual learning rate vanish in the
    rounding of bfloat16; but in a model that ZeRO 3 has sharded, which has one dtype, and whose
    optimizer keeps float32 copies.

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
    with torch.device("cpu"), _generator_at_its_seed():
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
def _generator_at_its_seed() -> Iterator[None]:
    generator = torch.default_generator
    state = generator.get_state()
    generator.manual_seed(generator.initial_seed())
    try:
        yield
    finally:
        generator.set_state(state)


def adapted(model: nn.Module) -> Adapted | None:
    """What `add_lora` did to a model, or None."""
    return getattr(model, _STATE, None)


def base_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of a model's frozen weights."""
    return next(p.dtype for p in model.parameters() if not p.requires_grad)


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


# -- checkpoints --


def left_out(module: nn.Module) -> set[str]:
    """Names, in the state dict of a module, of the weights that its checkpoints leave out: frozen
    ones of adapted models whose base is known.
    """
    found: set[str] = set()
    for path, model in named_models(module).items():
        state = adapted(model)
        if state is not None and state.base is not None:
            prefix = f"{path}." if path else ""
            names = model.named_parameters(remove_duplicate=False)
            found |= {prefix + name for name, weight in names if not weight.requires_grad}
    return found


def describe_adapters(module: nn.Module) -> dict[str, Any]:
    """What a checkpoint says about the adapters of a module's models, in plain types: attribute
    path -> `lora`, `base` (None where the checkpoint has all weights) and its `dtype`.
    """
    return {
        path: {
            "lora": asdict(state.lora),
            "base": state.base and asdict(state.base),
            "dtype": str(base_dtype(model)).removeprefix("torch."),
        }
        for path, model in named_models(module).items()
        if (state := adapted(model)) is not None
    }


def check_adapters(checkpoint: dict[str, Any], module: nn.Module) -> None:
    """Refuse to load a checkpoint into a module with other adapters, or on another base.

    Args:
        checkpoint: what it says about itself, under "lit_sparse".
        module: its models are built.

    Raises:
        ValueError: says what differs, and what to set.
    """
    saved: dict[str, Any] = checkpoint.get("adapters") or {}
    here = {path: adapted(model) for path, model in named_models(module).items()}
    for path, state in here.items():
        if path not in saved:
            if state is not None:
                raise ValueError(
                    "model.lora is set, but the checkpoint is of a run without it: leave it out, "
                    "or start a new run from the weights (lit-sparse export, then "
                    "--model.pretrained)"
                )
            continue
        then = LoRA(**saved[path]["lora"])
        base = Base(**saved[path]["base"]) if saved[path]["base"] else None
        if state is None:
            where = f" on the weights of {base.directory}" if base else ""
            changed = [key for key in _KEYS if getattr(then, key) != getattr(LoRA(), key)]
            raise ValueError(
                f"model.lora is not set, but the checkpoint holds adapters{where}: set "
                f"{_listed(then, changed or ['rank'])} (lit-sparse export merges them into a model)"
            )
        # Dropout is no part of the weights.
        keys = [key for key in _KEYS if key != "dropout"]
        if differing := [key for key in keys if getattr(then, key) != getattr(state.lora, key)]:
            raise ValueError(
                f"the adapters of the checkpoint are others: it has {_listed(then, differing)}, "
                f"not {_listed(state.lora, differing)}"
            )
        if base and state.base and base.fingerprint != state.base.fingerprint:
            base.check("model.pretrained", state.base.directory)


_KEYS = tuple(field.name for field in fields(LoRA))


def _listed(lora: LoRA, keys: Sequence[str]) -> str:
    return ", ".join(f"model.lora.{key}: {json.dumps(getattr(lora, key))}" for key in keys)
