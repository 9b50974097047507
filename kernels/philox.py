"""Philox-4x32-10, a counter-based generator (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

One round on the counter (c0, c1, c2, c3) with the key (k0, k1), all words of 32 bits:

    hi0:lo0 = 0xD2511F53 * c0,   hi1:lo1 = 0xCD9E8D57 * c2
    (c0, c1, c2, c3) <- (hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0)

Ten rounds; between two rounds k0 += 0x9E3779B9 and k1 += 0xBB67AE85. A number is a pure function of its seed and
counters: no state, the same on every device and for any number of ranks. Words are kept in int64 tensors (torch has no
full uint32 arithmetic); nothing waits for the device.

The layout that everything in this project uses, with a up to 64 bits and b up to 32:

    key     = (low32(seed), high32(seed))
    counter = (low32(a), high32(a), low32(b), stream)

It is that of Triton's `tl.philox(seed, c0, c1, c2, c3)` with a 64-bit seed. A word w becomes the float (w >> 8) * 2^-24
in [0, 1): the 24 upper bits, exactly representable, hence bit-equal wherever it is computed. (`tl.rand` maps words in
another way.)

Minimal bytes moved: read the counters, write the words; 40 integer multiplications a counter.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Streams: one small integer for each use of random numbers, so that no two uses share a counter.
DROPPING = 1
"""Teacher dropping: a = global position of the image, b as the caller chooses."""
AUGMENT = 2
"""Augmentation: a = global position of the image, b = block of four words."""
ORDER = 3
"""Order of the samples: a = pass over the group, b = group."""
VIEW = 4
"""Augmentation of fixed views: a = number of the view, b = block of four words."""
PATCHES = 5
"""Subset of the patches that a step's loss is taken on: a = patch, b = step."""
VIEW_PATCHES = 6
"""Patches that a cache keeps of a fixed view: a = number of the view, b = patch."""
TEACHER_VIEW = 7
"""A teacher's own crop of an image: a = global position of the image, b = which of the crops."""
SIZES = 8
"""Size of a step's images: a = step, b = 0 for the student, from 1 for teachers."""
POSITION_CROP = 9
"""Crop of the student's position table: a = global position of the image, b = step."""
POSITION_DROPOUT = 10
"""Images that are trained without positions: a = global position of the image, b = step."""
WINDOW = 11
"""Attention windows of a step: a = step."""

_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF


def _multiply(word: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of word * multiplier; the int64 product wraps, its bits are those of the unsigned one."""
    product = word * multiplier
    return (product >> 32) & _MASK, product & _MASK


def philox4x32(key: int, counter: Tensor) -> Tensor:
    """Philox-4x32-10 of counters, int64 [..., 4], words c0 to c3 in [0, 2^32); words like them, on the same device.

    `key` has 64 bits, k0 its low word, k1 its high one; a negative one counts as two's complement. ValueError for
    counters of another type or shape.
    """
    if counter.dtype != torch.int64 or counter.ndim < 1 or counter.shape[-1] != 4:
        raise ValueError(f"philox4x32 takes counters as int64 [..., 4], got {counter.dtype} {list(counter.shape)}")
    k0, k1 = key & _MASK, (key >> 32) & _MASK
    c0, c1, c2, c3 = counter.unbind(-1)
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return torch.stack([c0, c1, c2, c3], dim=-1)


def words(seed: int, stream: int, a: Tensor | int, b: Tensor | int = 0) -> Tensor:
    """Four random words for every pair of counters: int64 [..., 4], of the shape of a and b broadcast together.

    Args:
        seed: up to 64 bits.
        stream: one of the constants above, up to 32 bits.
        a, b: integers or integer tensors, up to 64 and 32 bits. Words are made on the tensors' device, else on the CPU.
    """
    device = next((x.device for x in (a, b) if isinstance(x, Tensor)), None)
    # full, not tensor: a Python number becomes a fill on the device, never a copy that the host waits for
    a = a.long() if isinstance(a, Tensor) else torch.full((), as_int64(a), dtype=torch.int64, device=device)
    b = b.long() if isinstance(b, Tensor) else torch.full((), b & _MASK, dtype=torch.int64, device=device)
    a, b = torch.broadcast_tensors(a, b)
    return philox4x32(seed, torch.stack([a & _MASK, (a >> 32) & _MASK, b & _MASK, torch.full_like(a, stream)], dim=-1))


def to_uniform(word: Tensor) -> Tensor:
    """Maps words, int64 in [0, 2^32), to float32 in [0, 1) with 24 random bits."""
    return (word >> 8).float() * 2.0**-24


def uniform4(seed: int, stream: int, a: Tensor | int, b: Tensor | int = 0) -> Tensor:
    """Four uniform numbers in [0, 1) for every pair of counters: float32 [..., 4]. Arguments: see `words`."""
    return to_uniform(words(seed, stream, a, b))


def as_int64(value: int) -> int:
    """The signed 64-bit integer with the low 64 bits of value."""
    return (value + 2**63) % 2**64 - 2**63
