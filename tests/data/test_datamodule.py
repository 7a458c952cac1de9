import re
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint

from lit_sparse.data import ByteTokenizer, PackedTextDataModule
from lit_sparse.data.loading import TrainingSampler
from lit_sparse.data.tasks import make_task
from lit_sparse.distributed import Ranks
from lit_sparse.training.curriculum import Curriculum, Stage

CURRICULUM = Curriculum([Stage(64, 3), Stage(256, 4)])
KEYS = ("input_ids", "position_ids", "labels", "step_tokens", "source")


def module(path, **others) -> PackedTextDataModule:
    path = path if isinstance(path, dict) else str(path)
    arguments = {"row_tokens": 256, "rows_per_step": 4, "validation_fraction": 0.2, "seed": 5}
    arguments |= {"curriculum": CURRICULUM, "path": path, **others}
    return PackedTextDataModule(**arguments)


def ready(path, **others) -> PackedTextDataModule:
    data = module(path, **others)
    data.setup()
    return data


def on_rank(data: PackedTextDataModule, rank: int, world: int) -> PackedTextDataModule:
    """The part of a trainer that a data module reads, as rank `rank` of a run that starts."""
    data.trainer = SimpleNamespace(
        distributed_sampler_kwargs={"rank": rank, "num_replicas": world},
        strategy=None,
        global_rank=rank,
        world_size=world,
        global_step=0,
        max_steps=-1,
        limit_train_batches=1.0,
        accumulate_grad_batches=1,
        fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(restarting=False, max_steps=-1)),
    )
    data.setup("fit")
    return data


def same(left: dict, right: dict) -> bool:
    return all(torch.equal(left[key], right[key]) for key in KEYS)


def pieces(batch: dict) -> list[slice]:
    begins = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
    return [slice(a, b) for a, b in zip(begins, [*begins[1:], None], strict=True)]


def training_documents(data: PackedTextDataModule) -> list[np.ndarray]:
    (held,) = data.validation_documents
    numbers = set(range(len(held.store))) - set(held.numbers.tolist())
    return [held.store.read(number) for number in sorted(numbers)]


def test_batches_are_what_they_say(corpus_dir):
    data = ready(corpus_dir)
    batches = list(data.train_dataloader())
    assert len(batches) == len(data.train_dataloader()) == CURRICULUM.total_steps * 4
    documents = [document.tobytes() for document in training_documents(data)]
    for number, batch in enumerate(batches):
        assert set(batch) == set(KEYS)
        for key in KEYS[:3]:
            assert batch[key].shape == (1, 256)
            assert batch[key].dtype == torch.int64
        length = CURRICULUM.at(number // 4).length
        for piece in pieces(batch):
            ids, labels = batch["input_ids"][0, piece], batch["labels"][0, piece]
            assert len(ids) <= length
            if (ids == 256).all():
                assert (labels == -100).all(), "what only fills the row up is not learnt"
                continue
            assert torch.equal(batch["position_ids"][0, piece], torch.arange(len(ids)))
            assert torch.equal(labels[:-1], ids[1:]), "a label is the next token of the piece"
            assert labels[-1] == -100, "and never the first token of the next"
            assert any(ids.numpy().astype(np.uint16).tobytes() in text for text in documents)
    for step in range(CURRICULUM.total_steps):
        group = batches[step * 4 : step * 4 + 4]
        labels = sum(int((batch["labels"] != -100).sum()) for batch in group)
        assert [int(batch["step_tokens"]) for batch in group] == [labels] * 4


def test_a_start_step_continues_exactly(corpus_dir):
    data = ready(corpus_dir, tasks={"passkey": 0.3, "multikey": 0.3})
    everything = list(data.train_dataloader())
    data.start_step = 5
    rest = list(data.train_dataloader())
    assert len(rest) == len(data.train_dataloader()) == 8
    assert all(map(same, rest, everything[20:]))
    assert list(TrainingSampler(rows=8, rows_per_step=4, start_step=9)) == []


def test_validation_documents_are_never_trained_on(corpus_dir):
    data = ready(corpus_dir)
    (held,) = data.validation_documents
    # Every file's lines begin with the file's number.
    apart = {held.store.name(int(number))[:2] for number in held.numbers}

    def files(loader) -> set[str]:
        tokenizer = ByteTokenizer()
        texts = [tokenizer.decode(batch["input_ids"][0]) for batch in loader]
        return {number for text in texts for number in re.findall(r"(\d\d)/\d{4} line", text)}

    assert files(data.val_dataloader()) <= apart
    assert files(data.val_dataloader())
    assert not files(data.train_dataloader()) & apart


@pytest.mark.parametrize("workers", [0, 2])
def test_the_validation_length_changes_between_passes_of_one_loader(corpus_dir, workers):
    data = ready(corpus_dir, num_workers=workers)
    loader = data.val_dataloader()

    def longest() -> int:
        return max(int(batch["position_ids"].max()) + 1 for batch in loader)

    assert data.validation_length == 256
    assert longest() == 256
    data.validation_length = 64
    assert longest() == 64
    first, second = list(loader), list(loader)
    assert all(map(same, first, second))
    assert len(loader) == len(first) >= 2
    for batch in first:
        assert batch["step_tokens"] == (batch["labels"] != -100).sum()


def test_validation_rows_are_divided_equally(corpus_dir):
    data = ready(corpus_dir, validation_rows=5)
    rows = list(data.val_dataloader())
    assert len(rows) == 5
    for rank in range(2):
        part = list(on_rank(module(corpus_dir, validation_rows=5), rank, 2).val_dataloader())
        assert all(map(same, part, rows[rank * 2 : rank * 2 + 2]))
        assert len(part) == 2


def test_tasks_are_planted_in_the_asked_shares_of_pieces(corpus_dir):
    def planted(**others) -> Counter[str]:
        data = ready(corpus_dir, **others)
        found: Counter[str] = Counter()
        for batch in data.train_dataloader():
            for piece in pieces(batch):
                text = data.text_tokenizer.decode(batch["input_ids"][0, piece])
                found["able"] += len(text) >= make_task("multikey", data.text_tokenizer).shortest
                for name, line in (("passkey", r"# passkey: "), ("multikey", r"# key of \w{4}: ")):
                    lines = re.findall(rf"{line}\d+", text)
                    if lines:
                        assert text.endswith(lines[-1]), "the answer ends the piece"
                        assert lines[-1] in lines[:-1], "it was stated"
                        found[name] += 1
                        found["statements"] += len(lines) - 1
        return found

    assert not planted()["statements"]
    some = planted(tasks={"passkey": 0.4, "multikey": 0.4})
    assert some["able"] / 4 < some["multikey"] < some["able"] * 0.6
    more = planted(tasks={"passkey": 0.4, "multikey": 0.4}, task_recalls=2)
    assert (more["passkey"], more["multikey"]) == (some["passkey"], some["multikey"])
    assert more["statements"] > some["statements"]
    every = planted(tasks={"multikey": 1.0})
    assert every["multikey"] == every["able"] > 10
    assert not every["passkey"]


def test_describe_says_what_was_read_and_how_long_it_is(corpus_dir):
    (corpus_dir / "empty.txt").write_text("")
    data = ready(corpus_dir)
    text = data.describe()
    train, held = len(training_documents(data)), len(data.validation_documents[0])
    assert f"{train} documents for training, {held} for validation" in text
    assert "1 skipped: 1 empty (empty.txt)" in text
    assert re.search(r"steps 3 to 6: \d+% of the tokens are in pieces of the full 256", text)
    assert data.vocab_size == 257
    assert 2 < data.unigram_bits < 6


def test_describe_says_how_rows_waste_less(corpus_dir):
    wasteful = ready(corpus_dir, curriculum=Curriculum([Stage(150, 3)]), prefer_long=True)
    assert "less if the stage's length divides data.row_tokens" in wasteful.describe()
    tight = ready(corpus_dir, curriculum=Curriculum([Stage(128, 3)]))
    assert "less if" not in tight.describe()


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"row_tokens": 0}, r"data\.row_tokens"),
        ({"rows_per_step": 0}, r"data\.rows_per_step"),
        ({"validation_fraction": 1.0}, r"data\.validation_fraction"),
        ({"validation_rows": 0}, r"data\.validation_rows"),
        ({"tasks": {"passkey": 1.5}}, r"data\.tasks\.passkey must be in \[0, 1\], got 1\.5"),
        ({"tasks": {"variables": -0.5}}, r"data\.tasks\.variables must be"),
        ({"tasks": {"passkey": 0.7, "multikey": 0.5}}, r"data\.tasks: the shares add up to 1\.2"),
        (
            {"tasks": {"needle": 0.5}},
            r"data\.tasks: there is no task 'needle', only copy",
        ),
        ({"task_recalls": -1}, r"data\.task_recalls"),
        ({"seed": -1}, r"data\.seed"),
        ({"num_workers": -1}, r"data\.num_workers"),
        ({"packing": "tight"}, r"data\.packing"),
        ({"upsample_longer_than": 0}, r"data\.upsample_longer_than"),
        ({"upsample_times": 0.5}, r"data\.upsample_times"),
        ({"path": {}}, r"data\.path"),
        ({"path": {"a": -1.0, "b": 2.0}}, r"data\.path"),
        ({"path": {"a": 0.0}}, r"data\.path"),
    ],
)
def test_bad_arguments_are_refused_by_name_before_anything_is_read(others, message):
    with pytest.raises(ValueError, match=message):
        ready(**{"path": "/does/not/exist", **others})


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"path": "/does/not/exist"}, r"data\.path"),
        ({"tokenizer": "gpt2"}, r"data\.tokenizer"),
        ({"curriculum": None}, r"data\.curriculum"),
        ({"row_tokens": 128}, r"curriculum\.stages\[1\]\.length = 256 exceeds data\.row_tokens"),
        ({"block": 48}, r"curriculum\.stages\[0\]\.length = 64 is not a multiple"),
        (
            {"row_tokens": 4096, "curriculum": Curriculum.doubling(2048, 4096, 2)},
            r"curriculum\.stages\[1\]\.length = 4096",
        ),
        (
            {"tasks": {"passkey": 0.1}, "curriculum": Curriculum([Stage(16, 2)])},
            r"data\.tasks\.passkey needs pieces of 35 tokens, and the longest stage has 16",
        ),
    ],
)
def test_what_does_not_go_together_is_refused_by_name(corpus_dir, others, message):
    with pytest.raises(ValueError, match=message):
        ready(**{"path": corpus_dir, **others})


def test_paths_that_lead_nowhere_are_refused_by_name(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    for path in ("", tmp_path / "loop", tmp_path / "missing"):
        with pytest.raises(ValueError, match=re.escape(f"data.path = {str(path)!r}: INPUT")):
            ready(path)


def test_rows_that_ranks_cannot_share_are_refused(corpus_dir):
    with pytest.raises(
        ValueError, match=r"data\.rows_per_step = 4 .* 3 .* nearest that can: 3 and 6"
    ):
        on_rank(module(corpus_dir), 0, 3)
    with pytest.raises(ValueError, match=r"data\.rows_per_step = 4 .* nearest that can: 8"):
        on_rank(module(corpus_dir), 0, 8)
    with pytest.raises(ValueError, match=r"data\.validation_rows = 1 .* 2 ranks"):
        on_rank(module(corpus_dir, validation_rows=1), 0, 2)
    data = module(corpus_dir)
    on_rank(data, 0, 2).trainer._accelerator_connector = SimpleNamespace(
        use_distributed_sampler=True
    )
    with pytest.raises(ValueError, match=r"trainer\.use_distributed_sampler must be false"):
        data.setup("fit")


def test_a_row_that_the_ranks_that_share_it_cannot_divide_is_refused(corpus_dir):
    data = on_rank(module(corpus_dir), 0, 1)
    data.trainer.strategy = SimpleNamespace(ranks=Ranks(0, 1, 0, 3))
    with pytest.raises(ValueError, match=r"data\.row_tokens = 256 cannot be divided among the 3"):
        data.setup("fit")


class Recorder(LightningModule):
    """Keeps what it is trained on: (optimizer step, tokens of the row)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[int, int]] = []

    def training_step(self, batch, batch_idx):
        self.seen.append((self.trainer.global_step, hash(batch["input_ids"].numpy().tobytes())))
        return self.weight * batch["input_ids"].float().mean()

    def validation_step(self, batch, batch_idx):
        self.log("loss", batch["step_tokens"].float(), batch_size=1)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def trainer(tmp_path, **others) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(accelerator="cpu", devices=1, default_root_dir=tmp_path, **quiet, **others)


def fit(tmp_path, data: PackedTextDataModule, ckpt_path=None, **others) -> Recorder:
    model = Recorder()
    keep = ModelCheckpoint(
        tmp_path / "checkpoints", filename="{step}", every_n_train_steps=1, save_top_k=-1
    )
    trainer(tmp_path, callbacks=[keep], **others).fit(model, datamodule=data, ckpt_path=ckpt_path)
    return model


def test_a_trainer_goes_once_through_the_curriculum(corpus_dir, tmp_path):
    data = module(corpus_dir)
    model = fit(tmp_path, data)
    assert model.trainer.global_step == CURRICULUM.total_steps
    assert model.trainer.accumulate_grad_batches == 4
    assert [step for step, _ in model.seen] == [s for s in range(7) for _ in range(4)]
    with pytest.raises(ValueError, match=r"trainer\.max_steps = 8"):
        fit(tmp_path, module(corpus_dir), max_steps=8)


@pytest.mark.filterwarnings("error:.*resuming from a checkpoint.*")
def test_a_resumed_trainer_sees_the_rest_and_nothing_else(corpus_dir, tmp_path):
    whole = fit(tmp_path / "whole", module(corpus_dir)).seen
    fit(tmp_path / "part", module(corpus_dir), max_steps=3)
    (checkpoint,) = (tmp_path / "part/checkpoints").glob("step=3*.ckpt")
    resumed = fit(tmp_path / "again", module(corpus_dir), ckpt_path=checkpoint)
    assert resumed.seen == whole[12:]
    # As on another number of ranks: the step is the same, the micro-batches of a step are not.
    more = fit(tmp_path / "more", module(corpus_dir, rows_per_step=8), ckpt_path=checkpoint)
    assert [step for step, _ in more.seen] == [s for s in range(3, 7) for _ in range(8)]
    assert more.trainer.global_step == CURRICULUM.total_steps


def test_importing_the_data_package_loads_no_framework():
    heavy = ("pytorch_lightning", "transformers", "tokenizers", "datasets", "pyarrow")
    code = f"import sys, lit_sparse.data; print([m for m in {heavy} if m in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
