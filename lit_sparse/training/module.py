"""SparseLM: the LightningModule that trains a transformers causal language model on packed rows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, cast

import torch
from pytorch_lightning import LightningModule
from torch import Tensor
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from lit_sparse.distributed import gradient_divisor, ranks_of, shard_sequence
from lit_sparse.distributed.checkpoint import description
from lit_sparse.distributed.gradients import (
    check_strategy,
    discard_step,
    gradients_are_whole,
    norm_of_last_step,
)
from lit_sparse.distributed.loading import load_pretrained
from lit_sparse.distributed.weights import whole_shape
from lit_sparse.models import build_model, check_source, model_config
from lit_sparse.models.lora.adapters import LoRA, add_lora
from lit_sparse.models.lora.base import Base
from lit_sparse.models.lora.checkpoints import check_adapters, left_out
from lit_sparse.training.activations import Activations, set_activations
from lit_sparse.training.adapters import check_liger_head, check_tiled_dropout, frozen_dtype
from lit_sparse.training.compilation import check_compilation, check_compiler, compile_layers
from lit_sparse.training.curriculum import find_curriculum
from lit_sparse.training.liger import use_liger_kernels
from lit_sparse.training.loss import IGNORED, Loss, check_loss, summed_loss
from lit_sparse.training.tiled import check_tiling, tile_mlps

_CALL = ("input_ids", "position_ids", "cu_seq_lens_q")
"""What of a batch the decoder is called with."""


class SparseLM(LightningModule):
    """A causal language model, AdamW with warm-up and cosine decay, and a loss that is right by
    tokens.

    The model is an ordinary transformers one; the `SparseAttention` callback makes it sparse.
    Batches are those of `PackedTextDataModule`.

    A new model is there from the start, whole on every rank, and a strategy may shard it later. A
    pretrained one is checked at the start, and loaded by `configure_model`: under ZeRO 3 in shards.

    Args:
        pretrained: local Hugging Face directory to fine-tune; None: a new model.
        architecture: transformers config of a new model: `model_type` and its keys. Beside
            `pretrained` it is what the directory has to hold, see
            `lit_sparse.models.build.model_config`.
        lora: adapters to train instead of the weights of `pretrained`; None trains all of them.
            Checkpoints then hold what trains, and not the rest. Under precision bf16-mixed the
            rest is bfloat16, as every product would see it.
        learning_rate: peak of the schedule, where the curriculum's stage sets none.
        min_learning_rate: end of the cosine, as a share of the peak.
        warmup_steps: optimizer steps of linear warm-up.
        weight_decay: of matrices; vectors (norms, biases) and embeddings do not decay.
        betas: of AdamW.
        activations: "keep" for the backward, "recompute" in it from the input of each layer, or
            "offload": the same with those inputs in CPU memory.
        tiled_mlp: parts of a row whose MLP activations exist one at a time (DeepSpeed); None for
            the whole row.
        loss: how the logits of a whole row are avoided: "chunked", "tiled" (DeepSpeed) or "liger".
        loss_chunk: tokens whose logits exist at a time; Liger chooses by itself.
        liger_kernels: run RMSNorm, RoPE and SwiGLU by Liger's CUDA kernels.
        compile: compile the layers by torch.compile, all but their attention; see `compile_layers`.
        trust_remote_code: run Python code that the directory of `pretrained` brings for a model
            that transformers does not know, with all rights of this process.
    """

    applies_stage_learning_rates = True
    """Asked for by `ContextCurriculum` where a stage sets a learning rate."""

    shards_sequences = True
    """Asked for by `DeepSpeedSparseStrategy` under sequence parallelism."""

    def __init__(
        self,
        pretrained: str | None = None,
        architecture: dict[str, Any] | None = None,
        lora: LoRA | None = None,
        learning_rate: float = 3e-4,
        min_learning_rate: float = 0.1,
        warmup_steps: int = 100,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.95),
        activations: Activations = "keep",
        tiled_mlp: int | None = None,
        loss: Loss = "chunked",
        loss_chunk: int = 1024,
        liger_kernels: bool = False,
        compile: bool = False,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        for key, value, holds in (
            ("learning_rate", learning_rate, learning_rate > 0),
            ("min_learning_rate", min_learning_rate, 0 <= min_learning_rate <= 1),
            ("warmup_steps", warmup_steps, warmup_steps >= 0),
            ("weight_decay", weight_decay, weight_decay >= 0),
            ("loss_chunk", loss_chunk, loss_chunk >= 1),
        ):
            if not holds:
                raise ValueError(f"model.{key} is out of its range: {value}")
        check_source(pretrained, architecture, trust_remote_code)
        check_loss(loss, model_config(pretrained, architecture, trust_remote_code))
        if compile:
            check_compilation(liger_kernels, tiled_mlp)
        if isinstance(lora, Mapping):  # of a checkpoint, which holds plain types only
            lora = LoRA(**lora)
        self.save_hyperparameters()
        self.save_hyperparameters({"lora": lora and asdict(lora)})
        if lora is not None:
            self.strict_loading = False  # on_load_checkpoint looks at the adapters itself
        self.model: Any = None
        if pretrained is None:
            # Before any strategy acts: the same random weights, however they will be sharded.
            self.configure_model()
        self._step_has_tokens = False
        self._step_total: Tensor | None = None

    def configure_model(self) -> None:
        """Build `model`, unless it is there. Lightning calls this inside of what the strategy needs
        to load pretrained weights in shards; call it to have them earlier.
        """
        if self.model is not None:
            return
        options = self.hparams
        pretrained, lora = options["pretrained"], options["lora"]
        trusted = options["trust_remote_code"]
        strategy: Any = self._trainer.strategy if self._trainer else None
        if pretrained is not None and getattr(strategy, "zero_stage_3", False):
            model = load_pretrained(pretrained, strategy.config, trusted)
        else:
            dtype = frozen_dtype(strategy) if lora else torch.float32
            model = build_model(
                pretrained, options["architecture"], dtype=dtype, trust_remote_code=trusted
            )
        model.train()  # transformers loads for inference, where all activations are kept
        if options["liger_kernels"]:
            use_liger_kernels(model)
        if options["tiled_mlp"] is not None:  # tiles of what Liger made of the MLPs
            tile_mlps(model, options["tiled_mlp"])
        if lora is not None:
            add_lora(model, LoRA(**lora), None if pretrained is None else Base.of(pretrained))
            if options["loss"] == "liger":
                check_liger_head(model)
            if lora["dropout"]:
                check_tiled_dropout(model, bool(options["tiled_mlp"]), options["loss"] == "tiled")
        set_activations(model, options["activations"])
        if options["compile"]:
            compile_layers(model)
        self.model = model

    @property
    def model_config(self) -> Any:
        """The transformers config of `model`, also before that is loaded."""
        if self.model is not None:
            return self.model.config
        names = ("pretrained", "architecture", "trust_remote_code")
        return model_config(*(self.hparams[name] for name in names))

    def setup(self, stage: str) -> None:
        # Lightning calls this before weights are read.
        tokens = getattr(self._datamodule, "vocab_size", None)
        embeddings = self.model_config.get_text_config().vocab_size
        if tokens is not None and tokens > embeddings:
            raise ValueError(
                f"data.tokenizer has {tokens} tokens but the model embeds {embeddings}: "
                + (
                    "set model.architecture.vocab_size"
                    if self.hparams["pretrained"] is None
                    else "use the tokenizer that model.pretrained was trained with, or resize its "
                    "embeddings first (transformers' resize_token_embeddings)"
                )
            )

    def on_fit_start(self) -> None:
        check_strategy(self.trainer)
        if self.hparams["lora"] and self.hparams["pretrained"] is None:
            raise ValueError(
                "model.lora adapts weights that have learned something, and those of "
                "model.architecture are random: set model.pretrained instead, or leave model.lora "
                "out"
            )
        if self.hparams["tiled_mlp"] is not None:
            check_tiling(self.trainer, "model.tiled_mlp")
        if self.hparams["loss"] == "tiled":
            check_tiling(self.trainer, "model.loss: tiled")
        if self.hparams["compile"]:
            check_compiler(self.trainer)

    @property
    def _datamodule(self) -> Any:
        return getattr(self.trainer, "datamodule", None)

    @property
    def _store_names(self) -> list[str]:
        return getattr(self._datamodule, "store_names", [])

    def token_loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Summed loss in nats and the number of loss tokens of one packed row, or of this rank's
        part of it.
        """
        part = shard_sequence(batch, ranks_of(self.trainer)) if self._trainer else batch
        call = {name: part[name] for name in _CALL if name in part}
        hidden = self.model.base_model(**call, use_cache=False).last_hidden_state
        labels, kind, chunk = part["labels"], self.hparams["loss"], self.hparams["loss_chunk"]
        return summed_loss(self.model, hidden, labels, kind, chunk), (labels != IGNORED).sum()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        total, _ = self.token_loss(batch)
        step_tokens = batch["step_tokens"]
        self._step_has_tokens = bool(step_tokens > 0)
        self._log_loss(total.detach().clone(), batch_idx, step_tokens)  # it is reduced in place
        # The mean over the tokens of the whole optimizer step, whichever rank and micro-batch they
        # are in.
        return total * gradient_divisor(self.trainer) / step_tokens.clamp(min=1)

    def _log_loss(self, total: Tensor, batch_idx: int, step_tokens: Tensor) -> None:
        """Log what the optimizer step minimises, once its last micro-batch is there."""
        self._step_total = total if self._step_total is None else self._step_total + total
        if (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0:
            whole = self.trainer.strategy.reduce(self._step_total, reduce_op="sum")
            self.log("train/loss", whole / step_tokens.clamp(min=1), prog_bar=True)
            self._step_total = None

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if gradients_are_whole(self.trainer):
            gradients = [p.grad for p in self.parameters() if p.grad is not None]
            self.log("train/grad_norm", torch.nn.utils.get_total_norm(gradients))
        self.log("train/lr", optimizer.param_groups[0]["lr"])
        if not self._step_has_tokens:
            # AdamW would go on by its momentum, and by decay, on a step that has nothing to learn
            # from.
            discard_step(self.trainer, optimizer)
            self.log("train/steps_without_tokens", 1.0, reduce_fx="sum")

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        if (norm := norm_of_last_step(self.trainer)) is not None:
            self.log("train/grad_norm", norm)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        total, count = self.token_loss(batch)
        # One line for each store of a mixture; batches of others' data modules are of one.
        source = int(batch["source"]) if "source" in batch else 0
        self._validation[source] += torch.stack([total.double(), count.double()])

    def on_validation_epoch_start(self) -> None:
        stores = max(1, len(self._store_names))
        self._validation = torch.zeros(stores, 2, dtype=torch.float64, device=self.device)

    def on_validation_epoch_end(self) -> None:
        # By tokens over all rows and ranks: a mean of row means would favour rows of many short
        # pieces.
        sums = (
            cast(Tensor, self.all_gather(self._validation)).view(-1, *self._validation.shape).sum(0)
        )
        total, count = sums.sum(0)
        loss = (total / count.clamp(min=1)).float()
        self.log("val/loss", loss)
        bytes_per_token = getattr(self._datamodule, "bytes_per_token", None)
        if bytes_per_token is not None:
            self.log("val/bits_per_byte", loss / (math.log(2) * bytes_per_token))
        length = getattr(self._datamodule, "validation_length", None)
        if length is not None:
            # val/loss jumps where a stage starts: a curve of one length compares with itself.
            self.log(f"val_by_length/{length}", loss)
        if len(sums) > 1:
            for name, (store_total, store_count) in zip(self._store_names, sums, strict=True):
                if store_count > 0:  # a store without a share has no rows
                    self.log(f"val_by_store/{name}", (store_total / store_count).float())

    test_step = validation_step
    on_test_epoch_start = on_validation_epoch_start
    on_test_epoch_end = on_validation_epoch_end

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # For one of weights only, of which no callback is told.
        checkpoint.setdefault("lit_sparse", description(self, None))
        frozen = left_out(self)
        weights = checkpoint["state_dict"]
        checkpoint["state_dict"] = {n: weights[n] for n in weights if n not in frozen}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        check_adapters(checkpoint.get("lit_sparse") or {}, self)

    def adamw(self, fused: bool | None = None) -> AdamW:
        """The optimizer of all weights that train: matrices decay, vectors, biases and embeddings
        do not.

        Args:
            fused: of AdamW; None: PyTorch chooses.
        """
        embeddings = {id(self.model.get_input_embeddings().weight)}
        decay: list[Tensor] = []
        keep: list[Tensor] = []
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                matrix = len(whole_shape(parameter)) >= 2 and id(parameter) not in embeddings
                # Those of gpt-oss's experts are stacked: [experts, features].
                matrix = matrix and not name.endswith("bias")
                (decay if matrix else keep).append(parameter)
        groups = [
            {"params": decay, "weight_decay": self.hparams["weight_decay"]},
            {"params": keep, "weight_decay": 0.0},
        ]
        options = self.hparams
        return AdamW(groups, lr=options["learning_rate"], betas=options["betas"], fused=fused)

    def configure_optimizers(self) -> Any:
        # On a CPU the fused one takes a tenth of the time; elsewhere PyTorch chooses.
        offloaded = getattr(self.trainer.strategy, "offload_optimizer", None) == "cpu"
        optimizer = self.adamw(fused=True if offloaded else None)
        steps = int(self.trainer.estimated_stepping_batches)
        curriculum, default = find_curriculum(self.trainer), self.hparams["learning_rate"]

        def share(step: int) -> float:
            peak = default if curriculum is None else curriculum.learning_rate(step, default)
            return self._learning_rate_share(step, steps) * (peak / default)

        schedule = LambdaLR(optimizer, share)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _learning_rate_share(self, step: int, steps: int) -> float:
        """Share of the peak at an optimizer step: linear warm-up, then a cosine to the minimum."""
        warmup, least = self.hparams["warmup_steps"], self.hparams["min_learning_rate"]
        if step < warmup:
            return (step + 1) / warmup
        progress = min((step - warmup) / max(steps - warmup, 1), 1.0)
        return least + (1 - least) * (1 + math.cos(math.pi * progress)) / 2
