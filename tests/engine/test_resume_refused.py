"""A run does not go on as another one: changed configurations, images, students, a folder that is in use."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import subprocess
import sys

import pytest

from dune_fast.engine import checkpoints
from dune_fast.engine.config import ConfigError, load_config
from dune_fast.engine.config_identity import changes
from dune_fast.engine.run_folder import LOCK
from dune_fast.teachers.run_files import CheckpointError, Manifest
from tests.engine.conftest import build


def test_a_changed_configuration_is_named_field_by_field_and_refused(overrides, finished, caplog):
    changed = [
        "optimizer.weight_decay=0.1", "train.seed=3", "+teachers@teachers.three=conv_patchify",
        "teachers.three.weights=random:1", "train.log_every=2", "deepspeed=zero1", "data.num_threads=2",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="the configuration has changed") as caught:
        build(overrides, *changed)
    text = str(caught.value)
    assert "optimizer.weight_decay: 0.03 -> 0.1" in text and "train.seed: 0 -> 3" in text
    assert 'teachers.three.weights: (none) -> "random:1"' in text and "train.allow_config_change=true" in text
    assert not any(free in text for free in ("log_every", "zero_stage", "num_threads"))
    with caplog.at_level(logging.WARNING):
        trainer = build(overrides, "train.seed=3", "train.allow_config_change=true")
    assert trainer.step == 6 and "train.seed: 0 -> 3" in caplog.text


def test_a_checkpoint_of_an_older_version_lacks_new_fields(finished):
    cfg = load_config(finished / "config.yaml")
    manifest = finished / "checkpoints" / "step_0000006" / "manifest.json"
    saved, older, other = (json.loads(manifest.read_text())["config"] for _ in range(3))
    assert changes(saved, cfg) == []
    del older["optimizer"]["clip_global"], older["logging"], older["teachers"]["one"]["grid_multiple"]
    older["teachers"]["one"]["cuda_graph"] = False  # a field that is gone and did nothing there
    assert changes(older, cfg) == []
    other["optimizer"]["gone"] = 1
    assert changes(other, cfg) == ["optimizer.gone: 1 -> (none)"]


def test_a_removed_field_is_dropped_where_it_did_nothing(finished):
    path = finished / "config.yaml"
    cfg, text = load_config(path), path.read_text()
    path.write_text(text.replace("    precision: auto\n", "    precision: auto\n    cuda_graph: false\n"))
    assert "cuda_graph" in path.read_text() and load_config(path) == cfg
    path.write_text(path.read_text().replace("cuda_graph: false", "cuda_graph: true"))
    with pytest.raises(ConfigError, match="teachers.one.cuda_graph is true, but CUDA graphs of teachers are gone"):
        load_config(path)


def test_other_numbers_of_images_are_refused(overrides, finished, caplog):
    """Every further step would be of other images than without the interruption."""
    checkpoint = finished / "checkpoints" / "step_0000006"
    manifest = Manifest.read(checkpoint)
    assert manifest.run["images"] == {"images": 20}
    more = dataclasses.replace(manifest, run=manifest.run | {"images": {"images": 21}})
    (checkpoint / "manifest.json").write_text(more.to_json())
    with pytest.raises(ConfigError, match="the number of images has changed .*: images: 21 -> 20.*allow_config_change"):
        build(overrides)
    with caplog.at_level(logging.WARNING):
        trainer = build(overrides, "train.allow_config_change=true")
    assert trainer.step == 6 and "images: 21 -> 20" in caplog.text


def test_statistics_of_another_convention_are_refused(overrides, finished):
    with pytest.raises(CheckpointError, match="another standardization.convention: take that change back"):
        build(overrides, "standardization.convention=phi_s", "train.allow_config_change=true")


def test_a_folder_in_use_is_refused(overrides, finished):
    """By another process; what that one holds is free again when it has ended, however it ends."""
    hold = "import fcntl, os, sys; file = open(sys.argv[1], 'w'); fcntl.lockf(file, fcntl.LOCK_EX); "
    hold += "file.write(f'process {os.getpid()}'); file.flush(); print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(finished / LOCK)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:  # fmt: skip
        try:
            assert other.stdout.readline() == "held\n"
            with pytest.raises(ValueError, match=f"in use by another training .process {other.pid}.: .*another name="):
                build(overrides, "train.overwrite=true")
            assert checkpoints.complete_steps(finished) == [3, 6]
        finally:
            other.kill()
    assert build(overrides).step == 6
    try_it = "import fcntl, sys; file = open(sys.argv[1], 'r+'); print(file.read()); "
    try_it += "fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)"
    tried = subprocess.run([sys.executable, "-c", try_it, str(finished / LOCK)], capture_output=True, text=True)
    assert tried.stdout.startswith(f"process {os.getpid()} on ") and "BlockingIOError" in tried.stderr


def test_a_checkpoint_of_another_student_is_refused(overrides, finished):
    with pytest.raises(ValueError, match="student.embed_dim: 48 -> 24"):
        build(overrides, "student.embed_dim=24")
    with pytest.raises(CheckpointError, match=r"another student: .* parameters have other shapes .*\[48\] -> \[24\]"):
        build(overrides, "student.embed_dim=24", "train.allow_config_change=true")
