"""Teachers' precision is looked at before the first step of a run, and by `dune-fast teachers drift`."""

from __future__ import annotations

import json
import logging

import pytest
from safetensors.torch import save_file

from bench.toy.conv_patchify import conv_patchify
from dune_fast.cli import main
from dune_fast.teachers.drift import DriftError
from tests.engine.conftest import train


@pytest.fixture
def coarse(overrides, tmp_path) -> list[str]:
    """The small run for one step, teacher "one" in bf16, which its features far from zero do not bear."""
    state = conv_patchify(14, 24).state_dict()
    state["lin.bias"] += 1000.0
    save_file(state, tmp_path / "far.safetensors")
    weights = [f"teachers.one.weights={tmp_path / 'far.safetensors'}", "teachers.one.precision=bf16"]
    return [*overrides, *weights, "train.steps=2"]


def test_a_run_with_a_precision_too_coarse_stops_before_its_first_step(coarse, tmp_path, caplog):
    with caplog.at_level(logging.INFO), pytest.raises(DriftError, match="set teachers.one.precision=fp32"):
        train(coarse)
    report = json.loads((tmp_path / "run" / "drift.json").read_text())
    assert [(entry["teacher"], entry["token"], entry["exceeds"]) for entry in report] == [
        ("one", "cls", True), ("one", "patch", True),
    ]  # fmt: skip
    assert "against float32 on 8 images" in caplog.text and "train.drift_images=0" in caplog.text
    assert not (tmp_path / "run" / "student.safetensors").exists()


def test_forced_it_trains_and_is_on_record(coarse, tmp_path):
    train(coarse, "teachers.one.force_precision=true")
    report = json.loads((tmp_path / "run" / "drift.json").read_text())
    assert all(entry["forced"] and entry["mean_cosine"] < 0.999 for entry in report)
    assert (tmp_path / "run" / "student.safetensors").exists()


def test_it_can_be_left_out(coarse, tmp_path):
    train(coarse, "train.drift_images=0")
    assert (tmp_path / "run" / "student.safetensors").exists() and not (tmp_path / "run" / "drift.json").exists()


def test_a_step_of_one_image_says_that_it_cannot_compare(coarse, caplog):
    with caplog.at_level(logging.WARNING):
        train(coarse, "train.global_batch=1")
    assert "takes 2 images and a step has 1" in caplog.text


def test_the_command_prints_the_report_and_fails_where_training_would(coarse, capsys):
    assert main(["teachers", "drift", *coarse]) == 2
    out, err = capsys.readouterr()
    rows = {tuple(line.split()[:2]): line.split() for line in out.splitlines()}
    assert rows["one", "patch"][2] == "bf16" and rows["one", "patch"][-1] == "refused"
    assert "in float32, so nothing to compare: two" in out
    assert "set teachers.one.precision=fp32" in " ".join(err.split())
    assert main(["teachers", "drift", *coarse, "teachers.one.force_precision=true"]) == 0
    assert "forced" in capsys.readouterr().out
    assert main(["teachers", "drift", "--images", "1", *coarse]) == 2
