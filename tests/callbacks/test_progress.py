"""The bar ends where training ends."""

import sys
from pathlib import Path

import pytest
import torch
from pytorch_lightning import LightningModule

sys.path.insert(0, str(Path(__file__).parent))
from monitored import make_trainer

from lit_sparse.callbacks import SparseProgressBar


class Line(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Bar(SparseProgressBar):
    shown = None

    def on_train_end(self, *_):
        self.shown = self.train_progress_bar.n, self.train_progress_bar.total


def _fit(**options):
    bar = Bar(refresh_rate=1)
    rows = torch.utils.data.DataLoader(torch.randn(40, 4), batch_size=4)
    trainer = make_trainer([bar], enable_progress_bar=True, **options)
    trainer.fit(Line(), rows)
    return bar.shown


@pytest.mark.parametrize(
    ("options", "batches"),
    [
        ({"max_steps": 3, "max_epochs": -1}, 3),
        ({"max_steps": 3, "max_epochs": -1, "accumulate_grad_batches": 2}, 6),
        ({"max_steps": 12, "max_epochs": -1}, 2),  # of the second epoch
        ({"max_epochs": 1, "accumulate_grad_batches": 2}, 10),
    ],
)
def test_micro_batches_are_counted_not_steps(options, batches):
    assert _fit(**options) == (batches, batches)
