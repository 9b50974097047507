"""Two photographs through encoder and head: points, matches, cameras, the relative pose.

Where view 2's points are wanted in the frame of its own camera, for its depths or its focal length, the head runs a
second time, in the other order.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dune_fast.heads.head import HeadError
from dune_fast.heads.mast3r.head import Mast3rHead
from dune_fast.heads.mast3r.images import Prepared, estimated_intrinsics, for_encoder
from dune_fast.heads.mast3r.matching import Matches, symmetric, trusted
from dune_fast.heads.mast3r.pose import RelativePose, essential, pnp
from dune_fast.heads.tokens import encode
from dune_fast.kernels.nn.vit import VisionTransformer

POSE_METHODS = ("pnp", "essential")


@dataclass
class TwoViews:
    """What the head says of a pair; of each entry [view 1, view 2], on the CPU."""

    points: list[np.ndarray]
    """float32 [h, w, 3], in the frame of camera 1."""
    conf: list[np.ndarray]
    """float32 [h, w], of `points`."""
    desc: list[Tensor]
    """[h, w, d], on the head's device."""
    desc_conf: list[Tensor]
    """[h, w], on the head's device."""
    second_alone: Callable[[], np.ndarray]
    """Makes view 2's points in the frame of its own camera, float32 [h, w, 3]."""

    @functools.cached_property
    def own_points(self) -> list[np.ndarray]:
        """float32 [h, w, 3], in the frame of the view's own camera."""
        return [self.points[0], self.second_alone()]

    @property
    def depths(self) -> list[np.ndarray]:
        """float32 [h, w], z in the frame of the view's own camera."""
        return [points[..., 2] for points in self.own_points]

    def matches(self, step: int = 8, confidence: float = 1.001, border: int = 3) -> Matches:
        """Matches found from both views, see `matching.symmetric`, that `matching.trusted` keeps."""
        found = symmetric(*self.desc, *self.desc_conf, step)
        return trusted(found, *(tuple(x.shape) for x in self.desc_conf), border, confidence)

    def cameras(self) -> list[np.ndarray | None]:
        """Camera matrices read off the points; None where they are of no camera."""
        return [estimated_intrinsics(points) for points in self.own_points]

    def relative_pose(self, matches: Matches, cameras: list[np.ndarray | None], method: str = "pnp") -> RelativePose:
        """The pose of camera 2, see `pose`.

        Args:
            matches: in pixels of the prepared images.
            cameras: camera matrices [3, 3] in the same pixels; None where there is none, which gives no pose.
            method: "pnp" or "essential".

        Raises:
            HeadError: another method, or no OpenCV.
        """
        if method not in POSE_METHODS:
            raise HeadError(f"pose method {method!r} is unknown; choose one of {', '.join(POSE_METHODS)}")
        xy = [x.cpu().numpy() for x in matches[:2]]
        k1, k2 = cameras
        if k2 is None or (k1 is None and method == "essential"):
            reason = "the points show no focal length: give the cameras' intrinsics"
            return RelativePose(None, None, 0, len(xy[0]), reason)
        at1, at2 = ((x[:, 1], x[:, 0]) for x in xy)
        if method == "pnp":
            return pnp(self.points[0][at1], xy[1], k2)
        assert k1 is not None
        return essential(*xy, k1, k2, self.depths[0][at1], self.depths[1][at2])


@torch.no_grad()
def look_at(view1: Prepared, view2: Prepared, encoder: VisionTransformer, head: Mast3rHead) -> TwoViews:
    """What the head says of two prepared images; they may have two sizes. HeadError if that is not finite."""
    device = next(head.parameters()).device
    tokens = [encode(encoder, for_encoder(view.image[None].to(device), encoder)) for view in (view1, view2)]
    result1, result2 = head(*tokens)
    points = [_finite("points", x) for x in (result1["pts3d"], result2["pts3d_in_other_view"])]
    conf, desc, desc_conf = (
        [_finite(name, result[name]) for result in (result1, result2)] for name in ("conf", "desc", "desc_conf")
    )

    @torch.no_grad()
    def second_alone() -> np.ndarray:
        return _finite("points", head(*tokens[::-1])[0]["pts3d"]).cpu().numpy()

    return TwoViews(*([x.cpu().numpy() for x in part] for part in (points, conf)), desc, desc_conf, second_alone)


def _finite(name: str, values: Tensor) -> Tensor:
    """The one image of a batch; HeadError if an output of the head is not finite."""
    if not bool(values.isfinite().all()):
        raise HeadError(f"the head's {name} are not finite: its weights do not fit the encoder, or are damaged")
    return values[0]
