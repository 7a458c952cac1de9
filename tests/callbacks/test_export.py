"""What HuggingFaceExport leaves behind, and what it does not overwrite."""

import peft
import pytest
import torch
from pytorch_lightning import LightningModule, Trainer
from transformers import AutoModelForCausalLM

from lit_sparse.callbacks import HuggingFaceExport
from lit_sparse.models import build_model


class TwoModels(LightningModule):
    def __init__(self, architecture):
        super().__init__()
        self.teacher = build_model(architecture=architecture)
        self.students = torch.nn.ModuleList([build_model(architecture=architecture)])

    def training_step(self, batch, batch_idx):
        return self.students[0](input_ids=batch, labels=batch).loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.students.parameters(), lr=0.1)


def _trainer(tmp_path, *callbacks, **options):
    return Trainer(
        accelerator="cpu",
        max_steps=2,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        callbacks=[*callbacks],
        **options,
    )


def _batches():
    return torch.utils.data.DataLoader(torch.randint(257, (2, 32)))


def test_every_model_of_a_module_by_its_name(architecture, tmp_path):
    module, batches = TwoModels(architecture), _batches()
    _trainer(tmp_path, HuggingFaceExport("models")).fit(module, batches)
    for name, model in (("teacher", module.teacher), ("students.0", module.students[0])):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "models" / name)
        assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)

    # A run that is resumed after its last step has nothing to train, and exports.
    checkpoint = next((tmp_path / "checkpoints").iterdir())
    _trainer(tmp_path, HuggingFaceExport("again")).fit(module, batches, ckpt_path=checkpoint)
    assert (tmp_path / "again" / "students.0" / "model.safetensors").is_file()


def test_what_is_no_model_is_refused_before_training(architecture, tmp_path):
    (tmp_path / "models" / "teacher").mkdir(parents=True)
    (tmp_path / "models" / "teacher" / "thesis.tex").write_text("")
    module = TwoModels(architecture)
    trainer = _trainer(tmp_path, HuggingFaceExport("models"), enable_checkpointing=False)
    with pytest.raises(ValueError, match=r"HuggingFaceExport.directory: .*teacher is there, and"):
        trainer.fit(module, _batches())
    assert trainer.global_step == 0


def test_adapters_that_it_cannot_merge_are_refused(architecture, tmp_path):
    module = TwoModels(architecture)
    peft.get_peft_model(module.students[0], peft.LoraConfig(target_modules=["q_proj"]))
    own = "lit_sparse.models.lora.adapters.add_lora"
    with pytest.raises(ValueError, match=f"merges adapters of {own}, and"):
        _trainer(tmp_path, HuggingFaceExport()).fit(module, _batches())


def test_a_trial_run_leaves_nothing(architecture, tmp_path):
    trainer = _trainer(tmp_path, HuggingFaceExport(), fast_dev_run=True)
    trainer.fit(TwoModels(architecture), _batches())
    assert not list(tmp_path.iterdir())
