"""The walk of a batch: plan -> DALI -> device, decoded ahead by a thread; colours are augmented by the consumer."""

from __future__ import annotations

import atexit
import contextlib
import functools
import logging
import time
import weakref
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dune_fast.dali_pipelines.batch import Batch, ToDevice
from dune_fast.dali_pipelines.datasets import DataConfig, Dataset, index_datasets
from dune_fast.dali_pipelines.decode import Decoded, Pictures, decode_steps
from dune_fast.dali_pipelines.errors import DataError
from dune_fast.dali_pipelines.order import rank_slots
from dune_fast.dali_pipelines.pipeline import Decoder, import_dali
from dune_fast.dali_pipelines.plan import Part, Plan, TrainPlans, ValPlans, ViewPlans, group_weights
from dune_fast.dali_pipelines.source import ImageSource
from dune_fast.dali_pipelines.teacher_views import OwnCrop, as_given
from dune_fast.kernels.augment import ColourParams, augment_colour

logger = logging.getLogger(__name__)

_LOOK_SECONDS = 0.2  # after which a caller that waits for a batch is asked whether it still wants it

__all__ = ["Batch", "ImageLoader", "TrainLoader", "ValLoader", "ViewLoader", "group_weights"]


class ImageLoader(contextlib.AbstractContextManager):
    """Decodes plans and brings them to the device, batches of at most `batch` images.

    Raises:
        DataError: images too small to make sense, or no DALI.
    """

    def __init__(
        self,
        plans: TrainPlans | ValPlans | ViewPlans,
        source: ImageSource,
        config: DataConfig,
        image_size: int,
        batch: int,
        device: torch.device,
    ) -> None:
        import_dali()  # fail here, not in the thread
        if image_size < 8:
            raise DataError(f"the image size is {image_size} pixels: at least 8 is needed")
        self.plans, self.config, self.image_size, self.device = plans, config, image_size, device
        self.datasets, self.groups = source.datasets, plans.groups.names
        self.dataset_names = [dataset.name for dataset in source.datasets]
        self.num_images = int(source.sizes().sum())
        """Images in all datasets and over all ranks, broken ones included; in training, those held out not counted."""
        self.waited_s = 0.0
        """Seconds that the caller has waited for batches, since the start: what decoding ahead did not hide."""
        self.read_views: Callable[[np.ndarray, np.ndarray, list[str]], ToDevice] | None = None
        """Called ahead, in the decoding thread, with the numbers of a batch's views, their images' checksums and
        paths: what it returns makes `Batch.features` of them, on the device."""
        self.parts = 1
        """Batches of a step."""
        self._source = source
        self._new_decoder = functools.partial(Decoder, batch, image_size, config.num_threads, device)
        self._streams: set[Iterator[Batch]] = set()
        self._abandoned = False
        """Whether a thread may be stuck in a read that nothing ends: nobody waits for the threads then."""
        # a thread inside DALI aborts the process while DALI shuts down at exit; handlers run last in, first out:
        # registered after the import of DALI, this one comes before its own
        self._at_exit = functools.partial(_close, weakref.ref(self))
        atexit.register(self._at_exit)

    @property
    def broken(self) -> dict[str, int]:
        """Broken images so far, by dataset: of all ranks where the run has a folder, else of this process."""
        return self._source.quarantine.counts()

    def batches(self, start_step: int = 0, wanted: Callable[[float], bool] | None = None) -> Iterator[Batch]:
        """Batches from any step on, read and decoded ahead while the caller works; those of training never end.

        Args:
            start_step: the first.
            wanted: asked several times a second while the caller waits, with the seconds that it has waited for this
                batch: False, or what it raises, ends the batches at once, whatever the storage does.

        Raises:
            DataError: too many broken images, or a failure of DALI that no image explains.
            StorageError (a DataError): the storage does not answer.
        """
        stream = self._consume(start_step, wanted)
        self._streams.add(stream)
        try:
            yield from stream
        finally:
            stream.close()
            self._streams.discard(stream)

    def close(self) -> None:
        """Ends the threads, and iterators still in use; a read that fails is not tried again."""
        atexit.unregister(self._at_exit)
        self._source.stop_waiting()
        for stream in list(self._streams):
            stream.close()
        self._source.close(wait=not self._abandoned)

    def __exit__(self, *_: object) -> None:
        self.close()

    def _consume(self, start: int, wanted: Callable[[float], bool] | None) -> Iterator[Batch]:
        """Takes decoded batches from a thread and finishes them on the device."""
        of_plans = self.plans, self._source, self.config.read_ahead, self._new_decoder
        steps = decode_steps(*of_plans, start * self.parts)
        # the current device is a matter of each thread
        set_device = functools.partial(torch.cuda.set_device, self.device) if self.device.type == "cuda" else None
        thread = ThreadPoolExecutor(1, "decode-images", set_device)
        ready = deque(thread.submit(self._next, steps) for _ in range(self.config.prefetch + 1))
        try:
            while (item := self._wait(ready.popleft(), wanted)) is not None:
                ready.append(thread.submit(self._next, steps))
                yield self._finish(*item)
        finally:
            thread.shutdown(wait=not self._abandoned, cancel_futures=True)
            if not self._abandoned:
                steps.close()

    def _next(self, steps: Iterator[Decoded]) -> tuple | None:
        """A decoded step and what is read beside it; None after the last one."""
        if (decoded := next(steps, None)) is None:
            return None
        plan = decoded[0]
        if self.read_views is None or plan.views is None:
            return *decoded, None
        return *decoded, self.read_views(plan.views, plan.checksums, self._paths(plan))

    def _paths(self, plan: Plan) -> list[str]:
        return [self._source.path(*image) for image in plan.images]

    def _wait(self, future: Future, wanted: Callable[[float], bool] | None) -> tuple | None:
        """A future's result; None, or an error of `wanted`, once it is not wanted any more."""
        began = time.perf_counter()
        self._abandoned = True  # until the thread has answered
        try:
            while not futures.wait([future], None if wanted is None else _LOOK_SECONDS).done:
                if not wanted(time.perf_counter() - began):
                    return None
            self._abandoned = False
            return future.result()
        finally:
            self.waited_s += time.perf_counter() - began

    def _finish(self, plan: Plan, pictures: Pictures, read: ToDevice | None) -> Batch:
        """Colour augmentation and the transfer of all else, on the consumer's stream; the host waits for neither."""
        dataset = np.array([dataset for dataset, _ in plan.images])
        table = np.stack([plan.positions, plan.group, dataset, plan.geometry.turn]).astype(np.int64)
        table = self._on_device(torch.from_numpy(table))
        turn = table[3].bool() if plan.geometry.turn.any() else None
        colour = None if plan.colour is None else plan.colour.to(self.device)
        images, *others = (self._coloured(*picture, turn, colour) for picture in pictures)
        features, patches = (None, None) if read is None else read(self.device)
        return Batch(
            images, table[0], table[1], table[2], self._paths(plan), plan.step, plan.group, plan.views, features,
            plan.positions, patches, plan.checksums, as_given(plan.crops, others, self._on_device), plan.part,
        )  # fmt: skip

    def _coloured(
        self, images: Tensor, event: torch.cuda.Event | None, turn: Tensor | None, colour: ColourParams | None
    ) -> Tensor:
        """One picture of each image, uint8 [B, S, S, 3], as the networks get it."""
        if event is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(event)
            images.record_stream(current)
        if turn is not None:
            images = torch.where(turn[:, None, None, None], images.rot90(-1, (1, 2)), images)
        return augment_colour(images, colour)

    def _on_device(self, x: Tensor) -> Tensor:
        return (x.pin_memory() if self.device.type == "cuda" else x).to(self.device, non_blocking=True)


def _close(loader: weakref.ref[ImageLoader]) -> None:
    if (alive := loader()) is not None:
        alive.close()


class TrainLoader(ImageLoader):
    """Endless training batches.

    Args:
        image_size: side of the images in pixels.
        global_batch: images of a step over all ranks.
        rank, world_size: this process's part.
        seed: of order and augmentation.
        device: where the batches are wanted.
        datasets: from `index_datasets(config)`, to index them once for several loaders.
        folder: of the run, for the record of broken images (`quarantine`); None keeps it in memory.
        sizes: step -> side of its images, up to `image_size`; None for `image_size` at every step.
        parts: what this rank takes of a step, one batch after the other; None for its share of the slots at once.
        crops: the teachers' own, with `data.teacher_views`; `patch`: of the student, in pixels; `wanted`: step, part
            -> names of the crops that teachers look at then, None for all.

    Raises:
        DataError: wrong configuration, no images, a batch that the ranks cannot share, or no DALI.
    """

    plans: TrainPlans

    def __init__(
        self,
        config: DataConfig,
        image_size: int,
        global_batch: int,
        rank: int,
        world_size: int,
        seed: int,
        device: torch.device,
        datasets: Sequence[Dataset] | None = None,
        folder: Path | None = None,
        sizes: Callable[[int], int] | None = None,
        parts: Sequence[Part] | None = None,
        crops: Sequence[OwnCrop] = (),
        patch: int = 1,
        wanted: Callable[[int, int], Collection[str] | None] | None = None,
    ) -> None:
        datasets = index_datasets(config) if datasets is None else datasets
        for dataset in datasets:
            if contents := dataset.contents():
                logger.info("dataset %s: %s", dataset.name, contents)
        parts = [Part(rank_slots(global_batch, rank, world_size))] if parts is None else parts
        source = ImageSource(datasets, "train", config, folder, rank)
        sizes = sizes or (lambda _: image_size)
        plans = TrainPlans(source, config, sizes, global_batch, parts, seed, crops, patch, wanted)
        largest = max(part.slots.stop - part.slots.start for part in parts)
        super().__init__(plans, source, config, image_size, largest, device)
        self.parts = len(parts)


class ViewLoader(ImageLoader):
    """Batches of given views, see `plan.ViewPlans`; broken images are left out. Errors: see `TrainLoader`."""

    plans: ViewPlans

    def __init__(
        self,
        config: DataConfig,
        image_size: int,
        seed: int,
        batches: Sequence[np.ndarray],
        device: torch.device,
        datasets: Sequence[Dataset],
    ) -> None:
        source = ImageSource(datasets, "train", config)
        plans = ViewPlans(source, config, image_size, seed, batches)
        super().__init__(plans, source, config, image_size, max(map(len, batches)), device)


class ValLoader(ImageLoader):
    """The held-out images, each exactly once over all ranks: rank r of w has images r, r + w, r + 2 w, ...

    Every `iter` starts from the first. The last batch may be smaller, ranks may differ by one image (and so by one
    batch), and broken images are left out. Without validation images `num_images` is 0 and there are no batches.

    `batch` is of this rank; see `TrainLoader` for the other arguments and the errors.
    """

    plans: ValPlans

    def __init__(
        self,
        config: DataConfig,
        image_size: int,
        batch: int,
        rank: int,
        world_size: int,
        device: torch.device,
        datasets: Sequence[Dataset] | None = None,
    ) -> None:
        if batch < 1:
            raise DataError(f"the validation batch is {batch}: at least 1 is needed")
        source = ImageSource(index_datasets(config) if datasets is None else datasets, "val", config)
        plans = ValPlans(source, image_size, batch, rank, world_size)
        super().__init__(plans, source, config, image_size, batch, device)

    def __len__(self) -> int:
        """Batches of this rank."""
        return len(self.plans)

    def __iter__(self) -> Iterator[Batch]:
        return self.batches()
