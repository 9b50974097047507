"""A run that is asked to stop saves and ends well; a rank that hangs is named."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest
import torch.distributed as dist

from dune_fast.dali_pipelines.errors import StorageError
from dune_fast.dali_pipelines.source import ImageSource
from dune_fast.engine import checkpoints
from dune_fast.engine import trainer as trainer_module
from dune_fast.engine.interruption import OtherRankError, Stop
from dune_fast.engine.run_state import read_state
from dune_fast.engine.watchdog import LostRankError, Watchdog
from tests.engine.conftest import build, same_weights, train


def test_a_signal_while_the_log_is_opened_stops_before_the_first_step(overrides, tmp_path, monkeypatch, caplog):
    """Services of logging take their time to connect. And a run that overwrites does not go on by the same command."""
    plain = trainer_module.open_log

    def interrupted(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return plain(*arguments)

    monkeypatch.setattr(trainer_module, "open_log", interrupted)
    caplog.set_level(logging.INFO, "dune_fast")
    trainer = build(overrides, "train.overwrite=true")
    before = signal.signal(signal.SIGTERM, lambda *_: pytest.fail("the run does not take the signal"))
    try:
        trainer.run()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert trainer.stopped and trainer.step == 0 and not checkpoints.complete_steps(tmp_path / "run")
    assert f"stopped after step 0 of 6; `dune-fast resume {tmp_path / 'run'}` goes on" in caplog.text


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_saves_stops_and_the_run_goes_on_from_there(overrides, trained_run, tmp_path, number):
    run, before = tmp_path / "run", signal.getsignal(number)

    def interrupt(trainer, batch):
        if trainer.step == 3:
            os.kill(os.getpid(), number)

    trainer = train(overrides, "train.checkpoint_every=100", before_step=interrupt)
    assert trainer.stopped and trainer.step == 4
    assert signal.getsignal(number) is before
    assert checkpoints.complete_steps(run) == [4] and not (run / "student.safetensors").exists()
    resumed = build(overrides, "train.checkpoint_every=100")
    assert resumed.step == 4
    resumed.run()
    assert not resumed.stopped and same_weights(run, trained_run)


@pytest.fixture
def storage(monkeypatch):
    """How images are read, to be exchanged within a run: a function of source and images."""
    plain = ImageSource.read_all
    read = {"now": plain}
    monkeypatch.setattr(ImageSource, "read_all", lambda source, images: read["now"](source, images))
    return read


@pytest.mark.parametrize("told", [True, False])
def test_frozen_storage_does_not_keep_a_run_from_saving(overrides, tmp_path, storage, told):
    """Regression: SIGTERM was not obeyed while a run waited for images, and nothing ended it."""
    answer = threading.Event()

    def frozen(source, images):
        answer.wait(60)
        raise StorageError("it is over")

    def freeze(trainer, batch):
        if trainer.step == 3:
            storage["now"] = frozen
            if told:
                threading.Timer(1.0, os.kill, [os.getpid(), signal.SIGTERM]).start()

    timeout = f"train.timeout_minutes={(30 if told else 5) / 60}"
    trainer = build(overrides, "train.steps=60", "train.checkpoint_every=100", timeout, before_step=freeze)
    try:
        if told:
            trainer.run()
        else:
            with pytest.raises(StorageError, match="no batch of images has come for 4 s"):
                trainer.run()
    finally:
        answer.set()
    assert trainer.stopped and checkpoints.complete_steps(tmp_path / "run") == [trainer.step] and trainer.step > 3
    state = read_state(tmp_path / "run")
    assert (state["state"], state["step"]) == (("stopped", trainer.step) if told else ("running", 0))


def test_an_error_of_the_storage_is_raised_once_the_steps_are_saved(overrides, tmp_path, storage, caplog):
    """Regression: the steps since the last checkpoint were lost."""

    def failing(source, images):
        raise StorageError("the server has gone")

    def fail(trainer, batch):
        storage["now"] = failing

    # more steps than are read ahead
    trainer = build(overrides, "train.steps=60", "train.checkpoint_every=100", before_step=fail)
    with pytest.raises(StorageError, match="the server has gone"):
        trainer.run()
    assert trainer.step > 0 and checkpoints.complete_steps(tmp_path / "run") == [trainer.step]
    assert "the server has gone; the run saves and stops" in caplog.text


def ranks_say(monkeypatch, *others: tuple[str, str, str]) -> Stop:
    """A `Stop` of rank 0 whose other ranks say (host, signal, fault)."""
    monkeypatch.setattr("torch.distributed.new_group", lambda **options: object())
    monkeypatch.setattr("torch.distributed.get_world_size", lambda group: 1 + len(others))
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    worst = max(float(bool(signal or fault)) for _, signal, fault in others)
    monkeypatch.setattr("torch.distributed.all_reduce", lambda x, op, group: x.clamp_(min=worst))

    def gather(values, mine, group):
        values[:] = [mine, *others]

    monkeypatch.setattr("torch.distributed.all_gather_object", gather)
    return Stop(1 + len(others), 60.0)


def test_the_ranks_agree_before_every_step(monkeypatch):
    """Regression: they did so every 10th, for which slow steps leave no time between a signal and the kill."""
    assert not ranks_say(monkeypatch, ("b", "", "")).now()
    stop = ranks_say(monkeypatch, ("b", "", ""), ("c", "SIGTERM", ""))
    assert stop.now() and stop.why == "SIGTERM"
    stop.raise_fault()


def test_a_rank_learns_why_another_one_cannot_go_on(monkeypatch, caplog):
    stop = ranks_say(monkeypatch, ("b", "", "the disk is gone"), ("c", "SIGTERM", ""))
    assert stop.now() and stop.why == "rank 1 on b: the disk is gone"
    with pytest.raises(OtherRankError, match="rank 1 on b: the disk is gone"):
        stop.raise_fault()
    own = StorageError("mine")
    stop = ranks_say(monkeypatch, ("b", "", "the disk is gone"))
    assert stop.now(own)
    with pytest.raises(StorageError, match="mine"):
        stop.raise_fault()


def test_what_takes_longer_than_the_notice_is_said_once(caplog):
    stop = Stop(1, 60.0, notice=10.0)
    stop.now()
    stop.saved(9.0)
    assert not caplog.text
    stop.saved(12.0)
    stop.saved(12.0)
    assert caplog.text.count("a checkpoint took 12 s to be written") == 1 and "train.notice_seconds=10" in caplog.text


def test_signals_that_were_ignored_stay_ignored_and_a_second_ctrl_c_insists(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Stop(1, 60.0) as stop:
            os.kill(os.getpid(), signal.SIGHUP)  # nohup
            assert not stop.asked
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)  # the launcher's, beside the terminal's
            assert stop.asked == "SIGINT"
            monkeypatch.setattr("dune_fast.engine.interruption.INSIST_SECONDS", 0.0)
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.fixture
def exits(monkeypatch) -> None:
    """The end of the process is a SystemExit."""

    def exited(code):
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", exited)


class Gone:
    """The store of a process that has ended."""

    def set(self, *_):
        raise dist.DistNetworkError("Broken pipe")


def watched(rank: int, hosts: list[str], stop: Stop | None = None, timeout: float = 0.2) -> Watchdog:
    """A watchdog on a store of its own, if there are several hosts."""
    dog = Watchdog(rank, hosts[:1], timeout, "go on", stop or Stop(1, 60.0), ended=[].append)
    dog.hosts, dog._store = hosts, dist.HashStore() if len(hosts) > 1 else None
    return dog


def test_the_watchdog_of_one_process_warns_and_then_ends_it(exits, caplog):
    """Regression: a run of one process had none."""
    dog, reasons = watched(0, ["a"]), []
    dog._ended = reasons.append
    dog.at("waiting for images")
    with pytest.raises(SystemExit, match="1"):
        dog._watch()
    assert "rank 0 on a: nothing has happened for 0 s (waiting for images)" in caplog.text
    assert len(reasons) == 1 and "nothing has happened on rank 0" in reasons[0] and "waiting for images" in reasons[0]


def test_a_rank_hears_that_another_one_or_the_launcher_has_ended_it(monkeypatch):
    asked, hears = Stop(1, 60.0), Stop(1, 60.0)
    first, second = watched(0, ["a", "b"], asked), watched(1, ["a", "b"], hears)
    second._store = first._store
    asked.ask("SIGTERM")
    first._talk()
    second._talk()
    assert hears.asked == "SIGTERM on rank 0"
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as launcher:
        left = Stop(1, 60.0)
        dog = watched(0, ["a"], left, 60.0)
        dog._interval, dog._starters = 0.01, [psutil.Process(launcher.pid)]
        with dog:
            time.sleep(0.1)
            assert not left.asked
            launcher.communicate(b"\n")
            end = time.monotonic() + 10
            while not left.asked and time.monotonic() < end:
                time.sleep(0.01)
    assert left.asked == "the launcher has ended"


@pytest.mark.parametrize("lost", [0, 2])
def test_a_lost_rank_is_one_sentence(lost):
    """Regression: 25 lines of traceback, and no name."""
    dog = watched(1, ["a", "b", "c"])
    for rank in range(3):
        dog._store.set(f"place/{rank}", "1.0 3 step 1, forward")
    dog._store.set("left/0", "")  # it has noticed the same
    if lost == 0:
        dog._store = Gone()
    error = RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:11392")
    with pytest.raises(LostRankError, match=f"connection to rank {lost} on {'abc'[lost]} is lost: .*; go on$"):
        dog.__exit__(RuntimeError, error, None)
    dog.__exit__(RuntimeError, RuntimeError("a bug of ours"), None)


def test_the_watchdog_names_the_rank_that_is_behind():
    dog = watched(0, ["a", "b", "c"], timeout=60.0)
    dog.at("step 7, backward")
    text = dog._describe(["90.0 21 step 7, backward", "90.1 19 waiting for images", "90.2 21 step 7, backward"])
    assert "timed out" in text and "rank 1 on b: waiting for images" in text and "rank 2" not in text
    assert "nothing has happened on rank 0 for 60 s" in text
    text = dog._describe(["90.0 21 step 7, backward", "90.2 21 step 7, backward"])
    assert "all ranks are at the same place: step 7, backward" in text
    # a process that is stopped within the phase in which the others wait for it has their count
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


def test_the_watchdog_of_a_run_whose_first_rank_has_ended_says_so(exits, caplog):
    """The store is rank 0's; that nothing has happened for so long is not true then."""
    dog = watched(1, ["a", "b"])
    dog._store = Gone()
    dog.at("step 7, backward")
    with pytest.raises(SystemExit, match="1"):
        dog._watch()
    assert "rank 0 has ended or does not answer (Broken pipe)" in caplog.text and "timed out" not in caplog.text
    assert "rank 1 itself: step 7, backward; go on" in caplog.text
