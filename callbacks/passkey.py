"""Does the model still find what it was told far back? Passkey retrieval at the stage's length."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from pytorch_lightning import Callback, LightningModule, Trainer

from lit_sparse.callbacks.common import datamodule_of, transformers_models
from lit_sparse.data import PackedTextDataModule
from lit_sparse.data.tasks import make_task, prompts
from lit_sparse.models import is_sparse, whole_sequences


class PasskeyEval(Callback):
    """After each validation, ask for a passkey planted in text of the stage's full length.

    Logs `passkey/teacher_forced` (share of prompts whose answer tokens are all the model's first
    choice, given the ones before), `passkey/token_accuracy` (share of answer tokens), and
    `passkey/generated` (share of answers that greedy generation with the cache gives exactly).
    Needs a `PackedTextDataModule`. Every rank asks for every passkey, also where ranks share rows:
    there a prompt has to fit on one, without gradients.

    Args:
        prompts: prompts, at evenly spaced depths.
        generate: whether to generate too.
        seed: of texts and keys; the same prompts each time at one length.
    """

    def __init__(self, prompts: int = 8, generate: bool = True, seed: int = 0) -> None:
        if prompts < 1:
            raise ValueError(f"PasskeyEval prompts must be >= 1, got {prompts}")
        self.prompts, self.generate, self.seed = prompts, generate, seed

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data = datamodule_of(trainer)
        if not isinstance(data, PackedTextDataModule):
            raise ValueError(
                "PasskeyEval takes its text from a PackedTextDataModule; remove it from "
                f"trainer.callbacks, or train with one (got {type(data).__name__})"
            )

    @torch.no_grad()
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        data: PackedTextDataModule = datamodule_of(trainer)
        model: Any = transformers_models(pl_module)[0]
        asked = prompts(
            make_task("passkey", data.text_tokenizer),
            data.validation_text,
            data.validation_length,
            self.prompts,
            np.random.default_rng(self.seed),
        )
        start = asked.answer_start
        tokens = torch.from_numpy(asked.ids).to(pl_module.device)
        right, generated = [], []
        whole = whole_sequences(model) if is_sparse(model) else nullcontext()
        # Where parameters are sharded every call needs all ranks: all make the same calls.
        with whole, trainer.precision_plugin.forward_context():
            for prompt in tokens.split(1):
                question, answer = prompt[:, :start], prompt[:, start:]
                logits = model(prompt, use_cache=False, logits_to_keep=answer.shape[1] + 1).logits
                right.append(logits[:, :-1].argmax(-1) == answer)
                if self.generate:
                    written = model.generate(
                        question,
                        attention_mask=torch.ones_like(question),
                        max_new_tokens=answer.shape[1],
                        min_new_tokens=answer.shape[1],
                        do_sample=False,
                        use_cache=True,
                    )
                    generated.append((written[:, start:] == answer).all())
        hits = torch.cat(right)
        found = {
            "passkey/teacher_forced": hits.all(-1).float().mean(),
            "passkey/token_accuracy": hits.float().mean(),
        }
        if generated:
            found["passkey/generated"] = torch.stack(generated).float().mean()
        pl_module.log_dict(found, sync_dist=True)
