"""The same validation batch sparse and dense: how far the two models' next tokens are apart."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor
from torch.nn import functional as F

from lit_sparse.distributed import Ranks, ranks_of
from lit_sparse.distributed.gradients import engine_of
from lit_sparse.models import dense_attention, find_documents
from lit_sparse.models.head import language_head

IGNORED = -100
_BUCKETS = 48
_LOGITS = 2**25
"""Logits that exist at a time, of each of the two models."""


@dataclass(frozen=True)
class Gap:
    """What was compared, of all ranks, as sums over tokens; float64 on the host."""

    sums: Tensor
    """[buckets, 6]: KL(dense || sparse) in nats, tokens, equal first choices, sparse and dense loss
    in nats, targets; of the tokens that see at least 2^i keys and fewer than 2^(i + 1).
    """
    documents: Tensor
    """[documents, 5]: of each document sums of 1, x, x^2, y, xy over its tokens, where x is ln n
    and y the KL.
    """

    @property
    def kl(self) -> float:
        """Nats a token."""
        return self._share(0, 1)

    @property
    def top1_agreement(self) -> float:
        """Share of the tokens for which both models' first choice is the same."""
        return self._share(2, 1)

    @property
    def loss_delta(self) -> float:
        """Sparse - dense loss, nats a target; NaN without targets."""
        return self._share(3, 5) - self._share(4, 5)

    def by_context(self, least_tokens: int = 1) -> dict[int, float]:
        """KL by context, smallest n of a bucket -> nats a token; buckets of fewer tokens left
        out.
        """
        kl, tokens = self.sums[:, 0].tolist(), self.sums[:, 1].tolist()
        pairs = enumerate(zip(kl, tokens, strict=True))
        return {2**i: nats / count for i, (nats, count) in pairs if count >= least_tokens}

    def _share(self, what: int, of: int) -> float:
        part, whole = self.sums[:, [what, of]].sum(0).tolist()
        return part / whole if whole else float("nan")


class DenseComparison:
    """Runs batches of one validation a second time, densely, and adds up the differences.

    The decoder's call is repeated, not the module's step: a step may log, count and use the head in
    pieces. Of several calls in a step the first is compared. Ranks that share a row compare their
    parts of it, and a document that spans them counts as one.

    Args:
        model: a sparsified causal language model.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._hooks: list[Any] = []
        self._call: tuple[tuple[Any, ...], dict[str, Any], Tensor] | None = None
        self._labels: Tensor | None = None
        self._sums = torch.zeros(_BUCKETS, 6, dtype=torch.float64)
        self._documents: list[Tensor] = []

    def start_batch(self) -> None:
        """Remember the decoder call that comes next."""
        self.stop()
        self._hooks = [
            self._model.base_model.register_forward_hook(self._remember_call, with_kwargs=True),
            self._model.register_forward_pre_hook(self._remember_labels, with_kwargs=True),
        ]

    def stop(self) -> None:
        """Remember nothing more."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._call, self._labels = [], None, None

    @torch.no_grad()
    def end_batch(self, trainer: Trainer, batch: Any) -> None:
        """Compare the call that was made since `start_batch`, if there was one."""
        call, labels, model = self._call, self._labels, self._model
        self.stop()
        if call is None:
            return
        args, kwargs, sparse = call
        with trainer.precision_plugin.forward_context():
            with dense_attention(model):
                dense = model.base_model(*args, **{**kwargs, "use_cache": False})[0]
            named = _named(model.base_model, args, kwargs)
            tokens = _tokens(named, sparse, labels, batch, ranks_of(trainer))
            places, targets = tokens.places.to(sparse.device), tokens.targets.to(sparse.device)
            sparse, dense = (x.flatten(0, 1)[places] for x in (sparse, dense))
            step = max(_LOGITS // model.config.vocab_size, 1)
            pieces = -(-_most(trainer, len(places)) // step)
            head = language_head(model)
            found = compare(sparse, dense, head, targets, max(pieces, 1)).cpu().double()
        self._add(found, tokens)

    def result(self, pl_module: LightningModule) -> Gap | None:
        """What all ranks compared; None if no rank compared anything. Called on every rank."""
        documents = torch.cat([torch.zeros(0, 5, dtype=torch.float64), *self._documents])
        sums = self._sums
        if pl_module.trainer.world_size > 1:
            ranks = ranks_of(pl_module.trainer)

            def gather(x: Tensor) -> Tensor:
                return cast(Tensor, pl_module.all_gather(x.to(pl_module.device))).cpu()

            sums = gather(sums).sum(0)
            most = int(gather(torch.tensor(len(documents))).max())
            documents = F.pad(documents, (0, 0, 0, most - len(documents)))
            # Ranks that share rows have parts of the same documents.
            parts = gather(documents).unflatten(0, (ranks.data_size, ranks.sequence_size))
            documents = parts.sum(1).flatten(0, 1)
        documents = documents[documents[:, 0] > 0]
        return Gap(sums, documents) if len(documents) else None

    def _remember_call(self, module: Any, args: tuple, kwargs: dict, output: Any) -> None:
        if self._call is None and kwargs.get("past_key_values") is None:
            self._call = (args, kwargs, output[0].detach())

    def _remember_labels(self, module: Any, args: tuple, kwargs: dict) -> None:
        if self._call is None:
            self._labels = kwargs.get("labels")

    def _add(self, found: Tensor, tokens: _Tokens) -> None:
        kl, agree, sparse, dense = found.unbind(1)
        one, counts = torch.ones_like(kl), (tokens.targets != IGNORED).double()
        columns = torch.stack([kl, one, agree, sparse, dense, counts], 1)
        bucket = tokens.context.double().log2().floor().long().clamp(max=_BUCKETS - 1)
        self._sums.index_add_(0, bucket, columns)
        x = tokens.context.double().log()
        columns = torch.stack([one, x, x * x, kl, x * kl], 1)
        sums = torch.zeros(tokens.documents, 5, dtype=torch.float64)
        self._documents.append(sums.index_add_(0, tokens.document, columns))


def compare(sparse: Tensor, dense: Tensor, head: Any, targets: Tensor, pieces: int) -> Tensor:
    """float32 [T, 4]: KL(dense || sparse) in nats, whether the first choices agree, and the two
    losses in nats, 0 where there is no target.

    Args:
        sparse, dense: [T, D], last hidden states.
        head: of the language model, [N, D] -> logits [N, vocabulary].
        targets: int64 [T].
        pieces: in which the tokens go through the head, so many that the logits of one have room.
    """
    parts = []
    for ours, theirs, target in zip(
        *(x.tensor_split(pieces) for x in (sparse, dense, targets)), strict=True
    ):
        ours, theirs = (head(x).float().log_softmax(-1) for x in (ours, theirs))
        kl = (theirs.exp() * (theirs - ours)).sum(-1)
        agree = ours.argmax(-1) == theirs.argmax(-1)
        losses = [
            F.nll_loss(x, target, ignore_index=IGNORED, reduction="none") for x in (ours, theirs)
        ]
        parts.append(torch.stack([kl, agree.to(kl), *losses], 1))
    return torch.cat(parts)


def _most(trainer: Trainer, tokens: int) -> int:
    """The largest number of tokens that a rank compares, where ranks have to call the head equally
    often: its parameters are sharded, and each call puts them together.
    """
    engine = engine_of(trainer)
    if engine is None or not engine.zero_optimization_partition_weights():
        return tokens
    count = torch.tensor(tokens, device=trainer.strategy.root_device)
    return int(trainer.strategy.reduce(count, reduce_op="max"))


@dataclass(frozen=True)
class _Tokens:
    """The T real tokens of a batch, or of this rank's part of it, document by document; int64 [T]
    on the host.
    """

    places: Tensor
    """Where they stand in [batch * length]."""
    document: Tensor
    documents: int
    """Of the whole batch."""
    context: Tensor
    targets: Tensor


_BY_TOKEN = ("attention_mask", "position_ids", "input_ids")
"""Arguments of a decoder with a token dimension."""


def _tokens(
    call: Mapping[str, Any], hidden: Tensor, passed_labels: Tensor | None, batch: Any, ranks: Ranks
) -> _Tokens:
    """Documents of a decoder call and what each token should predict.

    Targets are the labels that the module passed to the model, or has in its batch, shifted already
    or not; where it has none, the next token of the same document. Where ranks share rows, the
    call, `hidden` and the passed labels are this rank's part, the batch is whole.
    """
    rows, length = hidden.shape[0], hidden.shape[1] * ranks.sequence_size
    given = {name: x for name, x in call.items() if x is not None}
    given |= {name: ranks.whole_row(given[name]) for name in _BY_TOKEN if name in given}
    telling = ("attention_mask", "position_ids", "cu_seq_lens_q", "cu_seq_lens_k")
    told = {name: given[name] for name in telling if name in given}
    found = find_documents(rows, length, length, **told)
    places = torch.arange(rows * length) if found.queries is None else found.queries.cpu()
    starts = torch.tensor(found.cu_seqlens)
    # Never an empty document: the next one starts at the same token.
    document = torch.bucketize(torch.arange(len(places)), starts[1:], right=True)
    context = torch.arange(len(places)) - starts[document] + 1

    targets = torch.full((len(places),), IGNORED)
    ids = given.get("input_ids")
    labels = None if passed_labels is None else ranks.whole_row(passed_labels)
    if labels is None and isinstance(batch, Mapping):
        labels = batch.get("labels")
    if labels is None or labels.shape != (rows, length):
        labels = ids
    if labels is not None:
        packed = labels.flatten().cpu()[places]
        if passed_labels is not None or _is_unshifted(labels, ids):
            follows = document[1:] == document[:-1]
            targets[:-1] = torch.where(follows, packed[1:], IGNORED)
        else:
            targets = packed
    if ranks.sequence_size > 1:  # one row without padding
        part = ranks.own_part(length)
        document, context, targets = document[part], context[part], targets[part]
        places = torch.arange(len(targets))
    return _Tokens(places, document, len(found), context, targets)


def _is_unshifted(labels: Tensor, ids: Tensor | None) -> bool:
    return ids is not None and bool(((labels == ids) | (labels == IGNORED)).all())


def _named(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name."""
    bound = dict(inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments)
    return {**bound.pop("kwargs", {}), **bound}
