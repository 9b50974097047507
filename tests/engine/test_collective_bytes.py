"""How many bytes ranks exchange for the teachers' statistics, counted at the one all-reduce that carries them."""

from __future__ import annotations

import torch

from dune_fast.distill.standardization import TeacherStatistics
from dune_fast.engine.config import compose_config


def exchanged(images: int, patches: int) -> list[int]:
    """Bytes of every all-reduce of one update of DUNE's statistics."""
    cfg = compose_config(["experiment=dune_336"])
    statistics = TeacherStatistics(cfg.teacher_features)
    shapes = {"cls": (images,), "patch": (images, patches)}
    features = {
        name: {token: torch.randn(*shapes[token], channels) for token in tokens}
        for name, (channels, tokens) in cfg.teacher_features.items()
    }
    calls: list[int] = []
    statistics.update(features, 0.5, lambda packed: calls.append(packed.numel() * packed.element_size()))
    return calls


def test_dunes_four_statistics_take_one_small_all_reduce_whatever_the_batch():
    """Two float64 numbers for each of 4 x 1024 channels and a count: 64 KiB, where gathered features are gigabytes."""
    assert exchanged(2, 4) == exchanged(3, 9) == [4 * (2 * 1024 + 1) * 8]
    gathered = 8 * 128 * (3 * 576 + 1) * 1024 * 4  # 8 GPUs, 128 images each, at 336 px, float32
    assert gathered / 2**30 > 6.7 and sum(exchanged(2, 4)) < gathered / 100_000
