"""lit-sparse export: a Hugging Face directory of any checkpoint, plain or sharded.

SOURCE is a checkpoint, or a run directory, whose newest whole checkpoint is taken. One process
does it, without a GPU. The result loads in plain transformers as an ordinary dense model, and
lit_sparse.sparsify(model) makes it the sparse one. Its README.md, the model card, tells the law,
the stages and the gap that training measured last; one that you wrote or changed stays.

Adapters (model.lora) are merged into the weights that they were trained on, read from where those
were; --adapter writes them alone, for peft.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from lit_sparse.data.corpora import choose_tokenizer, paths_of
from lit_sparse.data.tokenizer import Tokenizer
from lit_sparse.distributed.checkpoint import RUN
from lit_sparse.distributed.stored_weights import checkpoint_weights
from lit_sparse.models import pretrained_generation
from lit_sparse.models.export.card import Training
from lit_sparse.models.export.write import check_replaceable, write_model
from lit_sparse.models.lora.merge import check_adapter_replaceable, merged_weights, write_adapter
from lit_sparse.recipes.run_directory import CONFIG
from lit_sparse.recipes.trained_model import TrainedModel
from lit_sparse.training.checkpoint import checkpoint_step, checkpoints, damage, newest_whole

DTYPES = ("float32", "bfloat16", "float16")


def main(argv: list[str]) -> int:
    """Write the directory. 2 where the command line, the checkpoint or the disk is wrong."""
    options = _parser().parse_args(argv)
    try:
        _export(options)
    except (ValueError, OSError) as error:
        if os.environ.get("LIT_SPARSE_TRACEBACK"):
            raise
        print(f"lit-sparse: error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lit-sparse export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", type=Path, metavar="SOURCE")
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="a module of several models gets a folder for each in there",
    )
    parser.add_argument(
        "--dtype",
        help=f"{', '.join(DTYPES)} (default: that of the checkpoint; those of ZeRO 1 to 3 have "
        "the float32 weights of the optimizer)",
    )
    parser.add_argument(
        "--adapter", action="store_true", help="write the adapters alone, in the format of peft"
    )
    parser.add_argument(
        "--base",
        type=Path,
        metavar="DIR",
        help="where the weights that the adapters were trained on are now (default: where they "
        "were then)",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a model that is there already"
    )
    return parser


def _export(options: argparse.Namespace) -> None:
    if options.dtype not in (None, *DTYPES):
        raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}, got {options.dtype}")
    dtype = getattr(torch, options.dtype) if options.dtype else None
    checkpoint = find_checkpoint(options.source)
    state = _state(checkpoint)
    configs: dict[str, dict[str, Any]] = state["lit_sparse"]["models"]
    places = {name: options.out if len(configs) == 1 else options.out / name for name in configs}
    for place in places.values():
        _check_out(place, options.overwrite, options.adapter)
    adapters: dict[str, dict[str, Any]] = state["lit_sparse"].get("adapters") or {}
    for option in ("adapter", "base"):
        if getattr(options, option) and adapters.keys() != configs.keys():
            raise ValueError(
                f"--{option}: {checkpoint} is of a run without model.lora, and has all weights of "
                f"its model: leave --{option} out"
            )
    weights = checkpoint_weights(checkpoint) if checkpoint.is_dir() else state["state_dict"]
    models = {}
    for name, config in configs.items():
        models[name] = trained = TrainedModel(checkpoint, name, config, weights, dtype)
        if name in adapters:
            trained.add_adapters(adapters[name], options.base)
        if not options.adapter:
            trained.check()
    pretrained = options.base or (state.get("hyper_parameters") or {}).get("pretrained")
    tokenizer = None if options.adapter else _tokenizer(checkpoint, pretrained)
    for name, trained in models.items():
        model = trained.model
        if options.adapter:
            tensors = {key: x.to(dtype or x.dtype) for key, x in trained.tensors.items()}
            write_adapter(model, places[name], tensors, trained.read)
            rank = adapters[name]["lora"]["rank"]
            print(f"{places[name]}: adapters of rank {rank} after {state['global_step']} steps")
            continue
        if pretrained and (generation := pretrained_generation(pretrained)) is not None:
            model.generation_config = generation
        merged, read = merged_weights(model, trained.tensors, trained.read, trained.dtype)
        write_model(
            model,
            places[name],
            merged,
            read,
            tokenizer=tokenizer,
            training=_training(state, name),
        )
        size = sum(tensor.numel() for tensor in merged.values())
        print(
            f"{places[name]}: {type(model).__name__} after {state['global_step']} steps, "
            f"{size:,} parameters in {str(trained.dtype).removeprefix('torch.')}"
        )


def _check_out(place: Path, overwrite: bool, adapter: bool) -> None:
    what = "an adapter" if adapter else "a model"
    if place.exists() and not overwrite:
        raise ValueError(f"--out: {place} is there already; --overwrite replaces {what}")
    try:
        check_adapter_replaceable(place) if adapter else check_replaceable(place)
    except ValueError as error:
        raise ValueError(f"--out: {error}") from None


def find_checkpoint(source: Path) -> Path:
    """The checkpoint that a path means: itself, or the newest whole one of a run directory.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    if not source.exists():
        raise ValueError(f"there is nothing at {source}")
    if source.is_file() or checkpoint_step(source) is not None or (source / RUN).is_file():
        if wrong := damage(source):
            raise ValueError(f"{source} is damaged: {wrong}")
        return source
    for folder in (source / "checkpoints", source):
        if checkpoints(folder):
            found = newest_whole(folder)
            if found is None:
                raise ValueError(f"{folder} holds no whole checkpoint")
            return found
    raise ValueError(f"{source} is neither a checkpoint nor the directory of a run that has one")


def _state(checkpoint: Path) -> dict[str, Any]:
    """All of a checkpoint but the weights of a sharded one. Tensors stay in the file."""
    # It was found to be whole, which includes that it can be loaded.
    path = checkpoint / RUN if checkpoint.is_dir() else checkpoint
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if not (state.get("lit_sparse") or {}).get("models"):
        raise ValueError(
            f"{checkpoint} does not say which models it holds: it was not written by RunCheckpoint"
        )
    return state


def _training(state: Mapping[str, Any], name: str) -> Training:
    """What the model card says: stages and metrics as the checkpoint remembers them."""
    curriculum = (state.get("callbacks") or {}).get("ContextCurriculum") or {}
    pretrained = (state.get("hyper_parameters") or {}).get("pretrained")
    own = state["lit_sparse"]
    logged = (own.get("logged") or {}).get("callback") or {}
    adapters = (own.get("adapters") or {}).get(name)
    return Training(
        steps=state["global_step"],
        pretrained=pretrained or own["models"][name].get("_name_or_path") or None,
        stages=curriculum.get("stages", []),
        measured={metric: float(value) for metric, value in logged.items()},
        lora=adapters and adapters["lora"],
    )


def _tokenizer(checkpoint: Path, pretrained: str | Path | None) -> Tokenizer | None:
    """That of the run that the checkpoint lies in; where it cannot be found, this is said."""
    config = checkpoint.resolve().parent.parent / CONFIG
    try:
        if not config.is_file():
            raise ValueError(f"there is no {config}")
        data = (yaml.safe_load(config.read_text(encoding="utf-8")) or {}).get("data", {})
        path, name = data.get("path", "stdlib"), data.get("tokenizer")
        for part in paths_of(path):
            if name is None and part != "stdlib" and not Path(part).exists():
                raise ValueError(f"data.path {part} of {config} is not there")
        return choose_tokenizer(path, name, None if pretrained is None else str(pretrained))
    except ValueError as error:
        print(f"lit-sparse: no tokenizer is written: {error}", file=sys.stderr)
        return None
