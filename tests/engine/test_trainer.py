"""Whole small runs in this process: resume, divergence, broken input, results."""

from __future__ import annotations

import json
import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file

from dune_fast.engine import checkpoints
from dune_fast.engine.config import compose_config
from dune_fast.engine.metrics import read_metrics
from dune_fast.engine.trainer import DivergedError, Trainer
from dune_fast.evaluate.run import evaluate_run


def train(overrides: list[str], *more: str) -> Trainer:
    trainer = Trainer(compose_config([*overrides, *more]))
    trainer.run()
    return trainer


def timeless(path) -> list[dict]:
    clock = {"images_per_second", "step_seconds", "data_wait_share"}
    return [{k: v for k, v in record.items() if k not in clock} for record in read_metrics(path)]


def test_a_run_writes_what_it_promises(overrides, tmp_path):
    run = tmp_path / "run"
    train(overrides)
    assert {"config.yaml", "encoder.safetensors", "student.safetensors", "metrics.jsonl", "tensorboard"} <= {
        p.name for p in run.iterdir()
    }
    records = read_metrics(run / "metrics.jsonl")
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    expected = {
        "loss",
        "loss/one",
        "loss/two",
        "share/one",
        "loss/one/cls/cosine",
        "loss/two/patch/smooth_l1",
        "gradient_norm/max",
        "lr",
    }
    assert expected <= records[0].keys()
    assert records[0]["share/one"] + records[0]["share/two"] == pytest.approx(1)
    assert checkpoints.complete_steps(run) == [3, 6]
    assert not any(key.startswith("projectors") for key in load_file(run / "encoder.safetensors"))
    assert "teacher_norms.one.normalizers.cls.mean" in load_file(run / "student.safetensors")

    result = evaluate_run(run, figures=True)
    assert {"pca.png", "loss.png", "held_out.json"} <= {p.name for p in run.iterdir()}
    assert json.loads((run / "held_out.json").read_text())["images"] == 4
    assert result["after"]["one"]["patch"] > result["before"]["one"]["patch"]


@pytest.mark.parametrize("zero", ["zero0", "zero2"])
def test_a_resumed_run_is_bit_identical(overrides, tmp_path, zero):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(overrides, f"output_dir={whole}", f"deepspeed={zero}")
    cfg = compose_config([*overrides, f"output_dir={parts}", f"deepspeed={zero}"])
    first = Trainer(cfg)
    batches = first.loader.batches(0)
    while first.step < 3:
        first.train_step(next(batches))
    first._save()
    first.loader.close()
    second = Trainer(cfg)
    assert second.step == 3
    second.run()
    assert timeless(parts / "metrics.jsonl") == timeless(whole / "metrics.jsonl")[3:]
    ours, theirs = load_file(parts / "student.safetensors"), load_file(whole / "student.safetensors")
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_finished_run_is_not_trained_again(overrides, tmp_path):
    train(overrides)
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    trainer = train(overrides)
    assert trainer.step == 6 and (tmp_path / "run" / "metrics.jsonl").read_text() == before


def test_a_checkpoint_that_was_cut_short_is_passed_over(overrides, tmp_path):
    run = tmp_path / "run"
    train(overrides)
    (run / "checkpoints" / checkpoints.tag(6) / "complete").unlink()
    assert Trainer(compose_config(overrides)).step == 3


def test_overwrite_starts_anew_and_keeps_foreign_files(overrides, tmp_path):
    run = tmp_path / "run"
    train(overrides)
    (run / "notes.txt").write_text("mine")
    trainer = Trainer(compose_config([*overrides, "train.overwrite=true"]))
    assert trainer.step == 0 and checkpoints.complete_steps(run) == [] and (run / "notes.txt").exists()


def test_a_folder_with_a_run_is_not_touched_unasked(overrides):
    train(overrides)
    with pytest.raises(ValueError, match=r"train.resume=true.*train.overwrite=true"):
        Trainer(compose_config([*overrides, "train.resume=false"]))


def test_only_the_newest_checkpoints_are_kept(overrides, tmp_path):
    train(overrides, "train.checkpoint_every=1", "train.keep_checkpoints=2")
    assert checkpoints.complete_steps(tmp_path / "run") == [5, 6]


def test_an_exploding_loss_stops_the_run_and_keeps_the_last_good_checkpoint(overrides, tmp_path):
    with pytest.raises(DivergedError, match="last good checkpoint is step_") as caught:
        train(overrides, "optimizer.lr_per_256=1e9", "train.steps=40", "train.log_every=7", "train.checkpoint_every=1")
    kept = checkpoints.complete_steps(tmp_path / "run")
    assert kept and checkpoints.tag(kept[-1]) in str(caught.value)
    trainer = Trainer(compose_config([*overrides, "train.steps=40"]))
    assert trainer.step == kept[-1]
    assert all(torch.isfinite(p).all() for p in trainer.engine.module.parameters())


def test_a_nan_between_two_logging_steps_is_not_saved(overrides, tmp_path):
    trainer = Trainer(compose_config([*overrides, "train.log_every=100", "train.checkpoint_every=2"]))
    plain = trainer.train_step

    def poisoned(batch):
        if trainer.step == 2:
            batch.images[0, 0, 0, 0] = float("nan")
        return plain(batch)

    trainer.train_step = poisoned
    with pytest.raises(DivergedError, match="not a finite number"):
        trainer.run()
    assert checkpoints.complete_steps(tmp_path / "run") == [2]


def test_a_broken_image_is_skipped_counted_and_named(overrides, photos, tmp_path, caplog):
    folder = tmp_path / "some broken"
    shutil.copytree(photos, folder)
    (folder / "05.jpg").write_bytes((folder / "05.jpg").read_bytes()[:300])
    (folder / "07.jpg").write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        trainer = Trainer(
            compose_config([*overrides, f"data.datasets.images.root='{folder}'", "data.datasets.images.holdout=0"])
        )
        seen = []
        plain = trainer.train_step
        trainer.train_step = lambda batch: (seen.append(batch), plain(batch))[1]
        trainer.run()
    assert all(len(batch) == 8 for batch in seen)
    assert trainer.loader.broken == {"images": 2}
    assert "05.jpg" in caplog.text and "07.jpg" in caplog.text
    assert not any("05.jpg" in path or "07.jpg" in path for batch in seen for path in batch.paths)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("data.datasets.images.root=/nowhere/at/all", "/nowhere/at/all"),
        ("teachers.one.weights=/nowhere/weights.safetensors", "no weights file"),
        ("objective.sharing=none", "never gets an image"),
    ],
)
def test_wrong_input_is_explained(overrides, change, words):
    extra = ["teachers.two.groups=[human]"] if "sharing" in change else []
    with pytest.raises(ValueError, match=words):
        Trainer(compose_config([*overrides, change, *extra]))


def test_an_empty_image_folder_is_explained(overrides, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no file ends in .jpg"):
        Trainer(compose_config([*overrides, f"data.datasets.images.root={tmp_path / 'empty'}"]))


def test_damaged_teacher_weights_are_explained(overrides, tmp_path):
    (tmp_path / "weights.safetensors").write_bytes(b"\x10" * 100)
    with pytest.raises(ValueError, match="cannot be read"):
        Trainer(compose_config([*overrides, f"teachers.one.weights={tmp_path / 'weights.safetensors'}"]))
