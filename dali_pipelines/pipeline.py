"""The DALI pipeline: encoded bytes -> decode a window -> resize (bicubic, antialias) -> cut a square -> flip.

One definition for a CPU and a GPU, for training and validation: what differs comes with each image (`Geometry`).
Decoding follows Pillow: EXIF orientation is not applied, and chroma is upsampled smoothly.

A DALI pipeline is dead after its first error, and DALI does not reliably say which image caused it. `Decoder` then
drops what is in flight and starts anew; `Decoder.refused` finds the culprits by halving batches.
"""

from __future__ import annotations

import contextlib
import functools
import io
from collections import deque
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from PIL import Image

from dune_fast.dali_pipelines.augmentation import Geometry
from dune_fast.dali_pipelines.datasets import DataError


class DecodeError(RuntimeError):
    """DALI gave up on a batch; everything in flight is lost."""


def import_dali():
    """The module nvidia.dali. Raises DataError with what to install where it is missing."""
    try:
        import nvidia.dali as dali
        import nvidia.dali.fn  # noqa: F401  (makes dali.fn an attribute)
        import nvidia.dali.types  # noqa: F401
    except ImportError as error:
        raise DataError(
            "images are decoded with NVIDIA DALI, which cannot be imported "
            f"({error}); install it with: pip install nvidia-dali-cuda130 (CUDA 13, also for machines without a GPU) "
            "or nvidia-dali-cuda120 (CUDA 12)"
        ) from error
    return dali


def build_pipeline(batch_size: int, num_threads: int, device: torch.device, depth: int):
    """A built DALI pipeline: inputs encoded, start, shape, size, anchor, side, flip; output uint8 [B, S, S, 3].

    The side S is an input, so that a run that changes its images' size keeps its pipeline.

    See `Decoder` for the arguments. "cpu" decodes and resizes on the CPU, "cuda" decodes with nvJPEG and resizes there.
    """
    dali = import_dali()
    fn, types = dali.fn, dali.types
    on_gpu = device.type == "cuda"

    @dali.pipeline_def
    def graph():
        encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
        start = fn.external_source(name="start", dtype=types.INT64, ndim=1)  # left, top
        shape = fn.external_source(name="shape", dtype=types.INT64, ndim=1)  # width, height
        size = fn.external_source(name="size", dtype=types.FLOAT, ndim=1)  # height, width
        anchor = fn.external_source(name="anchor", dtype=types.INT32, ndim=1)  # top, left
        side = fn.external_source(name="side", dtype=types.INT32, ndim=1)  # height, width
        flip = fn.external_source(name="flip", dtype=types.INT32, ndim=1)
        where, kind = "mixed" if on_gpu else "cpu", {"output_type": types.RGB, "axis_names": "WH"}
        as_pillow = {"adjust_orientation": False, "jpeg_fancy_upsampling": True}
        images = fn.decoders.image_slice(encoded, start, shape, device=where, **kind, **as_pillow)
        images = fn.resize(images, size=size, interp_type=types.INTERP_CUBIC, antialias=True)
        images = fn.slice(images, start=anchor, shape=side, axes=[0, 1], out_of_bounds_policy="pad")  # zeros
        return fn.flip(images, horizontal=flip[0], vertical=flip[1])

    device_id = (device.index if device.index is not None else torch.cuda.current_device()) if on_gpu else None
    pipeline = graph(batch_size=batch_size, num_threads=num_threads, device_id=device_id, prefetch_queue_depth=depth)
    pipeline.build()
    return pipeline


class Decoder:
    """Decodes batches asynchronously, first in, first out.

    `depth` batches are submitted before the first is received; from then on one for each one received; at the end of
    the data the rest is received. After a DecodeError it starts anew. Not safe to share between threads.

    Args:
        batch_size: largest batch.
        image_size: largest side of the results in pixels; a batch's own is in its geometry.
        num_threads: CPU threads.
        device: where the result is wanted, "cpu" or "cuda".
        depth: batches in flight.
    """

    def __init__(
        self, batch_size: int, image_size: int, num_threads: int, device: torch.device, depth: int = 1
    ) -> None:
        self.batch_size, self.image_size, self.device, self._depth = batch_size, image_size, device, depth
        self._build = functools.partial(build_pipeline, batch_size, num_threads, device, depth)
        # a stream of its own: training's stream waits for nothing but the batch it is about to use
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.close()

    def close(self) -> None:
        """Drops everything in flight and frees the pipeline; the next batch builds another one."""
        self._pipeline = None
        self._fed, self._sizes = 0, deque()

    def submit(self, encoded: list[np.ndarray], geometry: Geometry) -> None:
        """Starts on a batch; encoded: what `images.for_dali` gives, uint8 [length] each.

        Raises:
            DecodeError: a batch before has failed.
        """
        assert 1 <= len(encoded) == len(geometry) <= self.batch_size
        inputs = {
            "start": geometry.window[:, :2].astype(np.int64),
            "shape": geometry.window[:, 2:].astype(np.int64),
            "size": geometry.size.astype(np.float32),
            "anchor": geometry.anchor.astype(np.int32),
            "side": np.stack([geometry.side, geometry.side], axis=1).astype(np.int32),
            "flip": geometry.flip.astype(np.int32),
        }
        if self._pipeline is None:
            self._pipeline = self._build()
        with self._failing():
            self._pipeline.feed_input("encoded", encoded)
            for name, values in inputs.items():
                self._pipeline.feed_input(name, np.ascontiguousarray(values))
            self._sizes.append((len(encoded), int(geometry.side[0])))
            self._fed += 1
            if self._fed >= self._depth:  # the first run takes `depth` batches at once, each later one a batch
                self._pipeline.schedule_run()

    def receive(self) -> tuple[torch.Tensor, torch.cuda.Event | None]:
        """Waits for the oldest batch: uint8 [B, S, S, 3], and the event after which it may be read (None on a CPU).

        Raises:
            DecodeError: an image of this batch, or of another one in flight, could not be decoded.
        """
        assert self._fed >= self._depth, "fewer batches were submitted than the pipeline keeps in flight"
        batch, side = self._sizes.popleft()
        shape = (batch, side, side, 3)
        with self._failing():
            if self._stream is None:
                (output,) = self._pipeline.share_outputs()
                images = torch.from_numpy(np.array(output.as_tensor()))  # a copy: the buffer goes back to DALI
                self._pipeline.release_outputs()
                assert images.shape == shape
                return images, None
            from nvidia.dali.plugin.pytorch import feed_ndarray

            with torch.cuda.stream(self._stream):
                (output,) = self._pipeline.share_outputs(cuda_stream=self._stream)
                images = torch.empty(shape, dtype=torch.uint8, device=self.device)
                feed_ndarray(output.as_tensor(), images, cuda_stream=self._stream)
                self._pipeline.release_outputs()
                return images, self._stream.record_event()

    def refused(self, encoded: list[np.ndarray], geometry: Geometry, failure: str = "") -> dict[int, str]:
        """Which of any number of images DALI cannot decode, with the reason; nothing else may be in flight.

        `encoded` and `geometry` as in `submit`; `failure` is why decoding them has failed before, if it has.

        Raises:
            DataError: the images are not to blame: a good one fails as well (out of memory, no driver), or decoding
                fails although each of them can be decoded on its own.
        """
        if failure:
            self._check_good_image()
        found: dict[int, str] = {}
        order = np.arange(len(encoded))
        parts = [  # of one size each
            same[i : i + self.batch_size]
            for same in (order[geometry.side == side] for side in np.unique(geometry.side))
            for i in range(0, len(same), self.batch_size)
        ]
        while parts:
            part = parts.pop()
            if not (reason := self._try([encoded[i] for i in part], geometry[part])):
                continue
            if not failure:
                failure = reason
                self._check_good_image()
            if len(part) == 1:
                found[int(part[0])] = reason
            else:
                parts += [part[: len(part) // 2], part[len(part) // 2 :]]
        if failure and not found:
            raise DataError(f"DALI failed, although every image in flight can be decoded on its own: {failure}")
        return found

    def _check_good_image(self) -> None:
        buffer = io.BytesIO()
        Image.new("RGB", (32, 32), (90, 120, 150)).save(buffer, "JPEG")
        good = [np.frombuffer(buffer.getvalue(), np.uint8)]
        if reason := self._try(good, whole_images([(32, 32)], self.image_size)):
            raise DataError(f"DALI cannot decode even a good image any more: {reason}")

    def _try(self, encoded: list[np.ndarray], geometry: Geometry) -> str:
        """Decodes one batch; returns why it failed, or nothing."""
        try:
            self.submit(encoded, geometry)
            _, event = self.receive()
            if event is not None:
                event.synchronize()
        except DecodeError as error:
            return _reason(str(error))
        return ""

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        """Turns DALI's error into a DecodeError; its pipeline is dead."""
        try:
            yield
        except RuntimeError as error:
            self.close()
            raise DecodeError(str(error)) from error


def _reason(message: str) -> str:
    """The line of DALI's message that tells something."""
    lines = message.partition("encountered:")[2].splitlines() or message.splitlines()
    return next((line.strip() for line in lines if line.strip() and not line.startswith("Current pipeline")), message)


def whole_images(sizes: Sequence[tuple[int, int]], image_size: int) -> Geometry:
    """All of each image, as a square of `image_size` pixels whatever its shape. sizes: (width, height) of each."""
    shape = np.array(sizes, np.int64).reshape(-1, 2)
    batch = len(shape)
    window = np.concatenate([np.zeros_like(shape), shape], axis=1)
    size, none = np.full((batch, 2), image_size), np.zeros((batch, 2), np.int64)
    return Geometry(window, size, none, none.astype(bool), np.zeros(batch, bool), np.full(batch, image_size))

