"""Change a model's rotary position embedding (RoPE) while it lives: context extension by stages.

The frequencies are buffers that no state_dict holds; they follow from the config. Apply the
settings again after restoring a checkpoint into a model built from an older config.

Where kinds of layers have RoPE of their own (Gemma 3), everything here is about that of the layers
with full attention: a sliding window sees the same distances whatever the context, and keeps its
frequencies.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from lit_sparse.models.support import require_known

FULL = "full_attention"
"""The kind of layer that a longer context changes, as `config.layer_types` calls it."""

_COMMON = frozenset({"rope_type", "rope_theta"})
_ORIGINAL = "original_max_position_embeddings"
# What another rope_type takes over.
_OF_THE_MODEL = ("rope_theta", "partial_rotary_factor")
KEYS: dict[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "dynamic": frozenset({"factor"}),
    "yarn": frozenset(
        {
            "factor",
            "original_max_position_embeddings",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
        }
    ),
    "longrope": frozenset(
        {
            "factor",
            "original_max_position_embeddings",
            "attention_factor",
            "short_factor",
            "long_factor",
        }
    ),
    "llama3": frozenset(
        {
            "factor",
            "original_max_position_embeddings",
            "low_freq_factor",
            "high_freq_factor",
        }
    ),
    "proportional": frozenset({"factor", "partial_rotary_factor"}),
}


def rope_parameters(model: nn.Module) -> dict[str, Any]:
    """A copy of the model's RoPE parameters: rope_type, rope_theta and what the type needs."""
    require_known(model)
    parameters = _config(model).rope_parameters
    return copy.deepcopy(dict(parameters[FULL] if is_nested(parameters) else parameters))


def is_nested(parameters: Mapping[str, Any]) -> bool:
    """Whether `config.rope_parameters` holds parameters by kind of layer."""
    return isinstance(parameters.get(FULL), Mapping)


def frequencies(model: nn.Module, kind: str = FULL) -> tuple[Tensor, float]:
    """Inverse frequencies [rotated dimensions / 2] of the layers of a kind, as they stand, and the
    factor on queries and keys (YaRN's attention factor).
    """
    require_known(model)
    return _frequencies(cast(Any, model).base_model.rotary_emb, kind)


def set_rope(model: nn.Module, **parameters: Any) -> None:
    """Change RoPE in place; the model then gives what one built with these parameters would.

    Args:
        model: a supported transformers model.
        parameters: fields of `config.rope_parameters` in the names of transformers, e.g.
            `rope_theta=8e6` or `rope_type="yarn", factor=4.0,
            original_max_position_embeddings=32768`. Those not given keep their value; with another
            rope_type only rope_theta does. Call it before `set_max_positions`: an
            original_max_position_embeddings not given is what the config says.

    Raises:
        ValueError: an unknown rope_type, a key that the type does not read, one that it needs and
            lacks, or a value out of range. The model is then unchanged.
    """
    positions = _config(model).max_position_embeddings
    wanted = merged_rope(rope_parameters(model), parameters, positions)
    replace_rope(model, wanted, positions)


def merged_rope(
    current: Mapping[str, Any], given: Mapping[str, Any], positions: int
) -> dict[str, Any]:
    """All RoPE parameters where `given` ones change the `current`, as `set_rope` has it.

    `positions` is the context in tokens that a type which scales an original context starts from,
    unless one of the two says so.
    """
    kind = given.get("rope_type", current["rope_type"])
    if kind not in KEYS:
        raise ValueError(f"no rope_type {kind!r}; there are {', '.join(KEYS)}")
    allowed = _COMMON | KEYS[kind]
    unknown = sorted(set(given) - allowed)
    if unknown:
        raise ValueError(
            f"rope_type {kind!r} has no parameter {', '.join(unknown)}; it has "
            f"{', '.join(sorted(allowed))}"
        )
    kept = current
    if kind != current["rope_type"]:
        kept = {key: current[key] for key in _OF_THE_MODEL if key in current}
    wanted = {**kept, **given, "rope_type": kind}
    if "original_max_position_embeddings" in allowed:
        wanted.setdefault("original_max_position_embeddings", positions)
    return wanted


def replace_rope(model: nn.Module, parameters: Mapping[str, Any], positions: int) -> None:
    """Give the model these RoPE parameters, all of them, and max_position_embeddings.

    ValueError, and the model unchanged, where transformers could not build it so.
    """
    require_known(model)
    check_numbers(parameters)
    trial = copy.deepcopy(_config(model))
    _assign(trial, parameters, positions)
    try:
        trial.standardize_rope_params()
        trial.validate_rope()
        rotary = _build_rotary(model, trial)
    except (KeyError, ValueError) as error:
        # Of Phi-3, to which transformers gives no other scaling than longrope.
        refused = "must be one of" in str(error)
        advice = "; rules abf and ntk change rope_theta alone" if refused else ""
        raise ValueError(
            f"rope_type {parameters['rope_type']!r}: {error.args[0]}{advice}"
        ) from error
    rotates = rotary_dimensions(model)
    if (found := 2 * _frequencies(rotary)[0].numel()) != rotates:
        raise ValueError(
            f"rope_type {parameters['rope_type']!r} would rotate {found} dimensions of a head, "
            f"but the model rotates {rotates} "
            f"(partial_rotary_factor: {parameters.get('partial_rotary_factor')})"
        )
    config = _config(model)
    config.rope_parameters = trial.rope_parameters
    config.max_position_embeddings = positions
    if hasattr(trial, "head_dim"):
        config.head_dim = trial.head_dim
    if hasattr(trial, _ORIGINAL):
        config.original_max_position_embeddings = trial.original_max_position_embeddings
    _install(model, rotary)


def _assign(config: Any, parameters: Mapping[str, Any], positions: int) -> None:
    if getattr(config, "head_dim", 0) is None:
        # Mixtral's config leaves it open, and transformers 5.23 cannot compute YaRN from that.
        config.head_dim = config.hidden_size // config.num_attention_heads
    own = copy.deepcopy(dict(parameters))
    nested = is_nested(config.rope_parameters)
    if nested and own.get("truncate") is False:
        # transformers 5.23 looks for the key among the kinds of layers.
        raise ValueError("truncate: transformers ignores it where kinds of layers have own RoPE")
    config.rope_parameters = {**config.rope_parameters, FULL: own} if nested else own
    config.max_position_embeddings = positions
    # Phi-3 holds it beside the RoPE parameters too, and that one counts.
    if hasattr(config, _ORIGINAL) and _ORIGINAL in own:
        config.original_max_position_embeddings = own[_ORIGINAL]


def rebuild_rope(model: nn.Module, device: torch.device) -> None:
    """Compute the frequencies from the config, for a model that was built without memory (meta)."""
    require_known(model)
    with device:
        _install(model, type(cast(Any, model).base_model.rotary_emb)(_config(model)))


def rotary_dimensions(model: nn.Module) -> int:
    """Dimensions of a head that RoPE rotates: head_dim, or the part of it that the model says."""
    return 2 * frequencies(model)[0].numel()


def scales_by_positions(parameters: Mapping[str, Any]) -> bool:
    """Whether the frequencies depend on the config's max_position_embeddings."""
    kind = parameters["rope_type"]
    return kind == "dynamic" or (kind in ("yarn", "longrope") and parameters.get("factor") is None)


def set_max_positions(model: nn.Module, n: int) -> None:
    """Set `config.max_position_embeddings`, the context that the model claims, to `n` tokens.

    RoPE stays as it is. ValueError where it would not: "dynamic" scales by the ratio of the context
    to max_position_embeddings, "yarn" and "longrope" without a factor take it from there.
    """
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise ValueError(f"max_position_embeddings must be a positive number of tokens, got {n!r}")
    current = rope_parameters(model)
    config = _config(model)
    if n == config.max_position_embeddings:
        return
    if scales_by_positions(current):
        raise ValueError(
            f"rope_type {current['rope_type']!r} scales relative to max_position_embeddings here: "
            "another value would change the frequencies; set a factor or another rope_type with "
            "set_rope first"
        )
    config.max_position_embeddings = n
    _install(model, _build_rotary(model, config))


def restore_frequencies(model: nn.Module) -> None:
    """Give RoPE its float32 frequencies back where a cast of the whole model has rounded them.

    `model.to(torch.bfloat16)`, as Lightning and DeepSpeed call it for weights in half precision,
    takes buffers along. Rounded to 8 bits a frequency is up to .4 % off: after 1000 tokens a
    fast dimension may be radians away from where it was trained.
    """
    if frequencies(model)[0].dtype.itemsize < 4:
        _install(model, _build_rotary(model, _config(model)))


def check_numbers(parameters: Mapping[str, Any]) -> None:
    """ValueError where rope_theta or factor is out of its range."""
    # transformers only warns about these, or computes NaN.
    for key, least in (("rope_theta", 0.0), ("factor", 1.0)):
        value = parameters.get(key)
        if value is None:
            continue
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        in_range = number and math.isfinite(value) and value >= least and value > 0
        if not in_range:
            rule = f"a number >= {least:g}" if least else "a positive number"
            raise ValueError(f"{key} must be {rule}, got {value!r}")


def _build_rotary(model: nn.Module, config: Any) -> nn.Module:
    old = cast(Any, model).base_model.rotary_emb
    # Frequencies in float32 whatever the weights are, as from_pretrained builds them.
    return type(old)(config).to(_frequencies(old)[0].device)


def _frequencies(rotary: Any, kind: str = FULL) -> tuple[Tensor, float]:
    prefix = "" if hasattr(rotary, "inv_freq") else f"{kind}_"
    return getattr(rotary, f"{prefix}inv_freq"), getattr(rotary, f"{prefix}attention_scaling")


def _install(model: nn.Module, rotary: nn.Module) -> None:
    base = cast(Any, model).base_model
    cast(Any, rotary).config = base.config
    rotary.train(base.rotary_emb.training)
    base.rotary_emb = rotary


def _config(model: nn.Module) -> Any:
    return cast(Any, model).config
