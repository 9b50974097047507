"""Runs whose loss and standardization have running statistics: resumed, skipped steps, ranks, stages."""

from __future__ import annotations

import re
import shutil

import pytest
import torch
from safetensors.torch import load_file

import dune_fast
from dune_fast.engine import checkpoints
from dune_fast.engine.config import ConfigError, compose_config
from dune_fast.engine.metrics import read_metrics
from dune_fast.engine.trainer import Trainer
from dune_fast.evaluate.in_run import InRunEvaluation
from dune_fast.evaluate.run import evaluate_run
from dune_fast.teachers.run_files import STATE_FILE
from tests.engine.conftest import build, run_ranks, same_weights, timeless, train

RADIO = (
    "objective.cls={cosine: 0.2, smooth_l1: 0.0, angle: 1.0, tangent_sphere: 0.5}", "objective.tangent_samples=20",
    "objective.patch={cosine: 0.0, smooth_l1: 0.0, mse: 1.0}", "objective.tokens=sum",
    "+objective.weights.two.patch=2.0", "objective.drop_probability=0",
    "standardization.cls=none", "standardization.patch=phi_s_running", "standardization.phi_s_period=2",
)  # fmt: skip


@pytest.fixture
def radio(overrides) -> list[str]:
    """A run whose sphere settles in its third step, and whose rotations change in the first, third and fifth."""
    return [*overrides, *RADIO]


def test_a_resumed_run_ends_bit_identical_and_its_model_is_read(radio, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    cfg = compose_config([*radio, f"output_dir={whole}", "evaluation.every=3"])
    with InRunEvaluation(cfg) as evaluation:
        Trainer(cfg, evaluation).run()
    shutil.copytree(whole, parts)
    shutil.rmtree(parts / "checkpoints" / checkpoints.tag(6))
    again = build(radio, f"output_dir={parts}", "evaluation.every=3")
    assert again.step == 3 and again.task.states.one["tangent_sphere"].count == 24
    again.run()
    assert same_weights(parts, whole)
    records = [[record for record in timeless(run) if "loss" in record] for run in (parts, whole)]
    assert records[0][-3:] == records[1][-3:]
    assert {"loss/one/cls/angle", "loss/one/cls/tangent_sphere", "loss/two/patch/mse"} <= records[1][-1].keys()
    held_out = [record["held_out/one"] for record in timeless(whole) if "held_out/one" in record]
    assert len(held_out) == 2 and held_out[1] < held_out[0] < 20

    assert evaluate_run(whole, figures=False)["after"]["two"]["patch"] > 0
    model, images = dune_fast.load_model(whole), torch.randn(1, 3, 56, 56)
    own, standardized = model.projections(images, standardized=False), model.projections(images)
    assert torch.equal(own["one"]["cls"], standardized["one"]["cls"])
    back = model.statistics.rotated(own)["two"]["patch"]
    torch.testing.assert_close(back, standardized["two"]["patch"], rtol=1e-3, atol=1e-3)


def test_a_skipped_step_gives_all_statistics_back(radio):
    def spoil(trainer, batch) -> None:
        trainer.spoiled = getattr(trainer, "spoiled", {})
        if trainer.step == 2:
            trainer.spoiled["before"] = [x.clone() for x in trainer.task.live()]
            batch.images[0, 0, 0, 0] = torch.nan
        if trainer.step == 3:
            trainer.spoiled["after"] = [x.clone() for x in trainer.task.live()]

    trainer = train(radio, before_step=spoil)
    before, after = trainer.spoiled["before"], trainer.spoiled["after"]
    assert len(before) > 15 and all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
    assert trainer.task.states.one["tangent_sphere"].count == 24  # settled one step later
    assert all(x.isfinite().all() for x in trainer.task.live())


@pytest.mark.slow  # two processes: the ranks of each statistic are tested as threads
def test_two_ranks_train_as_one(radio, tmp_path):
    common = [*radio, "evaluation.held_out=false", "train.steps=4", "train.checkpoint_every=4"]
    train(common, f"output_dir={tmp_path / 'alone'}")
    run_ranks(2, "dune_fast/train.py", *common, f"output_dir={tmp_path / 'two'}")
    folders = (tmp_path / name / "checkpoints" / checkpoints.tag(4) for name in ("alone", "two"))
    alone, two = (load_file(folder / STATE_FILE) for folder in folders)
    compared = [name for name in alone if re.search("angle|tangent|count|alpha|total", name)]
    assert len(compared) > 10
    for name in compared:
        torch.testing.assert_close(two[name], alone[name], rtol=1e-4, atol=1e-5, msg=name)
    for one, both in zip(*(read_metrics(tmp_path / name / "metrics.jsonl") for name in ("alone", "two")), strict=True):
        for key in ("loss/one/cls/angle", "loss/one/cls/tangent_sphere", "loss/two"):
            assert both[key] == pytest.approx(one[key], rel=1e-3)


def test_a_stage_begins_with_statistics_of_its_own(radio, tmp_path):
    smaller = "progressive=[{until: 0.5, image_size: 28}]"
    trainer = train(radio, smaller, "teachers.two.grid_multiple=1", f"output_dir={tmp_path / 'run'}")
    patches = trainer.task.statistics.one.normalizers["patch"]
    assert patches.steps == 3 and patches.count == 3 * 8 * 16  # of the second stage's 56 px alone


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("+objective.weights.three.cls=1.0", "objective.weights.three is of no teacher of this run"),
        ("+objective.weights.two.cls=1.0", "objective.weights.two.cls: the teacher has patch tokens"),
        ("++objective.weights.two.patch=-1.0", "it must be at least 0"),
        ("standardization.cls=phi", "standardization.cls='phi'; choose one of dune, unic"),
        ("standardization.patch=fixed", "without cache.folder"),
        ("teachers.two.num_features=92", "teacher 'two'.*for 92 none is built here"),
        ("start.fit_projectors=true", "its statistics begin with the training"),
        ("objective.patch.mse=-1", "objective.patch.mse=-1"),
        ("objective.align=both", "objective.align is 'both'"),
        ("objective.weights={one: {cls: 1.0}}", r"added with a plus in front: \+objective.weights.TEACHER"),
    ],
)
def test_what_a_run_cannot_have_is_refused(radio, change, message):
    with pytest.raises(ConfigError, match=message):
        compose_config([*radio, change])
