"""What an estimate reads of a config: the only place that knows the keys."""

from __future__ import annotations

import os
import re
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from pytorch_lightning.accelerators import AcceleratorRegistry
from pytorch_lightning.cli import LightningArgumentParser

from lit_sparse.attention.plan import Plan, make_plan
from lit_sparse.attention.select import default_tile
from lit_sparse.budget import Budget
from lit_sparse.callbacks import ContextCurriculum, SparseAttention
from lit_sparse.data import PackedTextDataModule
from lit_sparse.distributed.options import deepspeed_config
from lit_sparse.models import Law
from lit_sparse.models.lora.adapters import LoRA
from lit_sparse.recipes.estimate.kinds import Keeps
from lit_sparse.recipes.estimate.model import Model, read_model
from lit_sparse.recipes.estimate.sharding import Sharding, Zero, refusal
from lit_sparse.recipes.estimate.step import Recipe
from lit_sparse.recipes.fit import SparseCLI
from lit_sparse.training import Curriculum, Stage

NODE = 8
"""GPUs of a node, and at hand, where a config does not say."""

_DEVICES = re.compile(r"auto|-1|\[?\d+(,\s*\d+)*,?\]?")
_FULL = ("32", "32-true")
_MIXED = ("16", "bf16", "16-mixed", "bf16-mixed")
_HALF = ("16-true", "bf16-true")
_PLAIN = ("auto", "ddp", "ddp_spawn", "single_device")


@dataclass(frozen=True)
class Settings:
    """A config, as far as memory and FLOPs depend on it.

    Args:
        name: of the config's files.
        law: of the callback; stages may have budgets of their own.
        precision: of the trainer.
        activations: "keep", "recompute" or "offload".
        tiled_mlp, loss, loss_chunk, liger_kernels: of the model.
        own: how the config shards, where it says on how many GPUs.
        gpus: at hand; per_node: of them on a node.
        zero: keys of a DeepSpeed config of the user's.
        generates: whether a callback generates text.
    """

    name: str
    model: Model
    law: Law
    curriculum: Curriculum
    row_tokens: int
    rows_per_step: int
    precision: str
    activations: str
    tiled_mlp: int | None
    loss: str
    loss_chunk: int
    liger_kernels: bool
    own: Sharding | None
    gpus: int
    per_node: int
    zero: Zero
    generates: bool

    def recipe(self, sharding: Sharding) -> Recipe:
        """A step under a sharding: DeepSpeed casts the model where PyTorch alone casts products."""
        autocast = sharding.stage is None and self.precision in _MIXED
        # Weights that no optimizer changes are kept as the products see them.
        whole = self.precision in _FULL or (autocast and self.model.lora is None)
        return Recipe(
            dtype=torch.float32 if whole else torch.bfloat16,
            autocast=autocast,
            recompute=self.activations != "keep",
            tiled_mlp=self.tiled_mlp,
            loss=self.loss,
            loss_chunk=self.loss_chunk,
        )

    def kinds(self, stage: Stage) -> Mapping[Keeps, int]:
        """What layers keep in a stage -> how many do."""
        budget = stage.budget or self.law.budget
        found: Counter[Keeps] = Counter()
        for layer, window in enumerate(self.model.windows):
            own = self.law.layers.get(layer, budget)
            dense = stage.attention == "dense" or window is not None
            found[Keeps(Budget.dense() if dense else own, window)] += 1
        return found

    def plan(self, length: int, keeps: Keeps, row_tokens: int | None = None) -> Plan:
        """Of a row full of documents of so many tokens; a last one is what is left."""
        row = row_tokens or self.row_tokens
        bounds = (*range(0, row, length), row)
        tile = self.law.tile or default_tile(self.model.groups)
        return make_plan(bounds, bounds, keeps.budget, self.law.block, tile, keeps.window)


def read_settings(argv: list[str], gpus: int | None) -> Settings:
    """The settings of `lit-sparse fit ARGV`, on so many GPUs at hand (None: those of the config).

    Raises:
        ValueError, NotImplementedError: what fit would refuse, as far as that shows without data,
            weights and GPUs; a strategy that is not known here.
    """
    return settings_of(_Parsed(["fit", *argv]).config["fit"], gpus)


def settings_of(config: Namespace, gpus: int | None = None) -> Settings:
    """See `read_settings`; of a config that is parsed."""
    attention, curriculum = _callbacks(config)
    data = PackedTextDataModule(**config.data.as_dict(), curriculum=curriculum)
    curriculum.check(row_tokens=data.row_tokens, block=attention.block)
    precision = str(config.trainer.precision or "32-true")
    if precision not in (*_FULL, *_MIXED, *_HALF):
        raise ValueError(f"trainer.precision: {precision} is not estimated; take bf16-true")
    lora = config.model.lora and LoRA(**config.model.lora.as_dict())
    source = config.model.pretrained, config.model.architecture
    model = read_model(*source, lora, config.model.trust_remote_code)
    named, node = _gpus_of(config.trainer)
    at_hand = gpus or named or NODE
    own, zero = _strategy(config.trainer.strategy, named, at_hand)
    divided = data.rows_per_step, data.row_tokens, model.kv_heads
    if own is not None and named is None and refusal(own, *divided):
        own = replace(own, gpus=own.sequence)  # the fewest that it can be on
    if own is not None and (wrong := refusal(own, *divided)):
        raise ValueError(wrong)
    return Settings(
        name="+".join(Path(str(path)).stem for path in config.config),
        model=model,
        law=attention.law,
        curriculum=curriculum,
        row_tokens=data.row_tokens,
        rows_per_step=data.rows_per_step,
        precision=precision,
        activations=config.model.activations,
        tiled_mlp=config.model.tiled_mlp,
        loss=config.model.loss,
        loss_chunk=config.model.loss_chunk,
        liger_kernels=config.model.liger_kernels,
        own=own,
        gpus=at_hand,
        per_node=node,
        zero=zero,
        generates=_generates(config.trainer.callbacks),
    )


class QuietCLI(SparseCLI):
    """Raises what is wrong with a config; trains nothing."""

    def __init__(self, argv: list[str]) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*LightningCLI's args parameter.*")
            super().__init__(argv)

    def _set_seed(self) -> None: ...

    def _run_subcommand(self, subcommand: str) -> None: ...


class _Parsed(QuietCLI):
    """Checks every key of a config, and builds nothing."""

    def before_instantiate_classes(self) -> None: ...

    def instantiate_classes(self) -> None: ...


def _callbacks(config: Namespace) -> tuple[SparseAttention, Curriculum]:
    parser = LightningArgumentParser()
    parser.add_lightning_class_args(SparseAttention, "sparse_attention")
    parser.add_lightning_class_args(ContextCurriculum, "curriculum")
    parts = {name: config[name] for name in ("sparse_attention", "curriculum")}
    made = parser.instantiate_classes(Namespace(**parts))
    return made.sparse_attention, made.curriculum.curriculum


def _gpus_of(trainer: Namespace) -> tuple[int | None, int]:
    """GPUs that the trainer names, None where it leaves that open, and those of a node."""
    devices, nodes = trainer.devices, trainer.num_nodes or 1
    if isinstance(devices, str) and not _DEVICES.fullmatch(devices):
        raise ValueError(
            f"trainer.devices must be a number, auto, -1 or a list of them, got {devices}"
        )
    known = ("auto", "gpu", *AcceleratorRegistry.available_accelerators())
    if isinstance(trainer.accelerator, str) and trainer.accelerator not in known:
        raise ValueError(
            f"trainer.accelerator must be one of {', '.join(known)}, got {trainer.accelerator}"
        )
    if isinstance(devices, (list, tuple)):
        devices = len(devices)
    if not str(devices).isdigit():
        return None, NODE
    return int(devices) * nodes, int(devices) if nodes > 1 else NODE


def _strategy(strategy: Any, named: int | None, at_hand: int) -> tuple[Sharding | None, Zero]:
    """How the config shards, and the keys of its DeepSpeed config."""
    name, given = strategy, Namespace()
    if isinstance(strategy, Namespace):
        name = strategy.class_path.rpartition(".")[2]
        given = strategy.get("init_args") or Namespace()
    if name in ("DeepSpeedSparseStrategy", "deepspeed_sparse"):
        stage, sequence = given.get("stage", 2), given.get("sequence_parallel", 1)
        offloads = [given.get(key) for key in ("offload_optimizer", "offload_parameters")]
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed warns where it has to guess
        # NVMe is for the machine that trains to have; its bytes are counted like CPU memory.
        optimizer, parameters = ("cpu" if device == "nvme" else device for device in offloads)
        checked = deepspeed_config(stage, optimizer, parameters, None, given.get("config"))
        sharding = Sharding(named or at_hand, stage, sequence, *offloads)
        return sharding, Zero.of(checked["zero_optimization"])
    if name not in _PLAIN and name != "DDPStrategy":
        raise ValueError(
            f"trainer.strategy: {name} is not estimated; take deepspeed_sparse, ddp or auto"
        )
    return (None if named is None else Sharding(named, None)), Zero()


def _generates(callbacks: Any) -> bool:
    given = callbacks if isinstance(callbacks, list) else [callbacks] if callbacks else []
    return any(
        callback.class_path.endswith(".LongContextEval")
        and (callback.get("init_args") or {}).get("generate", True)
        for callback in given
    )
