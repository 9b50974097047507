"""Every recipe of a sibling system, made narrow by one rule, trains 20 steps: what its file says goes together."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from bench.toy.conv_patchify import toy_teacher
from dune_fast.dali_pipelines.datasets import DatasetConfig
from dune_fast.distill.stored_statistics import write_statistics
from dune_fast.engine.config import RunConfig, compose_config, validate
from dune_fast.engine.metrics import read_metrics
from dune_fast.engine.trainer import Trainer
from dune_fast.teachers.config import TeacherConfig

RECIPES = (
    "am_radio", "phi_s", "radio_v25", "radio_v25_high", "c_radio_v4", "c_radio_v4_high", "theia", "theia_cddsv",
    "sak_b", "unic_l", "eupe_proxy", "eupe_student", "eupe_student_sizes",
)  # fmt: skip
WIDTH, DIM = 24, 48
"""Channels of a teacher and of the student."""


def smaller(size: int | None, patch: int, by: int) -> int | None:
    """A side of about so many times fewer patches, an even number, so that a window divides them."""
    return None if not size else patch * 2 * max(1, round(size / patch / by / 2))


def small_teacher(teacher, index: int, by: int):
    """A toy of the same patches, tokens, sizes and readings; SAK's have blocks."""
    patch = teacher.patch_size
    kept = {name: getattr(teacher, name) for name in ("source", "grid", "groups", "norm")}
    kept |= {"input_size": smaller(teacher.input_size, patch, by), "mosaic": smaller(teacher.mosaic, patch, by) or 0}
    kept |= {"input_sizes": sorted({smaller(size, patch, by) for size in teacher.input_sizes})}
    if teacher.layer is None:
        return toy_teacher(f"random:{index}", patch, WIDTH, teacher.token_types, **kept | {"norm": True})
    side = kept["input_size"] and 14 * (kept["input_size"] // patch)
    return TeacherConfig(
        family="dinov2", weights="random:0", num_features=192, image_size=56, token_types=teacher.token_types, layer=2,
        **kept | {"input_size": side},
    )  # fmt: skip


def small_recipe(name: str, photos, folder) -> RunConfig:
    """A recipe with a narrow student, toy teachers and small images."""
    cfg = compose_config([f"experiment={name}", "data=folder", "data.datasets.images.root=x"], complete=False)
    patch = cfg.student.patch_size
    layered = cfg.projector.kind == "sak"
    by = 1 if cfg.projector.kind == "theia" else 6  # its translators know 14 rows

    def small_sizes(entries):
        found = [replace(p, image_size=smaller(p.image_size, patch, by) or 0, image_sizes=sorted(
            {smaller(size, patch, by) for size in p.image_sizes})) for p in entries]  # fmt: skip
        return [replace(p, weights=[1.0] * len(p.image_sizes)) if p.weights else p for p in found]

    sizes, parts = small_sizes(cfg.progressive), [replace(p, images=2) for p in small_sizes(cfg.partitions)]
    side = smaller(cfg.image_size, patch, by)
    radio = replace(cfg.student.radio, cpe_max_size=2 * side if cfg.student.radio.cpe_max_size else 0,
                    num_global=1, window_sizes=[2] if cfg.student.radio.window_sizes else [])  # fmt: skip
    radio = radio if cfg.student.family == "radio" else cfg.student.radio
    heads = {f"{t}_head": replace(getattr(cfg.projector, f"{t}_head"), hidden_dim=32) for t in ("cls", "patch")}
    small = replace(
        cfg, output_dir=str(folder / "run"), image_size=side, progressive=sizes, partitions=parts, partition_by="steps",
        student=replace(cfg.student, image_size=side, embed_dim=DIM, depth=12 if layered else 2, num_heads=3,
                        mlp_ratio=2.0, radio=radio),
        projector=replace(cfg.projector, hidden_dim=32, last_hidden_dim=32, **heads),
        teachers={n: small_teacher(t, i, by) for i, (n, t) in enumerate(cfg.teachers.items())}, student_weights="",
        data=replace(cfg.data, datasets={"images": DatasetConfig(root=str(photos), group="generic")}, num_threads=1),
        train=replace(cfg.train, steps=20, global_batch=4, accumulation=1, log_every=1, precision="fp32",
                      drift_images=0, checkpoint_every=20),
        # LAMB's is a share of the weights
        optimizer=replace(cfg.optimizer, lr=0.01 if cfg.optimizer.name == "lamb" else 0.003,
                          frozen_trunk_steps=min(3, cfg.optimizer.frozen_trunk_steps)),
        evaluation=replace(cfg.evaluation, held_out=False), logging=replace(cfg.logging, tensorboard=False),
        deepspeed=replace(cfg.deepspeed, zero_stage=0),
    )  # fmt: skip
    if small.standardization.file:
        file = folder / "statistics.safetensors"
        write_statistics(file, {
            n: {token: (torch.zeros(WIDTH), torch.ones(WIDTH)) for token in t.token_types}
            for n, t in small.teachers.items()
        })  # fmt: skip
        small = replace(small, standardization=replace(small.standardization, file=str(file)))
    validate(small)
    return small


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_trains_in_small(name, photos, tmp_path):
    Trainer(small_recipe(name, photos, tmp_path)).run()
    losses = [record["loss"] for record in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in record]
    assert len(losses) == 20 and np.isfinite(losses).all()
    assert np.mean(losses[-5:]) < np.mean(losses[:5]), losses
