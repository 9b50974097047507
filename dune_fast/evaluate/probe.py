"""Trains a linear head on frozen tokens, by the recipes of DINOv2: `--task segmentation` and `--task depth`.

Every rank encodes its share of a batch; the tokens are gathered, and all ranks train the same head on the whole batch,
so BatchNorm and the loss are those of one process. Step i is a function of seed and i: a run that was killed goes on
from its last state and ends with the numbers of one that was not.
"""

from __future__ import annotations

import io
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from dune_fast.dali_pipelines.order import Permutation
from dune_fast.dali_pipelines.storage import write_whole
from dune_fast.evaluate.ranks import Ranks
from dune_fast.heads.linear.depth import WARM_UP_STEPS, depth_loss
from dune_fast.heads.linear.layers import Layer, LinearHead
from dune_fast.heads.linear.segmentation import segmentation_loss

logger = logging.getLogger(__name__)

_SAVE_SECONDS = 60.0
_AHEAD = 3  # batches that are read and cut while another one is trained on

Crops = Callable[[int, np.random.Generator], tuple[Tensor, Tensor]]
"""(index of an image, random numbers) -> normalised image [3, H, W] and its target [H, W]."""


@dataclass(frozen=True)
class Recipe:
    """How a head is trained; `RECIPES` has those of the publications."""

    iterations: int
    lr: float
    weight_decay: float
    warm_up: int
    """Steps of linear warm-up."""
    warm_up_start: float
    """Share of the rate that the warm-up begins with."""
    cosine: bool
    """Whether the rate falls as a cosine (to 1e-8 of it), and momentum goes 0.95, 0.85, 0.95; else linearly to 0."""
    clip: float
    """Largest norm of all gradients; 0: no limit."""
    batch: int = 16
    size: int = 512
    """Segmentation: side of crops and windows, and short side of the images, in pixels."""
    stride: int = 341
    """Segmentation: pixels between windows."""
    seed: int = 0

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        progress = step / self.iterations
        share = 1e-8 + (1 - 1e-8) * (1 + math.cos(math.pi * progress)) / 2 if self.cosine else 1 - progress
        if step < self.warm_up:
            share *= 1 - (1 - step / self.warm_up) * (1 - self.warm_up_start)
        return self.lr * share

    def momentum(self, step: int) -> float:
        """AdamW's first beta."""
        if not self.cosine:
            return 0.9
        turn = max(1.0, 0.3 * self.iterations - 1)
        if step <= turn:
            return _cosine(0.95, 0.85, step / turn)
        return _cosine(0.85, 0.95, (step - turn) / max(1.0, self.iterations - 1 - turn))


def _cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * min(1.0, share))) / 2


RECIPES = {
    "segmentation": Recipe(40_000, 1e-3, 1e-4, 1_500, 1e-6, False, 0.0),
    "depth": Recipe(38_400, 1e-4, 0.01, 12_800, 1e-3, True, 35.0),
}


def recipe(task: str, **given: float | None) -> Recipe:
    """The publication's, with what is given instead; the warm-up keeps its share of the iterations.

    Raises:
        ValueError: a value that makes no sense.
    """
    plain = RECIPES[task]
    values = asdict(plain) | {name: value for name, value in given.items() if value is not None}
    for name in ("iterations", "batch", "size", "stride", "lr"):
        if values[name] <= 0:
            raise ValueError(f"--{name} is {values[name]}: it must be above 0")
    if values["iterations"] != plain.iterations:
        values["warm_up"] = round(plain.warm_up * values["iterations"] / plain.iterations)
    if given.get("size") is not None and given.get("stride") is None:
        values["stride"] = max(1, values["size"] * plain.stride // plain.size)
    return Recipe(**values)


def sample(count: int, position: int, seed: int) -> tuple[int, np.random.Generator]:
    """The image at a position of the training, each once a pass, and the random numbers that belong to it."""
    index = Permutation(count, seed, 0, position // count)(np.array([position % count]))[0]
    return int(index), np.random.default_rng([seed, position])


def train(
    head: LinearHead,
    task: str,
    cfg: Recipe,
    count: int,
    crops: Crops | None,
    encode: Callable[[Tensor], Sequence[Layer]] | None,
    ranks: Ranks,
    state: Path,
    cached: Callable[[list[int]], tuple[Sequence[Layer], Tensor]] | None = None,
    threads: int = 4,
) -> float:
    """Trains in place, from `state` if there is one.

    Args:
        head: on the ranks' device.
        task: "segmentation" or "depth".
        cfg: see `Recipe`.
        count: training images.
        crops: makes a training image.
        encode: normalised images [B, 3, H, W] -> tokens.
        ranks: all of them call this.
        state: file for the state of an unfinished training.
        cached: instead of `crops` and `encode`: indices of images -> tokens and targets that are there already.
        threads: that read and cut images.

    Returns:
        The last step's loss, NaN if nothing was left to do.

    Raises:
        ValueError: a batch that the ranks cannot share.
    """
    if cfg.batch % ranks.size:
        raise ValueError(f"--batch {cfg.batch} cannot be shared by {ranks.size} processes: give a multiple of them")
    optimizer = torch.optim.AdamW(head.parameters(), cfg.lr, (0.9, 0.999), weight_decay=cfg.weight_decay)
    step = first = _resume(head, optimizer, state, ranks)
    loss, saved = torch.tensor(torch.nan), time.monotonic()
    share = cfg.batch // ranks.size
    with ranks.progress(f"training the {task} head", cfg.iterations, "steps", first) as progress:
        for layers, targets in _batches(cfg, count, crops, encode, ranks, first, share, cached, threads):
            head.train()
            output = head.from_layers(layers)
            if task == "segmentation":
                loss = segmentation_loss(output, targets)
            else:
                loss = depth_loss(output, targets[:, None], step < WARM_UP_STEPS)
            for group in optimizer.param_groups:
                group["lr"], group["betas"] = cfg.rate(step), (cfg.momentum(step), 0.999)
            optimizer.zero_grad()
            loss.backward()
            if cfg.clip:
                nn.utils.clip_grad_norm_(head.parameters(), cfg.clip)
            optimizer.step()
            step += 1
            progress.advance(1)
            if ranks.rank == 0 and (time.monotonic() - saved > _SAVE_SECONDS or step == cfg.iterations):
                _save(head, optimizer, step, state)
                saved = time.monotonic()
    for x in head.state_dict().values():  # rounding may differ between GPUs
        ranks.same(x)
    return loss.item()


def _batches(
    cfg: Recipe,
    count: int,
    crops: Crops | None,
    encode: Callable[[Tensor], Sequence[Layer]] | None,
    ranks: Ranks,
    first: int,
    share: int,
    cached: Callable[[list[int]], tuple[Sequence[Layer], Tensor]] | None,
    threads: int,
) -> Iterator[tuple[Sequence[Layer], Tensor]]:
    """Tokens and targets of the whole batch, step after step, the next images being cut meanwhile."""
    if cached is not None:
        for step in range(first, cfg.iterations):
            yield cached([sample(count, step * cfg.batch + slot, cfg.seed)[0] for slot in range(cfg.batch)])
        return
    assert crops is not None and encode is not None

    def cut(position: int) -> tuple[Tensor, Tensor]:
        return crops(*sample(count, position, cfg.seed))

    with ThreadPoolExecutor(threads, thread_name_prefix="cut-crops") as pool:
        waiting: deque[list] = deque()
        try:
            for step in range(first, cfg.iterations + _AHEAD):
                if step < cfg.iterations:
                    start = step * cfg.batch + ranks.rank * share
                    waiting.append([pool.submit(cut, start + slot) for slot in range(share)])
                if step - first < _AHEAD or not waiting:
                    continue
                images, targets = zip(*(future.result() for future in waiting.popleft()), strict=True)
                with torch.no_grad():
                    layers = encode(torch.stack(images).to(ranks.device, non_blocking=True))
                whole = [
                    (ranks.gather(patch), None if cls is None else ranks.gather(cls)) for patch, cls in layers
                ]
                yield whole, ranks.gather(torch.stack(targets).to(ranks.device))
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _save(head: nn.Module, optimizer: torch.optim.Optimizer, step: int, path: Path) -> None:
    buffer = io.BytesIO()
    torch.save({"step": step, "head": head.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, buffer.getvalue())


def _resume(head: nn.Module, optimizer: torch.optim.Optimizer, path: Path, ranks: Ranks) -> int:
    """Loads the state, if all ranks see the same one; how many steps it has done."""
    found = torch.load(path, map_location=ranks.device, weights_only=True) if path.is_file() else {"step": 0}
    steps = ranks.gather(torch.tensor([found["step"]], device=ranks.device))
    if not found["step"] or (steps != steps[0]).any():
        return 0
    head.load_state_dict(found["head"])
    optimizer.load_state_dict(found["optimizer"])
    logger.info("going on with the head's training after step %d, from %s", found["step"], path)
    return found["step"]
