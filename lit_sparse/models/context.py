"""RoPE for a longer context, by rules that start from the RoPE that a model was loaded with.

Nothing compounds: what a rule gives depends on the length and on the model as it was loaded, not on
what an earlier stage did to it, so that a resumed run has the frequencies of an uninterrupted one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from lit_sparse.models.export.serving import multiplies_positions
from lit_sparse.models.rope import (
    KEYS,
    check_numbers,
    merged_rope,
    replace_rope,
    rope_parameters,
    rotary_dimensions,
    scales_by_positions,
)

_ORIGIN = "lit_sparse_rope_origin"
"""Name of the attribute by which a model remembers its origin; never saved."""


@dataclass(frozen=True)
class RopeOrigin:
    """RoPE of a model as it was loaded: what rules start from.

    Args:
        parameters: `config.rope_parameters`, of the layers with full attention.
        positions: `config.max_position_embeddings`, in tokens.
        dimensions: of a head that are rotated.
        model_type: of the config.
    """

    parameters: Mapping[str, Any]
    positions: int
    dimensions: int
    model_type: str = ""

    @classmethod
    def of(cls, model: nn.Module) -> RopeOrigin:
        """The model's RoPE at the first call; later calls give the same whatever changed since."""
        found = getattr(model, _ORIGIN, None)
        if found is None:
            config = cast(Any, model).config
            found = cls(
                rope_parameters(model),
                config.max_position_embeddings,
                rotary_dimensions(model),
                config.model_type,
            )
            setattr(model, _ORIGIN, found)
        return found

    @property
    def context(self) -> int:
        """Longest context in tokens that the model claims; its config may hold that before or after
        scaling.
        """
        scaled = self.parameters.get("original_max_position_embeddings", 0)
        return max(self.positions, int(scaled * (self.parameters.get("factor") or 1.0)))


def extend_context(
    model: nn.Module, stages: Sequence[tuple[int, Mapping[str, Any] | None]]
) -> None:
    """Give a model the RoPE and the positions of the last stage, from whatever state it is in.

    Args:
        model: a supported transformers model.
        stages: length in tokens and `rope` of each stage up to this one. A rule (see
            `rule_parameters`) counts from the origin, explicit parameters change those of the stage
            before, None keeps them.

    Raises:
        ValueError: the last stage's rope cannot be; the model is then unchanged.
    """
    origin = RopeOrigin.of(model)
    parameters: Mapping[str, Any] = origin.parameters
    for length, rope in stages:
        if rope is not None and "rule" in rope:
            parameters = rule_parameters(rope, length, origin)
        elif rope is not None:
            parameters = merged_rope(parameters, rope, origin.positions)
    check_numbers(parameters)
    positions = stored_positions(parameters, stages[-1][0], origin)
    if positions > origin.positions and scales_by_positions(parameters):
        raise ValueError(
            f"rope_type {parameters['rope_type']!r} scales by max_position_embeddings, which would "
            f"change from {origin.positions} to {positions}: give a factor or a rule"
        )
    # Where nothing changes, a compiled model keeps its graphs.
    now = (rope_parameters(model), cast(Any, model).config.max_position_embeddings)
    if now != (parameters, positions):
        replace_rope(model, parameters, positions)


def stored_positions(parameters: Mapping[str, Any], length: int, origin: RopeOrigin) -> int:
    """`max_position_embeddings` of a config that says that the model reaches `length` tokens.

    transformers computes no frequencies from it where RoPE has a factor, or needs none. vLLM
    derives its longest sequence from it: times the factor where rope_type is "linear", so that it
    has to be the context before scaling; for "yarn" original_max_position_embeddings * factor, or
    since vllm#56446 the value itself, so that it has to be that product. See `export.serving`.
    """
    if length <= origin.positions and parameters == origin.parameters:
        return origin.positions
    reach = max(length, origin.context)
    if multiplies_positions(origin.model_type, parameters["rope_type"]):
        # The factor is a rounded quotient: 1000 must not become 1001 over 1001 / 1000.
        return math.ceil(reach / (parameters.get("factor") or 1.0) - 1e-6)
    return reach


def rule_parameters(rope: Mapping[str, Any], length: int, origin: RopeOrigin) -> dict[str, Any]:
    """All RoPE parameters that a rule gives for a context of `length` tokens.

    With C the original context, theta the original base, s = length / C and d the rotated
    dimensions of a head:

    - `abf`, adjusted base frequency (arXiv 2309.16039): theta' = theta ** (ln(length / 2 pi) /
      ln(C / 2 pi)). The dimensions whose period is at most C, those that training has seen turn
      once in full, are the first d * ln(C / 2 pi) / ln(theta) (the critical dimension of arXiv
      2310.05209); this is the base at which the same ones turn once within `length`. Equal to
      theta * s ** (d / critical dimension). It gives 1.9e5 for Llama 2 at 32k, where the paper
      trained with 5e5, and 2.2e7 for Llama 3 at 64k, where ProLong (arXiv 2410.02660) took 8e6:
      `theta` sets the base instead.
    - `ntk`: theta' = theta * s ** (d / (d - 2)): the lowest frequency falls by s, the highest
      stays. It raises theta less than `abf`.
    - `linear`, position interpolation (arXiv 2306.15595): factor s.
    - `yarn` (arXiv 2309.00071): factor s; takes beta_fast, beta_slow, attention_factor, mscale,
      mscale_all_dim, truncate.
    - `llama3` (Llama 3.1): factor s; low_freq_factor 1 and high_freq_factor 4 unless given.

    Which one, by what their papers report: `abf` where training is long (2309.16039: of the
    variants it tried, the only one that kept retrieving over all 32,768 tokens; ProLong trained
    40 billion tokens with a base raised further); `yarn` where it is short (2309.00071: 400 steps,
    a tenth of the tokens of `linear` and `ntk`, which it surpassed with and without them);
    `llama3` to go on from a model that has it; `linear` and `ntk` to compare with.

    A length of at most C changes nothing. A model that was loaded with rope_type linear, yarn or
    llama3 and factor f has the context C = max(max_position_embeddings, f * original), and only its
    own rule: the factor becomes f * length / C, over the same original.

    Args:
        rope: `rule`, what the rule takes as above, and `original`: the context in tokens that the
            frequencies were trained for, where the config does not say it.
        length: in tokens.
        origin: of the model.

    Raises:
        ValueError: the rule is unknown, has a wrong value, or does not fit the model.
    """
    check_rule(rope)
    name, original = rope["rule"], rope.get("original")
    kind = origin.parameters["rope_type"]
    if kind == "default":
        context = original or origin.positions
        if length <= context:
            return dict(origin.parameters)
        return _RULES[name](rope, length, context, origin)
    if name != kind:
        raise ValueError(
            f"the model was loaded with rope_type {kind!r}, and rule {name!r} starts from an "
            + (f"unscaled one: use rule {kind}, " if kind in _RULES else "unscaled one: ")
            + "or give explicit parameters"
        )
    return _rescaled(rope, length, origin)


def check_rule(rope: Mapping[str, Any]) -> None:
    """Raise ValueError where a rule is wrong whatever the model; the message names the key."""
    name = rope["rule"]
    if name not in _RULES:
        raise ValueError(f"no rule {name!r}; there are {', '.join(_RULES)}")
    unknown = sorted(set(rope) - {"rule", "original"} - _OPTIONS[name])
    if unknown:
        known = ", ".join(["original", *sorted(_OPTIONS[name])])
        raise ValueError(f"rule {name} has no {', '.join(unknown)}; it takes {known}")
    original = rope.get("original")
    if original is not None and (type(original) is not int or original < 1):
        raise ValueError(f"original must be a number of tokens >= 1, got {original!r}")
    for key in _OPTIONS[name] - {"truncate"}:
        value = rope.get(key)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if value is not None and not (number and math.isfinite(value) and value > 0):
            raise ValueError(f"{key} must be a positive number, got {value!r}")


def _abf(rope: Mapping[str, Any], length: int, context: int, origin: RopeOrigin) -> dict[str, Any]:
    theta = rope.get("theta")
    if theta is None:
        base, turn = origin.parameters["rope_theta"], 2 * math.pi
        if context <= turn or base <= 1:
            raise ValueError(
                f"rule abf has no answer for a context of {context} tokens and rope_theta {base}: "
                "give theta"
            )
        theta = base ** (math.log(length / turn) / math.log(context / turn))
    return {**origin.parameters, "rope_theta": float(theta)}


def _ntk(rope: Mapping[str, Any], length: int, context: int, origin: RopeOrigin) -> dict[str, Any]:
    d = origin.dimensions
    if d <= 2:
        raise ValueError(f"rule ntk needs more than 2 rotated dimensions, the model has {d}")
    theta = origin.parameters["rope_theta"] * (length / context) ** (d / (d - 2))
    return {**origin.parameters, "rope_theta": theta}


def _scaled(
    rope: Mapping[str, Any], length: int, context: int, origin: RopeOrigin
) -> dict[str, Any]:
    name = rope["rule"]
    given = {"rope_type": name, "factor": _ratio(length, context)}
    given |= _DEFAULTS.get(name, {}) | _options(rope)
    return merged_rope(origin.parameters, given, context)


def _ratio(length: int, context: int) -> float:
    """The factor that makes `length` of `context` again where its product is cut to an integer."""
    ratio = length / context
    return ratio if int(context * ratio) == length else math.nextafter(ratio, math.inf)


def _rescaled(rope: Mapping[str, Any], length: int, origin: RopeOrigin) -> dict[str, Any]:
    parameters = dict(origin.parameters)
    factor = parameters.get("factor")
    original = rope.get("original") or parameters.get("original_max_position_embeddings")
    linear = parameters["rope_type"] == "linear"
    if (
        original is None
        and factor
        and linear
        and not multiplies_positions(origin.model_type, "linear")
    ):
        original = round(origin.positions / factor)
    if original is None or factor is None:
        raise ValueError(
            f"the model's rope_type {rope['rule']!r} does not say which context it was scaled "
            "from, and by how much: give `original` and a factor in its config, or explicit "
            "parameters"
        )
    context = max(origin.positions, int(original * factor))
    if length <= context:
        return parameters
    if parameters.get("attention_factor") is not None and "attention_factor" not in rope:
        raise ValueError(
            f"the model has attention_factor {parameters['attention_factor']} for its own factor "
            f"{factor}: give attention_factor in the rule (null: from the new factor)"
        )
    if "original_max_position_embeddings" in parameters:
        parameters["original_max_position_embeddings"] = original
    scaled = {**parameters, **_options(rope), "factor": factor * length / context}
    # A null takes away what the model had; vLLM reads some keys without allowing for one.
    return {key: value for key, value in scaled.items() if value is not None}


def _options(rope: Mapping[str, Any]) -> dict[str, Any]:
    return {key: rope[key] for key in _OPTIONS[rope["rule"]] if key in rope}


_Rule = Callable[[Mapping[str, Any], int, int, RopeOrigin], dict[str, Any]]
_RULES: dict[str, _Rule] = {
    "abf": _abf,
    "ntk": _ntk,
    "linear": _scaled,
    "yarn": _scaled,
    "llama3": _scaled,
}
_COMPUTED = {"factor", "original_max_position_embeddings"}
_OPTIONS: dict[str, frozenset[str]] = {
    "abf": frozenset({"theta"}),
    "ntk": frozenset(),
    **{name: KEYS[name] - _COMPUTED for name in ("linear", "yarn", "llama3")},
}
_DEFAULTS = {"llama3": {"low_freq_factor": 1.0, "high_freq_factor": 4.0}}
