"""Training examples out of pairs of posed images, as a pure function of (seed, step, slot).

    data set and pair of a slot -> both views -> crop about a common part -> points and correspondences -> example

The order is `dali_pipelines.order`: each batch holds each data set's share, each pass over a set a new permutation.
Everything that is drawn for an example comes from its place in the run, so a resume and another number of ranks change
nothing. An example is stored landscape: a portrait image is transposed, its points and correspondences with it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dune_fast.dali_pipelines.augmentation import colour_params, draw_words
from dune_fast.dali_pipelines.datasets import DataConfig
from dune_fast.dali_pipelines.errors import DataError
from dune_fast.dali_pipelines.order import SampleOrder
from dune_fast.heads.mast3r.correspondences import back_project, correspondences, sample
from dune_fast.heads.mast3r.crops import PosedView, best_boxes, candidate_boxes, resize_and_cut, warp
from dune_fast.heads.mast3r.pair_folders import PairDatasetConfig, PairFolder

CROPS = ("auto", "centre")
_CANDIDATES = 4
"""Boxes of a view that "auto" chooses from."""
_SIZE, _EXAMPLE = 0, 1
"""Uses of random numbers."""

Example = dict[str, Any]


@dataclass
class PairDataConfig:
    """Pairs to train on and how an example is made of one. Defaults are those of MASt3R's training, with sizes for
    patches of 14 pixels."""

    datasets: dict[str, PairDatasetConfig] = field(default_factory=dict)
    """To train on, by name."""
    validation: dict[str, PairDatasetConfig] = field(default_factory=dict)
    """To measure on, by name."""
    sizes: list[list[int]] = field(
        default_factory=lambda: [[518, 392], [518, 336], [518, 294], [518, 252], [518, 168]]
    )
    """[width, height] of the images, landscape; a batch has one of them. Multiples of the encoder's patch size."""
    n_corres: int = 8192
    """Correspondences of an example."""
    negatives: float = 0.5
    """Share of them that are pixels without a partner."""
    crop: str = "auto"
    """"auto": a random zoom into a part that both views show, by a turn of the camera; "centre": the middle."""
    jitter: list[float] = field(default_factory=lambda: [0.5, 0.5, 0.5, 0.1])
    """Strengths of the colour jitter of each image: brightness, contrast, saturation, hue."""
    monocular: float = 0.005
    """Share of examples that take the first view twice."""
    keep_tokens: bool = False
    """Whether a view is encoded once and its tokens are kept in memory, on the device: 8 bytes for each of a patch's
    channels. Only where a view is always the same image: one of `sizes`, the crop "centre", no jitter."""

    def __post_init__(self) -> None:
        for size in self.sizes:
            if len(size) != 2 or not size[0] >= size[1] > 0:
                raise DataError(f"sizes are {self.sizes}: give [width, height], the width at least the height")
        if not self.sizes:
            raise DataError("sizes is empty: give at least one [width, height]")
        if self.crop not in CROPS:
            raise DataError(f"crop is {self.crop!r}: give one of {', '.join(CROPS)}")
        if self.n_corres < 1 or not 0 <= self.negatives < 1 or not 0 <= self.monocular <= 1:
            raise DataError(f"n_corres is {self.n_corres}, negatives {self.negatives}, monocular {self.monocular}: "
                            "give at least 1, a share below 1, a share")  # fmt: skip
        if len(self.jitter) != 4:
            raise DataError(f"jitter is {self.jitter}: give brightness, contrast, saturation and hue")
        if self.keep_tokens and (len(self.sizes) > 1 or self.crop != "centre" or any(self.jitter)):
            raise DataError(f"keep_tokens with sizes {self.sizes}, crop {self.crop!r} and jitter {self.jitter}: tokens "
                            "can be kept of images that do not change, with one size, crop=centre and "
                            "jitter=[0,0,0,0]")  # fmt: skip
        self.colours()

    def colours(self) -> DataConfig:
        """The jitter, as the images' configuration has it."""
        names = ("brightness", "contrast", "saturation", "hue")
        off = dict.fromkeys(("grayscale_probability", "blur_probability", "solarize_probability"), 0.0)
        return DataConfig(jitter_probability=1.0, **dict(zip(names, self.jitter, strict=True)), **off)


class PairSource:
    """Examples of a run.

    Args:
        folders: the data sets; those without depth are refused.
        weights: of each in a batch; all 0: by the number of pairs.
        cfg: how examples are made.
        seed: of everything that is drawn.
        batch: examples of a step over all ranks.

    Raises:
        DataError: no data set, one without depth, or weights that make no sense.
    """

    def __init__(
        self, folders: Sequence[PairFolder], weights: Sequence[float], cfg: PairDataConfig, seed: int, batch: int
    ) -> None:
        if without := [f.name for f in folders if f.layout == "mapfree"]:
            raise DataError(f"{', '.join(without)}: the layout 'mapfree' has no depth, so nothing can be trained on "
                            "it; give it as validation")  # fmt: skip
        if not folders:
            raise DataError("there is no data set of pairs: give at least one in head.data.datasets")
        self.folders, self.cfg, self.seed, self.batch = folders, cfg, seed, batch
        sizes = [len(folder) for folder in folders]
        self._order = SampleOrder(sizes, weights if any(weights) else sizes, seed, batch)

    def size(self, step: int) -> tuple[int, int]:
        """(width, height) of a step's images."""
        width, height = self.cfg.sizes[_generator(self.seed, _SIZE, step).integers(len(self.cfg.sizes))]
        return width, height

    def chosen(self, step: int, slot: int) -> tuple[PairFolder, int]:
        """The data set and the pair of a slot."""
        group, draw = (x[slot : slot + 1] for x in self._order.step(step))
        return self.folders[int(group[0])], int(self._order.image(group, draw)[0])

    def example(self, step: int, slot: int) -> Example:
        """See `make_example`; DataError where a file cannot be read."""
        folder, index = self.chosen(step, slot)
        position = step * self.batch + slot
        rng = _generator(self.seed, _EXAMPLE, position)
        views, names = folder.read(index), folder.pairs[index]
        if rng.random() < self.cfg.monocular:
            views, names = (views[0], views[0]), (names[0], names[0])
        made = make_example(views, self.size(step), self.cfg, rng)
        # a view's colours have a place of their own
        words = draw_words(self.seed, np.array([2 * position, 2 * position + 1]))
        made |= {f"colours{v}": row for v, row in enumerate(colour_params(words, self.cfg.colours()).pack(), 1)}
        made |= {"is_metric_scale": torch.tensor(folder.metric), "name": f"{folder.name} {index}"}
        return made | {"views": tuple((folder.name, name) for name in names)}


def make_example(
    views: tuple[PosedView, PosedView], size: tuple[int, int], cfg: PairDataConfig, rng: np.random.Generator
) -> Example:
    """One example of two views.

    Args:
        views: in float32.
        size: (width, height), landscape, that both are cut to; a portrait image is cut to the turned size.
        cfg: how.
        rng: of everything that is drawn.

    Returns:
        For v in 1, 2: `image{v}` uint8 [H, W, 3], `pts3d{v}` float32 [H, W, 3] in the world, `valid_mask{v}` and
        `sky_mask{v}` bool [H, W], `camera_pose{v}` [4, 4], `camera_intrinsics{v}` [3, 3] of the upright image,
        `corres{v}` int64 [n, 2] of (x, y); `valid_corres` bool [n], `portrait` (bool, bool): which images are stored
        transposed, and all maps and (x, y) of theirs with them.
    """
    flip = rng.random() < 0.5
    portrait = tuple(_is_portrait(view, flip) for view in views)
    targets = tuple(size[::-1] if turned else size for turned in portrait)
    if cfg.crop == "centre":
        cut = [resize_and_cut(view, target) for view, target in zip(views, targets, strict=True)]
    else:
        cut = _crop_together(views, targets, rng)
    points = [back_project(view.depth, view.intrinsics, view.pose) for view in cut]
    found = correspondences(points[0], points[1], *zip(*((v.intrinsics, v.pose) for v in cut), strict=True))
    *xy, true = sample(found, tuple(view.depth.shape for view in cut), cfg.n_corres, cfg.negatives, rng)
    made: Example = {"valid_corres": torch.from_numpy(true), "portrait": portrait}
    for v, (view, turned) in enumerate(zip(cut, portrait, strict=True)):
        maps = {"image": view.image, "pts3d": points[v].astype(np.float32), "valid_mask": view.depth > 0,
                "sky_mask": view.depth < 0}  # fmt: skip
        others = {"camera_pose": view.pose, "camera_intrinsics": view.intrinsics,
                  "corres": xy[v][:, ::-1] if turned else xy[v]}  # fmt: skip
        stored = {name: x.swapaxes(0, 1) if turned else x for name, x in maps.items()} | others
        made |= {f"{name}{v + 1}": torch.from_numpy(np.ascontiguousarray(x)) for name, x in stored.items()}
    return made


def collate(examples: Sequence[Example]) -> dict[str, Any]:
    """A batch of B pairs: tensors stacked, those of a view in `view1` and `view2`, without the number.

    `groups`: (portrait 1, portrait 2, first, last + 1) of the pairs whose images stand alike; pairs are sorted by it.
    """
    examples = sorted(examples, key=lambda example: example["portrait"])
    tensors = [name for name, value in examples[0].items() if isinstance(value, Tensor)]
    stacked = {name: torch.stack([example[name] for example in examples]) for name in tensors}
    shared = {name: x for name, x in stacked.items() if name[-1] not in "12"}
    batch: dict[str, Any] = {
        f"view{v}": {name[:-1]: x for name, x in stacked.items() if name.endswith(v)} | shared for v in "12"
    }
    groups, first = [], 0
    for portrait, members in itertools.groupby(example["portrait"] for example in examples):
        last = first + len(list(members))
        groups.append((*portrait, first, last))
        first = last
    names, views = ([example[key] for example in examples] for key in ("name", "views"))
    return batch | {"groups": groups, "names": names, "views": views}


def _crop_together(
    views: tuple[PosedView, PosedView], targets: tuple[tuple[int, int], ...], rng: np.random.Generator
) -> list[PosedView]:
    """Both views turned to the candidate boxes that share most correspondences."""
    points = [back_project(view.depth, view.intrinsics, view.pose) for view in views]
    found = correspondences(points[0], points[1], *zip(*((v.intrinsics, v.pose) for v in views), strict=True))
    known = views[0].depth.reshape(-1)[found[0]] > 0  # a crop is chosen by what can be learnt
    found = (found[0][known], found[1][known])
    boxes = tuple(candidate_boxes(v.size, t, _CANDIDATES, rng) for v, t in zip(views, targets, strict=True))
    best = best_boxes(boxes, found, (views[0].size[0], views[1].size[0]))
    return [warp(v, boxes[i][best[i]], targets[i]) for i, v in enumerate(views)]


def _is_portrait(view: PosedView, flip: bool) -> bool:
    """Whether an image is cut to the turned size; nearly square ones by the coin."""
    width, height = view.size
    return flip if 0.9 < width / height < 1.1 else height > width


def _generator(seed: int, use: int, position: int) -> np.random.Generator:
    return np.random.default_rng([seed % 2**64, use, position])
