"""What a model makes of a task's prompts: is each token of the answer its first choice?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lit_sparse.data.tasks import Prompts
from lit_sparse.evaluation.intervals import Estimate, wilson
from lit_sparse.models.head import language_head

_AT_ONCE = 8192
"""Tokens of prompts that a forward takes together, where they are shorter."""

_LOGIT_ROWS = 1024
"""Logits of so many answer tokens exist together: the answer of `copy` is half of a prompt."""


@dataclass(frozen=True)
class Answers:
    """Teacher-forced answers: each token given the right ones before it."""

    hits: np.ndarray
    """bool [prompts, answer tokens]: the model's first choice."""
    nats: np.ndarray
    """float64 [prompts, answer tokens]."""
    depths: np.ndarray
    """float64 [prompts], where the evidence stands, share of the text; NaN where all over it."""
    generated: np.ndarray | None = None
    """bool [prompts], whether greedy generation with the cache gives the answer exactly."""

    @property
    def right(self) -> np.ndarray:
        """bool [prompts]: all of the answer is the first choice."""
        return np.asarray(self.hits.all(1))

    @property
    def accuracy(self) -> Estimate:
        """Share of the prompts that are right, with its interval."""
        return wilson(int(self.right.sum()), len(self.right))

    @property
    def token_accuracy(self) -> float:
        """Share of the answers' tokens."""
        return float(self.hits.mean())

    @property
    def loss(self) -> float:
        """Nats per answer token."""
        return float(self.nats.mean())

    def to_dict(self) -> dict[str, Any]:
        """A form that JSON keeps; see `from_dict`."""
        return {k: None if v is None else v.tolist() for k, v in vars(self).items()}

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> Answers:
        arrays: dict[str, Any] = {k: None if v is None else np.array(v) for k, v in stored.items()}
        return cls(**arrays)

    def by_depth(self, parts: int) -> np.ndarray:
        """Share right in equal parts of the depth, start of the text first: float64 [parts], NaN in
        those without a prompt. One part where the evidence stands all over the text.
        """
        if np.isnan(self.depths).all():
            return np.array([self.accuracy.mean])
        part = np.minimum((self.depths * parts).astype(int), parts - 1)
        found = [self.right[part == i] for i in range(parts)]
        return np.array([own.mean() if len(own) else np.nan for own in found])


@torch.no_grad()
def ask(
    model: Any,
    prompts: Prompts,
    generate: bool = False,
    progress: Callable[[str], None] = lambda _: None,
) -> Answers:
    """Let a causal language model answer, given the right tokens before each.

    Args:
        model: a transformers model.
        prompts: of one task.
        generate: whether it also answers by itself, token by token.
        progress: told which prompts are read.
    """
    head, (count, length) = language_head(model), prompts.ids.shape
    (places,) = torch.from_numpy(prompts.answer[0]).to(model.device).nonzero(as_tuple=True)
    size = max(_AT_ONCE // length, 1)
    hits, nats, generated = [], [], []
    for start in range(0, count, size):
        progress(f"prompt {start + 1} of {count}, {length} tokens")
        ids = torch.from_numpy(prompts.ids[start : start + size]).to(model.device)
        answer = ids[:, places]
        # The base model: the logits of a long prompt never exist as a whole.
        hidden = model.base_model(input_ids=ids, use_cache=False)[0][:, places - 1].flatten(0, 1)
        right, loss = [], []
        for seen, wanted in zip(
            hidden.split(_LOGIT_ROWS), answer.flatten().split(_LOGIT_ROWS), strict=True
        ):
            logits = head(seen).float()
            right.append((logits.argmax(-1) == wanted).cpu())
            loss.append(F.cross_entropy(logits, wanted, reduction="none").double().cpu())
        hits.append(torch.cat(right).view(answer.shape))
        nats.append(torch.cat(loss).view(answer.shape))
        if generate:
            generated += [_writes(model, one, prompts.answer_start) for one in ids]
    return Answers(
        torch.cat(hits).numpy(),
        torch.cat(nats).numpy(),
        prompts.depths,
        np.array(generated) if generate else None,
    )


def _writes(model: Any, ids: Tensor, start: int) -> bool:
    """Whether the model goes on after the question, ids[:start], as the prompt does."""
    question, wanted = ids[None, :start], ids[start:]
    written = model.generate(
        question,
        attention_mask=torch.ones_like(question),
        max_new_tokens=len(wanted),
        min_new_tokens=len(wanted),
        do_sample=False,
        use_cache=True,
    )
    return torch.equal(written[0, start:], wanted)
