"""PHI-S: teachers' features rotated so that every channel has the same variance, then scaled by one number.

    eigh(Cov(x)) = U diag(L) U^T,   phi = sqrt(mean(L)),   y = H U^T (x - mean) / phi,   x = phi U H^T y + mean

with an orthonormal Hadamard matrix H (Ranzinger et al., "PHI-S: Distribution Balancing for Label-Free Multi-Teacher
Distillation", 2024). All entries of H are +-1 / sqrt(C), so each channel of y holds an equal share of every eigenvalue:
variance 1, and distances between features are kept up to the factor phi.

A Hadamard matrix of order C > 2 needs C to be a multiple of 4. Here C = 2^k * m is built as the Kronecker product of
Sylvester's matrix (order 2^k) and Paley's first (m - 1 a prime, 3 modulo 4) or second (m / 2 - 1 a prime, 1 modulo 4):
768 = 64 * 12, 1152 = 32 * 36, 1280 = 64 * 20, 1408 = 32 * 44, 1664 = 16 * 104.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

ROWS = 8192
"""Converted to float64 at a time: 64 MiB at 1024 channels."""


class HadamardError(ValueError):
    """There is no Hadamard matrix of this order, or no construction for it here."""


def hadamard(order: int) -> Tensor:
    """An orthonormal Hadamard matrix, float64 [order, order], every entry +-1 / sqrt(order).

    Raises:
        HadamardError: no such matrix exists or can be built here.
    """
    matrix = torch.ones(1, 1, dtype=torch.float64)
    base = hadamard_base(order)
    if base > 1:
        matrix = _paley(base)
    sylvester = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    while len(matrix) < order:
        matrix = torch.kron(sylvester, matrix)
    return matrix / math.sqrt(order)


def hadamard_base(order: int) -> int:
    """The smallest m with order = 2^k * m for which Paley's constructions (or m = 1) give a matrix; as `hadamard`."""
    m = order
    while m > 1 and m % 2 == 0:
        m //= 2
    while 0 < m <= order:
        if m == 1 or _paley_prime(m):
            return m
        m *= 2
    raise HadamardError(
        f"PHI-S needs a Hadamard matrix of as many rows as the features have channels; for {order} none "
        + ("is built here" if order % 4 == 0 else "exists (above 2 it must be a multiple of 4)")
    )


def _paley_prime(order: int) -> int:
    """The prime of Paley's first or second construction of this order, 0 if neither gives one."""
    first, second = order - 1, order // 2 - 1
    if first % 4 == 3 and _is_prime(first):
        return first
    return second if order % 4 == 0 and second % 4 == 1 and _is_prime(second) else 0


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % divisor for divisor in range(2, math.isqrt(n) + 1))


def _paley(order: int) -> Tensor:
    """Paley's Hadamard matrix with entries +-1."""
    q = _paley_prime(order)
    index = torch.arange(q)
    character = -torch.ones(q, dtype=torch.float64)
    character[index.square() % q] = 1.0
    character[0] = 0.0
    conference = torch.ones(q + 1, q + 1, dtype=torch.float64)
    conference[0, 0] = 0.0
    conference[1:, 1:] = character[(index[:, None] - index) % q]
    if order == q + 1:  # skew
        conference[1:, 0] = -1.0
        return conference + torch.eye(order, dtype=torch.float64)
    plus = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    diagonal = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    return torch.kron(conference, plus) + torch.kron(torch.eye(q + 1, dtype=torch.float64), diagonal)


class SecondMoments:
    """Sums over rows from which mean and covariance follow, float64: they lose nothing to a mean far from zero.

    Args:
        channels: C of the features.
        device: of the features.
        shift: float64 [C], subtracted from every row.
    """

    def __init__(self, channels: int, device: torch.device, shift: Tensor | None = None) -> None:
        self.channels, self.shift = channels, shift
        self.sums = torch.zeros(1 + channels + channels**2, dtype=torch.float64, device=device)
        """count, sum [C], sum of outer products [C, C]; sums of ranks add."""

    def add(self, x: Tensor, valid: Tensor | None = None) -> None:
        """Takes features [..., C] in, any number of rows: those where `valid` [...], bool, is true."""
        count, total, products = self.parts()
        count += x.numel() // self.channels if valid is None else valid.sum()
        chunks = x.reshape(-1, self.channels).split(ROWS)
        masks = [None] * len(chunks) if valid is None else valid.reshape(-1, 1).split(ROWS)
        for rows, mask in zip(chunks, masks, strict=True):
            rows = rows.double()
            if self.shift is not None:
                rows = rows - self.shift
            if mask is not None:
                rows = rows.where(mask, 0.0)
            total += rows.sum(0)
            products.addmm_(rows.T, rows)

    def mean_and_covariance(self) -> tuple[Tensor, Tensor]:
        """Mean [C] and unbiased covariance [C, C], float64."""
        count, total, products = self.parts()
        mean = total / count
        return mean, (products - count * mean.outer(mean)) / (count - 1).clamp_min(1)

    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """Views of `sums`: count [1], sum [C], sum of outer products [C, C]."""
        count, total, products = self.sums.split([1, self.channels, self.channels**2])
        return count, total, products.view(self.channels, self.channels)


def phi_s(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """The rotation H U^T [C, C] and phi, a scalar, of a covariance [C, C], in float64.

    Raises:
        HadamardError: there is no Hadamard matrix for C.
    """
    covariance = covariance.double()
    eigenvalues, vectors = torch.linalg.eigh(covariance)
    # an eigenvector's sign is arbitrary: its largest entry is made positive, so that the choice is no library's
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    vectors = vectors * largest.sign()
    rotation = hadamard(len(covariance)).to(covariance.device) @ vectors.T
    return rotation, eigenvalues.mean().clamp_min(0).sqrt()
