"""A run that is asked to stop saves and ends well; a rank that hangs is named."""

from __future__ import annotations

import logging
import os
import signal

import pytest
import torch
from safetensors.torch import load_file

from dune_fast.engine import checkpoints
from dune_fast.engine import trainer as trainer_module
from dune_fast.engine.config import compose_config
from dune_fast.engine.interruption import Stop
from dune_fast.engine.trainer import Trainer
from dune_fast.engine.watchdog import Watchdog


def test_a_signal_while_the_log_is_opened_stops_before_the_first_step(overrides, tmp_path, monkeypatch, caplog):
    """Services of logging take their time to connect. And a run that overwrites does not go on by the same command."""
    plain = trainer_module.open_log

    def interrupted(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return plain(*arguments)

    monkeypatch.setattr(trainer_module, "open_log", interrupted)
    caplog.set_level(logging.INFO, "dune_fast")
    trainer = Trainer(compose_config([*overrides, "logging.tensorboard=false", "train.overwrite=true"]))
    before = signal.signal(signal.SIGTERM, lambda *_: pytest.fail("the run does not take the signal"))
    try:
        trainer.run()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert trainer.stopped and trainer.step == 0 and not checkpoints.complete_steps(tmp_path / "run")
    assert f"stopped after step 0 of 6; `dune-fast resume {tmp_path / 'run'}` goes on" in caplog.text


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_saves_stops_and_the_run_goes_on_from_there(overrides, trained_run, tmp_path, number):
    whole, parts = trained_run, tmp_path / "parts"
    common = [*overrides, "logging.tensorboard=false", "train.checkpoint_every=100"]
    trainer = Trainer(compose_config([*common, f"output_dir={parts}"]))
    plain = trainer.train_step

    def interrupted(batch):
        if trainer.step == 3:
            os.kill(os.getpid(), number)
        return plain(batch)

    trainer.train_step = interrupted
    before = signal.getsignal(number)
    trainer.run()
    assert trainer.stopped and trainer.step == 4
    assert signal.getsignal(number) is before
    assert checkpoints.complete_steps(parts) == [4] and not (parts / "student.safetensors").exists()
    resumed = Trainer(compose_config([*common, f"output_dir={parts}"]))
    assert resumed.step == 4
    resumed.run()
    assert not resumed.stopped
    ours, theirs = load_file(parts / "student.safetensors"), load_file(whole / "student.safetensors")
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_the_watchdog_names_the_rank_that_is_behind():
    dog = Watchdog(0, ["a"], 60.0, "")
    dog.hosts = ["a", "b", "c"]
    dog.at("step 7, backward")
    text = dog._describe(["90.0 21 step 7, backward", "90.1 19 waiting for images", "90.2 21 step 7, backward"])
    assert "timed out" in text and "rank 1 on b: waiting for images" in text and "rank 2" not in text
    assert "nothing has happened on rank 0 for 60 s" in text
    text = dog._describe(["90.0 21 step 7, backward", "90.2 21 step 7, backward"])
    assert "all ranks are at the same place: step 7, backward" in text


def test_the_watchdog_names_a_process_that_stands_still_at_the_place_of_the_others():
    """Stopped within the phase in which the others wait for it, its count is theirs."""
    dog = Watchdog(0, ["a"], 60.0, "")
    dog.hosts = ["a", "b", "c"]
    dog.at("step 7, backward")
    text = dog._describe(["1090.0 21 step 7, backward", "1028.0 21 step 7, backward", "1090.2 22 step 7, update"])
    assert "it waits for rank 1 on b: step 7, backward (silent since)" in text and "rank 2" not in text


def test_the_collectives_are_more_patient_than_the_watchdog(monkeypatch):
    """Whichever is first ends the run, and only the watchdog can name the rank that is missing."""
    seen = {}
    monkeypatch.setattr("torch.distributed.new_group", lambda **options: seen.update(options))
    timeout = 15.0
    Stop(2, timeout)
    slowest_watch = timeout + min(5.0, timeout / 10)
    assert seen["timeout"].total_seconds() > 1.1 * slowest_watch


def test_the_watchdog_of_a_run_whose_first_rank_has_ended_says_so(monkeypatch, caplog):
    """The store is rank 0's; that nothing has happened for so long is not true then."""

    class Gone:
        def set(self, *_):
            raise RuntimeError("Broken pipe")

    def exited(code):
        raise SystemExit(code)

    dog = Watchdog(1, ["a"], 0.1, "this goes on")
    dog.hosts, dog._store = ["a", "b"], Gone()
    dog.at("step 7, backward")
    monkeypatch.setattr(os, "_exit", exited)
    with pytest.raises(SystemExit, match="1"):
        dog._watch()
    assert "rank 0 has ended or does not answer (Broken pipe)" in caplog.text and "timed out" not in caplog.text
    assert "rank 1 itself: step 7, backward; this goes on" in caplog.text
