"""An estimate in words and tables."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from lit_sparse.recipes.benchmark.cost import BACKWARD, FORWARD
from lit_sparse.recipes.benchmark.report import render_table, tokens, wrap
from lit_sparse.recipes.estimate.compute import Work
from lit_sparse.recipes.estimate.gpus import Gpu
from lit_sparse.recipes.estimate.memory import PARTS, Memory
from lit_sparse.recipes.estimate.result import Estimate
from lit_sparse.recipes.estimate.settings import Settings
from lit_sparse.recipes.estimate.sizing import remedies, smallest
from lit_sparse.training import Stage

NOTE = (
    "Rows are assumed full of documents of the stage's length. FLOPs of what is executed: 2 a "
    "parameter and token in a forward, 4 in a backward (2 where it is frozen), and a forward more "
    "wherever it runs again (activation checkpointing, chunked loss, tiled MLP); in attention "
    "{forward} and {backward} a pair and head dimension, of whole blocks in whole tiles (executed: "
    "these pairs / causal pairs; dense: all causal pairs). Days: at {utilisation:.0%} of the data "
    "sheet's dense bf16 peak of all GPUs, whatever the sharding. Memory of one GPU, in {unit}: "
    "states, and the largest of what does not happen at a time: training (the backward of a "
    "layer), the loss (logits, beside what layers keep), the optimizer step, and generation where "
    "a callback does that (cache: at the longest length, whole on each GPU; beside a forward). It "
    "is of the stage that needs most, without torch.compile, on the Triton kernels. buffers: "
    "DeepSpeed's reduction bucket, in ZeRO 3 also gathered and fetched weights. step: float32 "
    "gradients and AdamW's temporary. CPU: what is offloaded, of a node. A GPU's gigabyte is taken "
    "as 10^9 bytes; what it holds more is for the CUDA context, NCCL and fragmentation."
)

_UNITS = (("GiB", 2**30), ("MiB", 2**20))


def lines(found: Estimate) -> list[str]:
    """All that is printed."""
    table = [memory for memory in found.memories if memory.sharding.gpus == found.used]
    if found.own is not None and found.own.sharding not in [m.sharding for m in table]:
        table.insert(0, found.own)
    name, unit = memory_unit(table)
    printed = [*wrap(_title(found)), "", *_stages(found), "", *_shardings(found, table, unit), ""]
    for gpu in found.gpus:
        printed += [*_suggestion(found, gpu, name, unit), ""]
    for remark in _remarks(found):
        printed += wrap(remark)
    note = NOTE.format(forward=FORWARD, backward=BACKWARD, utilisation=found.utilisation, unit=name)
    return [*printed, *wrap(note)]


def _title(found: Estimate) -> str:
    settings, model = found.settings, found.settings.model
    trained = "" if model.lora is None else f" ({count(model.trained)} trained)"
    return (
        f"{settings.name}: {model.config.model_type}, {count(model.parameters)} parameters"
        f"{trained}, {model.layers} layers of {model.heads} query / {model.kv_heads} key-value "
        f"heads of {model.head_dim}; rows of {tokens(settings.row_tokens)} tokens, "
        f"{settings.rows_per_step} a step; {settings.precision}, activations: "
        f"{settings.activations}, loss: {settings.loss}"
    )


def _stages(found: Estimate) -> list[str]:
    settings, flops = found.settings, ("products", "attention", "selection", "total", "dense")
    groups = [
        ("stage", ("length", "steps", "tokens")),
        ("law", ("k(n)", "executed")),
        ("PFLOP", flops),
        (f"days on {found.used} GPUs", tuple(gpu.name for gpu in found.gpus)),
    ]

    def row(first: Sequence[str], steps: int, law: Sequence[str], works: Sequence[Work]) -> Any:
        days = [
            sum(work.days(gpu, found.used, found.utilisation) for work in works)
            for gpu in found.gpus
        ]
        sums = [sum(getattr(work, name) for work in works) for name in flops]
        cells = [*first, str(steps), count(found.tokens(steps)), *law]
        return [*cells, *(digits(x / 1e15) for x in sums), *map(_days, days)]

    rows = []
    for stage, work in zip(settings.curriculum.stages, found.work, strict=True):
        keys = keys_at(settings, stage)
        law = [keys, f"{work.executed:.3f}"]
        rows.append(row([tokens(stage.length)], stage.steps, law, [work]))
    rows.append(row(["all"], settings.curriculum.total_steps, ["", ""], found.work))
    return render_table(groups, rows)


def keys_at(settings: Settings, stage: Stage) -> str:
    """k(n) at a stage's length, of most of the layers that obey a law."""
    kinds = {keeps: n for keeps, n in settings.kinds(stage).items() if keeps.window is None}
    if stage.attention == "dense" or not kinds:
        return "dense" if kinds else "windows"
    return str(max(kinds, key=lambda keeps: kinds[keeps]).budget(stage.length))


def _shardings(found: Estimate, table: Sequence[Memory], unit: int) -> list[str]:
    groups = [
        ("sharding", ("GPUs", "ZeRO", "sp", "offload")),
        ("states", ("weights", "gradients", "optimizer")),
        ("training", ("buffers", *PARTS)),
        ("or", ("logits", "step", "cache")),
        ("", ("peak", "at", "CPU")),
        ("days where it fits", tuple(gpu.name for gpu in found.gpus)),
    ]
    rows = []
    for memory in table:
        sharding, states, row = memory.sharding, memory.states, memory.row
        own = "*" if sharding == found.settings.own else ""
        sizes = [states.weights, states.gradients, states.optimizer, states.buffers]
        sizes += [row.backward[name] for name in PARTS]
        sizes += [row.logits, states.step, memory.cache, memory.peak]
        days = [
            _days(found.days(gpu, sharding.gpus)) if memory.peak <= gpu.memory else "-"
            for gpu in found.gpus
        ]
        stage = "none" if sharding.stage is None else str(sharding.stage)
        place = [f"{sharding.gpus}{own}", stage, str(sharding.sequence), sharding.offload]
        cpu = digits(memory.cpu(found.settings.per_node) / unit)
        sizes_of_it = [digits(size / unit) for size in sizes]
        rows.append([*place, *sizes_of_it, memory.moment, cpu, *days])
    return render_table(groups, rows)


def _suggestion(found: Estimate, gpu: Gpu, name: str, unit: int) -> list[str]:
    best = smallest(found.memories, gpu)
    if best is None:
        return wrap(_refusal(found, gpu, name, unit))
    said = [f"{gpu.name}, the smallest sharding that fits"]
    chosen = [best]
    if best.sharding.offload != "-":
        without = [memory for memory in found.memories if memory.sharding.offload == "-"]
        chosen += filter(None, [smallest(without, gpu)])
        said.append("without offload")
    printed = []
    for what, memory in zip(said, chosen, strict=False):
        days = _days(found.days(gpu, memory.sharding.gpus))
        printed += [
            f"{what} ({digits(memory.peak / unit)} of {digits(gpu.memory / unit)} {name}, "
            f"{days} days):",
            f"  trainer: {_yaml(memory.sharding.trainer(found.settings.per_node))}",
        ]
    return printed


def _refusal(found: Estimate, gpu: Gpu, name: str, unit: int) -> str:
    """Nothing fits: how much is missing, what is largest, what would help."""
    least = min(found.memories, key=lambda memory: memory.peak)
    largest = max(least.parts, key=lambda part: least.parts[part])
    said = (
        f"{gpu.name}: no sharding on up to {found.settings.gpus} GPUs fits "
        f"{digits(gpu.memory / unit)} {name}. The least is {digits(least.peak / unit)} {name} "
        f"({_named(least)}, at {least.moment}), {digits(least.parts[largest] / unit)} of them "
        f"{largest}."
    )
    helps = [
        f"{what} ({_named(memory)}: {digits(memory.peak / unit)} {name})"
        for what, memory in remedies(found.settings, gpu)
    ]
    if not helps:
        return f"{said} Neither other activations nor more GPUs make it fit."
    return f"{said} It would fit with {', or with '.join(helps)}."


def _named(memory: Memory) -> str:
    sharding = memory.sharding
    offload = "" if sharding.offload == "-" else f", offload {sharding.offload}"
    gpus = f"{sharding.gpus} GPU{'s' * (sharding.gpus > 1)}"
    return f"{gpus}, ZeRO {sharding.stage}, sp {sharding.sequence}{offload}"


def _remarks(found: Estimate) -> list[str]:
    settings, said = found.settings, []
    if found.own is not None:
        said.append("*: the config's own sharding.")
    if settings.gpus != found.used:
        said.append(
            f"Of {settings.gpus} GPUs {found.used} can be used: data.rows_per_step = "
            f"{settings.rows_per_step} has to divide among GPUs / sp, and sp divides the row and "
            f"the {settings.model.kv_heads} key-value heads."
        )
    if settings.liger_kernels:
        said.append("model.liger_kernels is estimated as false: they keep fewer activations.")
    said += [f"The GPU kernels do not run this: {what}." for what in kernel_refusals(settings)]
    return said


def kernel_refusals(settings: Settings) -> list[str]:
    """What the Triton backend would refuse of a config."""
    from lit_sparse.attention.triton.backend import DIMS, LEAST_BLOCK, MOST_GROUPS

    model, (least, most) = settings.model, DIMS
    refusals = {
        f"trainer.precision {settings.precision} (take bf16-true)": settings.precision[:2] == "32",
        f"head_dim {model.head_dim} (a multiple of 16 from {least} to {most})": (
            model.head_dim % 16 or not least <= model.head_dim <= most
        ),
        f"sparse_attention.block {settings.law.block} (at least {LEAST_BLOCK})": (
            settings.law.block < LEAST_BLOCK
        ),
        f"{model.groups} query heads per key-value head (at most {MOST_GROUPS})": (
            model.groups > MOST_GROUPS
        ),
        f"sparse_attention.score {settings.law.score} (mass; this one takes more memory)": (
            settings.law.score != "mass"
        ),
    }
    return [what for what, refused in refusals.items() if refused]


def memory_unit(memories: Sequence[Memory]) -> tuple[str, int]:
    """Of the largest of them: its name and its bytes."""
    most = max(memory.peak for memory in memories)
    return next(((name, size) for name, size in _UNITS if most >= size), _UNITS[-1])


def _yaml(value: dict[str, Any]) -> str:
    """In flow style, as it can stand in a config."""
    return json.dumps(value).replace('"', "")


def count(number: int) -> str:
    """1230000 -> 1.23 M."""
    for size, unit in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)


def _days(value: float) -> str:
    return digits(value) if value >= 0.001 else "<0.001"


def digits(value: float) -> str:
    """A cell of about three digits."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
