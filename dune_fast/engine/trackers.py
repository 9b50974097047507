"""Services that show a run's numbers: TensorBoard, Weights & Biases, MLflow. Rank 0 alone has them.

A package that is asked for and not installed is an error before the run starts. A service that fails or hangs later is
given up with one warning: the training goes on, and `metrics.jsonl` has everything.
"""

from __future__ import annotations

import importlib
import logging
import queue
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from dune_fast.engine.config import ConfigError, LoggingConfig

logger = logging.getLogger(__name__)

_QUEUE = 1000  # records that wait for a slow service
_CLOSE_SECONDS = 30.0  # what a service may hold up the end of a run


class Tracker(Protocol):
    """Takes records of numbers."""

    def write(self, step: int, record: Mapping[str, float]) -> None:
        """Takes one record; returns at once."""

    def close(self, finished: bool) -> None:
        """Hands over what is left. `finished`: whether the run has reached its end."""


class TensorBoard:
    """Event files in `<run>/tensorboard`; steps after `first_step`, which will be repeated, are taken back.

    A disk that refuses them costs the events, not the run.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)
        self._given_up = False

    def write(self, step: int, record: Mapping[str, float]) -> None:
        if self._given_up:
            return
        with self._forgiving():
            for name, value in record.items():
                self._writer.add_scalar(name, value, step)

    def close(self, finished: bool) -> None:
        with self._forgiving():
            self._writer.close()

    @contextmanager
    def _forgiving(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:  # of its own thread, raised at the next call: no later event would be written
            if not self._given_up:
                logger.warning("TensorBoard's events end here (metrics.jsonl has everything): %s", error)
            self._given_up = True


class Service:
    """Sends records from a thread, so that a slow or dead server holds up no step.

    Args:
        name: of the service, for messages.
        send: takes (step, record); may raise, block, or never come back.
        finish: takes `finished`; as `send`.
    """

    def __init__(
        self, name: str, send: Callable[[int, dict[str, float]], None], finish: Callable[[bool], None]
    ) -> None:
        self.name, self._send, self._finish = name, send, finish
        self._given_up = False
        self._queue: queue.Queue[tuple[int, dict[str, float]] | bool] = queue.Queue(_QUEUE)
        self._thread = threading.Thread(target=self._work, name=f"log-to-{name}", daemon=True)
        self._thread.start()

    def write(self, step: int, record: Mapping[str, float]) -> None:
        if self._given_up:
            return
        try:
            self._queue.put_nowait((step, dict(record)))
        except queue.Full:
            self._give_up(f"it has not taken the last {_QUEUE} records")

    def close(self, finished: bool) -> None:
        if self._given_up:
            return
        deadline = time.monotonic() + _CLOSE_SECONDS
        with suppress(queue.Full):
            self._queue.put(finished, timeout=_CLOSE_SECONDS)
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self._give_up(f"it has not taken the last records in {_CLOSE_SECONDS:.0f} s")

    def _work(self) -> None:
        while True:
            item = self._queue.get()
            try:
                if isinstance(item, bool):
                    self._finish(item)
                    return
                self._send(*item)
            except Exception as error:  # another's code and another's server: whatever it is, the training goes on
                self._give_up(f"{type(error).__name__}: {error}")
                return

    def _give_up(self, reason: str) -> None:
        if not self._given_up:
            self._given_up = True
            logger.warning("%s gets no more of this run's numbers (metrics.jsonl does): %s", self.name, reason)


def check_packages(cfg: LoggingConfig) -> None:
    """ConfigError if a service is asked for whose package cannot be imported."""
    for package, field in (("wandb", "wandb_project"), ("mlflow", "mlflow_experiment")):
        if not getattr(cfg, field):
            continue
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise ConfigError(
                f"logging.{field} is set, but the package {package} cannot be imported ({error}): "
                f"pip install {package}, or leave logging.{field} empty"
            ) from error


def _wandb(project: str, name: str, folder: Path, run_id: str | None, config: dict[str, Any]) -> tuple[Service, str]:
    import wandb

    run_id = run_id or uuid.uuid4().hex[:12]
    run = wandb.init(
        project=project, name=name, id=run_id, resume="allow", dir=str(folder), config=config,
        settings=wandb.Settings(login_timeout=_CLOSE_SECONDS),  # a question for a key that nobody answers
    )  # fmt: skip
    service = Service(
        "Weights & Biases",
        send=lambda step, record: run.log(record, step=step),
        finish=lambda finished: run.finish(exit_code=0 if finished else 1),
    )
    return service, run_id


def _mlflow(experiment: str, name: str, run_id: str | None, config: dict[str, Any]) -> tuple[Service, str]:
    import mlflow

    client = mlflow.MlflowClient()
    if run_id is None:
        known = client.get_experiment_by_name(experiment)
        identifier = known.experiment_id if known is not None else client.create_experiment(experiment)
        run_id = str(client.create_run(identifier, run_name=name).info.run_id)
        client.log_dict(run_id, config, "config.yaml")
    else:
        client.update_run(run_id, status="RUNNING")

    def send(step: int, record: dict[str, float]) -> None:
        now = int(1000 * time.time())
        # its file store makes folders of slashes, and cannot have a file "loss" beside a folder "loss"
        values = {name.replace("/", "."): value for name, value in record.items()}
        client.log_batch(run_id, metrics=[mlflow.entities.Metric(k, v, now, step) for k, v in values.items()])

    def finish(finished: bool) -> None:
        client.set_terminated(run_id, "FINISHED" if finished else "KILLED")

    return Service("MLflow", send, finish), run_id


def open_trackers(
    cfg: LoggingConfig, name: str, folder: Path, first_step: int, ids: dict[str, str], config: dict[str, Any]
) -> list[Tracker]:
    """The services that the configuration asks for.

    Args:
        cfg: which.
        name, folder: of the run.
        first_step: where this process starts.
        ids: the services' names for this run, from its earlier starts; new ones are added.
        config: the run's resolved configuration, plain dictionaries and lists.

    Raises:
        ConfigError: see `check_packages`.
    """
    check_packages(cfg)
    trackers: list[Tracker] = [TensorBoard(folder, first_step)] if cfg.tensorboard else []
    if first_step == 0:
        ids.clear()  # a run that starts anew is another run
    asked: dict[str, Callable[[], tuple[Service, str]]] = {}
    if cfg.wandb_project:
        asked["wandb"] = lambda: _wandb(cfg.wandb_project, name, folder, ids.get("wandb"), config)
    if cfg.mlflow_experiment:
        asked["mlflow"] = lambda: _mlflow(cfg.mlflow_experiment, name, ids.get("mlflow"), config)
    for key, connect in asked.items():
        try:
            service, ids[key] = connect()
        except Exception as error:  # no server, no account, no network
            logger.warning("%s gets none of this run's numbers (metrics.jsonl does): %s", key, error)
            continue
        trackers.append(service)
    return trackers
