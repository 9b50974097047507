"""A run that has not ended and a checkpoint's folder serve wherever a finished run does."""

from __future__ import annotations

import json
import logging
import shutil

import pytest
import torch

import dune_fast
from dune_fast.engine.checkpoints import load_run
from dune_fast.evaluate.run import evaluate_run
from dune_fast.export.run import export
from dune_fast.load import ModelNotFoundError
from dune_fast.teachers.config import TeacherConfig
from dune_fast.teachers.containers import TeacherWeightsError
from dune_fast.teachers.ensemble import TeacherEnsemble
from dune_fast.teachers.verify import inspect_file

IMAGES = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def unfinished(finished):
    """Without what the end of a run writes; its newest checkpoint has the same weights."""
    whole = shutil.copytree(finished, finished.with_name("whole"))
    for name in ("encoder.safetensors", "student.safetensors"):
        (finished / name).unlink()
    return finished, whole


def test_encoder_and_model_are_those_of_the_newest_checkpoint(unfinished, caplog):
    run, whole = unfinished
    ours, theirs = dune_fast.load_encoder(run), dune_fast.load_encoder(whole)
    assert "has not ended: the weights are those of its newest checkpoint, step_0000006" in caplog.text
    assert ours.cfg == theirs.cfg and torch.equal(ours(IMAGES)["x_prenorm"], theirs(IMAGES)["x_prenorm"])
    for folder in (run, run / "checkpoints" / "step_0000006"):
        one, other = dune_fast.load_model(folder), dune_fast.load_model(whole)
        assert one.state_dict().keys() == other.state_dict().keys()
        assert all(torch.equal(value, other.state_dict()[key]) for key, value in one.state_dict().items())
    earlier = dune_fast.load_encoder(run / "checkpoints" / "step_0000003")
    assert not torch.equal(earlier(IMAGES)["x_prenorm"], ours(IMAGES)["x_prenorm"])


def test_export(unfinished, tmp_path):
    run, whole = unfinished
    files = [export(folder, "safetensors").files[0] for folder in (run, whole, run / "checkpoints" / "step_0000003")]
    assert files[0].read_bytes() == files[1].read_bytes() != files[2].read_bytes()
    assert files[2].parent == run / "export" / "step_0000003" / "safetensors"  # not where it would be pruned


def test_evaluate(unfinished):
    run, whole = unfinished
    checkpoint = run / "checkpoints" / "step_0000006"
    found = [evaluate_run(folder, figures=False, device=torch.device("cpu")) for folder in (run, checkpoint, whole)]
    assert found[0] == found[1] == found[2]
    assert json.loads((run / "held_out.json").read_text())["after"] == found[0]["after"]


def test_a_teacher_and_verify(unfinished, caplog):
    run, whole = unfinished
    caplog.set_level(logging.ERROR)
    outputs = [
        TeacherEnsemble({"a": TeacherConfig(family="dune", weights=str(folder), num_features=48)}, 14)(IMAGES)["a"]
        for folder in (run, whole, run / "checkpoints" / "step_0000006")
    ]
    assert torch.equal(outputs[0]["patch"], outputs[1]["patch"]) and torch.equal(outputs[2]["cls"], outputs[1]["cls"])
    report = inspect_file(run)
    assert report.family == "dune" and report.sound and report.architecture.embed_dim == 48


def test_damage_and_absence_are_named(unfinished):
    run, _ = unfinished
    for step in (3, 6):
        path = run / "checkpoints" / f"step_000000{step}" / "rank_00000.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(TeacherWeightsError, match="the checksum|bytes instead of"):
        dune_fast.load_encoder(run / "checkpoints" / "step_0000003")
    with pytest.raises(ModelNotFoundError, match="none of the checkpoints in"):
        dune_fast.load_encoder(run)
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(ModelNotFoundError, match="the run has not ended, and there is no checkpoint of it yet"):
        dune_fast.load_encoder(run)
    with pytest.raises(TeacherWeightsError, match="there is no checkpoint of it yet"):
        load_run(run)
