"""CUDA graphs for frozen teachers: a trunk's kernels recorded once for every shape of images, then replayed.

Why an own capture and not torch.compile's mode "reduce-overhead": that one hands out memory which its next graph may
take back, with rules (generations, marked steps) that concern the student's compiled graphs too, and works for compiled
code alone. Here the life of the features is one sentence, and the graph records the trunk as it is, compiled or not.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

MAX_GRAPHS = 8
"""Shapes for which one trunk keeps a graph, each with the memory of a forward pass; others run without. A run has one
shape, with `objective.route_by_dataset` two or three."""
_WARM_UP = 3  # calls before the capture: libraries pick and load their kernels, Triton and torch.compile compile theirs


class _Captured(NamedTuple):
    graph: torch.cuda.CUDAGraph
    images: Tensor
    features: Any


class GraphedTrunk:
    """Calls a trunk by replaying its CUDA graph.

    The features lie in memory that belongs to the graph: the next call with images of that shape overwrites them. Every
    graph has memory of its own, so that graphs of several teachers and shapes may be replayed in any order.

    Args:
        trunk: images [B, 3, H, W] -> features, without a wait for the device; its weights must stay where they are.
    """

    def __init__(self, trunk: Callable[[Tensor], Any]) -> None:
        self._trunk = trunk
        self._captured: dict[tuple, _Captured] = {}
        self._full = False

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Any:
        key = (tuple(images.shape), images.dtype, images.device)
        if key not in self._captured:
            if len(self._captured) == MAX_GRAPHS:
                if not self._full:
                    logger.warning("%d shapes of images have a CUDA graph; further ones run without", MAX_GRAPHS)
                self._full = True
                return self._trunk(images)
            self._captured[key] = self._capture(images)
        captured = self._captured[key]
        captured.images.copy_(images)
        captured.graph.replay()
        return captured.features

    def _capture(self, images: Tensor) -> _Captured:
        own = images.clone()
        side = torch.cuda.Stream(images.device)
        side.wait_stream(torch.cuda.current_stream(images.device))
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP):
                self._trunk(own)
        torch.cuda.current_stream(images.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # only this thread's calls are watched: the loader's threads allocate and copy meanwhile
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            features = self._trunk(own)
        return _Captured(graph, own, features)
