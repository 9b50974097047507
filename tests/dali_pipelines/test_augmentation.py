"""Distributions of the augmentation against torchvision's own draws, and its purity."""

import numpy as np
import pytest
import torch
from scipy import stats

from dune_fast.dali_pipelines.augmentation import (
    colour_params,
    draw_words,
    resized_crops,
    train_geometry,
    validation_geometry,
)
from dune_fast.dali_pipelines.datasets import DataConfig

transforms = pytest.importorskip("torchvision.transforms.v2")
SCALE, RATIO = [0.4, 1.0], [3 / 4, 4 / 3]


def ks(a, b) -> float:
    # crops are integers: break ties by less than a pixel
    rng = np.random.default_rng(0)
    return stats.ks_2samp(a + rng.random(len(a)), b + rng.random(len(b))).pvalue


@pytest.mark.parametrize("width, height, scale", [(640, 480, SCALE), (200, 300, [0.08, 1.0]), (1000, 100, SCALE)])
def test_crops_have_torchvisions_distribution(width, height, scale):
    """The third size leaves no room for most attempts and exercises the centre crop."""
    count = 2000
    crop = transforms.RandomResizedCrop(64, scale=scale, ratio=RATIO)
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    drawn = [crop.make_params([image]) for _ in range(count)]
    theirs = np.array([[p["left"], p["top"], p["width"], p["height"]] for p in drawn])
    ours = resized_crops(draw_words(0, np.arange(4 * count)), np.full((4 * count, 2), (width, height)), scale, RATIO)
    for k in range(4):
        assert ks(ours[:, k], theirs[:, k]) > 1e-3
    assert ks(ours[:, 2] * ours[:, 3], theirs[:, 2] * theirs[:, 3]) > 1e-3
    log_ratio = np.log(ours[:, 2] / ours[:, 3]), np.log(theirs[:, 2] / theirs[:, 3])
    assert log_ratio[0].mean() == pytest.approx(log_ratio[1].mean(), abs=0.02)


@pytest.mark.parametrize("width, height", [(1, 1), (3, 500), (500, 3), (1, 40)])
def test_crops_stay_inside_odd_images(width, height):
    left, top, w, h = resized_crops(draw_words(1, np.arange(500)), np.full((500, 2), (width, height)), SCALE, RATIO).T
    assert (left >= 0).all() and (top >= 0).all() and (w >= 1).all() and (h >= 1).all()
    assert (left + w <= width).all() and (top + h <= height).all()


def test_jitter_has_torchvisions_distribution():
    count, config = 3000, DataConfig(jitter_probability=1.0)
    jitter = transforms.ColorJitter(config.brightness, config.contrast, config.saturation, config.hue)
    torch.manual_seed(0)
    drawn = [jitter.make_params([]) for _ in range(count)]
    ours = colour_params(draw_words(0, np.arange(count)), config)
    for name in ("brightness", "contrast", "saturation", "hue"):
        theirs = np.array([p[f"{name}_factor"] for p in drawn])
        assert stats.ks_2samp(getattr(ours, name).numpy(), theirs).pvalue > 1e-3
    orders = np.unique(ours.order.numpy(), axis=0, return_counts=True)[1]
    assert len(orders) == 24 and stats.chisquare(orders).pvalue > 1e-3


def test_probabilities_and_identity_where_jitter_is_off():
    config, count = DataConfig(), 20_000
    words = draw_words(3, np.arange(count))
    params = colour_params(words, config)
    off = (params.brightness == 1) & (params.contrast == 1) & (params.saturation == 1) & (params.hue == 0)
    geometry = train_geometry(words, np.full((count, 2), 100), np.zeros(count, bool), 32, config)
    rates = [chosen.float().mean() for chosen in (off, params.grayscale, params.blur, params.solarize)]
    np.testing.assert_allclose([float(rate) for rate in rates], 0.2, atol=0.012)  # 4 standard deviations
    assert geometry.flip[:, 0].mean() == pytest.approx(0.5, abs=0.015) and not geometry.flip[:, 1].any()
    assert stats.kstest(params.sigma.numpy(), "uniform", (0.1, 4.9)).pvalue > 1e-3  # as torchvision's GaussianBlur


def test_decisions_are_independent_of_each_other():
    params = colour_params(draw_words(0, np.arange(20_000)), DataConfig(jitter_probability=1.0))
    table = torch.stack([v.float() for k, v in vars(params).items() if k != "order"])
    correlation = torch.corrcoef(table) - torch.eye(len(table))
    assert float(correlation.abs().max()) < 0.03


def test_an_images_draw_depends_on_nothing_but_seed_and_position():
    config, sizes = DataConfig(), np.array([[300, 200]] * 4)
    positions = np.array([5, 2**40 + 1, 17, 0])
    together = draw_words(9, positions)
    for i in range(4):
        assert torch.equal(together[i], draw_words(9, positions[i : i + 1])[0])
    a = train_geometry(together, sizes, np.zeros(4, bool), 64, config)
    b = train_geometry(draw_words(10, positions), sizes, np.zeros(4, bool), 64, config)
    assert (a.window != b.window).any()


@pytest.mark.parametrize("width, height", [(640, 480), (480, 641), (333, 333), (57, 100)])
def test_validation_geometry_is_resize_and_centre_crop(width, height):
    geometry = validation_geometry(np.array([[width, height]]), np.zeros(1, bool), 64)
    resized = transforms.Resize(64)(torch.zeros(1, height, width))
    assert geometry.size[0].tolist() == list(resized.shape[1:])
    top, left = (round((side - 64) / 2.0) for side in resized.shape[1:])
    assert geometry.anchor[0].tolist() == [top, left] and geometry.window[0].tolist() == [0, 0, width, height]
