import re
from pathlib import Path

import pytest
import torch
from pytorch_lightning import Trainer
from pytorch_lightning.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_sparse.callbacks.alerts import ADVICE, Alarm, Persistence, Place

README = Path(__file__).parents[2] / "callbacks" / "README.md"


def _trainer(**options):
    settings = {"logger": False, "enable_checkpointing": False, "accelerator": "cpu", **options}
    return Trainer(**settings)


def test_every_alert_has_its_entry_and_every_entry_an_alert():
    text = README.read_text()
    entries = re.split(r"^### `alerts/(\w+)`$", text, flags=re.M)[1:]
    assert sorted(entries[::2]) == sorted(ADVICE)
    for kind, entry in zip(entries[::2], entries[1::2], strict=True):
        for part in ("**Symptom.**", "**Cause.**", "**Cure.**"):
            assert part in entry, (kind, part)


def test_an_alert_is_raised_once_in_a_place_and_shown(tmp_path):
    trainer = _trainer(logger=TensorBoardLogger(tmp_path, version=""))
    alarm = Alarm()
    places = [Place(3, 1, 0.0123), Place(5, None, 0.5), Place(None, None, 7.0)]
    with pytest.warns(
        UserWarning, match=r"rank_loss at step 0: flat \(layer 3 head 1: 0.0123; layer 5: 0.5; m"
    ):
        alarm.raise_in(trainer, "rank_loss", places, "flat")
    again = Alarm()
    again.load_state_dict(alarm.state_dict())
    for known in (alarm, again):
        known.raise_in(trainer, "rank_loss", places, "flat")
    with pytest.warns(UserWarning, match=r"\(layer 3 head 2: 1\)"):
        again.raise_in(trainer, "rank_loss", [*places, Place(3, 2, 1.0)], "flat")
    trainer.logger.finalize("success")
    events = EventAccumulator(trainer.log_dir).Reload()
    (first, second) = events.Tensors("alerts/rank_loss/text_summary")
    text = first.tensor_proto.string_val[0].decode()
    assert "| 3 | 1 | 0.0123 |" in text
    assert "| 5 | all | 0.5 |" in text
    assert "| all | all | 7 |" in text
    assert ADVICE["rank_loss"] in text
    assert "| 3 | 2 | 1 |" in second.tensor_proto.string_val[0].decode()


def test_what_an_alert_does_is_chosen():
    seen = []
    for reaction in ("warn", "stop", lambda trainer, alert: seen.append((trainer, alert))):
        trainer = _trainer()
        with pytest.warns(UserWarning, match="dispersion") as warned:
            Alarm(reaction).raise_in(trainer, "dispersion", [Place(0, 1, 0.97)], "even")
        assert trainer.should_stop == (reaction == "stop")
        said = any("training ends after this step" in str(w.message) for w in warned)
        assert said == (reaction == "stop")
    ((told, alert),) = seen
    assert told is trainer
    assert (alert.kind, alert.places[0].value, alert.advice) == (
        "dispersion",
        0.97,
        ADVICE["dispersion"],
    )
    with pytest.raises(ValueError, match="on_alert must be 'warn', 'stop' or a callable, got 'no'"):
        Alarm("no")


def _past(values, moved, patience=3):
    """Whether each measurement of one place, with 0.5 as the limit, gives an alert."""
    persistence = Persistence(patience)
    found = []
    for value in map(torch.tensor, values):
        found.append(bool(persistence.add("x", value, value > 0.5, moved)))
        # What a checkpoint keeps is all there is.
        state, persistence = persistence.state_dict(), Persistence(patience)
        persistence.load_state_dict(state)
    return found


def test_an_alert_wants_measurements_on_end_and_a_change():
    assert _past([0.2, 0.6, 0.6, 0.6, 0.6], 0.1) == [False, False, False, True, True]
    assert not any(_past([0.2, 0.6, 0.6, 0.4, 0.6, 0.6], 0.1))  # not on end
    assert not any(_past([0.55, 0.6, 0.6, 0.6, 0.6], 0.1))  # hardly moved
    assert not any(_past([0.9, 0.6, 0.6, 0.6, 0.6], 0.1))  # moved, but the other way
    assert _past([0.9, 0.6, 0.6, 0.6], -0.1)[-1]
    assert _past([0.6, 0.6, 0.6], None)[-1]
    nan = float("nan")
    assert _past([nan, 0.2, 0.6, nan, 0.6, nan, 0.6], 0.1) == [False] * 6 + [True]


def test_patience_is_checked():
    with pytest.raises(ValueError, match="patience must be >= 1, got 0"):
        Persistence(0)
