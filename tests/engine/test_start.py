"""Runs that compute their student's start before the first step."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import dune_fast
from dune_fast.engine import checkpoints
from dune_fast.engine.config import ConfigError, compose_config
from dune_fast.evaluate.live_report import LiveReport
from dune_fast.evaluate.run import evaluate_run
from dune_fast.teachers.containers import TeacherWeightsError
from tests.engine.conftest import build, run_ranks, same_weights, train


@pytest.fixture
def started(overrides) -> list[str]:
    """The small run beside a drawn ViT teacher that its student starts from."""
    vit = ["family=dinov2", "weights=random:0", "num_features=192", "image_size=56", "patch_size=14"]
    return [
        *overrides, "+teachers@teachers.vit=vits14_semantic", *(f"teachers.vit.{word}" for word in vit),
        "teachers.vit.layer=null", "student.embed_dim=64", "student.num_heads=1", "start.teacher=vit",
        "start.blocks=1", "start.images=12", "start.fit_projectors=true", "train.drift_images=0",
    ]  # fmt: skip


def start_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "start.safetensors")


def test_a_run_starts_from_what_it_keeps_and_resumes_without_computing_it_again(started, tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    trainer = build(started, f"output_dir={whole}")
    start = start_of(whole)
    for name, x in trainer.engine.module.state_dict().items():
        assert torch.equal(x, start[name]), name
    drawn = build(started, "start.teacher=", "start.fit_projectors=false", f"output_dir={tmp_path / 'no'}")
    before = {name: x.clone() for name, x in drawn.engine.module.state_dict().items()}
    changed = {name for name in start if not torch.equal(start[name], before[name])}
    assert {"encoder.patch_embed.proj.weight", "encoder.blocks.0.attn.qkv.weight"} <= changed
    assert {f"projectors.{name}.linear.weight" for name in ("one", "two", "vit")} <= changed
    assert not any(name.startswith(("encoder.blocks.1.", "projectors.one.blocks")) for name in changed)
    trainer.run()
    shutil.copytree(whole, parts)
    shutil.rmtree(parts / "checkpoints" / checkpoints.tag(6))
    monkeypatch.setattr("dune_fast.engine.distillation.look_ahead", lambda *_: pytest.fail("computed again"))
    train(started, f"output_dir={parts}")
    assert same_weights(parts, whole)

    cosines = evaluate_run(whole, figures=False)
    assert cosines["before"]["two"]["patch"] > cosines["drawn"]["two"]["patch"] + 0.1
    LiveReport(whole).write(finished=True)
    assert "1 blocks out of teacher vit, projectors fitted" in (whole / "report.html").read_text()
    found = json.loads((whole / "held_out.json").read_text())["window_knn"]
    assert set(found) == {"drawn", "before", "after", "teacher one", "teacher vit"}
    assert all(0 <= share <= 1 for share in found.values())
    encoder = dune_fast.load_encoder(whole / "start.safetensors")
    assert torch.equal(encoder.cls_token.cpu(), start["encoder.cls_token"])
    (whole / "start.safetensors").unlink()
    with pytest.raises(TeacherWeightsError, match="start.safetensors, what the run has started from, is missing"):
        evaluate_run(whole, figures=False)


def test_two_ranks_start_as_one(started, tmp_path):
    common = [*started, "evaluation.held_out=false", "train.steps=2"]
    build(common, f"output_dir={tmp_path / 'alone'}")
    run_ranks(2, "dune_fast/train.py", *common, f"output_dir={tmp_path / 'two'}", "deepspeed=zero2")
    alone, two = start_of(tmp_path / "alone"), start_of(tmp_path / "two")
    for name, x in alone.items():
        torch.testing.assert_close(two[name], x, rtol=1e-3, atol=1e-3, msg=name)


def test_a_start_that_cannot_be_is_refused(started):
    for change, words in (
        ("start.teacher=nobody", "start.teacher='nobody' is not a teacher of this run; there are: one, two"),
        ("student_weights=elsewhere", "exclude each other"), ("start.images=1", "start.images=1; .* at least 2"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=words):
            compose_config([*started, change])
    with pytest.raises(ConfigError, match="start.teacher='two' is of family module, not a ViT of ours"):
        build(started, "start.teacher=two")
    with pytest.raises(ConfigError, match="cannot start from start.teacher='vit'.*which is more"):
        build(started, "student.embed_dim=256", "student.num_heads=4")
