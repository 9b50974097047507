"""TensorBoard, W&B and MLflow: what they get, and that their failures stop nothing."""

from __future__ import annotations

import json
import sys
import threading
import types

import pytest

from dune_fast.engine import trackers as trackers_module
from dune_fast.engine.config import ConfigError, LoggingConfig, compose_config
from dune_fast.engine.trackers import Service, open_trackers
from dune_fast.engine.trainer import Trainer


def test_a_full_disk_ends_tensorboards_events_and_not_the_run(tmp_path, caplog, monkeypatch):
    """Its own thread fails, and the next call raises what that has met."""
    (board,) = open_trackers(LoggingConfig(), "run", tmp_path, 0, {}, {})
    board.write(1, {"loss": 1.0})

    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(board._writer, "add_scalar", refuse)
    for step in range(2, 5):
        board.write(step, {"loss": 1.0})
    board.close(finished=True)
    assert caplog.text.count("events end here") == 1 and "No space left" in caplog.text


class Recorder(types.ModuleType):
    """A module, and every object below it, that notes what is called."""

    def __init__(self, name: str, calls: list) -> None:
        super().__init__(name)
        self._name, self._calls = name, calls

    def __getattr__(self, key):
        if key.startswith("__"):
            raise AttributeError(key)
        return Recorder(f"{self._name}.{key}", self._calls)

    def __call__(self, *args, **kwargs):
        self._calls.append((self._name, args, kwargs))
        return Recorder(f"{self._name}()", self._calls)


@pytest.fixture
def services(monkeypatch) -> list:
    """Fake packages wandb and mlflow; returns the list of calls."""
    calls: list = []
    for name in ("wandb", "mlflow"):
        monkeypatch.setitem(sys.modules, name, Recorder(name, calls))
    return calls


def test_wandb_and_mlflow_get_configuration_records_and_end(overrides, tmp_path, services):
    more = ["logging.wandb_project=proj", "logging.mlflow_experiment=exp", "train.steps=4", "train.log_every=2"]
    Trainer(compose_config([*overrides, *more])).run()
    called = {name: (args, kwargs) for name, args, kwargs in services}
    _, init = called["wandb.init"]
    assert init["project"] == "proj" and init["config"]["train"]["steps"] == 4 and init["resume"] == "allow"
    logged = [(kwargs["step"], args[0]) for name, args, kwargs in services if name == "wandb.init().log"]
    assert [step for step, _ in logged] == [1, 2, 4]
    assert all({"loss", "loss/one/cls/total", "kept/two", "images_per_second"} <= record.keys() for _, record in logged)
    assert called["wandb.init().finish"][1] == {"exit_code": 0}
    sent = [args for name, args, _ in services if name == "mlflow.entities.Metric"]
    assert {args[0] for args in sent} >= {"loss", "loss.one.cls.total", "gradient_norm.global"}
    assert not any("/" in args[0] for args in sent) and {args[3] for args in sent} == {1, 2, 4}
    assert called["mlflow.MlflowClient().set_terminated"][0][1] == "FINISHED"
    kept = json.loads((tmp_path / "run" / "run.json").read_text())["trackers"]
    assert set(kept) == {"wandb", "mlflow"} and kept["wandb"] == init["id"]


def test_a_resumed_run_goes_on_in_the_same_runs_of_the_services(services, tmp_path):
    cfg = LoggingConfig(tensorboard=False, wandb_project="proj", mlflow_experiment="exp")
    ids = {"wandb": "abc", "mlflow": "def"}
    for tracker in open_trackers(cfg, "run", tmp_path, 10, ids, {}):
        tracker.close(finished=False)
    called = {name: (args, kwargs) for name, args, kwargs in services}
    assert called["wandb.init"][1]["id"] == "abc" and "mlflow.MlflowClient().create_run" not in called
    assert called["mlflow.MlflowClient().set_terminated"][0] == ("def", "KILLED")
    assert called["wandb.init().finish"][1] == {"exit_code": 1}


def test_a_service_that_cannot_be_reached_or_fails_or_hangs_stops_nothing(services, tmp_path, caplog, monkeypatch):
    def refuse(**_):
        raise ConnectionError("no route to host")

    sys.modules["wandb"].init = refuse
    assert open_trackers(LoggingConfig(False, wandb_project="p"), "run", tmp_path, 0, {}, {}) == []
    assert "no route to host" in caplog.text
    caplog.clear()

    def fail(step, record):
        raise ConnectionError("gone")

    failing = Service("W", fail, lambda finished: None)
    failing.write(1, {"loss": 1.0})
    failing._thread.join(10)
    for step in range(2, 5):
        failing.write(step, {"loss": 1.0})
    failing.close(finished=True)
    assert caplog.text.count("gets no more of this run's numbers") == 1 and "gone" in caplog.text
    caplog.clear()

    monkeypatch.setattr(trackers_module, "_CLOSE_SECONDS", 0.2)
    never = threading.Event()
    hanging = Service("H", lambda step, record: never.wait(), lambda finished: None)
    hanging.write(1, {"loss": 1.0})
    hanging.close(finished=True)
    assert "H gets no more" in caplog.text
    never.set()


@pytest.mark.parametrize("package", ["wandb", "mlflow"])
def test_a_service_whose_package_is_missing_is_an_error_before_anything_is_built(overrides, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    field = {"wandb": "wandb_project", "mlflow": "mlflow_experiment"}[package]
    with pytest.raises(ConfigError, match=f"logging.{field} is set.*pip install {package}"):
        Trainer(compose_config([*overrides, f"logging.{field}=name"]))
