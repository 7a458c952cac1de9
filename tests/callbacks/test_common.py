"""What callbacks hand to the loggers."""

import torch
from pytorch_lightning import Trainer
from pytorch_lightning.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_sparse.callbacks.common import add_histogram


def test_a_histogram_leaves_out_what_is_not_finite(tmp_path):
    """Logits that overflow are when a monitor is needed; TensorBoard refuses to show them."""
    logger = TensorBoardLogger(tmp_path, version="")
    trainer = Trainer(logger=logger, accelerator="cpu", enable_checkpointing=False)
    add_histogram(trainer, "some", torch.tensor([[1.0, torch.inf], [torch.nan, 2.0]]))
    add_histogram(trainer, "none", torch.tensor([torch.inf, -torch.inf]))
    logger.experiment.flush()
    events = EventAccumulator(trainer.log_dir).Reload()
    assert events.Tags()["histograms"] == ["some"]
    assert events.Histograms("some")[0].histogram_value.num == 2
