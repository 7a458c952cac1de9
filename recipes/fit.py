"""`lit-sparse fit | validate | test`: Lightning's own command line around SparseLM."""

from __future__ import annotations

import argparse
import errno
import os
import re
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import yaml
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.utilities.exceptions import MisconfigurationException, SIGTERMException

import lit_sparse.distributed.strategy  # noqa: F401 - registers deepspeed_sparse
from lit_sparse.callbacks import ContextCurriculum, RunCheckpoint, SparseAttention, StepSeed
from lit_sparse.data import PackedTextDataModule
from lit_sparse.distributed.checkpoint import check_sharding
from lit_sparse.distributed.failure import lost_contact
from lit_sparse.distributed.gradients import check_strategy
from lit_sparse.files import write_whole
from lit_sparse.models import check_support, model_without_weights
from lit_sparse.models.lora.adapters import LoRA, add_lora
from lit_sparse.recipes.messages import own_words
from lit_sparse.recipes.run_directory import CONFIG, Run
from lit_sparse.recipes.shipped_configs import find_config
from lit_sparse.training import SparseLM
from lit_sparse.training.checkpoint import check_architecture

SUBCOMMANDS = ("fit", "validate", "test")
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class SparseCLI(LightningCLI):
    """Adds to LightningCLI the law, the curriculum and the run directory, as keys of the config."""

    def __init__(self, argv: list[str]) -> None:
        try:
            super().__init__(
                SparseLM,
                PackedTextDataModule,
                save_config_callback=SaveFitConfig,
                save_config_kwargs={"save_to_log_dir": False},
                auto_configure_optimizers=False,
                seed_everything_default=0,
                parser_kwargs={"prog": "lit-sparse", "allow_abbrev": False},
                args=argv,
            )
        except argparse.ArgumentError as error:
            raise ValueError(str(error)) from error

    def init_parser(self, **options: Any) -> LightningArgumentParser:
        parser = super().init_parser(**options)
        parser.exit_on_error = False  # it would print all options before what is wrong
        return parser

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        every = LightningCLI.subcommands()
        return {name: every[name] for name in SUBCOMMANDS}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.epilog = "fit --dry-run[=GPU] checks a run and prints its plan, and starts nothing."
        parser.add_class_arguments(Run, "run")
        parser.add_lightning_class_args(SparseAttention, "sparse_attention")
        parser.add_lightning_class_args(ContextCurriculum, "curriculum")
        parser.add_lightning_class_args(RunCheckpoint, "checkpoint")
        parser.set_defaults(
            {
                "trainer.log_every_n_steps": 10,
                # One pass over the row index is the whole run, and it divides rows among ranks
                # itself.
                "trainer.max_epochs": -1,
                "trainer.use_distributed_sampler": False,
                "trainer.num_sanity_val_steps": 0,
            }
        )
        parser.link_arguments("sparse_attention.block", "data.block")
        parser.link_arguments("model.pretrained", "data.pretrained")
        parser.link_arguments(
            "curriculum", "data.curriculum", compute_fn=_stages, apply_on="instantiate"
        )

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        if config.run.name is None:
            config.run.name = Path(str(config.config[0])).stem if config.get("config") else "run"
        self.run = Run(**config.run.as_dict())
        if config.get("ckpt_path"):
            config.ckpt_path = self.run.checkpoint(config.ckpt_path)
        if config.checkpoint.dirpath is not None:
            raise ValueError(
                f"checkpoint.dirpath = {config.checkpoint.dirpath}: a run keeps its checkpoints in "
                "its own directory; leave it out and choose --run.root and --run.name"
            )
        self.save_config_kwargs["directory"] = self.run.path

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        # Not in the config: another run may be started from the config.yaml of this one.
        self._get(self.config_init, "checkpoint").dirpath = str(self.run.checkpoints)
        if self._get(self.config_init, "trainer").get("logger") in (None, True):
            # No version folder: a resumed run goes on in the same directory.
            logger = TensorBoardLogger(
                self.run.root, name=self.run.name, version="", default_hp_metric=False
            )
            kwargs["logger"] = logger if self.subcommand == "fit" else False
        if self._get(self.config_init, "trainer").get("default_root_dir") is None:
            kwargs["default_root_dir"] = str(self.run.path)  # where no logger says another place
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except TypeError as error:
            if "devices" not in str(error):
                raise
            raise ValueError(f"trainer.devices: {error}") from error
        except MisconfigurationException as error:
            if "No supported gpu backend" not in str(error):
                raise
            raise ValueError(
                "trainer.accelerator asks for a GPU, and this machine has none that PyTorch finds: "
                "--trainer.accelerator cpu trains without, fit --dry-run plans without"
            ) from error
        except RuntimeError as error:
            if "stateful callback" not in str(error):
                raise
            twice = re.search(r"callback of type `(\w+)`", str(error))
            name = twice.group(1) if twice else "one callback"
            raise ValueError(
                f"trainer.callbacks has {name} twice: change the options of the one that the "
                "config has, in a copy of the config"
            ) from error
        check_strategy(trainer)  # Lightning's own is refused on CPUs, later and without advice
        # Before the others, so that what they draw is a function of the step too.
        trainer.callbacks.insert(0, StepSeed())  # type: ignore[attr-defined]
        return trainer

    def before_fit(self) -> None:
        # After all keys were checked, before anything is written.
        checkpoint = self.config[self.subcommand].get("ckpt_path")
        self.run.check_place(resume=bool(checkpoint))
        if self.trainer.is_global_zero:
            self.run.prepare(resume=bool(checkpoint))
        self._check_layers()
        if checkpoint:
            self._check_architecture(checkpoint)
        self.datamodule.setup()
        if self.trainer.is_global_zero:
            print(self.datamodule.describe(), flush=True)
        if checkpoint:
            self.run.check_resume(
                Path(checkpoint),
                yaml.safe_load(_dump(self._parser("fit"), self.config["fit"])),
                self.trainer.world_size,
                getattr(self.datamodule, "fingerprint", None),
                self._sharding,
            )
            if self.trainer.is_global_zero:
                self.run.rewind_to(Path(checkpoint))

    @property
    def _sharding(self) -> dict[str, int] | None:
        return getattr(self.trainer.strategy, "sharding", None)

    def before_validate(self) -> None:
        checkpoint = self.config[self.subcommand].get("ckpt_path")
        if checkpoint:
            if Path(checkpoint).is_dir():  # a file suits every strategy
                check_sharding(Path(checkpoint), self._sharding)
            self._check_architecture(checkpoint)

    before_test = before_validate

    def _check_layers(self) -> None:
        """Refuse what only the layers show, before data is packed and weights are read."""
        lora, trusted = (self.model.hparams[key] for key in ("lora", "trust_remote_code"))
        model = model_without_weights(self.model.model_config, trust_remote_code=trusted)
        check_support(model)
        if lora is not None:
            add_lora(model, LoRA(**lora))

    def _check_architecture(self, checkpoint: str) -> None:
        check_architecture(Path(checkpoint), {"model": self.model.model_config})

    def _parse_ckpt_path(self) -> None:
        """Do not let a checkpoint change keys of the model: what differs is shown, not taken."""

    def _run_subcommand(self, subcommand: str) -> None:
        try:
            super()._run_subcommand(subcommand)
        except SIGTERMException as stop:
            if stop.code is None:  # Lightning's own: before the first step
                raise SystemExit(128 + signal.SIGTERM) from None
            raise
        except Exception as error:
            began = self.trainer.global_step > 0 or _in_a_step(error)
            if subcommand == "fit" and not began:
                self.run.discard()
            if "loading state_dict" in str(error):  # of a checkpoint that somebody else wrote
                checkpoint, what = self.config[subcommand].ckpt_path, str(error).splitlines()[1]
                raise ValueError(
                    f"ckpt_path: {checkpoint} does not hold this model: {what.strip()[:200]}"
                ) from error
            error.in_training = began  # type: ignore[attr-defined]
            raise

    def after_fit(self) -> None:
        if self.trainer.is_global_zero:
            print(f"\nTensorBoard:  tensorboard --logdir {self.run.path}", flush=True)


class SaveFitConfig(SaveConfigCallback):
    """Saves the config of a fit alone, whole: validating a run must not change what it says about
    itself.

    Args:
        directory: of the run.
        others: see `SaveConfigCallback`.
    """

    def __init__(self, *others: Any, directory: Path, **keywords: Any) -> None:
        super().__init__(*others, **keywords)
        self.directory = directory

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            text = _dump(self.parser, self.config)
            write_whole(self.directory / CONFIG, lambda file: file.write(text.encode()))


def _dump(parser: LightningArgumentParser, config: Any) -> str:
    """The effective config as YAML, without what was asked for at this start alone: a run started
    from it must not overwrite, rewind or change anything by itself.
    """
    config = config.clone()
    config.ckpt_path = None
    for flag in ("overwrite", "allow_changes", "rewind"):
        config.run[flag] = False
    return parser.dump(config, skip_none=False)


def _stages(callback: ContextCurriculum) -> Any:
    return callback.curriculum


def main(argv: list[str]) -> int:
    """Run a sub-command. What is wrong before training starts (exit status 2), numbers that are not
    finite, a full disk and the loss of another rank (1) are one line, not a traceback.
    """
    # Rows are assembled in a fraction of a millisecond; workers would cost more than they save.
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*LightningCLI's args parameter.*")
    # What is logged for all ranks has been put together already.
    warnings.filterwarnings("ignore", message=".*sync_dist=True.*")
    # Other libraries' calls, which their users cannot change.
    for old in (".*is deprecated. Please use.*", ".*is deprecated, use torch.*", ".*LeafSpec.*"):
        warnings.filterwarnings("ignore", message=old, module="torch|lightning|pytorch_lightning")
    first = int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0) == 0
    try:
        SparseCLI(resolve_configs(argv))
    except (ValueError, NotImplementedError, MisconfigurationException) as error:
        # In training it matters where: no mistake in a config is left by then.
        if getattr(error, "in_training", False) or os.environ.get("LIT_SPARSE_TRACEBACK"):
            raise
        if first:  # where one rank of a node has an error in the config, all have
            print(f"lit-sparse: error: {own_words(error)}", file=sys.stderr)
        return 2
    except FloatingPointError as error:  # what was computed is wrong, not the program
        if os.environ.get("LIT_SPARSE_TRACEBACK"):
            raise
        if first:  # all have agreed on it
            print(f"lit-sparse: error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        if error.errno not in _NO_ROOM or os.environ.get("LIT_SPARSE_TRACEBACK"):
            raise
        print(
            f"lit-sparse: error: {error.filename or 'a file'} cannot be written "
            f"({error.strerror}): make room, and go on from the last checkpoint with --ckpt_path "
            "last",
            file=sys.stderr,
        )
        return 1
    except RuntimeError as error:
        lost = lost_contact(error)
        if lost is None or os.environ.get("LIT_SPARSE_TRACEBACK"):
            raise
        print(f"lit-sparse: error: {lost}", file=sys.stderr)
        return 1
    return 0


def resolve_configs(argv: list[str]) -> list[str]:
    """Replace the bare names that follow --config by the files of the shipped configs."""
    resolved = list(argv)
    for i, argument in enumerate(argv):
        if argument in ("--config", "-c") and i + 1 < len(argv):
            resolved[i + 1] = find_config(argv[i + 1])
        elif argument.startswith("--config="):
            resolved[i] = "--config=" + find_config(argument.removeprefix("--config="))
    return resolved


def _in_a_step(error: BaseException) -> bool:
    """Whether a step of training, validation or test stands in the traceback."""
    frame = error.__traceback__
    while frame is not None:
        if frame.tb_frame.f_code.co_name in (
            "training_step",
            "validation_step",
            "test_step",
            "backward",
        ):
            return True
        frame = frame.tb_next
    return False
