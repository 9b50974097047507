"""The DALI pipeline: encoded bytes -> decode a window -> resize (bicubic, antialias) -> cut a square -> flip.

One definition for a CPU and a GPU, one for training and validation: what differs comes as arguments of each sample
(`Geometry`). It gets what `images.for_dali` gives: plain JPEGs and PPMs. Decoding follows Pillow: EXIF orientation is
not applied, and chroma is upsampled smoothly. DALI's random operators are not used at all.

A DALI pipeline is dead after its first error, and DALI does not reliably say which image caused it. `Decoder` therefore
can be reset, and `find_broken` finds the culprits by halving the batch until single images fail on their own.
"""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from dune_fast.dali_pipelines.augmentation import Geometry
from dune_fast.dali_pipelines.datasets import DataError


class DecodeError(RuntimeError):
    """DALI gave up on a batch; the pipeline is dead until `Decoder.reset`."""


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


def build_pipeline(batch_size: int, image_size: int, num_threads: int, device: torch.device, depth: int):
    """A built DALI pipeline: inputs encoded, start, shape, size, anchor, flip; output uint8 [B, S, S, 3].

    Args:
        batch_size: largest batch it will be given.
        image_size: S, side of the result in pixels.
        num_threads: CPU threads of the pipeline.
        device: "cpu" decodes and resizes on the CPU; "cuda" decodes with nvJPEG and resizes there.
        depth: batches in flight; that many have to be fed before the first is run.
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
        flip = fn.external_source(name="flip", dtype=types.INT32, ndim=1)
        images = fn.decoders.image_slice(
            encoded,
            start,
            shape,
            device="mixed" if on_gpu else "cpu",
            output_type=types.RGB,
            axis_names="WH",
            adjust_orientation=False,
            jpeg_fancy_upsampling=True,
        )
        images = fn.resize(images, size=size, interp_type=types.INTERP_CUBIC, antialias=True)
        images = fn.slice(images, start=anchor, shape=[image_size, image_size], axes=[0, 1])
        return fn.flip(images, horizontal=flip[0], vertical=flip[1])

    device_id = (device.index if device.index is not None else torch.cuda.current_device()) if on_gpu else None
    pipeline = graph(batch_size=batch_size, num_threads=num_threads, device_id=device_id, prefetch_queue_depth=depth)
    pipeline.build()
    return pipeline


class Decoder:
    """Decodes batches asynchronously, first in, first out.

    `depth` batches are to be submitted before the first is received; from then on one can be submitted for each one
    received, and at the end of the data the rest is received. Nothing here is safe to share between threads.

    Args:
        batch_size: largest batch.
        image_size: side of the result in pixels.
        num_threads: CPU threads.
        device: where the result is wanted, "cpu" or "cuda".
    """

    def __init__(self, batch_size: int, image_size: int, num_threads: int, device: torch.device) -> None:
        self.batch_size, self.image_size, self.num_threads, self.device = batch_size, image_size, num_threads, device
        # a stream of its own: training's stream waits for nothing but the batch it is about to use
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.reset(1)

    def reset(self, depth: int) -> None:
        """Drops everything in flight; the next batch starts a new pipeline, which keeps `depth` of them in flight."""
        self._pipeline = None  # frees the old one's threads and buffers first
        self._depth, self._fed, self._sizes = depth, 0, deque()

    def submit(self, encoded: list[np.ndarray], geometry: Geometry) -> None:
        """Starts on a batch.

        Args:
            encoded: the bytes of each file, uint8 [length].
            geometry: what to do to them.

        Raises:
            DecodeError: a batch before has failed.
        """
        assert 1 <= len(encoded) == len(geometry) <= self.batch_size
        inputs = {
            "start": geometry.window[:, :2].astype(np.int64),
            "shape": geometry.window[:, 2:].astype(np.int64),
            "size": geometry.size.astype(np.float32),
            "anchor": geometry.anchor.astype(np.int32),
            "flip": geometry.flip.astype(np.int32),
        }
        if self._pipeline is None:
            self._pipeline = build_pipeline(
                self.batch_size, self.image_size, self.num_threads, self.device, self._depth
            )
        try:
            self._pipeline.feed_input("encoded", encoded)
            for name, values in inputs.items():
                self._pipeline.feed_input(name, np.ascontiguousarray(values))
            self._sizes.append(len(encoded))
            self._fed += 1
            if self._fed >= self._depth:  # the first run takes `depth` batches at once, each later one a batch
                self._pipeline.schedule_run()
        except RuntimeError as error:
            raise DecodeError(str(error)) from error

    def receive(self) -> tuple[torch.Tensor, torch.cuda.Event | None]:
        """The oldest batch, waiting for it.

        Returns:
            uint8 [B, S, S, 3] on the device, and the event after which it may be read (None on a CPU).

        Raises:
            DecodeError: an image of this batch, or of another one in flight, could not be decoded.
        """
        assert self._fed >= self._depth, "fewer batches were submitted than the pipeline keeps in flight"
        shape = (self._sizes.popleft(), self.image_size, self.image_size, 3)
        try:
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
        except RuntimeError as error:
            raise DecodeError(str(error)) from error

    def find_broken(self, encoded: list[np.ndarray], geometry: Geometry) -> dict[int, str]:
        """Which images fail on their own, with the reason; decodes everything again, in halves.

        Raises:
            DataError: a good image fails as well, so the images are not to blame (out of memory, no driver).
        """
        self._pipeline = None  # dead already; a GPU may not have the memory for two
        reason = self._try(*_good_image(self.image_size))
        if reason:
            raise DataError(f"DALI cannot decode even a good image any more: {reason}")
        broken: dict[int, str] = {}
        parts = [
            list(range(i, min(i + self.batch_size, len(encoded)))) for i in range(0, len(encoded), self.batch_size)
        ]
        while parts:
            part = parts.pop()
            reason = self._try([encoded[i] for i in part], geometry[part])
            if reason and len(part) == 1:
                broken[part[0]] = reason
            elif reason:
                parts += [part[: len(part) // 2], part[len(part) // 2 :]]
        return broken

    def refused(self, encoded: list[np.ndarray], sizes: Sequence[tuple[int, int]]) -> dict[int, str]:
        """Which images DALI cannot decode, all of each, with the reason. Nothing else may be in flight.

        Args:
            encoded: the bytes of each, uint8 [length]; at most a batch.
            sizes: (width, height) of each.

        Raises:
            DataError: DALI fails for a reason that no image explains.
        """
        if not encoded:
            return {}
        geometry = whole_images(sizes, self.image_size)
        try:
            self.submit(encoded, geometry)
            self.receive()
        except DecodeError as error:
            found = self.find_broken(encoded, geometry)
            self.reset(1)
            if not found:
                raise DataError(f"DALI failed, although every image can be decoded on its own: {error}") from error
            return found
        return {}

    def close(self) -> None:
        """Frees the pipeline."""
        self._pipeline = None

    def _try(self, encoded: list[np.ndarray], geometry: Geometry) -> str:
        """Decodes one batch with a pipeline of its own; returns why it failed, or nothing."""
        probe = Decoder(len(encoded), self.image_size, self.num_threads, self.device)
        try:
            probe.submit(encoded, geometry)
            _, event = probe.receive()
            if event is not None:
                event.synchronize()
        except DecodeError as error:
            return _reason(str(error))
        finally:
            probe.close()
        return ""


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
    return Geometry(window, size, none, none.astype(bool), np.zeros(batch, bool))


def _good_image(image_size: int) -> tuple[list[np.ndarray], Geometry]:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), (90, 120, 150)).save(buffer, "JPEG")
    return [np.frombuffer(buffer.getvalue(), np.uint8)], whole_images([(32, 32)], image_size)
