"""A rank's batch in parts: every image once, the same running statistics, metrics that are means."""

from __future__ import annotations

import dataclasses
import logging
import shutil

import numpy as np
import pytest
import torch

from dune_fast.dali_pipelines.loader import Batch
from dune_fast.dali_pipelines.order import rank_slots
from dune_fast.distill.step import PerImage, StepOutput
from dune_fast.engine import trainer
from dune_fast.engine.accumulation import all_ranks, merge, part_momentum, split
from dune_fast.engine.config import compose_config, load_config
from dune_fast.engine.memory import SPARE, fit, image_bytes
from dune_fast.engine.metrics import read_metrics
from tests.engine.conftest import build, train


def batch_of(size: int) -> Batch:
    index = torch.arange(size)
    paths = [str(i) for i in range(size)]
    return Batch(torch.randn(size, 3, 2, 2), index, index + 10, index + 20, paths, 4, np.arange(size))


def test_parts_have_every_image_once_and_are_merged_in_order():
    batch = batch_of(6)
    parts = split(batch, 3)
    assert [part.paths for part in parts] == [["0", "3"], ["1", "4"], ["2", "5"]]
    for name in ("images", "positions", "group", "dataset"):
        assert torch.equal(torch.stack([getattr(part, name) for part in parts], 1).flatten(0, 1), getattr(batch, name))
    assert all(part.step == 4 and len(part) == 2 and part.images.is_contiguous() for part in parts)
    assert parts[2].group_on_host.tolist() == [2, 5]
    outputs = [StepOutput(torch.ones(()), {}, PerImage(p.positions[None], p.positions[None] > 11)) for p in parts]
    _, images = merge(outputs, len(outputs))
    assert torch.equal(images.losses[0], batch.positions) and torch.equal(images.finite[0], batch.positions > 11)


def test_a_part_over_all_ranks_is_the_same_for_any_number_of_ranks():
    """Its statistics are taken together: a run that goes on with other ranks would not be the same otherwise."""
    whole, found = batch_of(16), {}
    for ranks in (1, 2, 4):
        shares = [whole.positions[rank_slots(16, rank, ranks)] for rank in range(ranks)]
        batches = [dataclasses.replace(batch_of(16 // ranks), positions=share) for share in shares]
        parts = zip(*(split(batch, 2) for batch in batches), strict=True)
        found[ranks] = [sorted(torch.cat([rank.positions for rank in part]).tolist()) for part in parts]
    assert found[1] == found[2] == found[4]


@pytest.mark.parametrize("momentum", [1.0, 0.3, 0.001, 0.0])
def test_the_past_keeps_its_share_over_all_parts(momentum):
    assert part_momentum(momentum, 1) == momentum
    assert (1 - part_momentum(momentum, 4)) ** 4 == pytest.approx(1 - momentum)


def test_a_run_in_parts_is_the_whole_but_for_the_statistics(overrides, tmp_path):
    """Those of PHI-S are frozen before the first step: then everything is the same."""
    records = {}
    for accumulation in (1, 2):
        out = tmp_path / str(accumulation)
        more = [f"train.accumulation={accumulation}", f"output_dir={out}", "objective.drop_probability=0"]
        train(overrides, *more, "standardization.convention=phi_s", "standardization.phi_s_batches=2")
        records[accumulation] = read_metrics(out / "metrics.jsonl")
    for whole, parts in zip(records[1], records[2], strict=True):
        for name in ("loss", "loss/one", "gradient_norm/global"):
            assert parts[name] == pytest.approx(whole[name], rel=1e-4)
        assert parts["lr"] == whole["lr"] and parts["images"] == whole["images"]


def test_a_batch_that_cannot_be_split_is_explained(overrides):
    with pytest.raises(ValueError, match=r"8 is not a multiple of the 1 processes x train.accumulation=3; .* 9"):
        build(overrides, "train.accumulation=3")


def test_parts_that_are_worked_out_stay_when_the_run_goes_on(overrides, tmp_path, monkeypatch, caplog):
    """Another machine has another memory; what is computed must not depend on it."""
    caplog.set_level(logging.INFO, "dune_fast")
    cfg = compose_config([*overrides, "train.accumulation=0"])
    each = image_bytes(cfg, low_precision=False)
    fixed = fit(cfg, 1, 0, False, 8).needed - each
    enough_for_five = int((fixed + 5 * each) / (1 - SPARE))
    monkeypatch.setattr(trainer, "smallest_memory", lambda device: enough_for_five)
    run = build(overrides, "train.accumulation=0")
    assert run.cfg.train.accumulation == 2 and run.fit.fits
    assert load_config(tmp_path / "run" / "config.yaml").train.accumulation == 2
    run.run()
    assert "8 images a step on 1 process, in 2 parts of 4: estimated" in caplog.text
    assert "the run may end for want of it" not in caplog.text
    losses = [record["loss"] for record in read_metrics(tmp_path / "run" / "metrics.jsonl")]

    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_0000006")
    for memory, fits in ((2**40, True), (1, False)):
        monkeypatch.setattr(trainer, "smallest_memory", lambda device, memory=memory: memory)
        resumed = build(overrides, "train.accumulation=0")
        assert resumed.step == 3 and resumed.cfg.train.accumulation == 2 and resumed.fit.fits == fits
    resumed.run()
    assert "the run may end for want of it" in caplog.text
    assert [record["loss"] for record in read_metrics(tmp_path / "run" / "metrics.jsonl")] == losses
    with pytest.raises(ValueError, match="train.accumulation: 2 -> 1"):
        build(overrides, "train.accumulation=1")


@pytest.mark.parametrize("dim", [0, -1])
def test_ranks_with_unequal_numbers_of_images_are_gathered_in_order(monkeypatch, dim):
    """Regression: all_gather takes equal shapes, and partitions by ranks have others on every rank."""
    every = [torch.arange(n * 2).view(n, 2).movedim(0, dim) + 100 * n for n in (3, 1)]
    longest = [torch.cat([x.movedim(dim, 0), torch.zeros(3 - x.shape[dim], 2, dtype=x.dtype)]) for x in every]

    def gather(parts, x):
        known = [torch.tensor([3]), torch.tensor([1])] if x.shape == (1,) else longest
        assert x.is_contiguous() and torch.equal(x, known[0])
        for part, found in zip(parts, known, strict=True):
            part.copy_(found)

    monkeypatch.setattr("torch.distributed.all_gather", gather)
    assert torch.equal(all_ranks(every[0], 2, dim), torch.cat(every, dim))
