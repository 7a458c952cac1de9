"""What is evaluated: a model with its law, and text that it was not trained on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml

from lit_sparse.budget import PRESETS, Budget
from lit_sparse.data import Documents, Tokenizer
from lit_sparse.models import (
    Law,
    RopeOrigin,
    build_model,
    extend_context,
    law_layers,
    sparsify,
    windows_everywhere,
)
from lit_sparse.models.state import CONFIG_KEY
from lit_sparse.recipes.benchmark.report import BadArgument
from lit_sparse.recipes.calibrate.texts import open_documents

VALIDATION, SPLIT_SEED = 0.05, 0
"""How `PackedTextDataModule` divides documents where a config says nothing else."""


@dataclass(frozen=True)
class Subject:
    """A model, in evaluation mode, and what it reads.

    Args:
        path: its Hugging Face directory.
        model: sparsified; without a law it runs densely.
        law: that it obeys.
        source: where the law is from, in words; None: there is none.
        documents: held out.
        tokenizer: of the documents.
        lengths: tokens of a text or prompt, ascending.
    """

    path: Path
    model: Any
    law: Law
    source: str | None
    documents: Documents
    tokenizer: Tokenizer
    lengths: list[int]

    @property
    def name(self) -> str:
        """Shorter than its path: a run's directory is always named alike."""
        return "/".join(self.path.absolute().parts[-2:])


@dataclass(frozen=True)
class Loading:
    """See the options of `lit-sparse evaluate`; None is the option left out."""

    budget: str | None
    block: int | None
    tile: int | None
    lengths: list[int] | None
    rope: str | None
    data: str
    all_documents: bool
    dtype: str
    device: str


def load(given: Path, options: Loading) -> Subject:
    """A model from a Hugging Face directory or a run's, with its law and text.

    Raises:
        BadArgument: there is none, or law, lengths, text and model do not go together.
    """
    path = huggingface_directory(given)
    try:
        model: Any = build_model(pretrained=path, dtype=options.dtype).eval()
        law, source = _law(model, options)
        if not law_layers(model):
            raise ValueError(windows_everywhere(model))
        sparsify(
            model, law.budget, layers=law.layers, block=law.block, tile=law.tile, score=law.score
        )
        lengths = _reach(model, options)
    except BadArgument:
        raise
    except (ValueError, NotImplementedError, OSError) as error:
        what = str(error).removeprefix("model.pretrained: ")
        raise BadArgument(f"MODEL {path}: {what}") from error
    vocabulary = model.get_input_embeddings().num_embeddings
    documents, tokenizer = open_documents(path, options.data, vocabulary)
    if not options.all_documents:
        documents = _held_out(documents, options.data)
    return Subject(path, model.to(options.device), law, source, documents, tokenizer, lengths)


def huggingface_directory(given: Path) -> Path:
    """The directory itself, or the one in a run directory."""
    for path in (given, given / "huggingface"):
        if (path / "config.json").is_file():
            return path
    if not given.is_dir():
        raise BadArgument(f"MODEL {given}: there is no such directory")
    raise BadArgument(
        f"MODEL {given} has no config.json, and no huggingface/config.json as a finished run has: "
        "give a Hugging Face directory (lit-sparse export makes one from a checkpoint)"
    )


def parse_law(text: str, own: Law) -> Law:
    """A law from the command line: a file of `lit-sparse calibrate` (or a config with the key
    sparse_attention), a preset's name, "dense", or Budget's arguments with commas, such as
    "alpha=16,exponent=.5,floor=0".

    Args:
        own: whose block, tile and scorer hold where the text is no file.

    Raises:
        ValueError: it is none of these.
    """
    if Path(text).is_file():
        return _law_of_file(Path(text))
    if text == "dense":
        budget = Budget.dense()
    elif text in PRESETS:
        budget = Budget.preset(text)
    elif "=" in text:
        budget = _budget_of_arguments(text)
    else:
        raise ValueError(
            f"{text!r} is no file, no preset ({', '.join(PRESETS)}), not dense, and no budget as "
            "in alpha=16,exponent=.5,floor=0"
        )
    return replace(own, budget=budget, layers={})


def _law_of_file(path: Path) -> Law:
    try:
        stored = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ValueError(f"{path} is no YAML: {error}") from error
    law = stored.get(CONFIG_KEY) if isinstance(stored, Mapping) else None
    if not isinstance(law, Mapping):
        raise ValueError(f"{path} has no key {CONFIG_KEY} with a law")
    # A run's config says more there than the law.
    known = {field.name for field in fields(Law)}
    return Law.from_dict({key: x for key, x in law.items() if key in known and x is not None})


def _budget_of_arguments(text: str) -> Budget:
    names = {field.name for field in fields(Budget)}
    values = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        if name.strip() not in names:
            raise ValueError(f"{part!r}: a budget has {', '.join(sorted(names))}, each as NAME=...")
        values[name.strip()] = yaml.safe_load(value)
    try:
        return Budget(**values)
    except TypeError as error:
        raise ValueError(f"{text!r} has a value that is no number: {error}") from error


def _law(model: Any, options: Loading) -> tuple[Law, str | None]:
    """What the model obeys, and where that is from."""
    stored = getattr(model.config, CONFIG_KEY, None)
    own = Law(Budget.dense()) if stored is None else Law.from_dict(stored)
    if options.budget is None:
        source = None if stored is None else "its own law"
        return own, source
    try:
        law = parse_law(options.budget, own)
        law = replace(law, block=options.block or law.block, tile=options.tile or law.tile)
    except ValueError as error:
        raise BadArgument(f"--budget: {error}") from error
    return law, f"--budget {options.budget}"


def _reach(model: Any, options: Loading) -> list[int]:
    """The lengths, which the model's positions reach, by a rule for RoPE if one is given."""
    context = RopeOrigin.of(model).context
    lengths = options.lengths or default_lengths(context)
    if lengths[-1] > context:
        if options.rope is None:
            raise BadArgument(
                f"--lengths: {lengths[-1]} is past the {context} tokens that the model's positions "
                "reach; --rope RULE (yarn, abf, ...) extends them by a rule, without training"
            )
        extend_context(model, [(lengths[-1], {"rule": options.rope})])
    return lengths


def default_lengths(context: int) -> list[int]:
    """The largest power of two within the context, and up to three halves of it."""
    longest = 2 ** (context.bit_length() - 1)
    return [n for n in (longest // 8, longest // 4, longest // 2, longest) if n >= 2]


def _held_out(documents: Documents, data: str) -> Documents:
    try:
        _, validation = documents.store.split(VALIDATION, SPLIT_SEED)
    except ValueError as error:
        what = str(error).replace("data.path", f"--data {data}", 1)
        raise BadArgument(
            f"{what}; or give --all-documents if the model has seen none of it"
        ) from error
    return Documents(documents.store, validation)
