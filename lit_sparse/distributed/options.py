"""The DeepSpeed config of a run: from the strategy's arguments, and from one that a user has."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

STAGES = (0, 1, 2, 3)
DEVICES = ("cpu", "nvme")


def deepspeed_config(
    stage: int,
    offload_optimizer: str | None,
    offload_parameters: str | None,
    nvme_path: str | None,
    given: Mapping[str, Any] | str | Path | None,
) -> dict[str, Any]:
    """The config without what the trainer decides: accumulation, clipping and precision.

    Args:
        stage: of ZeRO.
        offload_optimizer, offload_parameters: "cpu", "nvme" or None.
        nvme_path: folder on the NVMe device.
        given: a DeepSpeed config of the user's, as a mapping or a JSON file. Its keys count, where
            they do not say something else than the arguments or the trainer do; values of "auto"
            are left to us.

    Raises:
        ValueError: arguments that do not go together, or a given config that contradicts them.
    """
    if stage not in STAGES:
        raise ValueError(f"strategy.stage must be 0, 1, 2 or 3 (of ZeRO), got {stage!r}")
    for name, device in (
        ("offload_optimizer", offload_optimizer),
        ("offload_parameters", offload_parameters),
    ):
        if device is not None and device not in DEVICES:
            raise ValueError(f"strategy.{name} must be cpu, nvme or null, got {device!r}")
    if offload_optimizer and stage == 0:
        raise ValueError(
            "strategy.offload_optimizer needs the optimizer's states sharded: set strategy.stage "
            "to 1, 2 or 3"
        )
    if offload_optimizer == "nvme" and stage != 3:
        raise ValueError("strategy.offload_optimizer: nvme needs strategy.stage: 3; or use cpu")
    if offload_parameters and stage != 3:
        raise ValueError("strategy.offload_parameters needs strategy.stage: 3")
    if "nvme" in (offload_optimizer, offload_parameters):
        _check_nvme(nvme_path)
    elif nvme_path is not None:
        raise ValueError("strategy.nvme_path is set, but nothing is offloaded to nvme")

    zero: dict[str, Any] = {"stage": stage}
    for key, device in (
        ("offload_optimizer", offload_optimizer),
        ("offload_param", offload_parameters),
    ):
        if device is not None:
            zero[key] = {"device": device}
            if device == "nvme":
                zero[key]["nvme_path"] = nvme_path
    ours = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": zero,
        # Any optimizer of torch's; SparseLM takes the fused AdamW where it runs on the CPU, and
        # DeepSpeed's own for CPUs would have to be compiled.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    made: dict[str, Any] = ours
    if given is not None:
        made = _merge(ours, _without_auto(_read(given)), "")
    _check_zero(made["zero_optimization"])
    return made


DEFAULTS = ("zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer")
"""Keys of ours that a given config may change."""

DECIDED = {
    "gradient_accumulation_steps": "it follows from data.rows_per_step and the ranks",
    "train_batch_size": "it follows from data.rows_per_step",
    "managed_gradient_accumulation": "the trainer says where an optimizer step ends",
    "gradient_clipping": "set trainer.gradient_clip_val",
    "fp16": "set trainer.precision",
    "bf16": "set trainer.precision",
    "torch_autocast": "set trainer.precision",
    "optimizer": "the module's configure_optimizers makes it (model.learning_rate, ...)",
    "scheduler": "the module's configure_optimizers makes it (model.warmup_steps, ...)",
    "sequence_parallel_size": "set strategy.sequence_parallel",
    "tensor_parallel": "ranks share rows, not matrices: set strategy.sequence_parallel",
    "activation_checkpointing": "set model.activations",
    "checkpoint": "all checkpoints have one layout",
    "zero_optimization.round_robin_gradients": (
        "DeepSpeed then finds the gradients of other parameters than it is asked for"
    ),
}
"""Keys of a given config that would decide what something else decides already -> what does."""

LOSS_SCALE = {
    "loss_scale": 0,
    "loss_scale_window": 1000,
    "initial_scale_power": 16,
    "hysteresis": 2,
    "min_loss_scale": 1,
}
"""What float16 has in any case; configs that were made for transformers spell it out."""


def _read(given: Mapping[str, Any] | str | Path) -> dict[str, Any]:
    if not isinstance(given, (str, Path)):
        return copy.deepcopy(dict(given))
    try:
        found = json.loads(Path(given).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"strategy.config: {given} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ValueError(f"strategy.config: {given} is not JSON ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"strategy.config: {given} holds no DeepSpeed config, a JSON object")
    return found


def _without_auto(config: dict[str, Any]) -> dict[str, Any]:
    """A config without what is left to us: values of "auto", and sections of such values."""
    kept = {}
    for key, value in config.items():
        if isinstance(value, dict) and value:
            value = _without_auto(value)
            if not value or (key == "fp16" and value.items() <= LOSS_SCALE.items()):
                continue
        if value != "auto":
            kept[key] = value
    return kept


def _merge(ours: dict[str, Any], given: dict[str, Any], where: str) -> dict[str, Any]:
    merged = dict(ours)
    for key, value in given.items():
        place = f"{where}{key}"
        if place in DECIDED:
            raise ValueError(
                f"strategy.config has {place}: take it out ({DECIDED[place]}), or write auto"
            )
        if isinstance(value, dict) and isinstance(ours.get(key), dict):
            merged[key] = _merge(ours[key], value, f"{place}.")
        elif key in ours and ours[key] != value and place not in DEFAULTS:
            raise ValueError(
                f"strategy.config has {place} = {value!r}, but {_argument(place)} says "
                f"{ours[key]!r}: take one of them out"
            )
        else:
            merged[key] = value
        if place in ("zero_optimization.offload_optimizer", "zero_optimization.offload_param"):
            _check_offload(place, ours.get(key), value)
    return merged


def _check_zero(section: dict[str, Any]) -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    try:
        DeepSpeedZeroConfig(**section)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in ("zero_optimization", *first["loc"]))
        raise ValueError(
            f"strategy.config has {place} = {first['input']!r}, which DeepSpeed does not take: "
            f"{first['msg']}"
        ) from error


def _check_offload(place: str, ours: Any, given: Any) -> None:
    device = given.get("device", "none") if isinstance(given, dict) else "none"
    wanted = (ours or {}).get("device", "none")
    if device != wanted:
        raise ValueError(
            f"strategy.config has {place}.device = {device!r}, but {_argument(place)} says "
            f"{wanted!r}: set the strategy's argument"
        )


def _argument(place: str) -> str:
    """The key that says the same as a place in a DeepSpeed config."""
    return {
        "zero_optimization": "strategy.stage",
        "zero_optimization.stage": "strategy.stage",
        "zero_optimization.offload_optimizer": "strategy.offload_optimizer",
        "zero_optimization.offload_param": "strategy.offload_parameters",
        "zero_optimization.offload_optimizer.device": "strategy.offload_optimizer",
        "zero_optimization.offload_param.device": "strategy.offload_parameters",
        "zero_optimization.offload_optimizer.nvme_path": "strategy.nvme_path",
        "zero_optimization.offload_param.nvme_path": "strategy.nvme_path",
        "train_micro_batch_size_per_gpu": "the data (a micro-batch is one row)",
    }.get(place, "the strategy")


def _check_nvme(path: str | None) -> None:
    if path is None:
        raise ValueError("strategy.nvme_path is needed to offload to nvme: a folder on the device")
    if not Path(path).is_dir():
        raise ValueError(f"strategy.nvme_path: there is no folder {path}")
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        raise ValueError(
            "offloading to nvme needs DeepSpeed's async_io, which cannot be built here: install "
            "the headers of libaio (libaio-dev, libaio-devel) and a C++ compiler, or offload to "
            "cpu"
        )
