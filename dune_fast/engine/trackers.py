"""Services that show a run's numbers: TensorBoard, Weights & Biases, MLflow. Rank 0 alone has them.

A service is connected to while the training goes on. One that cannot be reached, fails or hangs is given up with one
warning: `metrics.jsonl` has everything.
"""

from __future__ import annotations

import importlib
import logging
import queue
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from dune_fast.engine.config_sections import ConfigError, LoggingConfig

logger = logging.getLogger(__name__)

_QUEUE = 1000  # records that wait for a slow service
_CONNECT_SECONDS = 30.0  # W&B's own default is 90, and Python does not end before it has given up
_FINISHED_SECONDS, _STOPPED_SECONDS = 30.0, 10.0
"""What all services together may hold up the end of a run, and of one that is stopped: schedulers wait 30 s."""

Send = Callable[[int, dict[str, float]], None]
"""Takes a step and its record; may raise, block, or never come back."""
Finish = Callable[[bool], None]
"""Takes whether the run has reached its end; as `Send`."""


class Tracker(Protocol):
    """Takes records of numbers."""

    def write(self, step: int, record: Mapping[str, float]) -> None:
        """Takes one record; returns at once."""

    def finish(self, finished: bool) -> None:
        """Has what is left handed over; returns at once. `finished`: whether the run has reached its end."""

    def close(self, seconds: float) -> None:
        """Waits at most so long until that has happened."""


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

    def finish(self, finished: bool) -> None:
        with self._forgiving():
            self._writer.close()

    def close(self, seconds: float) -> None:
        pass

    @contextmanager
    def _forgiving(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:  # of its own thread, raised at the next call: no later event would be written
            if not self._given_up:
                logger.warning("TensorBoard's events end here (metrics.jsonl has everything): %s", error)
            self._given_up = True


class Service:
    """Connects and sends records from a thread, so that a slow or dead server holds up no step.

    Args:
        name: of the service, for messages.
        connect: returns how to send and how to finish; may raise, block, or never come back.
    """

    def __init__(self, name: str, connect: Callable[[], tuple[Send, Finish]]) -> None:
        self.name, self._connect = name, connect
        self._connected = self._given_up = False
        self._lock = threading.Lock()
        self._queue: queue.Queue[tuple[int, dict[str, float]] | bool] = queue.Queue(_QUEUE)
        self._thread = threading.Thread(target=self._work, name=f"log-to-{name}", daemon=True)
        self._thread.start()

    def write(self, step: int, record: Mapping[str, float]) -> None:
        if not self._given_up:
            self._put((step, dict(record)))

    def finish(self, finished: bool) -> None:
        if not self._given_up:
            self._put(finished)

    def close(self, seconds: float) -> None:
        if self._given_up:
            return
        self._thread.join(seconds)
        if self._thread.is_alive():
            self._give_up("the run has ended, and it has not taken the last records")

    def _put(self, item: tuple[int, dict[str, float]] | bool) -> None:
        try:
            self._queue.put_nowait(item)
        except queue.Full:
            self._give_up(f"it has not taken the last {_QUEUE} records")

    def _work(self) -> None:
        try:
            send, finish = self._connect()
            self._connected = True
            while not self._given_up:
                item = self._queue.get()
                if isinstance(item, bool):
                    finish(item)
                    return
                send(*item)
        except Exception as error:  # another's code and another's server: whatever it is, the training goes on
            self._give_up(f"{type(error).__name__}: {error}")

    def _give_up(self, reason: str) -> None:
        with self._lock:
            if not self._given_up:
                share = "no more" if self._connected else "none"
                logger.warning("%s gets %s of this run's numbers (metrics.jsonl does): %s", self.name, share, reason)
                self._given_up = True


def close_trackers(trackers: Sequence[Tracker], finished: bool) -> None:
    """Ends all of them, within a time that is one for all. `finished`: whether the run has reached its end."""
    for tracker in trackers:
        tracker.finish(finished)
    deadline = time.monotonic() + (_FINISHED_SECONDS if finished else _STOPPED_SECONDS)
    for tracker in trackers:
        tracker.close(max(0.0, deadline - time.monotonic()))


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


def _wandb(project: str, name: str, folder: Path, run_id: str, config: dict[str, Any]) -> tuple[Send, Finish]:
    import wandb

    limits = dict.fromkeys(("login_timeout", "init_timeout"), _CONNECT_SECONDS)
    limits["finish_timeout"] = _STOPPED_SECONDS  # also of what it does when Python ends; older versions have none
    known = wandb.Settings.__annotations__
    settings = wandb.Settings(**{key: value for key, value in limits.items() if key in known})
    run = wandb.init(
        project=project, name=name, id=run_id, resume="allow", dir=str(folder), config=config, settings=settings
    )

    def send(step: int, record: dict[str, float]) -> None:
        run.log(record, step=step)

    return send, lambda finished: run.finish(exit_code=0 if finished else 1)


def _mlflow(
    experiment: str, name: str, run_id: str | None, config: dict[str, Any], on_id: Callable[[str], None]
) -> tuple[Send, Finish]:
    import mlflow

    client = mlflow.MlflowClient()
    if run_id is None:
        known = client.get_experiment_by_name(experiment)
        identifier = known.experiment_id if known is not None else client.create_experiment(experiment)
        run_id = str(client.create_run(identifier, run_name=name).info.run_id)
        on_id(run_id)
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

    return send, finish


def open_trackers(
    cfg: LoggingConfig,
    name: str,
    folder: Path,
    first_step: int,
    ids: Mapping[str, str],
    config: dict[str, Any],
    on_id: Callable[[str, str], None],
) -> list[Tracker]:
    """The services that the configuration asks for; nothing waits for them.

    Args:
        first_step: where this process starts; at 0, the run is another one for the services.
        ids: service -> its name for this run, from the run's earlier starts.
        config: the run's resolved configuration, plain dictionaries and lists.
        on_id: takes a service and its new name for this run; also from other threads, and later.

    Raises:
        ConfigError: see `check_packages`.
    """
    check_packages(cfg)
    trackers: list[Tracker] = [TensorBoard(folder, first_step)] if cfg.tensorboard else []
    earlier = ids.get if first_step else {}.get
    if cfg.wandb_project:
        run_id = earlier("wandb") or uuid.uuid4().hex[:12]
        on_id("wandb", run_id)
        connect = partial(_wandb, cfg.wandb_project, name, folder, run_id, config)
        trackers.append(Service("Weights & Biases", connect))
    if cfg.mlflow_experiment:
        keep = partial(on_id, "mlflow")
        connect = partial(_mlflow, cfg.mlflow_experiment, name, earlier("mlflow"), config, keep)
        trackers.append(Service("MLflow", connect))
    return trackers
