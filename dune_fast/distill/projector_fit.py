"""The projectors' last layers in closed form: a ridge regression to the standardized teachers before the first step.

A drawn projector answers with noise, and the gradients that it sends back bend the encoder until it fits. For a student
that starts from good weights the fit saves them.

    W = (G + penalty * mean(diag G))^-1 X,   G = Cov(h),  X = Cov(h, y)

h: inputs of a last layer, y: standardized features. Where cls and patches share a layer, either counts half, as in the
loss.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from dune_fast.distill.normalizers import BATCH, Standardizer
from dune_fast.distill.phi_s import SecondMoments
from dune_fast.distill.standardization import Features, TeacherStatistics
from dune_fast.projectors.base import split_cls
from dune_fast.student import Student

PENALTY = 1e-2

Rows = Mapping[str, Tensor]
"""teacher -> indices of the images that count for it."""


@torch.no_grad()
def fit_projectors(
    student: Student, batches: Iterable[tuple[Tensor, Features, Rows]], statistics: TeacherStatistics
) -> dict[str, float]:
    """Sets the last linear layer of every projector; the ladder's other rungs start from outputs of 0.

    Args:
        student: its encoder and the layers before the last stay as they are.
        batches: ImageNet-normalised images [B, 3, H, W], the teachers' raw features of them, and the images that count
            for each teacher.
        statistics: whose convention standardizes; those of PHI-S and fixed ones are taken from it, those of the other
            conventions from these images.

    Returns:
        teacher -> share of its standardized features that is explained.
    """
    layers = {name: projector.last_layers() for name, projector in student.projectors.items()}
    moments: dict[tuple[str, str], SecondMoments] = {}
    for images, raw, rows in batches:
        features = statistics.rotated(raw)
        inputs = _inputs(student, images, layers)
        for name, tokens in features.items():
            for token, y in tokens.items():
                h = inputs[name][token][rows[name]].float()
                z = torch.cat([h, y[rows[name]].float()], -1)
                moments.setdefault((name, token), SecondMoments(z.shape[-1], z.device)).add(z)
    known, normalizers = statistics.running(), {(name, token): n for name, token, n in statistics.items()}
    explained = {}
    for name, of_token in layers.items():
        by_layer: dict[nn.Linear, list[str]] = {}
        for token in student.projectors.token_types[name]:
            by_layer.setdefault(of_token[token], []).append(token)
        shares = []
        for layer, tokens in by_layer.items():
            parts = []
            for token in tokens:
                mean, covariance = moments[name, token].mean_and_covariance()
                at = layer.in_features
                normalizer, own = normalizers[name, token], known[name][token]
                if normalizer.convention in BATCH:
                    own = Standardizer(mean[at:], 1 / normalizer.denominator(covariance.diagonal()[at:].sqrt()))
                parts.append((mean, covariance, own))
            shares.append(_solve(layer, parts))
        explained[name] = sum(shares) / len(shares)
    return explained


def _inputs(
    student: Student, images: Tensor, layers: Mapping[str, Mapping[str, nn.Linear]]
) -> dict[str, dict[str, Tensor]]:
    """teacher -> token type -> what enters the last layer, [B, C] or [B, N, C]."""
    caught: dict[nn.Module, Tensor] = {}

    def catch(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        caught[layer] = args[0].detach()

    hooks = [layer.register_forward_pre_hook(catch) for tokens in layers.values() for layer in set(tokens.values())]
    try:
        student(images)
    finally:
        for hook in hooks:
            hook.remove()
    inputs: dict[str, dict[str, Tensor]] = {}
    for name, tokens in layers.items():
        shared = len(set(tokens.values())) < len(tokens)  # then its input is [B, 1 + N, C]
        inputs[name] = {
            token: split_cls(caught[layer])[token] if shared else caught[layer] for token, layer in tokens.items()
        }
    return inputs


def _solve(layer: nn.Linear, parts: list[tuple[Tensor, Tensor, Standardizer]]) -> float:
    """Sets the layer from mean and covariance of (input, feature) of each of its token types; returns the share."""
    at, device = layer.in_features, layer.weight.device
    h, y, hh, hy, yy = [], [], [], [], []
    for mean, covariance, standardizer in parts:
        scale = standardizer.inv_std.double()
        h.append(mean[:at])
        y.append((mean[at:] - standardizer.mean.double()) * scale)
        hh.append(covariance[:at, :at] + h[-1].outer(h[-1]))
        hy.append(covariance[:at, at:] * scale + h[-1].outer(y[-1]))
        yy.append((covariance.diagonal()[at:] * scale.square() + y[-1].square()).sum())
    h_mean, y_mean = torch.stack(h).mean(0), torch.stack(y).mean(0)
    if layer.bias is None:  # then nothing takes the means away
        h_mean, y_mean = torch.zeros_like(h_mean), torch.zeros_like(y_mean)
    gram = torch.stack(hh).mean(0) - h_mean.outer(h_mean)
    cross = torch.stack(hy).mean(0) - h_mean.outer(y_mean)
    ridge = gram + PENALTY * gram.diagonal().mean() * torch.eye(at, dtype=gram.dtype, device=device)
    weight = torch.linalg.solve(ridge, cross)  # [at, C]
    layer.weight.copy_(weight.T)
    if layer.bias is not None:
        layer.bias.copy_(y_mean - h_mean @ weight)
    total = torch.stack(yy).mean() - y_mean.square().sum()
    return ((2 * (weight * cross).sum() - (weight * (gram @ weight)).sum()) / total).item()
