"""The dropping kernel equals its reference, word for word of Philox, with and without sharing masks."""

from __future__ import annotations

import pytest
import torch

from dune_fast.kernels.teacher_drop import teacher_drop, teacher_drop_reference

pytestmark = pytest.mark.usefixtures("poisoned")


def arguments(teachers: int, images: int, device="cpu"):
    """(losses, positions, own, groups)."""
    torch.manual_seed(0)
    losses, own = torch.rand(teachers, images), torch.rand(teachers, 4) < 0.6
    positions, groups = torch.randint(-(2**62), 2**62, (images,)), torch.randint(0, 4, (images,))
    return tuple(x.to(device) for x in (losses, positions, own, groups))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("teachers", "images"), [(1, 3), (2, 1), (3, 70), (4, 32), (9, 33)])
def test_equals_the_reference(teachers, images, masked, device, fused):
    losses, positions, own, groups = arguments(teachers, images, device)
    mask = (own, groups) if masked else (None, None)
    for probability in (0.0, 0.3, 1.0):
        with fused():
            found = teacher_drop(losses, positions, 7, 3, probability, *mask)
        assert torch.equal(found, teacher_drop_reference(losses, positions, *mask, 7, 3, probability))


@pytest.mark.parametrize("seed", [0, 1, -3, 0x123456789ABCDEF, 2**64 - 1])
@pytest.mark.parametrize("step", [0, 2**31 - 1, 2**31, 2**32 - 1, 2**32 + 5])
def test_every_bit_of_seed_and_step(seed, step, device, fused):
    losses, positions, _, _ = arguments(3, 40, device)
    with fused():
        found = teacher_drop(losses, positions, step, seed, 0.5)
    expected = teacher_drop_reference(losses, positions, None, None, step, seed, 0.5)
    assert torch.equal(found, expected) and 0 < expected.mean() < 1


def test_equal_and_undefined_losses(device, fused):
    """The first of equal losses is the hardest, and NaN is harder than any number, as in torch."""
    nan, inf = torch.nan, torch.inf
    losses = torch.tensor([[1, nan, 2, inf, -inf, nan], [1, 3, nan, nan, -inf, 1], [1, nan, 2, inf, -inf, nan]])
    losses, positions = losses.to(device), torch.arange(6, device=device)
    with fused():
        found = teacher_drop(losses, positions, 0, 0, 1.0)
    assert torch.equal(found, teacher_drop_reference(losses, positions, None, None, 0, 0, 1.0))
    assert found.argmax(0).tolist() == [0, 0, 1, 1, 0, 0] and torch.all(found.sum(0) == 1)


def test_only_allowed_teachers_compete(device, fused):
    losses = torch.tensor([[5.0, 5.0, 5.0], [1.0, 1.0, 1.0], [2.0, 2.0, 2.0]], device=device)
    own = torch.tensor([[True, False, False], [True, True, False], [True, True, False]], device=device)
    images = torch.arange(3, device=device)
    with fused():
        found = teacher_drop(losses, images, 0, 0, 1.0, own, images)
    assert found.tolist() == [[1, 0, 0], [0, 0, 0], [0, 1, 0]]


def test_strided_losses_and_no_images(device, fused):
    losses, positions, own, groups = arguments(4, 20, device)
    with fused():
        for cut in (losses[1:, 3:11], losses[:, ::2], losses.T[:4, :4], losses[:, :0]):
            at = positions[: cut.shape[1]]
            expected = teacher_drop_reference(cut, at, None, None, 1, 2, 0.5)
            assert torch.equal(teacher_drop(cut, at, 1, 2, 0.5), expected)
        found = teacher_drop(losses, positions, 1, 2, 0.5, own.T.contiguous().T, groups)
    assert torch.equal(found, teacher_drop_reference(losses, positions, own, groups, 1, 2, 0.5))


def test_no_gradient_flows_through_the_choice(device, fused):
    losses, positions, _, _ = arguments(3, 8, device)
    with fused():
        assert not teacher_drop(losses.requires_grad_(), positions, 1, 2, 0.5).requires_grad


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda x, p, o, g: (x[0], p, 0, 0, 0.5),
            r"losses \[T, B\] and positions int64 \[B\]; got losses float32 \[4\]",
        ),
        (lambda x, p, o, g: (x, p[1:], 0, 0, 0.5), "positions int64"),
        (lambda x, p, o, g: (x, p.int(), 0, 0, 0.5), r"positions int32 \[4\]"),
        (lambda x, p, o, g: (x, p, 0, 0, 0.5, o), "both or neither"),
        (lambda x, p, o, g: (x, p, 0, 0, 0.5, o[1:], g), r"own bool \[T, G\]"),
        (lambda x, p, o, g: (x, p, 0, 0, 0.5, o.float(), g), "own float32"),
        (lambda x, p, o, g: (x, p, 0, 0, 0.5, o, g[1:]), r"groups int64 \[3\]"),
        (lambda x, p, o, g: (x, p.to("meta"), 0, 0, 0.5), "one device"),
        (lambda x, p, o, g: (x, p, 0, 0, 1.5), "1.5 is not in"),
    ],
)
def test_messages(change, words, fused):
    with fused(), pytest.raises(ValueError, match=words):
        teacher_drop(*change(*arguments(3, 4)))
