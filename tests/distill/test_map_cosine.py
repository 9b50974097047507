"""The cosine of whole maps against PyTorch's own layers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dune_fast.distill.map_cosine import map_cosine


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_are_those_of_pytorchs_loss(dtype):
    torch.manual_seed(0)
    prediction, target = (torch.randn(4, 9, 5).to(dtype) for _ in range(2))
    target[1], target[2] = prediction[1], 0  # an equal pair, a map of zeros
    ours, theirs = (prediction.clone().requires_grad_() for _ in range(2))
    loss = map_cosine(ours, target)
    flat = F.normalize(theirs.flatten(1).float()), F.normalize(target.flatten(1).float())
    reference = F.cosine_embedding_loss(*flat, torch.ones(4), reduction="none")
    torch.testing.assert_close(loss, reference, rtol=1e-5, atol=1e-6)
    assert loss.dtype == torch.float32
    assert loss[2] == 1
    (loss * torch.arange(1.0, 5)).sum().backward()
    (reference * torch.arange(1.0, 5)).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4 if dtype == torch.float32 else 1e-2, atol=1e-6)


def test_a_student_of_zeros_gives_no_nan_and_maps_of_other_shapes_are_refused():
    prediction = torch.zeros(2, 3, 4, requires_grad=True)
    map_cosine(prediction, torch.randn(2, 3, 4)).sum().backward()
    assert prediction.grad.isfinite().all()
    with pytest.raises(ValueError, match=r"\[2, 1, 4\]"):  # would broadcast to every pair of images
        map_cosine(torch.zeros(2, 4), torch.zeros(2, 1, 4))
