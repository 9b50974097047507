"""What a cache stores: components, some of the patches, moments, the images that it was made from."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from dune_fast.cache.basis import FILE, keep_basis, read_basis
from dune_fast.cache.formats import FORMATS, Basis, decode, encode
from dune_fast.cache.report import summarize
from dune_fast.cache.store import CacheError, Store
from dune_fast.dali_pipelines.datasets import index_datasets
from dune_fast.dali_pipelines.source import ImageSource
from dune_fast.distill.phi_s import SecondMoments
from dune_fast.engine.cache_build import build as build_cache
from dune_fast.engine.cache_shard import bytes_per_view
from dune_fast.engine.memory import cached_bytes
from dune_fast.kernels.nn.routing import select
from tests.cache.test_cache import VIEWS, batch, cache, composed, losses
from tests.engine.conftest import photos, small_run, train

__all__ = ["cache", "photos"]  # fixtures


def low_rank(rank: int) -> torch.Tensor:
    """[6, 40, 24] of so many directions, and a little of all."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(6, 40, rank, generator=draw) @ torch.randn(rank, 24, generator=draw) + 3
    return x + 1e-3 * torch.randn(6, 40, 24, generator=draw)


@pytest.mark.parametrize("form", FORMATS)
def test_components_are_decoded_to_the_teachers_channels(form):
    x = low_rank(5)
    moments = SecondMoments(24, x.device)
    moments.add(x)
    mean, covariance = moments.mean_and_covariance()
    vectors = torch.linalg.eigh(covariance).eigenvectors.float()
    errors = []
    for components in (4, 5):
        basis = Basis(mean.float(), vectors[:, -components:])
        stored = encode("x", x, form, basis)
        assert stored["x"].shape == (6, 40, components)
        found = decode("x", stored, basis)
        assert found.dtype == (torch.float32 if form == "fp32" else torch.bfloat16)
        errors.append(((found.float() - x).square().sum() / (x - mean.float()).square().sum()).item())
    assert errors[1] < (2e-3 if form == "fp8" else 2e-4) and errors[0] > 10 * errors[1]


def test_a_cache_of_components(photos, cache, tmp_path):
    """Parts agree on one basis; the run's features are in the teachers' channels; what is lost is said."""
    folder = tmp_path / "cache"
    cfg = composed(photos, folder, "cache.components=30")  # of 24 and 32 channels
    cfg.cache.shard_megabytes = (14 * bytes_per_view(cfg) + 1) / 2**20
    build_cache(cfg, 1, 2)
    before = (folder / FILE).read_bytes()
    keep_basis(folder, {})  # another process that was slower
    build_cache(cfg, 0, 2)
    assert (folder / FILE).read_bytes() == before and len(list(folder.iterdir())) == 3 + 2
    tokens = [("one", "cls"), ("one", "patch"), ("two", "patch")]
    every, ours = Store(str(cache), tokens), Store(str(folder), tokens)
    (live, _), (found, patches) = (batch(store, range(9))(torch.device("cpu")) for store in (every, ours))
    assert patches is None and torch.equal(found["one"]["patch"], live["one"]["patch"])
    mean, components = read_basis(folder)[0]["two/patch"]
    assert components.shape == (32, 30) and torch.allclose(components.T @ components, torch.eye(30), atol=1e-5)
    x = live["two"]["patch"] - mean
    assert torch.allclose(found["two"]["patch"], x @ components @ components.T + mean, atol=1e-4)
    near = summarize(ours)["tokens"]["two/patch"]
    assert 0.9 < near["explained"] < 1 - 1e-6 and near["cosine"] > 0.9

    path = folder / FILE
    path.write_bytes(before[:-4] + b"\0\0\0\1")
    with pytest.raises(CacheError, match=r"was not made with .*basis.safetensors, which is damaged or of another"):
        Store(str(folder)).row(0)
    path.unlink()
    with pytest.raises(CacheError, match="has lost its basis"):
        Store(str(folder))


def test_a_run_from_components_and_some_patches(photos, cache, tmp_path):
    """Features at the kept patches are those of the whole cache; a run trains on them, its statistics the cache's."""
    folder = tmp_path / "cache"
    more = "cache.patch_share=0.5", "cache.components=12", "cache.format=int8"
    build_cache(composed(photos, folder, *more))
    tokens = [("one", "cls"), ("two", "patch")]
    (live, _), (found, kept) = (
        batch(Store(str(f), tokens), range(9))(torch.device("cpu")) for f in (cache, folder)
    )
    assert kept.shape == (9, 8) and len({tuple(row) for row in kept.tolist()}) > 5
    ours, theirs = found["two"]["patch"].float(), select(live["two"]["patch"], kept)
    assert torch.cosine_similarity(ours, theirs, dim=-1).mean() > 0.7  # 12 of 32 components
    every = found["one"]["cls"].nbytes + found["two"]["patch"].nbytes + 9 * 8 * 24 * 2  # teacher one's patches, too
    assert 9 * cached_bytes(composed(photos, folder, *more)) == every
    run = [*small_run(photos, tmp_path / "run"), *VIEWS, *more, f"cache.folder={folder}"]
    trainer = train(run, "standardization.convention=fixed", "objective.patch_share=0.5", "train.accumulation=2")
    moments = Store(str(cache)).moments()
    for name, token, normalizer in trainer.task.statistics.items():
        assert torch.allclose(normalizer.mean.double(), moments[name][token].mean, atol=1e-5)
        assert torch.allclose(normalizer.std.double(), moments[name][token].std, rtol=1e-5)
    assert losses(tmp_path / "run")[-1]["loss"] < losses(tmp_path / "run")[0]["loss"]


def test_moments_are_those_of_all_features(cache):
    store = Store(str(cache), [("one", "cls"), ("one", "patch"), ("two", "patch")])
    features, _ = batch(store, range(40))(torch.device("cpu"))
    for teacher, kinds in features.items():
        for kind, x in kinds.items():
            mean, std = store.moments()[teacher][kind]
            rows = x.double().flatten(0, -2)
            assert torch.allclose(mean, rows.mean(0), atol=1e-6) and torch.allclose(std, rows.std(0), rtol=1e-5)


def test_an_image_that_has_changed_is_named(photos, tmp_path):
    folder = shutil.copytree(photos, tmp_path / "photos")
    build_cache(composed(folder, tmp_path / "cache"))
    run = [*small_run(folder, tmp_path / "run"), *VIEWS, f"cache.folder={tmp_path / 'cache'}"]
    images = index_datasets(composed(folder, tmp_path / "cache").data)[0].train
    changed = Path(images[3])
    changed.write_bytes(Path(images[5]).read_bytes())
    with pytest.raises(CacheError, match=f"the image {changed} has changed since the cache .* was made of it"):
        train(run)


@pytest.mark.parametrize("shrink", [0, 40])
def test_the_checksum_of_an_image_is_of_its_own_bytes(photos, tmp_path, monkeypatch, shrink):
    monkeypatch.setenv("DUNE_FAST_CACHE", str(tmp_path / "shrunk"))
    folder = shutil.copytree(photos, tmp_path / "photos")
    cfg = composed(folder, tmp_path / "cache", f"data.datasets.images.shrink={shrink}").data
    found = []
    for _ in range(3):
        source = ImageSource(index_datasets(cfg), "train", cfg)
        found.append(source.read_good([(0, 4)])[0].checksum)
        path = Path(source.path(0, 4))
        source.close()
        path.write_bytes(path.read_bytes() + b"more" * (len(found) == 2))
    assert found[0] == found[1] != found[2]
