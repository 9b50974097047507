"""Reference cases of views: transforms, masks and grids of homographies, mosaics, SAM's own input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bench.case import FORWARD, Case, Check, compare
from dune_fast.kernels.nn.homography import between_views, grid, valid_mask
from dune_fast.teachers.inputs import Mosaic, fit_longest

EXACT = 1e-6
"""Of statistics, matrices and transforms."""
EQUAL = 1e-12
"""Of masks that have to be the same."""
BORDER = 0.03
"""Share of the pixels of a mask, at its border, that may differ where the quad is turned or warped."""


def run_homography(case: Case) -> list[Check]:
    """`radio_homography`: views of one source, the first of which is the student's."""
    info, checks = case.info, []
    quads = [
        torch.stack([case[f"view{v}/bounds/{i}"] for i in range(info["batch"])]) for v, _ in enumerate(info["views"])
    ]
    sizes: list[Any] = [tuple(case[f"view{v}/size"].tolist()) for v, _ in enumerate(info["views"])]
    for v, (quad, size) in enumerate(zip(quads, sizes, strict=True)):
        wrong = valid_mask(quad, size).float() != case[f"valid_mask{v}"]
        axis_parallel = bool(((quad == quad.roll(1, 1)).any(-1)).all())
        checks.append(Check(f"valid_mask{v}", float(wrong.float().mean()), EQUAL if axis_parallel else BORDER))
        if v == 0:
            continue
        transform = between_views(quad, size, quads[0], sizes[0])
        ours = {f"transform{v}": transform, f"grid{v}": grid(transform, tuple(info["grid"]))}
        checks += compare(ours, {name: case[name] for name in ours}, EXACT)
    return checks


def run_mosaic(case: Case) -> list[Check]:
    """`radio_mosaic`: images on canvases, features of canvases for every image."""
    images, mosaic = case["images"], Mosaic(case.info["outer"], case.info["inner"], case.info["stride"])
    ours = {
        "canvas": mosaic.pack(images), "unpacked": mosaic.unpack(case["features"], len(images)),
        "summary_unpacked": mosaic.repeat(case["summary"], len(images)),
    }  # fmt: skip
    return compare(ours, {name: case[name] for name in ours}, FORWARD)


def run_sam_preprocess(case: Case) -> list[Check]:
    """`sam_preprocess`: the longest side resized, the rest of the square filled up."""
    return compare({"out": fit_longest(case["in"], case.info["size"])}, {"out": case["out"]})


VIEW_RUNNERS: dict[str, Callable[[Case], list[Check]]] = {
    "radio_homography": run_homography,
    "radio_mosaic": run_mosaic,
    "sam_preprocess": run_sam_preprocess,
}
"""Kind of a case -> what recomputes it."""
