"""Matching of descriptors: InfoNCE over the true correspondences of a pair, and average precision to test with.

    S = a b^T / T                                       a, b: descriptors of views 1 and 2 at N correspondences
    proper: -log softmax over k of S_ki at k = i  -  log softmax over k of S_ik at k = i
    all:    -log softmax over all entries of S at (i, i)
    dual:   -2 S_ii + log sum_k exp S_ik + log sum_k exp S_ki

each term at most -log(eps). Added negatives (`valid_corres` false) stay in the sums and give no loss themselves. The
confidence weighs a correspondence as it weighs a pixel's point: mean(l c - alpha log c).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dune_fast.heads.mast3r.point_loss import View, masked_mean, with_confidence

MODES = ("proper", "all", "dual")


@dataclass
class MatchingLossConfig:
    """Options of the matching loss; defaults are those of MASt3R's training."""

    mode: str = "proper"
    """Which softmax: proper, all or dual."""
    temperature: float = 0.05
    eps: float = 1e-8
    """Smallest probability."""
    blocksize: int = 8192
    """More correspondences than this are cut into blocks, in the order in which they come; a block is a problem of its
    own. The number of correspondences must be a multiple of it."""
    negatives_padding: int = 0
    """Pixels of view 2 that are no correspondence and are added as negatives: the first ones, row by row."""
    confmode: str = "mean"
    """The confidence of a correspondence from its two pixels': "mean" or "prod"."""
    alpha: float = 10.0
    """Weight of the confidence's logarithm; 0: the plain mean, without confidence."""

    def __post_init__(self) -> None:
        if self.mode not in MODES or self.confmode not in ("mean", "prod"):
            raise ValueError(f"mode is {self.mode!r}, confmode {self.confmode!r}: give one of {', '.join(MODES)}, and "
                             "mean or prod")  # fmt: skip
        if self.temperature <= 0 or not 0 < self.eps < 1 or self.alpha < 0:
            raise ValueError(f"temperature {self.temperature}, eps {self.eps}, alpha {self.alpha}: give a temperature "
                             "above 0, an eps between 0 and 1, an alpha of at least 0")  # fmt: skip
        if self.blocksize < 1 or self.negatives_padding < 0:
            raise ValueError(f"blocksize {self.blocksize}, negatives_padding {self.negatives_padding}: give at least 1 "
                             "and at least 0")  # fmt: skip


class MatchingLoss:
    """Loss of the descriptors of two views of B pairs, float32.

    The truth of a view: `corres` [B, N, 2], integer (x, y), and of view 1 `valid_corres` [B, N]. The prediction: `desc`
    [B, H, W, d] of unit length, `desc_conf` [B, H, W].
    """

    def __init__(self, cfg: MatchingLossConfig) -> None:
        self.cfg = cfg

    def __call__(
        self, gt1: View, gt2: View, pred1: View, pred2: View, permutation: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The scalar, and metrics without gradient: `matching`, the mean before the confidence, `matching_conf` after.

        Args:
            permutation: [B, N], the order in which correspondences are cut into blocks; None: as they come. Pairs of
                `pairs.PairSource` come in random order.

        Raises:
            ValueError: the correspondences cannot be cut into blocks.
        """
        cfg, valid = self.cfg, gt1["valid_corres"]
        xy1, xy2 = gt1["corres"], gt2["corres"]
        if permutation is not None:
            valid = valid.gather(1, permutation)
            xy1, xy2 = (xy.gather(1, permutation[..., None].expand(-1, -1, 2)) for xy in (xy1, xy2))
        losses = self.pairs(xy1, xy2, pred1["desc"], pred2["desc"])  # [B, N]
        plain = masked_mean(losses, valid)
        metrics = {"matching": plain.detach()}
        if not cfg.alpha:
            return plain, metrics
        c1, c2 = at(pred1["desc_conf"].float(), xy1), at(pred2["desc_conf"].float(), xy2)
        conf = (c1 + c2) / 2 if cfg.confmode == "mean" else c1 * c2
        loss = masked_mean(with_confidence(losses, conf, cfg.alpha), valid)
        return loss, metrics | {"matching_conf": loss.detach()}

    def pairs(self, xy1: Tensor, xy2: Tensor, desc1: Tensor, desc2: Tensor) -> Tensor:
        """The loss of every correspondence [B, N], valid or not."""
        cfg, (batch, n) = self.cfg, xy1.shape[:2]
        size = min(n, cfg.blocksize)
        if n % size:
            raise ValueError(f"{n} correspondences cannot be cut into blocks of {size}: choose a multiple of it")
        a, b = (at(d.float(), xy).reshape(batch * (n // size), size, -1) for d, xy in ((desc1, xy1), (desc2, xy2)))
        scores = a @ b.mT / cfg.temperature  # [B * blocks, size, size]
        positive = scores.diagonal(dim1=1, dim2=2)
        if cfg.negatives_padding:
            negatives, hidden = padding(desc2.float(), xy2, cfg.negatives_padding)
            more = torch.einsum("bnd,bkd->bnk", a.reshape(batch, n, -1), negatives) / cfg.temperature
            more = more.masked_fill(hidden[:, None], -torch.inf).reshape(len(a), size, -1)
            scores = torch.cat([scores, more], 2)
        floor = math.log(cfg.eps)
        if cfg.mode == "all":
            loss = -(positive - scores.flatten(1).logsumexp(1, keepdim=True)).clamp_min(floor)
        else:
            rows = positive - scores.logsumexp(2)
            columns = positive - scores[..., :size].logsumexp(1)
            if cfg.mode == "proper":
                loss = -rows.clamp_min(floor) - columns.clamp_min(floor)
            else:
                loss = -(rows + columns).clamp_min(floor)
        return loss.reshape(batch, n)


@torch.no_grad()
def average_precision(gt1: View, gt2: View, pred1: View, pred2: View, negatives_padding: int = 12288) -> Tensor:
    """Mean over the valid correspondences of 1 / rank of the true partner among all of view 2: a scalar up to 1.

    Arguments: as `MatchingLoss`. A partner that ties with others has the worst rank of them.
    """
    xy1, xy2 = gt1["corres"], gt2["corres"]
    negatives, hidden = padding(pred2["desc"].float(), xy2, negatives_padding)
    sums = []
    # a pair at a time: N x (N + padding) scores
    for i in range(len(xy1)):
        a, b = at(pred1["desc"][i : i + 1].float(), xy1[i : i + 1])[0], at(pred2["desc"][i : i + 1], xy2[i : i + 1])[0]
        inside = a @ b.float().mT
        outside = (a @ negatives[i].mT).masked_fill(hidden[i], -torch.inf)
        own = inside.diagonal()[:, None]
        rank = (inside >= own).sum(1) + (outside >= own).sum(1)
        sums.append(torch.where(gt1["valid_corres"][i], 1 / rank, 0.0).sum())
    return torch.stack(sums).sum() / gt1["valid_corres"].sum().clamp_min(1)


def at(x: Tensor, xy: Tensor) -> Tensor:
    """Values of maps [B, H, W, ...] at integer (x, y) [B, N, 2]: [B, N, ...]."""
    return x[torch.arange(len(x), device=x.device)[:, None], xy[..., 1], xy[..., 0]]


def padding(desc: Tensor, xy: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The first pixels [B, n, d] of maps [B, H, W, d] that no xy [B, N, 2] names; n = count or fewer.

    Also [B, n]: which of them are named after all, where too few are not.
    """
    batch, height, width = desc.shape[:3]
    named = desc.new_zeros(batch, height * width, dtype=torch.bool)
    named.scatter_(1, xy[..., 1] * width + xy[..., 0], True)
    first = named.byte().argsort(dim=1, stable=True)[:, :count]  # [B, n]
    return desc.flatten(1, 2).gather(1, first[..., None].expand(-1, -1, desc.shape[-1])), named.gather(1, first)
