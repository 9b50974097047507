"""MASt3R's losses against formulas, finite differences and invariants."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dune_fast.heads.mast3r.loss import Mast3rLoss, Mast3rLossConfig, held_out_metrics
from dune_fast.heads.mast3r.matching_loss import MatchingLoss, MatchingLossConfig, average_precision, padding
from dune_fast.heads.mast3r.point_loss import PointLoss, PointLossConfig

B, H, W, N, D = 3, 5, 7, 12, 4


@pytest.fixture
def views() -> tuple[dict[str, Tensor], ...]:
    """Truth and prediction of two views; pair 1 alone is in metres."""
    g = torch.Generator().manual_seed(0)

    def gt() -> dict[str, Tensor]:
        pose = torch.eye(4).repeat(B, 1, 1)
        pose[:, :3, :3] = torch.linalg.qr(torch.randn(B, 3, 3, generator=g)).Q
        pose[:, :3, 3] = torch.randn(B, 3, generator=g)
        return {
            "pts3d": torch.randn(B, H, W, 3, generator=g) + 3, "camera_pose": pose,
            "valid_mask": torch.rand(B, H, W, generator=g) < 0.7, "sky_mask": torch.rand(B, H, W, generator=g) < 0.2,
            "is_metric_scale": torch.tensor([False, True, False]),
            "corres": torch.stack([torch.randint(0, n, (B, N), generator=g) for n in (W, H)], -1),
            "valid_corres": torch.rand(B, N, generator=g) < 0.6,
        }  # fmt: skip

    def pred(name: str) -> dict[str, Tensor]:
        desc = torch.nn.functional.normalize(torch.randn(B, H, W, D, generator=g), dim=-1)
        return {
            name: torch.randn(B, H, W, 3, generator=g) + 2, "conf": 1 + torch.rand(B, H, W, generator=g),
            "desc": desc, "desc_conf": 0.5 + torch.rand(B, H, W, generator=g),
        }  # fmt: skip

    gt1, gt2 = gt(), gt()
    gt2["valid_corres"] = gt1["valid_corres"]
    return gt1, gt2, pred("pts3d"), pred("pts3d_in_other_view")


def exact(gt1: dict[str, Tensor], gt2: dict[str, Tensor]) -> list[Tensor]:
    """The true points in camera 1's frame, pixel by pixel."""
    inverse = torch.linalg.inv(gt1["camera_pose"])
    return [torch.stack([x @ m[:3, :3].T + m[:3, 3] for x, m in zip(gt["pts3d"], inverse, strict=True)])
            for gt in (gt1, gt2)]  # fmt: skip


@pytest.mark.parametrize("norm", ["avg_dis", "?avg_dis", "avg_log1p", "avg_warp-log1p", "median_dis", "sqrt_dis"])
@pytest.mark.parametrize("log", [False, True])
def test_true_points_have_no_loss(views, norm, log):
    gt1, gt2, pred1, pred2 = views
    pred1["pts3d"], pred2["pts3d_in_other_view"] = exact(gt1, gt2)
    cfg = PointLossConfig(norm_mode=norm, sky_loss_value=0, alpha=0, loss_in_log=log)
    assert PointLoss(cfg)(*views)[0] < 1e-6


def test_value_is_the_formula(views):
    """A slow loop over pairs, with a mean over the valid pixels and sky pixels at 2."""
    gt1, gt2, pred1, pred2 = views
    expected = [[], []]
    for i in range(B):
        g = [x[i] for x in exact(gt1, gt2)]
        p = [pred1["pts3d"][i], pred2["pts3d_in_other_view"][i]]
        valid = [gt["valid_mask"][i] for gt in (gt1, gt2)]
        n_g, n_p = (torch.cat([x[m].norm(dim=-1) for x, m in zip(xs, valid, strict=True)]).mean() for xs in (g, p))
        n_p = n_g if gt1["is_metric_scale"][i] else n_p
        for v, gt in enumerate((gt1, gt2)):
            expected[v] += (p[v] / n_p - g[v] / n_g).norm(dim=-1)[valid[v]].tolist()
            expected[v] += [2.0] * int((gt["sky_mask"][i] & ~valid[v]).sum())
    loss, metrics = PointLoss(PointLossConfig(alpha=0))(*views)
    means = [sum(values) / len(values) for values in expected]
    assert math.isclose(loss, sum(means), rel_tol=1e-5) and math.isclose(metrics["point_2"], means[1], rel_tol=1e-5)


def test_scale_matters_for_pairs_in_metres_alone(views):
    *_, pred1, pred2 = views
    loss = PointLoss(PointLossConfig(sky_loss_value=0))
    before = loss.pixels(*views)[0][0]
    pred1["pts3d"], pred2["pts3d_in_other_view"] = pred1["pts3d"] * 3, pred2["pts3d_in_other_view"] * 3
    after = loss.pixels(*views)[0][0]
    assert torch.allclose(before[[0, 2]], after[[0, 2]], atol=1e-5) and not torch.allclose(before[1], after[1])


def test_far_pairs_are_not_metric(views):
    loss = PointLoss(PointLossConfig(max_metric_scale=1e-3))
    gt1, gt2, *preds = views
    unknown = {**gt1, "is_metric_scale": torch.zeros(B, dtype=torch.bool)}
    assert torch.equal(loss(*views)[0], PointLoss(PointLossConfig())(unknown, gt2, *preds)[0])


def test_scale_and_shift_invariance(views):
    gt1, gt2, pred1, pred2 = views
    shift = torch.tensor([0.0, 0.0, 1.5])
    pred1["pts3d"], pred2["pts3d_in_other_view"] = (0.5 * x + shift for x in exact(gt1, gt2))
    found = held_out_metrics(*views, negatives_padding=4)
    assert found["points_invariant"] < 1e-4 < found["points"]


def test_what_is_not_valid_may_be_nan(views):
    gt1, gt2, pred1, pred2 = views
    loss = Mast3rLoss(Mast3rLossConfig())
    before = loss(*views)[0]
    for gt in (gt1, gt2):
        gt["pts3d"] = torch.where(gt["valid_mask"][..., None], gt["pts3d"], torch.nan)
    leaves = [pred1["pts3d"].requires_grad_(), pred2["pts3d_in_other_view"].requires_grad_()]
    after = loss(*views)[0]
    assert torch.equal(before, after)
    assert all(torch.isfinite(x).all() for x in torch.autograd.grad(after, leaves))


def test_a_batch_without_a_valid_pixel_has_no_loss(views):
    gt1, gt2, pred1, pred2 = views
    for gt in (gt1, gt2):
        gt |= {name: torch.zeros_like(gt[name]) for name in ("valid_mask", "sky_mask", "valid_corres")}
    leaves = [pred1["pts3d"].requires_grad_(), pred1["desc"].requires_grad_()]
    loss, _ = Mast3rLoss(Mast3rLossConfig())(*views)
    assert loss == 0 and all((x == 0).all() for x in torch.autograd.grad(loss, leaves))


@pytest.mark.parametrize(
    "cfg",
    [
        Mast3rLossConfig(),
        Mast3rLossConfig(PointLossConfig(norm_mode="sqrt_dis", loss_in_log=True), MatchingLossConfig("all")),
        Mast3rLossConfig(
            PointLossConfig(norm_mode="avg_warp-log1p"), MatchingLossConfig("dual", confmode="prod", blocksize=4)
        ),
        Mast3rLossConfig(PointLossConfig(), MatchingLossConfig(negatives_padding=6, blocksize=4)),
    ],
)
def test_gradient_is_the_difference_quotient(views, cfg):
    """Along random directions; the loss computes in float32."""
    gt1, gt2, pred1, pred2 = views
    loss = Mast3rLoss(cfg)
    leaves = [pred[name].requires_grad_() for pred in (pred1, pred2) for name in pred]
    gradients = torch.autograd.grad(loss(*views)[0], leaves)
    g = torch.Generator().manual_seed(1)
    for leaf, gradient in zip(leaves, gradients, strict=True):
        direction = torch.randn(leaf.shape, generator=g) * gradient.abs().clamp_min(1e-6)
        direction /= direction.abs().max()
        values = []
        with torch.no_grad():
            for sign in (1, -1):
                leaf += sign * 1e-2 * direction
                values.append(loss(*views)[0].double())
                leaf -= sign * 1e-2 * direction
        expected = (gradient * direction).sum().item()
        scale = (gradient * direction).abs().sum().item()
        assert abs((values[0] - values[1]).item() / 2e-2 - expected) < 2e-2 * scale


def test_matching_is_a_softmax(views):
    gt1, gt2, pred1, pred2 = views
    losses = MatchingLoss(MatchingLossConfig()).pairs(gt1["corres"], gt2["corres"], pred1["desc"], pred2["desc"])
    at_most = -math.log(1e-8)  # of each of the two terms
    for i in range(B):
        xy1, xy2 = gt1["corres"][i], gt2["corres"][i]
        a, b = pred1["desc"][i, xy1[:, 1], xy1[:, 0]], pred2["desc"][i, xy2[:, 1], xy2[:, 0]]
        scores, target = (a @ b.T / 0.05).double(), torch.arange(N)
        terms = [torch.nn.functional.cross_entropy(s, target, reduction="none") for s in (scores, scores.T)]
        assert torch.allclose(losses[i].double(), sum(t.clamp(max=at_most) for t in terms), atol=1e-3)


def test_blocks_are_problems_of_their_own(views):
    gt1, gt2, pred1, pred2 = views
    loss = MatchingLoss(MatchingLossConfig(blocksize=4))
    whole = loss.pairs(gt1["corres"], gt2["corres"], pred1["desc"], pred2["desc"])
    part = loss.pairs(gt1["corres"][:, 4:8], gt2["corres"][:, 4:8], pred1["desc"], pred2["desc"])
    assert torch.allclose(whole[:, 4:8], part, atol=1e-5)
    with pytest.raises(ValueError, match="choose a multiple"):
        loss.pairs(gt1["corres"][:, :7], gt2["corres"][:, :7], pred1["desc"], pred2["desc"])


def test_padding_takes_the_first_pixels_without_a_partner(views):
    _, gt2, _, pred2 = views
    found, hidden = padding(pred2["desc"], gt2["corres"], 5)
    for i in range(B):
        taken = {y * W + x for x, y in gt2["corres"][i].tolist()}
        free = [p for p in range(H * W) if p not in taken][:5]
        assert torch.equal(found[i], pred2["desc"][i].flatten(0, 1)[free]) and not hidden[i].any()
    _, hidden = padding(pred2["desc"], gt2["corres"], H * W)
    assert hidden.sum(1).tolist() == [len(set(map(tuple, xy))) for xy in gt2["corres"].tolist()]


def test_average_precision_of_perfect_and_of_equal_descriptors(views):
    gt1, gt2, pred1, pred2 = views
    flat = torch.stack([torch.randperm(H * W)[:N] for _ in range(B)])
    gt1["corres"] = gt2["corres"] = torch.stack([flat % W, flat // W], -1)
    gt2["valid_corres"] = gt1["valid_corres"] = torch.ones(B, N, dtype=torch.bool)
    pred2["desc"] = pred1["desc"]
    assert average_precision(*views, negatives_padding=8) == 1
    pred1["desc"] = pred2["desc"] = torch.ones_like(pred1["desc"])  # nothing can be told apart
    assert math.isclose(average_precision(*views, negatives_padding=8), 1 / (N + 8), rel_tol=1e-6)


class HostReads(TorchDispatchMode):
    """Names of the operations that make a host wait for its device, or copy to it."""

    waiting = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "lift_fresh", "unique")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        # a mask as an index is a nonzero on a device
        masks = [x for x in (args[1] if name in ("index", "index_put") else ()) if x is not None]
        if name.rstrip("_0123456789") in self.waiting or any(x.dtype == torch.bool for x in masks):
            self.found.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("norm", ["?avg_dis", "median_dis", "sqrt_dis"])
def test_nothing_in_a_step_waits_for_the_device(views, norm):
    *gts, pred1, pred2 = views
    leaves = [pred[name].requires_grad_() for pred in (pred1, pred2) for name in pred]
    points = PointLossConfig(norm, max_metric_scale=9.0, loss_in_log=True, scale_shift_invariant=True)
    loss = Mast3rLoss(Mast3rLossConfig(points, MatchingLossConfig(negatives_padding=4)))
    with HostReads() as reads:
        torch.autograd.grad(loss(*views)[0], leaves)
        held_out_metrics(*views, negatives_padding=4)
    assert reads.found == []
    with HostReads() as reads:  # it would see them
        gts[0]["pts3d"][gts[0]["valid_mask"]].sum().item()
    assert reads.found == ["index", "_local_scalar_dense"]


def test_options_that_make_no_sense_are_refused():
    for wrong in ({"norm_mode": "mean"}, {"norm_mode": "?avg_warp-log1p"}, {"alpha": -1}):
        with pytest.raises(ValueError, match="give"):
            PointLossConfig(**wrong)
    for wrong in ({"mode": "softmax"}, {"temperature": 0}, {"blocksize": 0}, {"confmode": "max"}):
        with pytest.raises(ValueError, match="give"):
            MatchingLossConfig(**wrong)
