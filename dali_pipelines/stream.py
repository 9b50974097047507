"""The walk of a batch: plan -> DALI -> device, decoded ahead by a thread.

A `Plan` says which images a step holds, with their bytes and their augmentation; a `Decoder` turns it into uint8
squares; on the consumer's side the colour augmentation runs on the device. A plan is a pure function of its step (and
of which images are broken), so after an image has killed the DALI pipeline the same steps are simply planned again:
with that image decoded by Pillow, or without it.
"""

from __future__ import annotations

import atexit
import functools
import queue
import threading
import time
import weakref
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dune_fast.dali_pipelines.augmentation import Geometry
from dune_fast.dali_pipelines.datasets import DataConfig, Dataset
from dune_fast.dali_pipelines.errors import BrokenImage, DataError
from dune_fast.dali_pipelines.pipeline import DecodeError, Decoder, import_dali
from dune_fast.dali_pipelines.source import ImageSource
from dune_fast.kernels.augment import ColourParams, augment_colour

_IN_FLIGHT = 2  # batches inside DALI: one is decoded while the next one's files are read


@dataclass(frozen=True)
class Batch:
    """One rank's images of one step; B of them."""

    images: Tensor
    """float32 [B, 3, S, S], augmented and normalised with ImageNet's mean and standard deviation, on the device."""
    positions: Tensor
    """int64 [B], global positions, on the device: the key of all randomness that belongs to an image. In validation:
    the index among all validation images."""
    group: Tensor
    """int64 [B], index into the loader's `groups`, on the device."""
    dataset: Tensor
    """int64 [B], index into the loader's `dataset_names`, on the device."""
    paths: list[str]
    """Where each image came from, for messages."""
    step: int
    """Which step of training it belongs to; in validation the number of the batch."""
    group_on_host: np.ndarray | None = None
    """`group` where the host can look at it without waiting for the device."""

    def __len__(self) -> int:
        return len(self.paths)


@dataclass(frozen=True)
class Plan:
    """What one batch consists of, before decoding; all on the host."""

    step: int
    images: list[tuple[int, int]]
    """(dataset, index) of each image."""
    positions: np.ndarray
    group: np.ndarray
    encoded: list[np.ndarray]
    """What DALI gets, uint8 [length] each, see `images.for_dali`."""
    geometry: Geometry
    colour: ColourParams | None


class ImageLoader(ABC):
    """What training and validation share: planning a step is the subclass's part, `_plan`.

    Args:
        config: threads, prefetching, limits.
        image_size: side of the images in pixels.
        batch: images of a batch on this rank.
        device: where the batches are wanted.
        datasets: from `index_datasets`.
        source: reads one split of them.

    Raises:
        DataError: images too small to make sense, or no DALI.
    """

    def __init__(
        self,
        config: DataConfig,
        image_size: int,
        batch: int,
        device: torch.device,
        datasets: Sequence[Dataset],
        source: ImageSource,
    ) -> None:
        import_dali()  # fail here, not in the thread
        if image_size < 8:
            raise DataError(f"the image size is {image_size} pixels: at least 8 is needed")
        self.config, self.image_size, self.device = config, image_size, device
        self.datasets = datasets
        self.dataset_names = [dataset.name for dataset in datasets]
        self.groups = sorted({dataset.config.group for dataset in datasets})
        self.waited_s = 0.0
        """Seconds that the caller has waited for batches, since the start: what decoding ahead did not hide."""
        self._batch, self._source = batch, source
        self._group_of = np.array([self.groups.index(dataset.config.group) for dataset in datasets])
        self._pool = ThreadPoolExecutor(config.num_threads, thread_name_prefix="read-images")
        self._streams: set[Iterator[Batch]] = set()
        # a thread inside DALI aborts the process while DALI shuts down at exit; handlers run last in, first out:
        # registered after the import of DALI, this one comes before its own
        self._at_exit = functools.partial(_close, weakref.ref(self))
        atexit.register(self._at_exit)

    @property
    def broken(self) -> dict[str, int]:
        """Broken images so far, by dataset: of all ranks where the run has a folder, else of this process."""
        return self._source.quarantine.counts()

    @property
    def broken_paths(self) -> list[str]:
        """Their files."""
        return self._source.quarantine.paths()

    def close(self) -> None:
        """Ends the threads, and iterators still in use; a read that fails is not tried again. May be called twice."""
        atexit.unregister(self._at_exit)
        self._source.stop_waiting()
        for stream in list(self._streams):
            stream.close()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @abstractmethod
    def _plan(self, step: int) -> Plan | None:
        """The plan of one step, None after the last one. A pure function of the step and of which images are broken."""

    def _iterate(self, start: int) -> Iterator[Batch]:
        stream = self._consume(start)
        self._streams.add(stream)
        try:
            yield from stream
        finally:
            stream.close()
            self._streams.discard(stream)

    def _consume(self, start: int) -> Iterator[Batch]:
        """Takes decoded batches from a thread and finishes them on the device."""
        ready: queue.Queue = queue.Queue(maxsize=self.config.prefetch)
        stop = threading.Event()

        def put(item: object) -> None:
            while not stop.is_set():
                try:
                    return ready.put(item, timeout=0.1)
                except queue.Full:
                    continue

        def produce() -> None:
            try:
                if self.device.type == "cuda":
                    torch.cuda.set_device(self.device)  # the current device is a matter of each thread
                for item in self._decode(start):
                    put(item)
                    if stop.is_set():
                        return
                put(None)
            except BaseException as error:  # the consumer raises it
                put(error)

        thread = threading.Thread(target=produce, name="decode-images", daemon=True)
        thread.start()
        try:
            while True:
                began = time.perf_counter()
                item = ready.get()
                self.waited_s += time.perf_counter() - began
                if item is None:
                    return
                if isinstance(item, BaseException):
                    raise item
                yield self._finish(*item)
        finally:
            stop.set()
            thread.join()

    def _decode(self, start: int) -> Iterator[tuple[Plan, Tensor, torch.cuda.Event | None]]:
        """Plans and decodes step after step; images that DALI refuses go to Pillow, broken ones are set aside."""
        decoder = Decoder(self._batch, self.image_size, self.config.num_threads, self.device)
        plans = self._plan_ahead(start)
        pending: deque[Plan] = deque()
        failure: DecodeError | None = None

        def fill() -> None:
            while len(pending) < _IN_FLIGHT and (plan := next(plans, None)) is not None:
                pending.append(plan)

        def submit(plan: Plan) -> None:
            nonlocal failure
            try:
                decoder.submit(plan.encoded, plan.geometry)
            except DecodeError as error:  # of a batch still pending
                failure = error

        def restart() -> None:
            if pending:
                decoder.reset(len(pending))
                for plan in pending:
                    submit(plan)

        try:
            fill()
            restart()
            while pending:
                try:
                    if failure is not None:
                        raise failure
                    images, event = decoder.receive()
                except DecodeError as error:
                    failure = None
                    self._handle_refused(decoder, pending, error)
                    again = [self._plan(plan.step) for plan in pending]
                    pending = deque(plan for plan in again if plan.images)
                    fill()
                    restart()
                    continue
                done = pending.popleft()
                if (plan := next(plans, None)) is not None:
                    pending.append(plan)
                    submit(plan)
                yield done, images, event
        finally:
            plans.close()
            decoder.close()

    def _plan_ahead(self, start: int) -> Iterator[Plan]:
        """Plans step after step, the files of the next `read_ahead` ones being read meanwhile.

        A plan that was made before an image turned out to be broken may still hold it: decoding fails again then, and
        the plan is made anew.
        """
        with ThreadPoolExecutor(self.config.read_ahead, thread_name_prefix="plan-batches") as planners:
            waiting = deque(planners.submit(self._plan, start + i) for i in range(self.config.read_ahead))
            step = start + self.config.read_ahead
            try:
                while (plan := waiting.popleft().result()) is not None:
                    waiting.append(planners.submit(self._plan, step))
                    step += 1
                    if plan.images:  # validation images may all be broken
                        yield plan
            finally:
                planners.shutdown(wait=True, cancel_futures=True)

    def _handle_refused(self, decoder: Decoder, pending: Sequence[Plan], error: DecodeError) -> None:
        """Finds the images that DALI refuses: Pillow decodes them from now on, or they are broken."""
        images = [image for plan in pending for image in plan.images]
        encoded = [data for plan in pending for data in plan.encoded]
        refused = decoder.find_broken(encoded, Geometry.concatenate([plan.geometry for plan in pending]))
        if not refused:
            raise DataError(
                f"DALI failed, although every image in flight can be decoded on its own: {error}"
            ) from error
        for i, reason in refused.items():
            try:
                self._source.refused(*images[i], encoded[i], reason)
            except BrokenImage as broken:
                self._source.quarantine.add(*images[i], str(broken), broken.lasting)

    def _read(self, image: tuple[int, int]) -> tuple[np.ndarray, tuple[int, int]] | BrokenImage:
        """What DALI gets for an image and its size, or why it is broken."""
        try:
            return self._source.read(*image)
        except BrokenImage as error:
            return error

    def _read_good(self, images: Sequence[tuple[int, int]]) -> list[tuple[np.ndarray, tuple[int, int]] | None]:
        """Bytes and size of each image; None where one is broken, which is then on record."""
        quarantine = self._source.quarantine
        good = [image for image in images if image not in quarantine]
        found = dict(zip(good, self._pool.map(self._read, good), strict=True))
        for image, result in found.items():
            if isinstance(result, BrokenImage):
                quarantine.add(*image, str(result), result.lasting)
        return [None if image in quarantine else found[image] for image in images]

    def _turned(self, images: Sequence[tuple[int, int]]) -> np.ndarray:
        return np.array([self._source.is_turned(*image) for image in images], dtype=bool)

    def _finish(self, plan: Plan, images: Tensor, event: torch.cuda.Event | None) -> Batch:
        """Colour augmentation and the transfer of all else, on the consumer's stream; the host waits for neither."""
        if event is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(event)
            images.record_stream(current)
        dataset = np.array([dataset for dataset, _ in plan.images])
        table = torch.from_numpy(np.stack([plan.positions, plan.group, dataset, plan.geometry.turn]).astype(np.int64))
        if self.device.type == "cuda":
            table = table.pin_memory()
        table = table.to(self.device, non_blocking=True)
        if plan.geometry.turn.any():
            images = torch.where(table[3].bool()[:, None, None, None], images.rot90(-1, (1, 2)), images)
        images = augment_colour(images, None if plan.colour is None else plan.colour.to(self.device))
        paths = [self._source.path(*image) for image in plan.images]
        return Batch(images, table[0], table[1], table[2], paths, plan.step, plan.group)


def _close(loader: weakref.ref[ImageLoader]) -> None:
    if (alive := loader()) is not None:
        alive.close()
