"""How a run says that it has finished, was stopped or has failed."""

from __future__ import annotations

import os
import signal

import pytest

from dune_fast import train
from dune_fast.engine.run_state import (
    FAILED,
    FINISHED,
    RUNNING,
    STOPPED,
    STOPPED_STATUS,
    command_status,
    read_state,
    write_state,
)
from dune_fast.engine.trainer import Trainer
from tests.engine.conftest import small_run


@pytest.mark.parametrize("ends", [FINISHED, STOPPED, FAILED])
def test_a_runs_folder_says_how_it_ended(photos, tmp_path, monkeypatch, ends):
    step, states = Trainer.train_step, []

    def ending(self, batch):
        states.append(read_state(tmp_path)["state"])
        if self.step == 4 and ends == STOPPED:
            os.kill(os.getpid(), signal.SIGTERM)
        if self.step == 4 and ends == FAILED:
            raise ValueError("the disk is made of cheese")
        return step(self, batch)

    monkeypatch.setattr(Trainer, "train_step", ending)
    status = train.main([*small_run(photos, tmp_path), "evaluation.held_out=false"])
    found = read_state(tmp_path)
    assert status == (2 if ends == FAILED else 0) and set(states) == {RUNNING}
    assert (found["state"], found["steps"]) == (ends, 6)
    saved, why = {FINISHED: (6, ""), STOPPED: (5, "SIGTERM"), FAILED: (3, "the disk is made of cheese")}[ends]
    assert (found["step"], found["why"]) == (saved, why)


@pytest.mark.parametrize(("state", "status"), [(FINISHED, 0), (STOPPED, STOPPED_STATUS), (RUNNING, 0)])
def test_a_commands_status_tells_a_stopped_run_from_one_at_its_end(tmp_path, state, status):
    def launch() -> int:
        write_state(tmp_path, state, 3, 6)
        return 0

    assert command_status(tmp_path, launch) == status


def test_a_launch_that_did_not_begin_is_not_taken_for_the_stop_before(tmp_path):
    write_state(tmp_path, STOPPED, 3, 6)
    assert command_status(tmp_path, lambda: 2) == 2
