"""Runs that read teachers' features from a cache: equal to those that run the teachers; what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dune_fast import cli
from dune_fast.cache.formats import FORMATS, decode, encode
from dune_fast.cache.store import IMAGES, CacheError, Store, Stored, shard_path
from dune_fast.dali_pipelines.datasets import index_datasets
from dune_fast.dali_pipelines.plan import Part, TrainPlans
from dune_fast.dali_pipelines.source import ImageSource
from dune_fast.engine.cache_build import build as build_cache
from dune_fast.engine.cache_shard import bytes_per_view
from dune_fast.engine.config import RunConfig, compose_config
from dune_fast.engine.metrics import read_metrics
from tests.engine.conftest import photos, small_run, train

__all__ = ["photos"]  # a fixture
VIEWS = ["data.views=2", "cache.format=fp32"]


def composed(photos: Path, cache: Path, *more: str) -> RunConfig:
    return compose_config([*small_run(photos, cache.with_name("run")), *VIEWS, f"cache.folder={cache}", *more])


@pytest.fixture(scope="module")
def cache(photos, tmp_path_factory) -> Path:
    """Float32 features of the small run's images in shards of seven views; not to be changed."""
    folder = tmp_path_factory.mktemp("cache") / "cache"
    cfg = composed(photos, folder)
    cfg.cache.shard_megabytes = (7 * bytes_per_view(cfg) + 1) / 2**20
    return build_cache(cfg)


def losses(run: Path) -> list[dict[str, float]]:
    """Of every step, the teachers' too."""
    return [{k: v for k, v in record.items() if "loss" in k} for record in read_metrics(run / "metrics.jsonl")]


def batch(store: Store, views: range) -> Stored:
    """What is stored of views whose images have not changed."""
    images = [int(store.row(view)[IMAGES]) for view in views]
    return store.read(np.array(views), np.array(images), [""] * len(views))


@pytest.mark.parametrize(
    "more",
    [
        (), ("train.accumulation=2",), ("standardization.convention=unic",),
        ("standardization.convention=phi_s", "standardization.phi_s_batches=2"),
        ("objective.sharing=none", "objective.route_by_dataset=true", "teachers.one.groups=[images]",
         "teachers.two.groups=[images]", "data.datasets.images.group=images"),
    ],
    ids=["whole", "accumulated", "running", "rotated", "routed"],
)  # fmt: skip
def test_a_cached_run_has_the_losses_of_the_live_one(photos, cache, tmp_path, more, monkeypatch):
    train(small_run(photos, tmp_path / "live"), *VIEWS, *more)
    from dune_fast.cache.teachers import LateTeachers

    monkeypatch.setattr(LateTeachers, "ensemble", property(lambda _: pytest.fail("the teachers were asked for")))
    quiet = "evaluation.every=0", "evaluation.held_out=false"
    train(small_run(photos, tmp_path / "cached"), *VIEWS, *more, f"cache.folder={cache}", *quiet)
    live, cached = losses(tmp_path / "live"), losses(tmp_path / "cached")
    assert len(live) == 6 and live[0] != live[-1]
    for one, other in zip(live, cached, strict=True):
        assert other == pytest.approx(one, rel=1e-3)


def test_statistics_of_a_cache_are_those_of_the_live_features(photos, tmp_path, capsys):
    cfg = composed(photos, tmp_path / "cache", "data.views=1")
    paths = [str(tmp_path / name) for name in ("cached.safetensors", "live.safetensors")]
    assert cli.main(["cache", "statistics", paths[0], "--cache", str(build_cache(cfg))]) == 0
    assert cli.main(["cache", "statistics", paths[1], *small_run(photos, tmp_path / "run"), "data.views=1"]) == 0
    cached, live = map(load_file, paths)
    assert sorted(cached) == ["one/cls/mean", "one/cls/std", "one/patch/mean", "one/patch/std", "two/patch/mean",
                              "two/patch/std"]  # fmt: skip
    for name, x in live.items():
        torch.testing.assert_close(cached[name], x, rtol=1e-5, atol=1e-6)
    of_cache = ["--cache", str(tmp_path / "cache")]
    for wrong in ([], [*of_cache, "experiment=demo"], ["--images", "1", "experiment=demo"], [*of_cache, "--images=2"]):
        assert cli.main(["cache", "statistics", paths[0], *wrong]) == 2
    assert cli.main(["cache", "statistics", str(tmp_path), *of_cache]) == 2  # a folder


def test_a_start_asks_the_teachers(photos, cache, tmp_path):
    more = "standardization.convention=phi_s", "standardization.phi_s_batches=2", "start.fit_projectors=true"
    train(small_run(photos, tmp_path / "live"), *VIEWS, *more)
    cached = train(small_run(photos, tmp_path / "cached"), *VIEWS, *more, f"cache.folder={cache}")
    for one, other in zip(losses(tmp_path / "live"), losses(tmp_path / "cached"), strict=True):
        assert other == pytest.approx(one, rel=1e-3)
    assert "ensemble" not in vars(cached.task.teachers)


def test_views_take_turns_and_repeat(photos):
    cfg = composed(photos, photos.with_name("none"))
    source = ImageSource(index_datasets(cfg.data), "train", cfg.data)
    plans = TrainPlans(source, cfg.data, lambda step: 56, 20, [Part(slice(0, 20))], 0)  # a pass is one step
    seen = [plans(step) for step in range(4)]
    windows = [{image: tuple(plan.geometry.window[i]) for i, image in enumerate(plan.images)} for plan in seen]
    assert windows[0] == windows[2] and windows[1] == windows[3] and windows[0] != windows[1]
    assert [sorted(plan.views % 2) for plan in seen] == [[0] * 20, [1] * 20] * 2
    colours = [dict(zip(plan.images, plan.colour.brightness.tolist(), strict=True)) for plan in seen]
    assert colours[0] == colours[2] != colours[1]
    cfg.data.fresh_colour = True
    fresh = TrainPlans(source, cfg.data, lambda step: 56, 20, [Part(slice(0, 20))], 0)
    first, third = fresh(0), fresh(2)
    assert sorted(first.views) == sorted(third.views)
    assert sorted(first.colour.brightness.tolist()) != sorted(third.colour.brightness.tolist())
    source.close()


def test_fresh_colours_are_the_students_alone(photos, tmp_path):
    """The cache has the features of a run without colours."""
    folders = []
    for name, more in (("fresh", "data.fresh_colour=true"), ("none", "data.colour=false")):
        folders.append(build_cache(composed(photos, tmp_path / name, more)))
    ours, theirs = (Store(str(folder)).row(5) for folder in folders)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("form", FORMATS)
def test_stored_features_are_close(form):
    x = torch.randn(3, 50, 16, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 2, 16)
    found = decode("x", encode("x", x, form)).float()
    error = ((found - x).abs().amax((0, 1)) / x.abs().amax((0, 1))).max()
    assert error <= {"fp32": 0, "bf16": 2**-8, "int8": 1 / 127, "fp8": 2**-3}[form]
    assert torch.equal(decode("x", encode("x", torch.zeros(1, 4, 8), form)), torch.zeros(1, 4, 8).to(found.dtype)) or (
        form == "fp32"
    )
    cls = torch.randn(3, 16)
    assert torch.allclose(decode("x", encode("x", cls, form)).float(), cls, rtol=2**-8)


def test_a_build_goes_on_and_is_shared_out(photos, cache, tmp_path):
    """Whatever is missing is built, to the same bytes, by any number of parts."""
    count = Store(str(cache)).shards
    assert count == 6  # 40 views by 7
    copy = Path(shutil.copytree(cache, tmp_path / "copy"))
    cfg = composed(photos, copy)
    cfg.cache.shard_megabytes = (7 * bytes_per_view(cfg) + 1) / 2**20
    for index in (1, 2, 5):
        shard_path(copy, index).unlink()
    (copy / "shard-000001.safetensors.part").write_bytes(b"killed here")
    with pytest.raises(CacheError, match="3 of 6 shards are missing; the command that builds it goes on"):
        Store(str(copy))
    kept = shard_path(copy, 0).stat().st_mtime_ns
    build_cache(cfg, 0, 2)
    assert shard_path(copy, 2).exists() and not shard_path(copy, 1).exists()
    build_cache(cfg, 1, 2)
    assert shard_path(copy, 0).stat().st_mtime_ns == kept
    ours, theirs = Store(str(copy)), Store(str(cache))
    for view in range(40):
        one, other = ours.row(view), theirs.row(view)
        assert all(torch.equal(one[name], other[name]) for name in other)


def test_damage_is_noticed(cache, tmp_path):
    copy = Path(shutil.copytree(cache, tmp_path / "copy"))
    path = shard_path(copy, 0)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1  # in a feature: the moments lie last
    path.write_bytes(data)
    store = Store(str(copy))
    with pytest.raises(CacheError, match=r"shard-000000.safetensors is damaged \(view \d+\); delete it and build"):
        batch(store, range(7))
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(CacheError, match="is damaged .*; delete it and build the cache again"):
        batch(Store(str(copy)), range(7))
    with pytest.raises(CacheError, match="holds no cache .*`dune-fast cache build` makes one"):
        Store(str(tmp_path))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("image_size=112", "image_size: 56 there, 112 here"), ("train.seed=3", "train.seed: 0 there, 3 here"),
        ("data.views=3", "data.views: 2 there, 3 here"), ("data.hue=0.2", "data.hue: 0.1 there, 0.2 here"),
        ("cache.format=bf16", "cache.format: fp32 there, bf16 here"),
        ("teachers.one.weights=random:7", "weights of teacher one: random:1 there, random:7 here"),
        ("data.datasets.images.holdout=6", r"training images of dataset images: 20 \(names .* there, 18 "),
        ("teachers.two.mean=[0,0,0]", r"teachers.two.mean: \[0.485"),
    ],
)  # fmt: skip
def test_another_runs_cache_is_refused_by_name(photos, cache, tmp_path, change, named):
    overrides = [*small_run(photos, tmp_path / "run"), *VIEWS, f"cache.folder={cache}", change]
    with pytest.raises(CacheError, match=f"was made from something else: {named}"):
        train(overrides)
    with pytest.raises(CacheError, match="was made from something else"):
        build_cache(compose_config(overrides))


def test_broken_images_are_passed_over(photos, tmp_path):
    folder = shutil.copytree(photos, tmp_path / "photos")
    broken = sorted(folder.iterdir())[7]
    broken.write_bytes(broken.read_bytes()[:50])
    build_cache(composed(folder, tmp_path / "cache"))
    trainer = train(small_run(folder, tmp_path / "run"), *VIEWS, f"cache.folder={tmp_path / 'cache'}")
    assert trainer.step == 6 and trainer.task.loader.broken == {"images": 1}
    store = Store(str(tmp_path / "cache"))
    with pytest.raises(CacheError, match="its image was broken when the cache was built"):
        batch(store, range(40))


def test_mistakes_are_sentences(photos, tmp_path, capsys):
    overrides = small_run(photos, tmp_path / "run")
    assert cli.main(["cache", "build", *overrides]) == 2
    assert "a cache needs a folder and a number of fixed views" in capsys.readouterr().err
    for given, said in (
        ("cache.folder=somewhere", "with data.views=0: a cache holds fixed views"),
        ("cache.format=png", "choose one of fp32, bf16, int8, fp8"),
        ("data.fresh_colour=true", "a number of fixed views, which fresh colours need"),
        ("cache.folder=s3://bucket/cache", "s3://bucket/cache"),
    ):
        assert cli.main(["distill", *overrides, given]) == 2
        assert said in capsys.readouterr().err
    assert cli.main(["cache", "build", *overrides, "data.views=1", "cache.folder=x", "--part", "3/2"]) == 2
    assert "--part 3/2: give NUMBER/COUNT" in capsys.readouterr().err


def test_the_commands(photos, tmp_path, capsys):
    cache = tmp_path / "cache"
    overrides = [*small_run(photos, tmp_path / "run"), "data.views=2", f"cache.folder={cache}"]
    assert cli.main(["cache", "build", *overrides]) == 0
    said = capsys.readouterr().out
    assert "20 images x 2 views in int8" in said and "saves their work from epoch 3 on" in said
    assert cli.main(["cache", "report", str(cache), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["missing"] == 0
    assert set(found["tokens"]) == {"one/cls", "one/patch", "two/patch"}
    assert all(near["cosine"] > 0.999 and 0.999 < near["explained"] <= 1 for near in found["tokens"].values())
    assert found["bytes_per_image"] == 2 * bytes_per_view(compose_config(overrides))
