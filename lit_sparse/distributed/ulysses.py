"""Ulysses sequence parallelism: ranks share a row, and exchange tokens for heads around attention.

DeepSpeed Ulysses (arXiv 2309.14509) in DeepSpeed's own form for transformers. Outside of attention
each rank has a part of the tokens; inside, all tokens and a part of the heads. Selection and
operator are local to a key-value head, so the result does not depend on the number of ranks.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lit_sparse.distributed.ranks import Ranks
from lit_sparse.models import find_documents, find_models, is_sparse, set_exchange
from lit_sparse.models.attention import attend_whole

SHARDED = ("input_ids", "position_ids", "labels")
"""What of a batch has a token dimension."""


def shard_sequence(batch: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
    """The part of a batch that this rank computes; the batch itself where each rank has its own.

    Args:
        batch: `input_ids`, `position_ids` and `labels`, int64 [1, T]. Labels are already shifted:
            a part does not know the first token of the next one.
        ranks: of this process.

    Returns:
        The batch with [1, T / sequence_size] of these, and besides `cu_seq_lens_q`, the cumulative
        lengths of the documents of the whole row as host integers: to be passed on to the model,
        whose layers would look for them one by one.

    Raises:
        ValueError: the row cannot be divided, or the batch has several rows.
    """
    if ranks.sequence_size == 1:
        return batch
    rows, length = batch["position_ids"].shape
    if rows != 1:
        raise ValueError(
            f"a batch of {rows} rows under sequence parallelism: a micro-batch is one packed row"
        )
    part = ranks.own_part(length)
    documents = find_documents(1, length, length, position_ids=batch["position_ids"])
    return {
        **{k: v[:, part].contiguous() if k in SHARDED else v for k, v in batch.items()},
        "cu_seq_lens_q": documents.cu_seqlens,
    }


def check_heads(module: nn.Module, sequence_size: int, world_size: int) -> None:
    """ValueError unless the key-value heads of every transformers model inside can be divided."""
    for model in find_models(module):
        heads = model.config.get_text_config().num_key_value_heads
        if heads % sequence_size:
            works = [n for n in range(1, heads + 1) if heads % n == 0 and world_size % n == 0]
            raise ValueError(
                f"strategy.sequence_parallel = {sequence_size} does not divide the {heads} "
                f"key-value heads of {type(model).__name__}; on {world_size} ranks these do: "
                f"{', '.join(map(str, works))}"
            )


def attach(module: nn.Module, ranks: Ranks) -> None:
    """Put the exchange around the attention of every transformers model in a module.

    Raises:
        ValueError: a model that is not sparse. Budget.dense() makes it dense by our operator.
    """
    if ranks.sequence_size == 1:
        return
    for model in find_models(module):
        if not is_sparse(model):
            raise ValueError(
                f"strategy.sequence_parallel > 1, but {type(model).__name__} does not run our "
                "attention: add SparseAttention(Budget(...)) to the callbacks; Budget.dense() "
                "drops nothing"
            )
        set_exchange(model, _exchange(model.config.get_text_config(), ranks))


def detach(module: nn.Module, ranks: Ranks) -> None:
    """Take the exchange away: a rank that calls the model now, alone, would wait for the others."""
    if ranks.sequence_size > 1:
        for model in filter(is_sparse, find_models(module)):
            set_exchange(model, None)


def _exchange(config: Any, ranks: Ranks) -> Any:
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

    head_dim = getattr(config, "head_dim", None) or (
        config.hidden_size // config.num_attention_heads
    )
    ulysses = UlyssesSPAttentionHF(
        attn=attend_whole,
        batch_size=1,
        attn_head_count=config.num_attention_heads,
        attn_head_size=head_dim,
        kv_head_count=config.num_key_value_heads,
        num_hidden_layers=config.num_hidden_layers,
        process_group=ranks.group,
        seq_length_is_variable=True,
    )

    def exchange(
        layer: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        _check_call(query, key, attention_mask, kwargs.get("position_ids"))
        if (sinks := kwargs.get("s_aux")) is not None:
            kwargs["s_aux"] = sinks[ranks.own_heads(len(sinks))]
        return ulysses(layer, query, key, value, None, *args, **kwargs)

    return exchange


def _check_call(query: Tensor, key: Tensor, mask: Tensor | None, positions: Tensor | None) -> None:
    if mask is not None:
        raise NotImplementedError(
            "an attention mask with padding under sequence parallelism: give packed rows without "
            "padding, and position_ids that start again at every document"
        )
    if query.shape[0] != 1 or query.shape[2] != key.shape[2] or positions is None:
        raise ValueError(
            f"sequence parallelism takes one row without a cache and with its position_ids, got "
            f"queries {list(query.shape)} and keys {list(key.shape)}: pass "
            "lit_sparse.distributed.shard_sequence(batch, ranks) to the model; generation runs "
            "inside lit_sparse.models.whole_sequences(model)"
        )
