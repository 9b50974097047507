"""Plans into pixels, step after step.

Pillow decodes an image that has killed the DALI pipeline, or it is set aside as broken. Plans are pure, so decoding
then starts again at the first step that was not delivered.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import numpy as np
import torch
from torch import Tensor

from dune_fast.dali_pipelines.augmentation import Geometry
from dune_fast.dali_pipelines.pipeline import DecodeError, Decoder
from dune_fast.dali_pipelines.plan import Plan
from dune_fast.dali_pipelines.source import ImageSource

_IN_FLIGHT = 2  # batches inside DALI: one is decoded while the next one's files are read

Pictures = list[tuple[Tensor, torch.cuda.Event | None]]
"""For each of `Plan.geometries`: uint8 [B, S, S, 3] on the device, and the event after which they may be read."""
Decoded = tuple[Plan, Pictures]
Planner = Callable[[int], Plan | None]


def decode_steps(
    plans: Planner, source: ImageSource, read_ahead: int, new_decoder: Callable[..., Decoder], start: int
) -> Iterator[Decoded]:
    """Decodes the plans from the number `start` on.

    Args:
        plans: number -> plan, None after the last one.
        source: that the plans read from.
        read_ahead: steps whose files are read before they are decoded.
        new_decoder: depth -> decoder.

    Raises:
        DataError: too many broken images, or a failure of DALI that no image explains.
    """
    while True:
        in_flight: deque[Plan] = deque()
        try:
            for decoded in _until_failure(plan_ahead(plans, read_ahead, start), new_decoder, in_flight):
                yield decoded
                start = decoded[0].number + 1
            return
        except DecodeError as error:
            _set_aside(in_flight, source, new_decoder(1), str(error))


def _until_failure(plans: Iterator[Plan], new_decoder: Callable[..., Decoder], in_flight: deque) -> Iterator[Decoded]:
    """Leaves the plans that DALI was at in `in_flight` when it raises DecodeError.

    DALI gets a picture for each one that it has given back, whichever plans they belong to.
    """
    with closing(plans):
        first = list(itertools.islice(plans, _IN_FLIGHT))
        if not first:
            return
        pictures, depth = _pictures(itertools.chain(first, plans), in_flight), sum(len(p.geometries) for p in first)
        with closing(new_decoder(depth)) as decoder:
            for encoded, geometry in itertools.islice(pictures, depth):
                decoder.submit(encoded, geometry)
            while in_flight:
                done, received = in_flight[0], []
                for _ in done.geometries:
                    received.append(decoder.receive())
                    for encoded, geometry in itertools.islice(pictures, 1):
                        decoder.submit(encoded, geometry)
                in_flight.popleft()
                yield done, received


def _pictures(plans: Iterator[Plan], in_flight: deque) -> Iterator[tuple[list[np.ndarray], Geometry]]:
    """The images of each plan once for each of their geometries: two windows of one image are two decodings."""
    for plan in plans:
        in_flight.append(plan)
        for geometry in plan.geometries:
            yield plan.encoded, geometry


def plan_ahead(plans: Planner, read_ahead: int, start: int) -> Iterator[Plan]:
    """Plans step after step, those of the next `read_ahead` ones being made meanwhile."""
    with ThreadPoolExecutor(read_ahead, thread_name_prefix="plan-batches") as planners:
        waiting = deque(planners.submit(plans, step) for step in range(start, start + read_ahead))
        try:
            for step in itertools.count(start + read_ahead):
                if (plan := waiting.popleft().result()) is None:
                    return
                waiting.append(planners.submit(plans, step))
                if plan.images:  # validation images may all be broken
                    yield plan
        finally:
            planners.shutdown(wait=True, cancel_futures=True)


def _set_aside(failed: Sequence[Plan], source: ImageSource, decoder: Decoder, failure: str) -> None:
    """Finds the images that DALI refuses."""
    images = [image for plan in failed for _ in plan.geometries for image in plan.images]
    encoded = [data for plan in failed for _ in plan.geometries for data in plan.encoded]
    with closing(decoder):
        geometries = [geometry for plan in failed for geometry in plan.geometries]
        refused = decoder.refused(encoded, Geometry.concatenate(geometries), failure)
    for i, reason in refused.items():
        if (broken := source.refused(images[i], encoded[i], reason)) is not None:
            source.quarantine.add(*images[i], str(broken), broken.lasting)
