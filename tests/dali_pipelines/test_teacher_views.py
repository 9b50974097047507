"""Teachers' own crops: what they show, where it lies in the student's, that they are functions of seed and position."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from dune_fast.dali_pipelines.augmentation import draw_words, train_geometry
from dune_fast.dali_pipelines.datasets import DataConfig, DataError, DatasetConfig
from dune_fast.dali_pipelines.loader import Batch, TrainLoader
from dune_fast.dali_pipelines.teacher_views import OwnCrop, own_crops
from dune_fast.kernels.imagenet import IMAGENET_MEAN, IMAGENET_STD
from dune_fast.kernels.nn.homography import grid

CPU = torch.device("cpu")
CROPS = (OwnCrop("large", 84), OwnCrop("same", None))


@pytest.fixture(scope="module")
def ramps(tmp_path_factory):
    """Images that grow red to the right and green downwards; every third is stored turned."""
    folder = tmp_path_factory.mktemp("ramps")
    for i in range(9):
        width, height = 150 + 14 * i, 190 - 9 * i
        x, y = np.meshgrid(np.linspace(20, 235, width), np.linspace(20, 235, height))
        pixels = np.stack([x, y, np.full_like(x, 90)], axis=-1).round().astype(np.uint8)
        image = Image.fromarray(np.rot90(pixels).copy() if i % 3 == 0 else pixels)
        image.save(folder / f"{'turned' if i % 3 == 0 else 'plain'}_{i}.png")
    return folder


def taken(folder, zoom, shift, steps=2, world=1, rank=0, start=0, wanted=None, **options) -> list[Batch]:
    data = DataConfig(
        {"d": DatasetConfig(root=str(folder), rotate="turned*")}, num_threads=1, colour=False, teacher_views=True,
        teacher_zoom=zoom, teacher_shift=shift, **options,
    )  # fmt: skip
    with TrainLoader(data, 56, 6, rank, world, 3, CPU, crops=CROPS, patch=14, wanted=wanted) as loader:
        batches = loader.batches(start)
        return [next(batches) for _ in range(steps)]


def levels(images: torch.Tensor) -> torch.Tensor:
    return images * torch.tensor(IMAGENET_STD).view(3, 1, 1) + torch.tensor(IMAGENET_MEAN).view(3, 1, 1)


def test_a_teacher_sees_at_a_point_what_the_student_sees_where_the_transform_takes_it(ramps):
    found = 0
    for batch in taken(ramps, [0.8, 1.4], 0.7, steps=3):
        for name, side in (("large", 84), ("same", 56)):
            view = batch.teacher_views[name]
            assert view["images"].shape == (6, 3, side, side) and view["valid"].shape == (6, side, side)
            # centres of pixels in coordinates from edge to edge, which transforms are in
            at = grid(view["transform"] @ torch.diag(torch.tensor([1 - 1 / side, 1 - 1 / side, 1.0])), (side, side))
            student = F.grid_sample(levels(batch.images), at, align_corners=False)
            inner = F.max_pool2d(1 - view["valid"][:, None].float(), 7, 1, 3)[:, 0] == 0
            both = inner & (at.abs().amax(-1) < 0.93)
            difference = (levels(view["images"]) - student).abs()[:, :2].amax(1)
            assert difference[both].max() < 0.02, name  # half a pixel of the smallest image is 0.003
            found += int(both.sum())
            outside = ~view["valid"]
            assert not view["images"].transpose(0, 1)[:, outside].any()
    assert found > 20_000


def test_without_zoom_and_shift_a_crop_is_the_students(ramps):
    (batch,) = taken(ramps, [1.0, 1.0], 0.0, steps=1)
    same, large = batch.teacher_views["same"], batch.teacher_views["large"]
    assert torch.equal(same["images"], batch.images) and same["valid"].all() and large["valid"].all()
    for view in (same, large):
        torch.testing.assert_close(view["transform"], torch.eye(3).expand(6, 3, 3), atol=1e-6, rtol=0)


@pytest.mark.parametrize("views", [0, 2])
def test_crops_do_not_depend_on_ranks_and_restarts(ramps, views):
    """The student's stream is the one without them, too."""
    whole = taken(ramps, [0.9, 1.2], 0.6, views=views)
    halves = [taken(ramps, [0.9, 1.2], 0.6, steps=1, world=2, rank=rank, start=1, views=views)[0] for rank in (0, 1)]
    for name in ("large", "same"):
        for key, x in whole[1].teacher_views[name].items():
            assert torch.equal(x, torch.cat([half.teacher_views[name][key] for half in halves])), key
    data = DataConfig({"d": DatasetConfig(root=str(ramps), rotate="turned*")}, num_threads=1, colour=False, views=views)
    with TrainLoader(data, 56, 6, 0, 1, 3, CPU) as loader:
        batches = loader.batches()
        plain = [next(batches) for _ in range(2)]
    assert all(torch.equal(a.images, b.images) and b.teacher_views is None for a, b in zip(whole, plain, strict=True))


def test_crops_that_nobody_looks_at_are_left_out_step_by_step(ramps):
    """Regression: DALI hangs if it is given more pictures at once than it gives back."""
    looked = [set(), {"same"}, {"large", "same"}, {"large"}, {"large", "same"}, set(), {"large"}]
    whole = taken(ramps, [0.9, 1.2], 0.6, steps=7)
    some = taken(ramps, [0.9, 1.2], 0.6, steps=7, wanted=lambda step, part: looked[step % 7])
    for every, batch, names in zip(whole, some, looked, strict=True):
        assert torch.equal(every.images, batch.images)
        for name, view in batch.teacher_views.items():
            assert ("images" in view) == (name in names)
            assert all(torch.equal(x, every.teacher_views[name][key]) for key, x in view.items())


def test_shifts_are_whole_patches_of_the_published_distribution():
    """Of 4,000 large images: the transform's offset is a whole number of patches, as often as round(N(0, 0.5)) is."""
    n, patch, side = 4000, 16, 256
    config = DataConfig(crop_scale=[0.05, 0.06], teacher_views=True, teacher_shift=0.5, flip_probability=0.0)
    sizes, turn, positions = np.full((n, 2), 4096), np.zeros(n, bool), np.arange(n)
    words = draw_words(0, positions)
    student = train_geometry(words, sizes, turn, side, config)
    crops = own_crops(CROPS[:1] + (OwnCrop("b", side),), 0, positions, words, sizes, turn, student, patch, config)
    transform = crops[1].transform / crops[1].transform[:, 2:, 2:]
    moved = transform[:, :2, 2] * side / 2 / patch
    assert (moved - moved.round()).abs().max() < 0.05  # half a pixel
    torch.testing.assert_close(transform[:, :2, :2], torch.eye(2).double().expand(n, 2, 2), atol=2e-3, rtol=0)
    share = (moved.round() == 0).double().mean()
    assert abs(share - 0.6827) < 0.02  # |N(0, 0.5)| < 0.5
    other = crops[0].transform / crops[0].transform[:, 2:, 2:]
    assert not torch.allclose(other[:, :2, 2], transform[:, :2, 2])


def test_a_zoom_that_cannot_be_is_explained():
    with pytest.raises(DataError, match=r"data.teacher_zoom is \[1.2, 1.0\]: give \[smallest, largest\]"):
        DataConfig(teacher_zoom=[1.2, 1.0])
    with pytest.raises(DataError, match="data.teacher_shift is -1"):
        DataConfig(teacher_shift=-1)
