"""Hugging Face's own Trainer, which knows nothing of us, trains a sparsified model to the losses of
`lit-sparse fit` on the same rows.
"""

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from lit_sparse import Budget
from lit_sparse.cli import main
from lit_sparse.data import PackedTextDataModule
from lit_sparse.models import build_model, sparsify
from lit_sparse.training import Curriculum, Stage

STAGES = [{"length": 128, "steps": 4}, {"length": 512, "steps": 4}]
BUDGET = {"alpha": 2.0, "floor": 32, "sink": 8, "local": 0.25}
DATA = {
    "tokenizer": "bytes",
    "row_tokens": 512,
    "rows_per_step": 2,
    "validation_fraction": 0.2,
    "validation_rows": 1,
}


@pytest.fixture
def pretrained(tmp_path, architecture, monkeypatch):
    """A directory with a model of random weights, in the working directory."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    build_model(architecture=architecture).save_pretrained("model")
    return "model"


def _losses_of_fit(pretrained, corpus):
    keys = {
        "model": {"pretrained": pretrained, "learning_rate": 3e-3, "warmup_steps": 0}
        | {"min_learning_rate": 0.1, "weight_decay": 0.0},
        "sparse_attention": {"budget": BUDGET, "block": 16, "tile": 16},
        "curriculum": {"stages": STAGES},
        "data": {**DATA, "path": str(corpus)},
        "trainer": {"accelerator": "cpu", "log_every_n_steps": 1, "gradient_clip_val": 1.0}
        | {"enable_progress_bar": False, "enable_model_summary": False},
    }
    with open("ours.yaml", "w") as file:
        yaml.safe_dump(keys, file)
    assert main(["fit", "--config", "ours.yaml"]) == 0
    events = EventAccumulator("runs/ours").Reload()
    return [point.value for point in events.Scalars("train/loss")]


def _losses_of_trainer(pretrained, corpus):
    curriculum = Curriculum([Stage(**stage) for stage in STAGES])
    data = PackedTextDataModule(**DATA, path=str(corpus), curriculum=curriculum)
    data.setup()
    rows = [
        {
            "input_ids": row["input_ids"][0],
            "position_ids": row["position_ids"][0],
            # A row's labels are those of the next token; transformers shifts them itself.
            "labels": row["labels"][0].roll(1),
        }
        for row in data.train_dataloader()
    ]
    model = AutoModelForCausalLM.from_pretrained(pretrained)
    sparsify(model, Budget(**BUDGET), block=16, tile=16)
    arguments = TrainingArguments(
        output_dir="theirs",
        use_cpu=True,
        max_steps=curriculum.total_steps,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        train_sampling_strategy="sequential",
        learning_rate=3e-3,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
        weight_decay=0.0,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_it_trains_to_the_same_losses(pretrained, corpus, capsys):
    ours = _losses_of_fit(pretrained, corpus)
    theirs = _losses_of_trainer(pretrained, corpus)
    assert len(ours) == 8
    assert ours[-1] < ours[0] - 0.5, "it learns"
    assert theirs == pytest.approx(ours, rel=1e-5)
