"""Heads against the published cases, metrics against scikit-learn and plain NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bench.case import Case
from bench.cases import RUNNERS
from dune_fast.evaluate.metrics import DEPTH_METRICS, ConfusionMatrix, DepthMetrics, depth_errors
from dune_fast.heads.linear.depth import DepthHead, depth_loss
from dune_fast.heads.linear.segmentation import SegmentationHead, segmentation_loss


@pytest.mark.parametrize("name", ["linear_depth/one_layer", "linear_depth/four_layers", "linear_seg/eleven_classes"])
def test_reference_case(reference_dir, name):
    case = Case(reference_dir / "heads" / f"{name}.safetensors")
    failed = [check for check in RUNNERS[case.kind](case) if not check.passed]
    assert not failed


def test_iou_is_scikit_learns_summed_over_images():
    metrics = pytest.importorskip("sklearn.metrics")
    truth, found = torch.randint(5, (3, 20, 30)), torch.randint(5, (3, 20, 30))
    truth[:, :4] = 255
    confusion = ConfusionMatrix(7)  # two classes that never occur do not count
    for pair in zip(found, truth, strict=True):
        confusion.add(*pair)
    kept = truth != 255
    expected = metrics.jaccard_score(truth[kept], found[kept], average=None)
    assert confusion.iou()[:5].tolist() == pytest.approx(expected.tolist())
    result = confusion.result()
    assert result["miou"] == pytest.approx(expected.mean())
    assert result["pixel_accuracy"] == pytest.approx(metrics.accuracy_score(truth[kept], found[kept]))
    assert result["class_accuracy"] == pytest.approx(metrics.balanced_accuracy_score(truth[kept], found[kept]))


def test_a_label_without_a_class_is_refused():
    with pytest.raises(ValueError, match="a label is 9: give classes 0 to 2"):
        ConfusionMatrix(3).add(torch.zeros(1, 2, dtype=torch.long), torch.tensor([[9, 255]]))


def test_depth_errors_are_those_of_plain_numpy():
    truth, found = 12 * torch.rand(30, 40), 15 * torch.rand(30, 40) - 1
    truth[:5] = 0
    ours = dict(zip(DEPTH_METRICS, depth_errors(found, truth, 10.0).tolist(), strict=True))
    t, p = truth.numpy().astype(float), found.numpy().astype(float)
    valid = (t > 0.001) & (t < 10)
    t, p = t[valid], np.clip(p[valid], 0.001, 10)
    worst, g = np.maximum(p / t, t / p), np.log(p) - np.log(t)
    assert ours == pytest.approx(
        {
            "rmse": np.sqrt(np.mean((p - t) ** 2)), "abs_rel": np.mean(np.abs(p - t) / t), "a1": np.mean(worst < 1.25),
            "a2": np.mean(worst < 1.5625), "a3": np.mean(worst < 1.953125), "mae": np.mean(np.abs(p - t)),
            "log_10": np.mean(np.abs(g)) / np.log(10), "rmse_log": np.sqrt(np.mean(g**2)),
            "sq_rel": np.mean((p - t) ** 2 / t), "silog": 100 * np.std(g),
        }, rel=1e-5,
    )  # fmt: skip


def test_depth_metrics_are_means_over_images_that_have_depths():
    metrics = DepthMetrics()
    pairs = [(10 * torch.rand(4, 5), 10 * torch.rand(4, 5)) for _ in range(3)]
    for pair in [*pairs, (torch.ones(4, 5), torch.zeros(4, 5))]:
        metrics.add(*pair, 10.0)
    expected = torch.stack([depth_errors(*pair, 10.0) for pair in pairs]).mean(0)
    assert list(metrics.result().values()) == pytest.approx(expected.tolist())
    assert np.isnan(DepthMetrics().result()["rmse"])


def test_a_crop_without_a_label_or_depth_trains_nothing():
    head = SegmentationHead(4, 3)
    loss = segmentation_loss(head.from_layers([(torch.randn(2, 4, 3, 3), None)]), torch.full((2, 6, 6), 255))
    loss.backward()
    assert loss == 0 and all(torch.isfinite(p.grad).all() for p in head.parameters())
    head = DepthHead(4, with_cls=False)
    loss = depth_loss(head.from_layers([(torch.randn(2, 4, 3, 3), None)]), torch.zeros(2, 1, 6, 6))
    loss.backward()
    assert loss == 0 and all(torch.isfinite(p.grad).all() for p in head.parameters())


def test_depth_loss_resizes_and_leaves_out_what_is_not_known():
    prediction, truth = 1 + torch.rand(1, 1, 3, 4), 1 + torch.rand(1, 1, 6, 8)
    truth[..., :2] = 0
    loss = depth_loss(prediction, truth)
    resized = torch.nn.functional.interpolate(prediction, (6, 8), mode="bilinear")
    g = (torch.log(resized + 0.001) - torch.log(truth + 0.001))[..., 2:]
    torch.testing.assert_close(loss, torch.sqrt(g.var() + 0.15 * g.mean() ** 2))
    torch.testing.assert_close(depth_loss(prediction, truth, warm_up=True), torch.sqrt(0.15 * g.mean() ** 2))
