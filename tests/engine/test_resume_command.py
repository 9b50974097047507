"""`dune-fast resume RUN`, and the log in the run's folder."""

from __future__ import annotations

import logging
import os
import signal

import pytest

from dune_fast import train
from dune_fast.engine import run_log
from dune_fast.engine.config import ConfigError, compose_config
from tests.engine.conftest import build, same_weights


@pytest.fixture
def handlers():
    """Puts the log's handlers back: `train.main` sets its own."""
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    yield
    for handler in root.handlers:
        if handler not in before:
            handler.close()
    root.handlers[:] = before
    root.setLevel(level)


def test_a_run_goes_on_from_its_folder_alone(overrides, trained_run, tmp_path, monkeypatch, handlers):
    """The same weights as the run that nothing interrupted; `train.overwrite` of the first start does not count."""
    run = tmp_path / "run"

    def interrupt(trainer, batch):
        if trainer.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    trainer = build(overrides, "train.overwrite=true", before_step=interrupt)
    trainer.run()
    assert trainer.stopped and trainer.step == 4
    moved = run.rename(tmp_path / "moved, to = here")
    assert train.main(["--run", str(moved), "train.log_every=2", "evaluation.held_out=false"]) == 0
    assert same_weights(moved, trained_run) and not run.exists()
    text = (moved / run_log.NAME).read_text()
    assert "going on from step 4 of 6" in text and "Next: `dune-fast evaluate" in text


def test_what_was_said_before_the_folder_was_known_is_in_its_log(tmp_path, handlers):
    run_log.setup_logging(debug=False, rank=0)
    logging.getLogger("dune_fast").info("early [1]")
    run_log.open_run_log(tmp_path)
    try:
        raise RuntimeError("a bug")
    except RuntimeError:
        logging.getLogger("dune_fast").critical("late", exc_info=True)
    early, late, *traceback = (tmp_path / run_log.NAME).read_text().splitlines()
    assert early.endswith(" INFO early [1]") and late.endswith(" CRITICAL late")
    assert traceback[-1] == "RuntimeError: a bug"


def test_a_folder_that_holds_no_run_is_named(tmp_path, handlers, capsys):
    assert train.main(["--run", str(tmp_path)]) == 2
    assert f"{tmp_path} is not the folder of a run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "cure"), [("deepspeed=zero2", "deepspeed.zero_stage=2"), ("experiment=demo", "instead, name=demo")]
)
def test_a_file_of_a_group_is_refused_and_its_fields_are_named(trained_run, override, cure):
    """Regression: the error named neither the reason nor the field."""
    with pytest.raises(ConfigError, match="chooses a file .*a run that goes on has its own") as caught:
        compose_config([override], trained_run)
    assert cure in str(caught.value)
    assert compose_config(["deepspeed.zero_stage=2"], trained_run).deepspeed.zero_stage == 2
