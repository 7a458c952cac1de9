"""Turn a transformers model sparse and back, change its law, run it densely for a while."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar, cast

from torch import nn

from lit_sparse.attention.op import check_backend
from lit_sparse.budget import Budget
from lit_sparse.models.state import (
    CONFIG_KEY,
    NAME,
    Law,
    LayerState,
    ModelState,
    find_state,
    layer_state,
    require_state,
)
from lit_sparse.models.support import (
    attention_layers,
    check_support,
    law_layers,
    layer_names,
    window_of,
    windows_everywhere,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Model = TypeVar("Model", bound=nn.Module)


def sparsify(
    model: Model,
    budget: Budget | None = None,
    *,
    layers: Mapping[int, Budget] | None = None,
    block: int = 64,
    tile: int | None = None,
    score: str = "mass",
    backend: str | None = None,
) -> Model:
    """Replace the attention of a transformers causal language model by sparse attention, in place.

    The law is also written to `model.config.sparse_attention`, so that a saved model remembers it:
    `sparsify(AutoModelForCausalLM.from_pretrained(path))` is the same sparse model again, and
    without `sparsify` the directory loads as an ordinary model. Calling it again replaces the law.

    `torch.compile(model, fullgraph=True)` works: a graph serves all documents and observers, and is
    compiled anew for another law and the first time that `set_dense` is used. Tell documents by
    position_ids, a mask or lengths in tensors; host integers would be constants of the graph.

    A layer with a sliding window keeps it to the token, through the same operator, and obeys no
    law: neither budget nor `set_dense` changes it.

    Args:
        model: a causal language model, or its base model, of a supported type (`SUPPORTED`).
        budget: keys per query as a function of the context; None takes the law from the model's
            config.
        layers: budgets of single layers without a window; `Budget.dense()` keeps one dense.
        block: consecutive keys kept or dropped together, in tokens.
        tile: consecutive queries sharing a selection, in tokens; None for the operator's default.
        score: name of the block scorer.
        backend: "cpu" or "reference"; None picks by device. Not stored.

    Returns:
        The same model.

    Raises:
        ValueError: unsupported model, a layer number that is unknown or of a sliding window, no law
            to take, or an attention function of somebody else, which would be lost.
        NotImplementedError: a layer has neither full attention nor a sliding window.
    """
    check_support(model)
    check_backend(backend)
    if budget is not None:
        law = Law(budget, dict(layers or {}), block, tile, score)
    elif layers is None and (block, tile, score) == (64, None, "mass"):
        law = _stored_law(model)
    else:
        raise ValueError(
            "layers, block, tile and score need a budget: without one the whole law is taken from "
            f"config.{CONFIG_KEY}"
        )
    modules, names = attention_layers(model), layer_names(model)
    _check_layers(model, law, names)
    if modules and not law_layers(model):
        warnings.warn(f"the law changes nothing: {windows_everywhere(model)}", stacklevel=2)

    _register()
    _transformers(model).set_attn_implementation(NAME)
    state = find_state(model)
    if state is None:
        state = ModelState(law, backend)
    else:
        # The same object: observers of the model go on observing it.
        state.take(law)
        state.backend = backend
    for layer, module in modules:
        own = LayerState(layer, names[layer], state, window_of(model, layer))
        setattr(module, NAME, own)
    setattr(_transformers(model).config, CONFIG_KEY, law.to_dict())
    return model


def _check_layers(model: nn.Module, law: Law, names: Mapping[int, str]) -> None:
    unknown = sorted(set(law.layers) - set(names))
    if unknown:
        raise ValueError(f"layers names {unknown}, but the model has layers 0 to {len(names) - 1}")
    for layer in law.layers:
        if (window := window_of(model, layer)) is not None:
            raise ValueError(
                f"layers names {layer}, but {names[layer]} has a sliding window of {window} keys, "
                "which it keeps: take it out"
            )


def unsparsify(model: Model) -> Model:
    """Undo `sparsify`, in place: sdpa attention, or eager where the model has no sdpa, and nothing
    of ours on modules or in the config.
    """
    for _, module in attention_layers(model):
        if layer_state(module) is not None:
            delattr(module, NAME)
    transformers_model = _transformers(model)
    if transformers_model.config._attn_implementation == NAME:
        own = "sdpa" if transformers_model._supports_sdpa else "eager"
        transformers_model.set_attn_implementation(own)
    if hasattr(transformers_model.config, CONFIG_KEY):
        delattr(transformers_model.config, CONFIG_KEY)
    return model


def law_of(model: nn.Module) -> Law:
    """The law of a sparsified model; ValueError if it is not one."""
    return require_state(model).law


def configured_law(model: nn.Module) -> Law:
    """The law of a sparsified model as `sparsify` and `set_budget` gave it: `law_of` without
    `alpha_factor`.
    """
    state = require_state(model)
    return replace(state.given, budget=state.budget or state.given.budget)


def alpha_factor(model: nn.Module) -> float:
    """What `scale_budget` multiplies every alpha of a sparsified model by; 1 where it did not."""
    return require_state(model).alpha_factor


def set_budget(model: nn.Module, budget: Budget | None) -> None:
    """Change the budget of the layers of a sparsified model that have none of their own, in place.

    The model's config follows. None gives them back the budget of `sparsify`. Cheap: nothing is
    registered again; a compiled graph is compiled anew once for each law.
    """
    _change_law(model, budget, require_state(model).alpha_factor)


def scale_budget(model: nn.Module, factor: float) -> None:
    """Multiply the alpha of every layer's budget by a factor, in place; dense budgets stay dense.

    The factor is of the budgets as `sparsify` and `set_budget` give them, before and after: a
    second call replaces the first. The model's config follows.
    """
    _change_law(model, require_state(model).budget, factor)


def _change_law(model: nn.Module, budget: Budget | None, alpha_factor: float) -> None:
    state = require_state(model)
    before = state.law
    state.change(budget, alpha_factor)
    if state.law == before:
        return
    for _, module in attention_layers(model):
        cast(LayerState, layer_state(module)).read_model()
    setattr(_transformers(model).config, CONFIG_KEY, state.law.to_dict())


def budget_of(model: nn.Module, layer: int | None = None) -> Budget:
    """What a layer of a sparsified model obeys at the moment; None: those without a budget of their
    own. Of a layer with a sliding window: as many keys as that has.
    """
    state = require_state(model)
    if layer is not None and (window := window_of(model, layer)) is not None:
        return Budget.fixed(window, sink=0, local=1.0)
    if state.dense:
        return Budget.dense()
    return state.law.budget if layer is None else state.law.of(layer)


def set_dense(model: nn.Module, dense: bool) -> None:
    """Let every layer of a sparsified model see all keys (of its window, where it has one), or obey
    the law again.

    The switch is of this process (a dense stage of training); law and config stay as they are.
    """
    require_state(model).dense = dense


def set_exchange(model: nn.Module, exchange: Callable[..., Any] | None) -> None:
    """Let the ranks of a sequence-parallel group exchange heads for tokens around each attention
    call of a sparsified model; None: every call has whole sequences. Of this process.
    """
    require_state(model).exchange = exchange


@contextmanager
def whole_sequences(model: nn.Module) -> Iterator[None]:
    """Inside, a sparsified model is called with whole sequences on every rank, as generation does,
    although sequence-parallel ranks share those of training.
    """
    state = require_state(model)
    before, state.exchange = state.exchange, None
    try:
        yield
    finally:
        state.exchange = before


@contextmanager
def dense_attention(model: nn.Module) -> Iterator[None]:
    """Inside, every layer of a sparsified model has `Budget.dense()`: dense attention per document,
    within its window where it has one.

    With activation checkpointing, call backward inside as well: it runs the layers again.
    """
    state = require_state(model)
    before, state.dense = state.dense, True
    try:
        yield
    finally:
        state.dense = before


def _stored_law(model: nn.Module) -> Law:
    stored = getattr(_transformers(model).config, CONFIG_KEY, None)
    if stored is None:
        raise ValueError(
            f"the model's config has no {CONFIG_KEY}: it was not saved from a sparsified model; "
            "pass a budget, e.g. sparsify(model, Budget(alpha=16, exponent=0.5))"
        )
    return Law.from_dict(stored)


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    from lit_sparse.models.attention import padding_mask, sparse_attention_forward

    # Without a mask function of the same name transformers drops padding and packing silently.
    AttentionInterface.register(NAME, sparse_attention_forward)
    AttentionMaskInterface.register(NAME, padding_mask)


def _transformers(model: nn.Module) -> PreTrainedModel:
    return cast(Any, model)
