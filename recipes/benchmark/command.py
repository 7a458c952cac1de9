"""The command line of `lit-sparse benchmark`: arguments, the jobs, what is printed."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable
from typing import Any

import torch

from lit_sparse.recipes.benchmark import (
    attention,
    cuda,
    cuda_report,
    data,
    generation,
    plot,
    selection,
    tune,
)
from lit_sparse.recipes.benchmark.clock import Clock, cuda_environment
from lit_sparse.recipes.benchmark.options import (
    DEFAULT_SECONDS,
    DEFAULTS,
    PROGRAM,
    at_least_one,
    attention_parser,
    budget,
    check_common,
    data_parser,
    generation_parser,
    selection_parser,
    which,
)
from lit_sparse.recipes.benchmark.report import (
    BadArgument,
    describe,
    environment,
    render_table,
    wrap,
    write_json,
)
from lit_sparse.recipes.benchmark.steps import Problem
from lit_sparse.recipes.benchmark.verify import WrongResult

Report = dict[str, Any]


def main(argv: list[str]) -> int:
    """Run the command line.

    Returns the exit code: 0; 2 where an argument is refused; 1 where the operator computes
    something wrong, which is then not timed.
    """
    threads = torch.get_num_threads()
    try:
        what, rest = which(argv)
        parse, measure = JOBS[what]
        options = parse().parse_args(rest)
        check_common(options)
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        machine = environment(shlex.join([*PROGRAM.split(), *argv]))
        report, lines = measure(options, machine)
    except (BadArgument, WrongResult) as error:
        print(f"{PROGRAM}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2 if isinstance(error, BadArgument) else 1
    finally:
        torch.set_num_threads(threads)
    print("\n".join([*lines, *wrap(describe(machine))]))
    if options.json is not None:
        write_json(options.json, {"what": what, "machine": machine, **report})
    return 0


# -- the jobs --


def _run_attention(options: argparse.Namespace, machine: Report) -> tuple[Report, list[str]]:
    for name, value in DEFAULTS[options.device].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    for name in ("heads", "kv_heads", "head_dim", "repeats"):
        at_least_one(name, getattr(options, name))
    for length in options.lengths:
        at_least_one("lengths", length)
    if options.heads % options.kv_heads:
        raise BadArgument(
            f"--kv-heads {options.kv_heads} must divide --heads {options.heads} (grouped-query "
            "attention)"
        )
    problems = [
        Problem(
            length=length,
            heads=options.heads,
            kv_heads=options.kv_heads,
            head_dim=options.head_dim,
            dtype=options.dtype,
            budget=budget(options),
            block=options.block,
            tile=options.tile,
        )
        for length in options.lengths
    ]
    if options.device == "cuda":
        return _run_cuda(problems, options, machine)
    for name in ("plot", "compare", "seconds", "tune"):
        if getattr(options, name):
            raise BadArgument(f"--{name} is for --device cuda")
    results = attention.run(
        problems, options.repeats, torch.get_num_threads(), options.memory, _progress
    )
    problem = {key: value for key, value in problems[0].to_dict().items() if key != "length"}
    title = f"{_title(options, problems[0])}, tile {results[0]['tile']}"
    title += f", {options.repeats} sparse runs each"
    rows = [attention.cells(result) for result in results]
    table = render_table(attention.GROUPS, rows)
    lines = [*wrap(title), "", *table, "", *wrap(attention.NOTE)]
    disturbed = attention.warning(results, torch.get_num_threads())
    if disturbed is not None:
        lines += wrap(disturbed)
    return {"problem": problem, "repeats": options.repeats, "results": results}, lines


def _run_cuda(
    problems: list[Problem], options: argparse.Namespace, machine: Report
) -> tuple[Report, list[str]]:
    if options.seconds is not None:
        at_least_one("seconds", options.seconds)
    if options.plot is not None and not options.plot.parent.is_dir():
        raise BadArgument(f"--plot {options.plot}: there is no directory {options.plot.parent}")
    earlier = None if options.compare is None else cuda_report.load(options.compare)
    device = _cuda()
    if device.type == "cuda":
        machine.update(cuda_environment(device))

    def save(report: Report) -> None:
        if options.json is not None:
            write_json(options.json, {"what": "attention", "machine": machine, **report})
        if options.plot is not None:
            plot.plot({"machine": machine, **report}, options.plot)

    clock = Clock(device, options.repeats)
    if options.tune:
        result = tune.tune(problems[0], clock, _progress)
        return result, [*wrap(_title(options, problems[0])), "", *tune.lines(result), ""]
    report = cuda.Benchmark(
        problems, clock, machine.get("gpu"), options.seconds or DEFAULT_SECONDS, save, _progress
    ).run()
    title = f"{_title(options, problems[0])}, tile {report['problem']['tile']}"
    lines = cuda_report.lines(report, title)
    if earlier is not None:
        lines += ["", *cuda_report.compare({"machine": machine, **report}, earlier)]
    return report, [*lines, ""]


def _cuda() -> torch.device:
    if not torch.cuda.is_available():
        raise BadArgument(
            f"--device cuda: torch {torch.__version__} finds no CUDA device here; pass --device cpu"
        )
    return torch.device("cuda", torch.cuda.current_device())


def _title(options: argparse.Namespace, problem: Problem) -> str:
    return (
        f"Attention forward and backward: {options.heads} query / {options.kv_heads} key-value "
        f"heads, head_dim {options.head_dim}, {options.dtype}, {problem.budget}, block "
        f"{options.block}"
    )


def _run_selection(options: argparse.Namespace, _: Report) -> tuple[Report, list[str]]:
    for name in ("length", "documents", "rows"):
        at_least_one(name, getattr(options, name))
    task = selection.Task(
        model=options.model,
        data=options.data,
        length=options.length,
        documents=options.documents,
        rows=options.rows,
        budget=budget(options),
        block=options.block,
        tile=options.tile,
        dtype=options.dtype or "float32",
    )
    result = selection.run(task, _progress)
    title = (
        f"Selection quality: {task.model}, {result['layers']} layers of {result['heads']} query / "
        f"{result['kv_heads']} key-value heads, {len(result['documents'])} documents of "
        f"{task.length} tokens from {task.data}, {result['rows']} rows of the later half of each; "
        f"{task.budget}, sink {task.budget.sink}, local {task.budget.local:g}, block {task.block}"
    )
    rows = [selection.cells(entry) for entry in result["rules"]]
    table = render_table(selection.GROUPS, rows)
    lines = [*wrap(title), "", *table, "", *wrap(selection.NOTE)]
    law = {"budget": task.budget.to_dict(), "block": task.block, "tile": task.tile}
    return {**law, **result}, lines


def _run_generation(options: argparse.Namespace, _: Report) -> tuple[Report, list[str]]:
    for name in ("length", "documents"):
        at_least_one(name, getattr(options, name))
    prompt = options.length // 2 if options.prompt is None else options.prompt
    if not 1 <= prompt < options.length:
        raise BadArgument(f"--prompt must be 1 to {options.length - 1} (--length), got {prompt}")
    task = generation.Task(
        options.model, options.data, options.length, prompt, options.documents, options.dtype
    )
    result = generation.run(task, _progress)
    title = (
        f"Generation: {task.model}, {len(result['documents'])} documents of {task.length} tokens "
        f"from {task.data}, those after a prompt of {task.prompt}; {task.dtype}"
    )
    first = result["rows"][0]
    rows = [generation.cells(entry, first) for entry in result["rows"]]
    table = render_table(generation.GROUPS, rows)
    return result, [*wrap(title), "", *table, "", *wrap(generation.NOTE)]


def _run_data(options: argparse.Namespace, _: Report) -> tuple[Report, list[str]]:
    for name in ("megabytes", "documents", "processes"):
        at_least_one(name, getattr(options, name))
    report = data.run(options.megabytes, options.documents, options.processes, _progress)
    return report, [*data.lines(report), ""]


Run = Callable[[argparse.Namespace, Report], tuple[Report, list[str]]]
JOBS: dict[str, tuple[Callable[[], argparse.ArgumentParser], Run]] = {
    "attention": (attention_parser, _run_attention),
    "selection": (selection_parser, _run_selection),
    "generation": (generation_parser, _run_generation),
    "data": (data_parser, _run_data),
}


def _progress(text: str) -> None:
    print(f"{PROGRAM}: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
