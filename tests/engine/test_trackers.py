"""TensorBoard, W&B and MLflow: what they get, and that their failures stop nothing."""

from __future__ import annotations

import json
import sys
import threading
import time
from unittest.mock import MagicMock

import pytest

from dune_fast.engine import trackers as trackers_module
from dune_fast.engine.config_sections import ConfigError, LoggingConfig
from dune_fast.engine.trackers import Service, close_trackers, open_trackers
from tests.engine.conftest import build, train


def forget(service: str, run_id: str) -> None:
    """In place of the run's record."""


def test_a_full_disk_ends_tensorboards_events_and_not_the_run(tmp_path, caplog, monkeypatch):
    """Its own thread fails, and the next call raises what that has met."""
    (board,) = open_trackers(LoggingConfig(), "run", tmp_path, 0, {}, {}, forget)
    board.write(1, {"loss": 1.0})

    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(board._writer, "add_scalar", refuse)
    for step in range(2, 5):
        board.write(step, {"loss": 1.0})
    close_trackers([board], finished=True)
    assert caplog.text.count("events end here") == 1 and "No space left" in caplog.text


@pytest.fixture
def services(monkeypatch) -> MagicMock:
    """Stands for the packages wandb and mlflow, and notes what is called."""
    packages = MagicMock()
    packages.wandb.Settings.__annotations__ = {}
    for name in ("wandb", "mlflow"):
        monkeypatch.setitem(sys.modules, name, getattr(packages, name))
    return packages


def test_wandb_and_mlflow_get_configuration_records_and_end(overrides, tmp_path, services):
    more = ["logging.wandb_project=proj", "logging.mlflow_experiment=exp", "train.steps=4", "train.log_every=2"]
    train(overrides, *more)
    calls = services.mock_calls
    called = {name: (args, kwargs) for name, args, kwargs in calls}
    _, init = called["wandb.init"]
    assert init["project"] == "proj" and init["config"]["train"]["steps"] == 4 and init["resume"] == "allow"
    logged = [(kwargs["step"], args[0]) for name, args, kwargs in calls if name == "wandb.init().log"]
    assert [step for step, _ in logged] == [1, 2, 4]
    assert all({"loss", "loss/one/cls/total", "kept/two", "images_per_second"} <= record.keys() for _, record in logged)
    assert called["wandb.init().finish"][1] == {"exit_code": 0}
    sent = [args for name, args, _ in calls if name == "mlflow.entities.Metric"]
    assert {args[0] for args in sent} >= {"loss", "loss.one.cls.total", "gradient_norm.global"}
    assert not any("/" in args[0] for args in sent) and {args[3] for args in sent} == {1, 2, 4}
    assert called["mlflow.MlflowClient().set_terminated"][0][1] == "FINISHED"
    kept = json.loads((tmp_path / "run" / "run.json").read_text())["trackers"]
    assert set(kept) == {"wandb", "mlflow"} and kept["wandb"] == init["id"]


@pytest.mark.parametrize("step", [10, 0])
def test_a_resumed_run_goes_on_in_the_same_runs_of_the_services_and_one_anew_in_others(services, tmp_path, step):
    cfg, kept = LoggingConfig(tensorboard=False, wandb_project="proj", mlflow_experiment="exp"), {}
    ids = {"wandb": "abc", "mlflow": "def"}
    close_trackers(open_trackers(cfg, "run", tmp_path, step, ids, {}, kept.__setitem__), finished=False)
    called = {name: (args, kwargs) for name, args, kwargs in services.mock_calls}
    given, end = called["wandb.init"][1]["id"], called["mlflow.MlflowClient().set_terminated"][0]
    assert given == kept["wandb"] and (given == "abc") == bool(step)
    assert ("mlflow.MlflowClient().create_run" in called) == (kept.get("mlflow", "def") != "def") == (not step)
    assert end[1] == "KILLED" and (end[0] == "def") == bool(step)
    assert called["wandb.init().finish"][1] == {"exit_code": 1}


def test_a_service_that_cannot_be_reached_or_fails_stops_nothing(services, tmp_path, caplog):
    def refuse(**_):
        raise ConnectionError("no route to host")

    sys.modules["wandb"].init = refuse
    trackers = open_trackers(LoggingConfig(False, wandb_project="p"), "run", tmp_path, 0, {}, {}, forget)
    close_trackers(trackers, finished=True)
    assert "gets none of this run's numbers" in caplog.text and "no route to host" in caplog.text
    caplog.clear()

    def fail(step, record):
        raise ConnectionError("gone")

    failing = Service("W", lambda: (fail, lambda finished: None))
    failing.write(1, {"loss": 1.0})
    failing._thread.join(10)
    for step in range(2, 5):
        failing.write(step, {"loss": 1.0})
    close_trackers([failing], finished=True)
    assert caplog.text.count("gets no more of this run's numbers") == 1 and "gone" in caplog.text


@pytest.fixture
def never(monkeypatch):
    """What hangs until the test ends; services may hold up the end for 0.3 s."""
    monkeypatch.setattr(trackers_module, "_FINISHED_SECONDS", 0.3)
    over = threading.Event()
    yield over
    over.set()


def test_services_that_hang_hold_up_the_end_of_a_run_once_and_not_those_that_answer(never, caplog):
    got = []
    dead = [Service(name, lambda: ((lambda *_: never.wait()), never.wait)) for name in ("A", "B")]
    alive = Service("C", lambda: ((lambda *item: got.append(item)), got.append))
    for service in (*dead, alive):
        service.write(1, {"loss": 1.0})
    began = time.monotonic()
    close_trackers([*dead, alive], finished=True)
    assert time.monotonic() - began < 2 and got == [(1, {"loss": 1.0}), True]
    assert "A gets no more" in caplog.text and "B gets no more" in caplog.text and "C gets" not in caplog.text


def test_a_server_that_is_down_at_the_start_delays_no_step(overrides, services, never, caplog, tmp_path):
    """MLflow tries again for minutes, W&B waits 90 s: with two ranks, the watchdog ended the run."""
    sys.modules["mlflow"].MlflowClient = lambda: never.wait()
    sys.modules["wandb"].init = lambda **_: never.wait()
    more = ["logging.wandb_project=proj", "logging.mlflow_experiment=exp", "train.steps=2", "train.log_every=1"]
    train(overrides, *more)
    assert not never.is_set() and caplog.text.count("gets none of this run's numbers") == 2
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) >= 2
    assert set(json.loads((tmp_path / "run" / "run.json").read_text())["trackers"]) == {"wandb"}


def test_records_wait_for_a_server_that_comes_late(never):
    got = []
    service = Service("late", lambda: never.wait() and ((lambda *item: got.append(item)), got.append))
    for step in (1, 2):
        service.write(step, {"loss": float(step)})
    never.set()
    close_trackers([service], finished=False)
    assert got == [(1, {"loss": 1.0}), (2, {"loss": 2.0}), False]


def test_records_that_wait_are_bounded(never, caplog, monkeypatch):
    monkeypatch.setattr(trackers_module, "_QUEUE", 3)
    service = Service("late", lambda: never.wait())
    for step in range(6):
        service.write(step, {})
    assert caplog.text.count("late gets none of this run's numbers") == 1 and "last 3 records" in caplog.text


@pytest.mark.parametrize("package", ["wandb", "mlflow"])
def test_a_service_whose_package_is_missing_is_an_error_before_anything_is_built(overrides, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    field = {"wandb": "wandb_project", "mlflow": "mlflow_experiment"}[package]
    with pytest.raises(ConfigError, match=f"logging.{field} is set.*pip install {package}"):
        build(overrides, f"logging.{field}=name")
