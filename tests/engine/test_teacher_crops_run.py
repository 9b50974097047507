"""A run whose teachers see crops of their own, at sizes of their own: it trains, and goes on where it stopped."""

from __future__ import annotations

import shutil

import pytest
import torch

from dune_fast.engine.config import ConfigError, compose_config
from tests.engine.conftest import build, same_weights, small_run, timeless, train

CROPS = [
    "data.teacher_views=true", "data.teacher_zoom=[0.9,1.2]", "data.teacher_shift=0.6", "objective.align=teacher",
    "teachers.one.input_size=84", "teachers.one.grid=own", "teachers.two.mosaic=128",
]  # fmt: skip


@pytest.mark.parametrize("align", ["teacher", "smaller", "partitioned"])
def test_teachers_crops_go_into_the_loss(overrides, align):
    trainer = build(overrides, *CROPS, f"objective.align={align}", "data.prefetch=1")
    task = trainer.task
    batch = next(task.batches(0, lambda _: True))
    (part,) = task.split(batch)
    assert {n: v["images"].shape[-1] for n, v in part.teacher_views.items()} == {"one": 84, "two": 56}
    moved = task.forward(part, 0)
    assert moved.loss.isfinite() and moved.images.finite.all()
    features = task.teachers(part.images, None, None, task.crops.pictures(part))
    assert features["one"]["patch"].shape[1] == 36 and features["two"]["patch"].shape[1] == 16
    task.crops.views = lambda part: {}
    other = task.forward(part, 0)
    assert not torch.equal(moved.loss, other.loss), "the loss does not know of the views"
    task.loader.close()


def test_a_run_with_crops_goes_on_where_it_stopped(photos, tmp_path):
    whole = train(small_run(photos, tmp_path / "whole"), *CROPS).run_dir
    part = shutil.copytree(whole, tmp_path / "part")
    shutil.rmtree(part / "checkpoints" / "step_0000006")
    train(small_run(photos, part), *CROPS)
    assert same_weights(whole, part) and timeless(whole) == timeless(part)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["objective.align=''"], "teachers see other parts of an image than the student; choose objective.align"),
        (["cache.folder=x", "data.views=1"], "data.teacher_views=true with cache.folder='x'"),
        (["objective.patch_share=0.5", "objective.align=''", "data.teacher_views=false"],
         "teachers.one.grid=own with objective.patch_share=0.5"),
        (["objective.align=''", "data.teacher_views=false"],
         "teachers.one.grid=own gives 6 x 6 patches, and at image_size=56 the student's projection has 4 x 4"),
        (["teachers.two.mosaic=32"], "gives teacher 'two' images of 64 px, which do not fit on a canvas"),
    ],
)  # fmt: skip
def test_what_does_not_go_with_own_crops_is_refused(overrides, more, words):
    with pytest.raises(ConfigError, match=words):
        compose_config([*overrides, *CROPS, *more])
