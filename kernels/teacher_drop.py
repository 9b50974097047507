"""Which (teacher, image) losses count: the hardest teacher of each image and a random part of the others.

    c[t, b] = allowed[t, b] * (t == argmax_t L[t, b]  or  u[t, b] >= p),   allowed[t, b] = own[t, group[b]]

with the argmax over allowed teachers and u ~ U[0, 1) from a counter-based generator keyed by (seed, step, global image
index, teacher), so that the choice does not depend on how images are spread over ranks (UNIC, ECCV 2024, "lowest loss"
teacher dropping). Without `own` every teacher is allowed on every image.

Minimal bytes moved: read L, positions and groups, write c: a launch's latency, whatever the bytes.
Shapes: L, c float32 [T, B]; positions, groups int64 [B]; own bool [T, G].
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dune_fast.kernels import philox
from dune_fast.kernels.launching import Example, launch
from dune_fast.kernels.library import contiguous, guard, guard_device, jit, register, tl, use_triton


def drop_uniforms(seed: int, step: int, positions: Tensor, num_teachers: int) -> Tensor:
    """u of the formula, float32 [T, B]: Philox words 0..3 of stream DROPPING + 256 * (t // 4) serve four teachers."""
    groups = [
        philox.uniform4(seed, philox.DROPPING | block << 8, positions, step)  # [B, 4]
        for block in range((num_teachers + 3) // 4)
    ]
    return torch.cat(groups, dim=-1)[:, :num_teachers].T


def teacher_drop_reference(
    losses: Tensor, positions: Tensor, own: Tensor | None, groups: Tensor | None,
    step: int, seed: int, probability: float,
) -> Tensor:  # fmt: skip
    """`teacher_drop` in plain torch."""
    allowed = torch.ones_like(losses, dtype=torch.bool) if own is None else own[:, groups]
    if probability == 0.0 or len(losses) == 1:
        return allowed.to(losses.dtype)
    teachers = torch.arange(len(losses), device=losses.device)[:, None]
    hardest = losses.masked_fill(~allowed, -torch.inf).argmax(0, keepdim=True) == teachers
    kept = drop_uniforms(seed, step, positions, len(losses)) >= probability
    return (allowed & (hardest | kept)).to(losses.dtype)


@jit
def _allowed(own, group, inside, t, num_groups, RESTRICT: tl.constexpr):
    """bool [B]: whether teacher t may teach each image."""
    if RESTRICT:
        inside = inside & (tl.load(own + t * num_groups + group, mask=inside, other=0) != 0)
    return inside


@jit(do_not_specialize=["images", "num_groups", "step", "seed"])
def _drop_kernel(
    losses, positions, own, groups, c, images, num_groups, teacher_stride, step, seed, probability,
    RESTRICT: tl.constexpr, STREAM: tl.constexpr, TEACHERS: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """c [T, B] of BLOCK_B images a program."""
    image = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    inside = image < images
    group = tl.zeros([BLOCK_B], tl.int64)
    if RESTRICT:
        group = tl.load(groups + image, mask=inside, other=0)

    hardest = tl.zeros([BLOCK_B], tl.int32)
    largest = tl.full([BLOCK_B], float("-inf"), tl.float32)
    for t in tl.static_range(TEACHERS):
        loss = tl.load(losses + t * teacher_stride + image, mask=inside, other=0.0).to(tl.float32)
        loss = tl.where(_allowed(own, group, inside, t, num_groups, RESTRICT), loss, float("-inf"))
        harder = (loss > largest) | ((loss != loss) & (largest == largest))  # the first NaN wins, as in torch
        hardest = tl.where(harder, t, hardest)
        largest = tl.where(harder, loss, largest)

    position = tl.load(positions + image, mask=inside, other=0)
    low, high = position.to(tl.uint32), (position >> 32).to(tl.uint32)
    step_word = tl.full([BLOCK_B], 0, tl.uint32) + step.to(tl.uint32)
    for block in tl.static_range((TEACHERS + 3) // 4):
        stream = tl.full([BLOCK_B], STREAM | (block << 8), tl.uint32)
        words = tl.philox(seed, low, high, step_word, stream)
        for word in tl.static_range(4):
            t = block * 4 + word
            if t < TEACHERS:
                u = (words[word] >> 8).to(tl.float32) * 5.9604644775390625e-08  # 2^-24
                kept = _allowed(own, group, inside, t, num_groups, RESTRICT) & ((hardest == t) | (u >= probability))
                tl.store(c + t * images + image, kept.to(tl.float32), mask=inside)


def _drop_triton(
    losses: Tensor, positions: Tensor, own: Tensor | None, groups: Tensor | None,
    step: int, seed: int, probability: float,
) -> Tensor:  # fmt: skip
    num_teachers, images = losses.shape
    losses = losses if losses.stride(1) == 1 else losses.contiguous()
    c = losses.new_empty(num_teachers, images)
    # one warp: 32 images a program spread over the multiprocessors, where latency is all there is (not measured)
    launch(
        _drop_kernel, (-(-images // 32),),
        losses, *contiguous(positions, own, groups), c, images, 0 if own is None else own.shape[1],
        losses.stride(0), step, seed, probability,
        RESTRICT=own is not None, STREAM=philox.DROPPING, TEACHERS=num_teachers, BLOCK_B=32, num_warps=1,
    )  # fmt: skip
    return c


_drop = register(
    "teacher_drop(Tensor losses, Tensor positions, Tensor? own, Tensor? groups, SymInt step, int seed, "
    "float probability) -> Tensor",
    _drop_triton, teacher_drop_reference, lambda losses, *_: losses.new_empty(losses.shape),
)  # fmt: skip


def teacher_drop(
    losses: Tensor, positions: Tensor, step: int, seed: int, probability: float,
    own: Tensor | None = None, groups: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Coefficients 0 or 1, float32 [T, B].

    Args:
        losses: float32 [T, B], per teacher and image; no gradient flows through the choice.
        positions: int64 [B], global index of each image in the run.
        step, seed: of the run; low 32 and 64 bits count.
        probability: with which a teacher that is not the hardest of its image is dropped, in [0, 1].
        own: bool [T, G], on which dataset groups a teacher counts; on all if left out.
        groups: int64 [B], dataset group of each image, where `own` is given.

    Raises:
        ValueError: shapes, integer types or devices disagree, only one of own and groups is given, or the probability
            is out of range.
    """
    given = {"losses": losses, "positions": positions, "own": own, "groups": groups}
    guard_device("teacher_drop", **given)
    guard(
        losses.ndim == 2 and positions.shape == losses.shape[1:] and positions.dtype == torch.int64,
        "teacher_drop takes losses [T, B] and positions int64 [B]", **given,
    )  # fmt: skip
    guard((own is None) == (groups is None), "teacher_drop takes own and groups, both or neither", **given)
    if own is not None:
        guard(
            own.ndim == 2 and own.dtype == torch.bool and len(own) == len(losses)
            and groups.shape == positions.shape and groups.dtype == torch.int64,
            "teacher_drop takes own bool [T, G] and groups int64 [B] for losses [T, B]", **given,
        )  # fmt: skip
    if not 0.0 <= probability <= 1.0:
        raise ValueError(f"drop probability {probability} is not in [0, 1]")
    if not use_triton(*given.values()):
        return teacher_drop_reference(losses.detach(), positions, own, groups, step, seed, probability)
    return _drop(losses.detach(), positions, own, groups, step, philox.as_int64(seed), probability)


AOT = (((128, 1, 1), torch.float32),)


def examples(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> Iterator[Example]:
    """Losses of three teachers and of nine (three blocks of random words), [T, B]; with and without sharing masks."""
    positions, groups = torch.arange(shape[0], device=device), torch.arange(shape[0], device=device) % 3
    for teachers in (3, 9):
        losses, own = torch.rand(teachers, shape[0], device=device), torch.rand(teachers, 3, device=device) < 0.6
        for mask in ((None, None), (own, groups)):
            label = f"{teachers} teachers{'' if mask[0] is None else ', masked'}"
            yield Example(label, _drop, (losses, positions, *mask, 1000, 1 << 40, 0.5))
