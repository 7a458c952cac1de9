"""The model card of an exported model: its README.md, from facts to text.

What nobody measured is said to be "not measured".
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lit_sparse.models.export.serving import context_of, full_rope, serving_notes
from lit_sparse.models.rope import FULL
from lit_sparse.models.state import CONFIG_KEY, Law

_SEAL = re.compile(r"<!-- lit-sparse (\w{16}) -->\n\Z")
_HUB_CACHE = re.compile(r"models--(.+?)--(.+)")

_MEASURED = (
    # key of a logged metric, what it is, format
    ("gap/captured_mass", "softmax mass of dense attention on the kept keys, sampled rows", ".3f"),
    ("gap/kl", "KL divergence of the logits from its own dense forward, nats a token", ".4f"),
    ("gap/loss_delta", "loss less that of its own dense forward, nats a token", "+.4f"),
    ("val/loss", "validation loss, nats a token", ".4f"),
    ("val/bits_per_byte", "validation bits per byte", ".4f"),
)


@dataclass(frozen=True)
class Training:
    """What a card says about how a model was made.

    Args:
        pretrained: directory that training started from; None for none, or an unknown one.
        steps: optimizer steps that were done.
        stages: of the curriculum, the fields of `Stage` by name; empty where none is known.
        measured: last values of logged metrics, by name.
        lora: of merged adapters, the fields of `LoRA` by name.
    """

    steps: int
    pretrained: str | None = None
    stages: Sequence[Mapping[str, Any]] = ()
    measured: Mapping[str, float] = field(default_factory=dict)
    lora: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class CardFacts:
    """What a card is made of.

    Args:
        config: the model's config.json as a dictionary, with law and RoPE.
        architecture: name of the class, e.g. "LlamaForCausalLM".
        parameters: how many.
        dtype: of the stored weights, e.g. "bfloat16".
    """

    config: Mapping[str, Any]
    architecture: str
    parameters: int
    dtype: str
    training: Training


def model_card(facts: CardFacts) -> str:
    """The text of README.md, in Hugging Face's format: YAML front matter, then Markdown."""
    stored = facts.config.get(CONFIG_KEY)
    law = Law.from_dict(stored) if stored else None
    context = context_of(facts.config)
    sparse = "sparse" if law else "dense"
    parts = [
        _front_matter(facts.training.pretrained, law),
        f"# {facts.architecture}, {sparse} attention, {context:,} tokens",
        f"Trained by lit-sparse{_origin(facts.training.pretrained)}: {facts.parameters:,} "
        f"parameters in {facts.dtype}, for contexts up to {context:,} tokens. To transformers and "
        "vLLM it is an ordinary dense model.",
        *(["## The law of its sparse attention", _law(law, facts.config, context)] if law else []),
        "## Training",
        *([_lora(facts.training.lora)] if facts.training.lora else []),
        _stages(facts.training),
        "Measured in training, at the last stage that it reached:",
        _measured(facts.training.measured),
        "## How to load it",
        _loading(law),
        "## Positions",
        _positions(facts.config),
        "## Not checked",
        "No benchmark was run on this model: no task, no safety, no bias. It was not loaded in "
        "vLLM. No licence is stated here; those of the weights and the data that it was trained "
        "from apply.",
    ]
    return _sealed("\n\n".join(parts) + "\n")


def is_own_card(path: Path) -> bool:
    """Whether a README.md is a card as `model_card` gave it, and nobody has changed it since."""
    text = path.read_text(encoding="utf-8", errors="replace")
    return _sealed(_SEAL.sub("", text)) == text


def _sealed(text: str) -> str:
    return f"{text}<!-- lit-sparse {hashlib.sha256(text.encode()).hexdigest()[:16]} -->\n"


def _front_matter(pretrained: str | None, law: Law | None) -> str:
    import yaml

    matter: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if base := _hub_name(pretrained):
        matter["base_model"] = base
    matter["tags"] = [*(["sparse-attention"] if law else []), "long-context", "lit-sparse"]
    return f"---\n{yaml.safe_dump(matter, sort_keys=False)}---"


def _hub_name(directory: str | None) -> str | None:
    """The name on the Hub of a directory in its cache; None for any other: a path is no name."""
    for part in Path(directory or "").parts:
        if match := _HUB_CACHE.fullmatch(part):
            return f"{match[1]}/{match[2]}"
    return None


def _origin(pretrained: str | None) -> str:
    if pretrained is None:
        return ""
    return f" from {_hub_name(pretrained) or f'the directory `{Path(pretrained).name}`'}"


def _law(law: Law, config: Mapping[str, Any], context: int) -> str:
    budget = law.budget
    form = "alpha * ln(n)" if budget.law == "log" else "alpha * n^C"
    rows = [
        ("alpha", f"{budget.alpha:g}", "keys"),
        ("C", f"{budget.exponent:g}", "exponent"),
        ("floor", f"{budget.floor}", "fewest keys"),
        ("ceiling", "none" if budget.ceiling is None else f"{budget.ceiling}", "most keys"),
        ("dense_below", f"{budget.dense_below}", "contexts up to this keep all keys"),
        ("sink", f"{budget.sink}", "first tokens, always kept"),
        ("local", f"{budget.local:g}", "share of the budget for the nearest keys"),
        ("late", f"{budget.late:g}", "share of the rest that a tile's own rows choose"),
        ("block", f"{law.block}", "keys kept or dropped together"),
        ("tile", f"{law.tile or 'default'}", "queries that share a list"),
        ("score", law.score, "how blocks are ranked"),
    ]
    if budget.law == "log":
        del rows[1]
    text = (
        f"A query that sees n tokens attends to k(n) = {form} of them, rounded up, within floor "
        f"and ceiling: {budget(context):,} at {context:,} tokens.\n\n"
    )
    text += _table(("key", "value", ""), rows)
    if law.layers:
        own = [(str(layer), _budget(other)) for layer, other in law.layers.items()]
        text += f"\n\nLayers with a law of their own:\n\n{_table(('layer', 'law'), own)}"
    window = config.get("sliding_window")
    if window and window < config["max_position_embeddings"]:  # see window_of
        kinds = config.get("layer_types") or [None] * config["num_hidden_layers"]
        near = ", ".join(str(layer) for layer, kind in enumerate(kinds) if kind != FULL)
        if near:
            text += f"\n\nLayers {near} keep the model's sliding window of {window:,} tokens."
    return text


def _budget(budget: Any) -> str:
    return "dense" if budget == type(budget).dense() else str(budget)


def _lora(lora: Mapping[str, Any]) -> str:
    targets = lora["targets"] or "the projections of attention"
    parts = [targets if isinstance(targets, str) else ", ".join(targets)]
    parts += ["norms"] * lora["train_norms"] + ["embeddings"] * lora["train_embeddings"]
    return (
        f"LoRA of rank {lora['rank']}, alpha {lora['alpha']:g}, merged into the weights; trained: "
        f"{', '.join(parts)}."
    )


def _stages(training: Training) -> str:
    if not training.stages:
        return f"{training.steps:,} optimizer steps; no curriculum is recorded."
    rows, begin = [], 0
    for number, stage in enumerate(training.stages, start=1):
        steps = stage["steps"]
        done = min(training.steps - begin, steps)
        begin += steps
        if done <= 0:
            break
        shown = [
            str(number),
            f"{stage['length']:,}",
            f"{done:,}" if done == steps else f"{done:,} of {steps:,}",
            json.dumps(stage["rope"]) if stage["rope"] else "as before",
            stage["attention"],
        ]
        rows.append(shown)
    return _table(("stage", "tokens of context", "steps", "RoPE", "attention"), rows)


def _measured(measured: Mapping[str, float]) -> str:
    rows = [
        (f"`{key}`", what, format(measured[key], form) if key in measured else "not measured")
        for key, what, form in _MEASURED
    ]
    return _table(("metric", "", "value"), rows)


def _loading(law: Law | None) -> str:
    text = (
        "Densely, in plain transformers (version 5 or later: earlier ones do not read "
        "`rope_parameters`, and silently compute other positions):\n\n"
        "```python\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained(DIR, dtype="auto")\n'
        "tokenizer = AutoTokenizer.from_pretrained(DIR)\n"
        "```"
    )
    if law is None:
        return text
    return (
        f"{text}\n\nSparsely, by its law:\n\n"
        "```python\n"
        "import lit_sparse\n\n"
        "lit_sparse.sparsify(model)\n"
        "```\n\n"
        "`generate` works either way; pad prompts on the left. A token that is decoded from the "
        "cache chooses its keys by itself, where training shared a list among the queries of a "
        "tile: `lit-sparse benchmark --what generation --model DIR` measures the difference."
    )


def _positions(config: Mapping[str, Any]) -> str:
    rope = ", ".join(f"{key} {_short(value)}" for key, value in full_rope(config).items())
    notes = "\n".join(f"- {note}" for note in serving_notes(config))
    return (
        f"RoPE: {rope}; max_position_embeddings {config['max_position_embeddings']:,}.\n\n{notes}"
    )


def _short(value: Any) -> str:
    if isinstance(value, list):
        return f"[{len(value)} numbers]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
