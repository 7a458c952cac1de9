"""What TensorBoard shows: a page whose charts find their tags, the law, a row for the run."""

import io
import re

import pytest
import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch.utils.tensorboard import SummaryWriter

from lit_sparse import Budget
from lit_sparse.attention.plan import make_plan
from lit_sparse.callbacks import (
    BudgetController,
    Cockpit,
    CollapseMonitor,
    ContextCurriculum,
    DenseGapMonitor,
    RunCheckpoint,
    SparseAttention,
    Throughput,
    cockpit,
)
from lit_sparse.callbacks.cockpit import METRICS, layout
from lit_sparse.callbacks.law_figure import law_figure
from lit_sparse.data import PackedTextDataModule
from lit_sparse.models import Law, build_model
from lit_sparse.training import SparseLM, Stage
from lit_sparse.training.checkpoint import own_state, rewind_events

LAW = Budget(alpha=5, exponent=0.5, floor=16, sink=16, local=0.0)
ARCHITECTURE = {
    "model_type": "llama",
    "vocab_size": 257,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
_HPARAMS = [
    f"_hparams_/{name}" for name in ("experiment", "session_start_info", "session_end_info")
]
STAGES = [Stage(128, 2), Stage(256, 3)]


def _fit(corpus, path, ckpt=None):
    curriculum = ContextCurriculum(STAGES)
    data = PackedTextDataModule(
        path=str(corpus),
        row_tokens=256,
        curriculum=curriculum.curriculum,
        validation_rows=1,
        validation_fraction=0.2,
    )
    often = {"every_n_steps": 1, "rows": 16, "min_context": 32}
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=-1,
        logger=TensorBoardLogger(path, name="", version="", default_hp_metric=False),
        callbacks=[
            RunCheckpoint(every_n_steps=3),
            SparseAttention(LAW, block=16, tile=16),
            curriculum,
            Throughput(),
            CollapseMonitor(**often),
            DenseGapMonitor(**often, compare_every=1),
            BudgetController(0.1, **often, patience=3),
            Cockpit(),
        ],
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        num_sanity_val_steps=0,
    )
    torch.manual_seed(0)
    module = SparseLM(architecture=ARCHITECTURE, warmup_steps=1, learning_rate=2e-3)
    trainer.fit(module, datamodule=data, ckpt_path=ckpt)


def _events(path):
    """Tag -> its (step, value) in the order of the files."""
    found = {}
    files = sorted(path.glob("events.out.tfevents.*"), key=lambda p: p.stat().st_mtime_ns)
    for event in (event for file in files for event in EventFileLoader(str(file)).Load()):
        for value in event.summary.value:
            found.setdefault(value.tag, []).append((event.step, value))
    return found


def _layout(events):
    ((_, value),) = events["custom_scalars__config__"]
    return layout_pb2.Layout.FromString(value.tensor.string_val[0])


def _row(events):
    """Hyperparameters and metrics of the run's only row, and whether it says that it succeeded."""
    content = []
    for tag in _HPARAMS:
        ((_, value),) = events[tag]
        content.append(HParamsPluginData.FromString(value.metadata.plugin_data.content))
    hyperparameters = {
        name: value.string_value or value.number_value
        for name, value in content[1].session_start_info.hparams.items()
    }
    metrics = [metric.name.tag for metric in content[0].experiment.metric_infos]
    return hyperparameters, metrics, content[2].session_end_info.status


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with a corpus, and under run/ a run of five steps that all monitors watched."""
    folder = tmp_path_factory.mktemp("cockpit")
    (folder / "corpus").mkdir()
    for i in range(4):
        (folder / "corpus" / f"{i}.py").write_text("".join(f"x{j} = {i * j}\n" for j in range(200)))
    draw = SummaryWriter.add_figure

    def law_only(writer, tag, *others, **options):
        if tag == "curriculum/law":  # heat maps take most of the time, and have tests of their own
            draw(writer, tag, *others, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SummaryWriter, "add_figure", law_only)
        _fit(folder / "corpus", folder / "run")
        yield folder / "run"


def test_every_chart_finds_what_is_logged(run):
    shown = _events(run)
    page = {category.title: category.chart for category in _layout(shown).category}
    assert list(page) == ["Loss", "Gap to dense attention", "Collapse", "Curriculum", "Speed"]
    wanted = [tag for charts in page.values() for c in charts for tag in c.multiline.tag]
    bands = [s for charts in page.values() for c in charts for s in c.margin.series]
    wanted += [f"^{tag}$" for band in bands for tag in (band.value, band.lower, band.upper)]
    assert [tag for tag in wanted if not any(re.match(tag, name) for name in shown)] == []


def test_a_finished_run_has_a_row_with_law_curriculum_and_gap(run):
    shown = _events(run)
    hyperparameters, metrics, status = _row(shown)
    assert hyperparameters == {
        "alpha": pytest.approx(5 * 0.97**-14),
        "exponent": 0.5,
        "floor": 16,
        "curriculum": "128 to 256",
        "steps": 5,
        "learning_rate": pytest.approx(2e-3),
    }
    assert metrics == list(METRICS)
    assert set(metrics) < set(shown)
    assert status == 1  # STATUS_SUCCESS


def test_the_law_is_drawn_again_when_alpha_moves_and_not_when_a_stage_begins(run):
    shown = _events(run)
    factors = [float(v.tensor.float_val[0]) for _, v in shown["controller/alpha_factor"]]
    assert factors == pytest.approx([1, 1, 1, 0.97**-7, 0.97**-14])
    assert [step for step, _ in shown["curriculum/law"]] == [1, 4, 5]


def test_a_continued_run_shows_all_of_it_once(run):
    whole, checkpoint = _events(run), run / "checkpoints" / "step=3.ckpt"
    rewind_events(run, own_state(checkpoint)["events"])
    _fit(run.parent / "corpus", run, checkpoint)
    continued = _events(run)
    for tag in ("custom_scalars__config__", "curriculum/law", *_HPARAMS):
        assert continued[tag] == whole[tag], tag


def test_a_trainer_without_monitors_gets_a_page_without_their_charts():
    trainer = Trainer(logger=False, accelerator="cpu", enable_checkpointing=False)
    page = layout(trainer)
    assert list(page) == ["Loss", "Curriculum"]
    (tag,) = page["Loss"]["validation loss (nats a token)"][1]
    assert re.match(tag, "val_loss")
    assert "stage" not in page["Curriculum"]


def test_a_logger_that_takes_the_row_is_warned_of(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    trainer = Trainer(logger=logger, accelerator="cpu", enable_checkpointing=False)
    with pytest.warns(UserWarning, match="default_hp_metric=False"):
        Cockpit().on_fit_start(trainer, None)


class OneModel(LightningModule):
    def __init__(self):
        super().__init__()
        self.model = build_model(architecture=ARCHITECTURE)

    def training_step(self, batch, batch_idx):
        return self.model(input_ids=batch, labels=batch).loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def test_a_trial_of_one_step_and_other_loggers_get_no_figure(tmp_path, monkeypatch, recwarn):
    monkeypatch.setattr(cockpit, "law_figure", lambda *_, **__: pytest.fail("drawn"))
    tokens = torch.utils.data.DataLoader(torch.randint(257, (2, 1, 64)), batch_size=None)
    for options in (
        {"fast_dev_run": True, "logger": TensorBoardLogger(tmp_path, default_hp_metric=False)},
        {"max_steps": 1, "logger": CSVLogger(tmp_path)},
    ):
        trainer = Trainer(
            accelerator="cpu",
            callbacks=[SparseAttention(LAW), Cockpit()],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **options,
        )
        trainer.fit(OneModel(), tokens)
        assert trainer.global_step == 1
    assert not [w for w in recwarn if "hp_metric" in str(w.message)]


# -- the figure of the law --


def _lines(figure):
    return {line.get_label(): line for line in figure.axes[0].lines}


def test_the_figure_has_the_law_its_stages_and_what_whole_blocks_keep():
    wide = Budget(alpha=8, exponent=0.5, floor=16, sink=16)
    stages = [Stage(512, 1, attention="dense"), Stage(1024, 1), Stage(2048, 1, budget=wide)]
    law = Law(LAW, {0: Budget.dense(), 3: Budget(alpha=9)}, block=16, tile=16)
    figure = law_figure(law, stages, 2048, factor=2.0, groups=4)
    lines = _lines(figure)
    for budget in (LAW.scaled(2), wide.scaled(2)):
        n, keys = lines[str(budget)].get_data()
        assert keys[-1] == budget(2048)
        assert n[-1] == 2048
    assert "layer 0: dense" in lines
    assert f"layer 3: {Budget(alpha=18)}" in lines
    dots = [(line.get_xdata()[0], line.get_ydata()[0]) for line in figure.axes[0].lines[-6:]]
    assert {(512, 512), (1024, LAW.scaled(2)(1024)), (2048, wide.scaled(2)(2048))} <= set(dots)
    written = {text.get_text() for text in figure.axes[0].texts}
    assert written == {"dense", f"{320}\n31%", f"{725}\n35%"}
    n, kept = lines["kept in whole blocks of 16"].get_data()
    plan = make_plan((0, 2048), (0, 2048), LAW.scaled(2), 16, 16)
    assert kept[-1] == plan.lengths[-1] * 16
    assert (kept <= n).all()


@pytest.mark.parametrize("longest", [64, 2**20])
def test_a_law_without_a_curriculum_is_drawn_to_the_longest_context(longest):
    figure = law_figure(Law(Budget()), [], longest)
    n, keys = _lines(figure)[str(Budget())].get_data()
    assert (n[-1], keys[-1]) == (longest, Budget()(longest))
    figure.savefig(io.BytesIO())
