"""Files that are there whole or not at all, and are checked before they are believed."""

import pytest
import torch

from lit_sparse.files import write_whole
from lit_sparse.training.checkpoint import (
    AtomicCheckpointIO,
    checkpoints,
    damage,
    event_sizes,
    newest_whole,
    remove_unfinished,
    rewind_events,
)


@pytest.fixture
def folder(tmp_path):
    """Three checkpoints, the newest of them written first."""
    for step in (12, 9, 100):
        AtomicCheckpointIO().save_checkpoint(
            {"step": step, "weight": torch.full((500,), float(step))},
            tmp_path / f"step={step}.ckpt",
        )
    (tmp_path / "best.ckpt").write_bytes(b"somebody else's")
    return tmp_path


def test_checkpoints_are_in_the_order_of_their_steps(folder):
    assert [p.name for p in checkpoints(folder)] == ["step=9.ckpt", "step=12.ckpt", "step=100.ckpt"]
    assert newest_whole(folder) == folder / "step=100.ckpt"
    loaded = AtomicCheckpointIO().load_checkpoint(folder / "step=12.ckpt")
    assert loaded["step"] == 12
    assert torch.equal(loaded["weight"], torch.full((500,), 12.0))


def _flip(content, at):
    return content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :]


@pytest.mark.parametrize(
    "harm",
    [
        lambda content: b"",
        lambda content: content[: len(content) // 2],
        lambda content: content[:-1],
        lambda content: _flip(content, content.index(b"\x00\x00\xc8\x42") + 400),
        lambda content: _flip(content, 27),
        lambda content: _flip(content, content.rindex(b"PK\6\6") + 34),
        lambda content: b"not a checkpoint",
    ],
    ids=[
        "empty",
        "half",
        "one byte short",
        "one bit flipped",
        "in a name",
        "in the number of entries",
        "something else",
    ],
)
def test_a_damaged_newest_checkpoint_is_passed_over_with_a_warning(folder, harm):
    newest = folder / "step=100.ckpt"
    newest.write_bytes(harm(newest.read_bytes()))
    assert damage(newest)
    with pytest.warns(UserWarning, match=r"damaged: .*step=100.ckpt .*Using .*step=12.ckpt"):
        assert newest_whole(folder) == folder / "step=12.ckpt"


def test_nothing_whole_is_nothing(folder):
    for path in checkpoints(folder):
        path.write_bytes(b"")
    with pytest.warns(UserWarning, match="There is no other checkpoint"):
        assert newest_whole(folder) is None


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "new" / "file"
    write_whole(path, lambda file: file.write(b"old"))

    def fail(file):
        file.write(b"half of the ne")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_whole(path, fail)
    assert path.read_bytes() == b"old"
    assert [p.name for p in path.parent.iterdir()] == ["file"]


def test_what_a_killed_process_left_is_removed(folder):
    (folder / ".step=200.ckpt.77.tmp").write_bytes(b"half")
    before = checkpoints(folder)
    remove_unfinished(folder)
    assert not list(folder.glob(".*"))
    assert checkpoints(folder) == before


class Unsafe:
    pass


def test_a_checkpoint_that_needs_unpickling_is_not_loaded(tmp_path):
    AtomicCheckpointIO().save_checkpoint({"unsafe": Unsafe()}, tmp_path / "step=1.ckpt")
    with pytest.raises(Exception, match="weights_only|Unsupported"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "step=1.ckpt")


def test_event_files_are_cut_back_to_the_checkpoint(tmp_path):
    first, second = (tmp_path / f"events.out.tfevents.{n}" for n in (1, 2))
    below = tmp_path / "hparams" / "events.out.tfevents.3"
    below.parent.mkdir()
    first.write_bytes(b"before")
    sizes = event_sizes(tmp_path)
    first.write_bytes(b"before and after")
    second.write_bytes(b"after")
    below.write_bytes(b"after")
    (tmp_path / "config.yaml").write_text("stays")
    rewind_events(tmp_path, sizes)
    assert first.read_bytes() == b"before"
    assert event_sizes(tmp_path) == sizes
    assert (tmp_path / "config.yaml").read_text() == "stays"
