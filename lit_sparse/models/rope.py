"""Change a model's rotary position embedding (RoPE) while it lives: context extension by stages.

The frequencies are buffers that no state_dict holds; they follow from the config. Apply the
settings again after restoring a checkpoint into a model built from an older config.
"""

from __future__ import annotations

import copy
import math
from typing import Any, cast

from torch import nn

from lit_sparse.models.support import require_known

_COMMON = frozenset({"rope_type", "rope_theta"})
_KEYS: dict[str, frozenset[str]] = {
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
    return copy.deepcopy(dict(_config(model).rope_parameters))


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
    current = rope_parameters(model)
    kind = parameters.get("rope_type", current["rope_type"])
    if kind not in _KEYS:
        raise ValueError(f"no rope_type {kind!r}; there are {', '.join(_KEYS)}")
    allowed = _COMMON | _KEYS[kind]
    unknown = sorted(set(parameters) - allowed)
    if unknown:
        raise ValueError(
            f"rope_type {kind!r} has no parameter {', '.join(unknown)}; it has "
            f"{', '.join(sorted(allowed))}"
        )
    kept = current if kind == current["rope_type"] else {"rope_theta": current["rope_theta"]}
    wanted = {**kept, **parameters, "rope_type": kind}
    _check_numbers(wanted)
    trial = copy.deepcopy(_config(model))
    trial.rope_parameters = wanted
    try:
        trial.standardize_rope_params()
        trial.validate_rope()
        rotary = _build_rotary(model, trial)
    except KeyError as error:
        raise ValueError(f"rope_type {kind!r}: {error.args[0]}") from error
    _config(model).rope_parameters = trial.rope_parameters
    _install(model, rotary)


def set_max_positions(model: nn.Module, n: int) -> None:
    """Set `config.max_position_embeddings`, the context that the model claims, to `n` tokens.

    RoPE stays as it is. ValueError where it would not: "dynamic" scales by the ratio of the context
    to max_position_embeddings, "yarn" and "longrope" without a factor take it from there.
    """
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise ValueError(f"max_position_embeddings must be a positive number of tokens, got {n!r}")
    current = rope_parameters(model)
    kind = current["rope_type"]
    config = _config(model)
    if n == config.max_position_embeddings:
        return
    if kind == "dynamic" or (kind in ("yarn", "longrope") and current.get("factor") is None):
        raise ValueError(
            f"rope_type {kind!r} scales relative to max_position_embeddings here: another value "
            "would change the frequencies; set a factor or another rope_type with set_rope first"
        )
    config.max_position_embeddings = n
    _install(model, _build_rotary(model, config))


def _check_numbers(parameters: dict[str, Any]) -> None:
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
    return type(old)(config).to(old.inv_freq.device)


def _install(model: nn.Module, rotary: nn.Module) -> None:
    base = cast(Any, model).base_model
    cast(Any, rotary).config = base.config
    rotary.train(base.rotary_emb.training)
    base.rotary_emb = rotary


def _config(model: nn.Module) -> Any:
    return cast(Any, model).config
