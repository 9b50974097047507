"""Which images have spoilt a step is seen in the teachers' features, image by image."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dune_fast.distill.step import finite_images
from dune_fast.kernels.nn.routing import make_routes


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_teacher_and_the_image_are_found(value, dtype):
    features = {
        "a": {"cls": torch.randn(4, 8).to(dtype), "patch": torch.randn(4, 5, 8).to(dtype)},
        "b": {"patch": 1e3 * torch.randn(4, 5, 6).to(dtype)},
    }
    assert finite_images(features, None).all()
    features["a"]["cls"][1, 3] = value
    features["b"]["patch"][2, 0, 0] = value
    features["b"]["patch"][2, 4, 5] = -value
    assert finite_images(features, None).tolist() == [[True, False, True, True], [True, True, False, True]]


def test_images_that_a_teacher_does_not_get_are_not_its_fault():
    routes = make_routes({"a": np.array([1, 3]), "b": np.array([0])}, 4, torch.device("cpu"))
    features = {"a": {"patch": torch.randn(2, 5, 8)}, "b": {"patch": torch.randn(1, 5, 6)}}
    features["a"]["patch"][1, 2, 2] = float("nan")
    assert finite_images(features, routes).tolist() == [[True, True, True, False], [True] * 4]
