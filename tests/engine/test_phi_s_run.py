"""Runs with PHI-S: estimated before the first step, the same for any number of ranks, kept by checkpoint and export."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import dune_fast
from dune_fast.engine import checkpoints
from dune_fast.engine.config import ConfigError, compose_config
from dune_fast.engine.metrics import read_metrics
from dune_fast.evaluate.run import evaluate_run
from dune_fast.export.check import ExportError
from dune_fast.export.run import export
from dune_fast.kernels.distill_loss import standardize
from tests.engine.conftest import build, run_ranks, same_weights, train


@pytest.fixture
def phi_s(overrides) -> list[str]:
    return [*overrides, "standardization.convention=phi_s", "standardization.phi_s_batches=2"]


def statistics_of(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for k, v in load_file(folder / "student.safetensors").items() if k.startswith("teacher_norms.")}


def test_the_first_batches_have_mean_0_and_variance_1(phi_s):
    trainer = build(phi_s)
    batches = trainer.task.loader.batches(0)
    rows: dict[tuple[str, str], list] = {}
    standardizers = trainer.task.statistics.running()
    for _ in range(2):
        features = trainer.task.statistics.rotated(trainer.task.teachers(next(batches).images))
        for name, tokens in features.items():
            for token, x in tokens.items():
                y = standardize(x, *standardizers[name][token])
                rows.setdefault((name, token), []).append(y.double().flatten(0, -2))
    trainer.task.loader.close()
    assert rows.keys() == {("one", "cls"), ("one", "patch"), ("two", "patch")}
    for y in map(torch.cat, rows.values()):
        assert y.mean(0).abs().max() < 1e-4
        torch.testing.assert_close(y.var(0), torch.ones_like(y[0]), rtol=1e-3, atol=0)


def test_a_resumed_run_keeps_its_statistics_and_ends_bit_identical(phi_s, tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(phi_s, f"output_dir={whole}")
    shutil.copytree(whole, parts)
    shutil.rmtree(parts / "checkpoints" / checkpoints.tag(6))
    again = "dune_fast.engine.distillation.look_ahead"
    monkeypatch.setattr(again, lambda *_: pytest.fail("a resumed run estimated again"))
    again = build(phi_s, f"output_dir={parts}")
    assert again.step == 3
    again.run()
    assert same_weights(parts, whole)

    cosines = evaluate_run(whole, figures=False)
    assert cosines["after"]["one"]["patch"] > cosines["before"]["one"]["patch"]
    model = dune_fast.load_model(whole)
    images = torch.randn(1, 3, 56, 56)
    own, standardized = model.projections(images, standardized=False), model.projections(images)
    back = model.statistics.rotated(own)["two"]["patch"]
    torch.testing.assert_close(
        standardize(back, *model.statistics.running()["two"]["patch"]), standardized["two"]["patch"]
    )
    with pytest.raises(ExportError, match="needs features standardized per channel"):
        export(whole, "dune", tmp_path / "out")


def test_two_ranks_train_as_one(phi_s, tmp_path):
    common = [*phi_s, "objective.drop_probability=0", "evaluation.held_out=false", "train.steps=2"]
    train(common, f"output_dir={tmp_path / 'alone'}")
    run_ranks(2, "dune_fast/train.py", *common, f"output_dir={tmp_path / 'two'}")
    alone, two = statistics_of(tmp_path / "alone"), statistics_of(tmp_path / "two")
    assert "teacher_norms.one.normalizers.cls.rotation" in alone
    for key, value in alone.items():
        if "cls" not in key:  # 16 cls rows in 24 channels leave a null space, where any basis is as good
            torch.testing.assert_close(two[key], value, rtol=1e-4, atol=1e-5, msg=key)
    for one, both in zip(*(read_metrics(tmp_path / name / "metrics.jsonl") for name in ("alone", "two")), strict=True):
        for key in ("loss/two", "loss/one/patch/total"):
            assert both[key] == pytest.approx(one[key], rel=1e-4)


def test_a_width_without_a_hadamard_matrix_is_refused_beforehand(phi_s):
    with pytest.raises(ConfigError, match="teacher 'one'.*for 92 none is built here; choose"):
        compose_config([*phi_s, "teachers.one.num_features=92"])
    with pytest.raises(ConfigError, match="phi_s_batches=0"):
        compose_config([*phi_s, "standardization.phi_s_batches=0"])
