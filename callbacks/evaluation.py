"""Does the model still find what it was told far back? Tasks at the stage's length."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_warn

from lit_sparse.callbacks.common import add_figure, datamodule_of, transformers_models
from lit_sparse.data import PackedTextDataModule
from lit_sparse.evaluation import (
    DENSE,
    SPARSE,
    Answers,
    Evaluation,
    LeftOut,
    Questions,
    evaluate,
)
from lit_sparse.evaluation.figure import answers_figure
from lit_sparse.models import is_sparse, whole_sequences


class LongContextEval(Callback):
    """After each validation, ask what only text far back answers, as `lit-sparse evaluate` does, in
    validation text of the stage's full length.

    Logs for each task `TASK/teacher_forced` (share of prompts whose answer tokens are all the
    model's first choice, given the ones before), `TASK/token_accuracy` (share of answer tokens),
    and `TASK/generated` (share of answers that greedy generation with the cache gives exactly). Of
    `ppl` it logs `loss_by_position/START`, nats per token at the positions from there to the next.
    The figure `retrieval` shows the newest answers at each length by depth.

    Needs a `PackedTextDataModule`. Every rank asks everything, also where ranks share rows: there a
    prompt has to fit on one, without gradients.

    Args:
        tasks: some of copy, passkey, multikey, multivalue, variables, aggregation, ppl.
        prompts: of each task, at evenly spaced depths.
        documents: of ppl, at most.
        generate: whether to generate too.
        dense: whether to ask a sparse model with dense attention as well: the same names with
            `_dense` behind them.
        seed: of texts and answers; the same each time at one length.

    Raises:
        ValueError: a value is out of its range.
    """

    def __init__(
        self,
        tasks: Sequence[str] = ("passkey",),
        prompts: int = 8,
        documents: int = 8,
        generate: bool = True,
        dense: bool = False,
        seed: int = 0,
    ) -> None:
        self.tasks = tuple(tasks)
        self._questions = partial(
            Questions,
            tasks=self.tasks,
            prompts=prompts,
            documents=documents,
            generate=generate,
            dense=dense,
            seed=seed,
        )
        try:
            self._questions([2])
        except ValueError as error:
            raise ValueError(f"LongContextEval {error}") from None
        self._told: set[LeftOut] = set()
        self._answers: dict[str, dict[int, dict[str, Answers]]] = {}
        """Task -> length -> side -> the newest answers."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data = datamodule_of(trainer)
        if not isinstance(data, PackedTextDataModule):
            raise ValueError(
                "LongContextEval takes its text from a PackedTextDataModule; remove it from "
                f"trainer.callbacks, or train with one (got {type(data).__name__})"
            )

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        data: PackedTextDataModule = datamodule_of(trainer)
        model: Any = transformers_models(pl_module)[0]
        # The same ranges of positions in every stage.
        questions = self._questions([data.validation_length], longest=data.row_tokens)
        whole = whole_sequences(model) if is_sparse(model) else nullcontext()
        # Where parameters are sharded every call needs all ranks: all make the same calls.
        with whole, trainer.precision_plugin.forward_context():
            found = evaluate(model, data.text_tokenizer, data.validation_text, questions)
        pl_module.log_dict(_named(found), sync_dist=True)
        for what in found.left_out:
            if what not in self._told:
                self._told.add(what)
                at = "" if what.length is None else f" at {what.length} tokens"
                rank_zero_warn(f"LongContextEval leaves out {what.task}{at}: {what.why}")
        for task, at_length in found.answers.items():
            self._answers[task] = dict(sorted((self._answers.get(task, {}) | at_length).items()))
        if self._answers:
            title = f"step {trainer.global_step}"
            add_figure(trainer, "retrieval", partial(answers_figure, self._answers, title))

    def state_dict(self) -> dict[str, Any]:
        return {"answers": _each(self._answers, Answers.to_dict)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._answers = _each(state_dict["answers"], Answers.from_dict)


def _named(found: Evaluation) -> dict[str, float]:
    """What is logged."""
    logged = {}
    for sides_of_losses in found.losses.values():
        for side, losses in sides_of_losses.items():
            for start, end in losses.parts:
                mean = float(losses.of_texts(start, end).mean())
                logged[f"loss_by_position/{start:05d}{_behind(side, sides_of_losses)}"] = mean
    for task, at in found.answers.items():
        for sides in at.values():
            for side, answers in sides.items():
                also = _behind(side, sides)
                logged[f"{task}/teacher_forced{also}"] = answers.accuracy.mean
                logged[f"{task}/token_accuracy{also}"] = answers.token_accuracy
                if answers.generated is not None:
                    logged[f"{task}/generated{also}"] = float(answers.generated.mean())
    return logged


def _behind(side: str, sides: Collection[str]) -> str:
    """Behind a name: the model as it trains has the plain one."""
    return "_dense" if side == DENSE and SPARSE in sides else ""


def _each(answers: dict[str, dict[int, dict[str, Any]]], change: Callable[[Any], Any]) -> Any:
    return {
        task: {n: {side: change(own) for side, own in sides.items()} for n, sides in at.items()}
        for task, at in answers.items()
    }
