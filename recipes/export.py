"""lit-sparse export: a Hugging Face directory of any checkpoint, plain or sharded.

SOURCE is a checkpoint, or a run directory, whose newest whole checkpoint is taken. One process
does it, without a GPU. The result loads in plain transformers as an ordinary dense model, and
lit_sparse.sparsify(model) makes it the sparse one. Its README.md, the model card, tells the law,
the stages and the gap that training measured last; one that you wrote or changed stays.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from lit_sparse.data.corpora import choose_tokenizer, paths_of
from lit_sparse.data.tokenizer import Tokenizer
from lit_sparse.distributed.checkpoint import RUN
from lit_sparse.distributed.stored_weights import StoredTensor, checkpoint_weights
from lit_sparse.models import pretrained_generation
from lit_sparse.models.card import Training
from lit_sparse.models.export import check_replaceable, stored_tensors, write_model
from lit_sparse.recipes.run_directory import CONFIG
from lit_sparse.training.checkpoint import checkpoint_step, checkpoints, damage, newest_whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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
        _check_out(place, options.overwrite)
    weights = checkpoint_weights(checkpoint) if checkpoint.is_dir() else state["state_dict"]
    models = {
        name: _Trained(checkpoint, name, config, weights, dtype) for name, config in configs.items()
    }
    tokenizer = _tokenizer(checkpoint)
    pretrained = (state.get("hyper_parameters") or {}).get("pretrained")
    for name, trained in models.items():
        model = trained.model
        if pretrained and (generation := pretrained_generation(pretrained)) is not None:
            model.generation_config = generation
        write_model(
            model,
            places[name],
            trained.tensors,
            trained.read,
            tokenizer=tokenizer,
            training=_training(state, pretrained or configs[name].get("_name_or_path") or None),
        )
        size = sum(tensor.numel() for tensor in trained.tensors.values())
        print(
            f"{places[name]}: {type(model).__name__} after {state['global_step']} steps, "
            f"{size:,} parameters in {str(model.dtype).removeprefix('torch.')}"
        )


def _check_out(place: Path, overwrite: bool) -> None:
    if place.exists() and not overwrite:
        raise ValueError(f"--out: {place} is there already; --overwrite replaces a model")
    try:
        check_replaceable(place)
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


class _Trained:
    """A model of a checkpoint: without memory, and what reads its weights; ValueError where they do
    not fit its config.
    """

    def __init__(
        self,
        checkpoint: Path,
        name: str,
        config: Mapping[str, Any],
        weights: Mapping[str, StoredTensor],
        dtype: torch.dtype | None,
    ) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        prefix = f"{name}." if name else ""
        self._weights = {
            key.removeprefix(prefix): weight
            for key, weight in weights.items()
            if key.startswith(prefix)
        }
        if not self._weights:
            raise ValueError(f"{checkpoint} has no weights of {name}")
        dtype = dtype or next(iter(self._weights.values())).dtype
        with torch.device("meta"):
            self.model: PreTrainedModel = AutoModelForCausalLM.from_config(
                AutoConfig.for_model(**config), dtype=dtype
            )
        self.tensors = stored_tensors(self.model)
        for key, tensor in self.tensors.items():
            found = self._weights.get(key)
            if found is None or found.shape != tensor.shape:
                held = "lacks" if found is None else f"has {list(found.shape)} as"
                raise ValueError(
                    f"{checkpoint} {held} {prefix}{key}; its config asks for {list(tensor.shape)}"
                )

    def read(self, key: str) -> torch.Tensor:
        return self._weights[key].contiguous()


def _training(state: Mapping[str, Any], pretrained: str | None) -> Training:
    """What the model card says: stages and metrics as the checkpoint remembers them."""
    curriculum = (state.get("callbacks") or {}).get("ContextCurriculum") or {}
    logged = (state["lit_sparse"].get("logged") or {}).get("callback") or {}
    return Training(
        steps=state["global_step"],
        pretrained=pretrained,
        stages=curriculum.get("stages", []),
        measured={name: float(value) for name, value in logged.items()},
    )


def _tokenizer(checkpoint: Path) -> Tokenizer | None:
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
        return choose_tokenizer(path, name)
    except ValueError as error:
        print(f"lit-sparse: no tokenizer is written: {error}", file=sys.stderr)
        return None
