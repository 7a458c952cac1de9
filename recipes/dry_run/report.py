"""The plan of a run in words."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from lit_sparse.callbacks import HuggingFaceExport, StageReport
from lit_sparse.recipes.benchmark.report import WIDTH, render_table, tokens
from lit_sparse.recipes.dry_run.build import Build
from lit_sparse.recipes.dry_run.data import Source
from lit_sparse.recipes.estimate.gpus import Gpu
from lit_sparse.recipes.estimate.memory import Memory
from lit_sparse.recipes.estimate.report import (
    count,
    digits,
    kernel_refusals,
    keys_at,
    memory_unit,
)
from lit_sparse.recipes.estimate.sizing import stage_work

_LABEL = 11
_ADAM = 12
"""Bytes of DeepSpeed's master weight and moments of a parameter."""


def lines(build: Build, gpu: Gpu) -> list[str]:
    """All that is printed."""
    memory: Memory | str
    try:
        memory = build.memory()
    except NotImplementedError as error:  # of kernels that this machine or this shape has not
        memory = f"not known: {error}"
    parts = [
        ("model", _model(build)),
        ("stages", _stages(build)),
        ("schedule", _schedule(build)),
        ("data", _data(build)),
        ("layout", _layout(build)),
        ("memory", _memory(build, memory, gpu)),
        ("files", _files(build)),
        ("not tried", _notes(build)),
        ("warnings", list(_warnings(build, memory, gpu))),
    ]
    printed = [f"{build.settings.name}: a dry run; nothing is trained or written"]
    for label, texts in parts:
        if texts:
            printed += ["", *_block(label, texts)]
    return printed


def _block(label: str, texts: Sequence[str]) -> Iterator[str]:
    """The label, and the texts beside it; tables, whose lines start with a blank, as they are."""
    for text in texts:
        room = [text[1:]] if text.startswith(" ") else textwrap.wrap(text, WIDTH - _LABEL)
        for line in room:
            yield f"{label.ljust(_LABEL)}{line}".rstrip()
            label = ""


def _model(build: Build) -> list[str]:
    model, settings = build.settings.model, build.settings
    parameters = list(build.model.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    every = sum(p.numel() for p in parameters)
    what = "all trained" if trained == every else f"{trained:,} of them trained"
    pretrained = build.asked.model.pretrained
    source = f"weights of {pretrained}" if pretrained else "new"
    if not pretrained and model.lora is not None:
        source = "on weights that --model.pretrained DIR has to name"
    groups = ", ".join(
        f"{len(group['params'])} tensors with weight decay {group['weight_decay']:g}"
        for group in build.optimizer.param_groups
    )
    return [
        f"{model.config.model_type}, {every:,} parameters, {what}; {source}",
        f"{model.layers} layers of {model.heads} query / {model.kv_heads} key-value heads of "
        f"{model.head_dim}, {model.vocabulary:,} ids; {settings.precision}, activations: "
        f"{settings.activations}, loss: {settings.loss}",
        f"{type(build.optimizer).__name__}: {groups}",
    ]


def _stages(build: Build) -> list[str]:
    settings, rows = build.settings, []
    for i, stage in enumerate(settings.curriculum.stages):
        rows.append(
            [
                str(i + 1),
                tokens(stage.length),
                str(stage.steps),
                count(stage.steps * settings.rows_per_step * settings.row_tokens),
                keys_at(settings, stage),
                f"{stage_work(settings, stage).executed:.3f}",
                _rope(build.ropes[i]),
                f"{build.peaks[i]:.2e}",
            ]
        )
    names = ("stage", "length", "steps", "tokens", "k(n)", "executed", "RoPE", "learning rate")
    _, *table = render_table([("", names)], rows)
    own = len(settings.law.layers)
    windows = sum(window is not None for window in settings.model.windows)
    others = f"; {own} layers have laws of their own" if own else ""
    others += f"; sliding windows stay in {windows} of the layers" if windows else ""
    law = (
        f"{settings.law.budget}, blocks of {settings.law.block} keys{others}; executed: share of "
        "the causal pairs; learning rate: the stage's largest"
    )
    return [*(f" {line}" for line in table), law]


def _rope(parameters: Mapping[str, Any]) -> str:
    """The type, and what of its numbers tells most."""
    factor = parameters.get("factor")
    what = f"theta {parameters['rope_theta']:g}" if factor is None else f"factor {factor:g}"
    return f"{parameters['rope_type']}, {what}"


def _schedule(build: Build) -> list[str]:
    settings, model = build.settings, build.model.hparams
    steps, row = settings.curriculum.total_steps, settings.row_tokens
    return [
        f"{steps:,} steps of {_rows(settings.rows_per_step)} of {tokens(row)} tokens: "
        f"{count(steps * settings.rows_per_step * row)} tokens; warm-up of "
        f"{model['warmup_steps']} steps, then a cosine to {model['min_learning_rate']:g} of the "
        "peak"
    ]


def _data(build: Build) -> list[str]:
    tokenizer = build.data.tokenizer
    how = "that of the data, when it is there"
    if tokenizer is not None:
        how = f"{tokenizer.name}, {tokenizer.vocab_size:,} ids"
    return [*map(_source, build.data.sources), f"tokenizer: {how}"]


def _source(source: Source) -> str:
    if source.store is not None:
        store = source.store
        found = (
            f"{store.kind}, {len(store):,} documents, {count(store.tokens)} tokens, read "
            f"{source.passes:.3g} times"
        )
    else:
        found = "will be packed at the start" if source.there else "not there yet"
    return f"{source.path}, {source.share:.0%} of the tokens: {found}"


def _layout(build: Build) -> list[str]:
    sharding, asked = build.sharding, build.asked.trainer
    cpu = asked.accelerator == "cpu"
    kind = ("CPU process" if cpu else "GPU") + ("es" if cpu else "s") * (sharding.gpus > 1)
    nodes = f" on {asked.num_nodes} nodes" if asked.num_nodes > 1 else ""
    how = "plain PyTorch" if sharding.stage is None else f"DeepSpeed, ZeRO {sharding.stage}"
    offload = "" if sharding.offload == "-" else f", {sharding.offload} in CPU memory"
    shared = f"{sharding.sequence} ranks share a row, " if sharding.sequence > 1 else ""
    return [
        f"{sharding.gpus} {kind}{nodes}: {how}{offload}; {shared}{_rows(build.data_ranks)} at a "
        f"time, {build.trainer.accumulate_grad_batches} times a step"
    ]


def _rows(number: int) -> str:
    return f"{number} row{'s' * (number > 1)}"


def _memory(build: Build, memory: Memory | str, gpu: Gpu) -> list[str]:
    if isinstance(memory, str):
        return [memory]
    name, unit = memory_unit([memory])
    parts = sorted(memory.parts.items(), key=lambda part: -part[1])
    listed = ", ".join(f"{part} {digits(size / unit)}" for part, size in parts if size > 0)
    of = f"{digits(memory.peak / unit)} of {digits(gpu.memory / unit)} {name} of one {gpu.name}"
    if build.asked.trainer.accelerator == "cpu":
        of = f"{digits(memory.peak / unit)} {name} a process, counted as on a GPU"
    cpu = memory.cpu(build.settings.per_node)
    beside = f"; CPU memory of a node: {digits(cpu / unit)} {name}" if cpu else ""
    return [f"{of}, at {memory.moment}: {listed}{beside} (lit-sparse estimate says more)"]


def _files(build: Build) -> list[str]:
    keep, ends = build.asked.checkpoint, len(build.settings.curriculum.stages)
    kept = keep["keep"] + (ends if keep["keep_stage_ends"] else 0)
    size = f"up to {kept} checkpoints of about {_size(_checkpoint_bytes(build))}"
    there = [type(callback) for callback in build.trainer.callbacks]  # type: ignore[attr-defined]
    written = ["config.yaml", "TensorBoard events", size]
    written += ["stages.json"] * (StageReport in there)
    written += ["huggingface/"] * (HuggingFaceExport in there)
    adapters = build.settings.model.lora is not None
    written += ["adapter/"] * (HuggingFaceExport in there and adapters)
    return [f"{build.run.path}: {', '.join(written)}"]


def _checkpoint_bytes(build: Build) -> int:
    sharding = build.sharding
    size = build.settings.recipe(sharding).dtype.itemsize
    parameters = list(build.model.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    # Of a model with adapters a checkpoint has what is trained.
    every = trained if build.settings.model.lora else sum(p.numel() for p in parameters)
    states = 2 * size if sharding.stage is None else _ADAM
    return size * every + states * trained


def _size(number: float) -> str:
    exponent = min(9, max(3, len(str(int(number))) // 3 * 3))
    return f"{digits(number / 10**exponent)} {({3: 'kB', 6: 'MB', 9: 'GB'})[exponent]}"


def _notes(build: Build) -> list[str]:
    liger = build.settings.loss == "liger" or build.asked.model.liger_kernels
    missing = ["liger-kernel is not installed here: pip install 'lit-sparse[liger]'"]
    return build.unchecked + missing * (liger and find_spec("liger_kernel") is None)


def _warnings(build: Build, memory: Memory | str, gpu: Gpu) -> Iterator[str]:
    settings = build.settings
    on_gpu = build.asked.trainer.accelerator in ("gpu", "cuda")
    if on_gpu and isinstance(memory, Memory) and memory.peak > gpu.memory:
        yield (
            f"it does not fit on one {gpu.name}: lit-sparse estimate with the same arguments "
            "names the shardings that do"
        )
    if on_gpu:
        yield from (f"the GPU kernels do not run {what}" for what in kernel_refusals(settings))
    warmup, steps = build.model.hparams["warmup_steps"], settings.curriculum.total_steps
    if 0 < build.trainer.max_steps < steps:
        stage = settings.curriculum.index_at(build.trainer.max_steps - 1) + 1
        yield (
            f"trainer.max_steps = {build.trainer.max_steps} ends the run in stage {stage} of "
            f"{len(settings.curriculum.stages)}, before step {steps:,} of the schedule"
        )
    if warmup >= steps:
        yield f"model.warmup_steps = {warmup}: the whole run of {steps} steps is warm-up"
    try:
        build.run.check_place(resume=bool(build.asked.ckpt_path))
    except ValueError as error:
        yield f"fit would not start now: {error}"
