"""Whole small runs in this process: resume, divergence, broken input, routing, results."""

from __future__ import annotations

import json
import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file

from dune_fast.dali_pipelines.datasets import DatasetConfig
from dune_fast.engine import checkpoints
from dune_fast.engine.config import compose_config
from dune_fast.engine.metrics import read_metrics
from dune_fast.engine.trainer import DivergedError, Trainer
from dune_fast.evaluate.figures import loss_figure
from dune_fast.evaluate.run import evaluate_run
from tests.engine.conftest import build, full_disk, timeless, train


def test_a_run_writes_what_it_promises(overrides, tmp_path):
    run = tmp_path / "run"
    train(overrides, "logging.tensorboard=true")
    assert {"config.yaml", "encoder.safetensors", "student.safetensors", "metrics.jsonl", "tensorboard"} <= {
        p.name for p in run.iterdir()
    }
    records = read_metrics(run / "metrics.jsonl")
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    expected = {
        "loss", "loss/one", "loss/two", "share/one", "kept/one", "gradient_norm/global", "memory_gib",
        "loss/one/cls/cosine", "loss/two/patch/smooth_l1", "gradient_norm/max", "lr",
    }  # fmt: skip
    assert expected <= records[0].keys()
    assert records[0]["share/one"] + records[0]["share/two"] == pytest.approx(1)
    assert checkpoints.complete_steps(run) == [3, 6]
    assert not any(key.startswith("projectors") for key in load_file(run / "encoder.safetensors"))
    assert "teacher_norms.one.normalizers.cls.mean" in load_file(run / "student.safetensors")

    result = evaluate_run(run, figures=True)
    assert {"pca.png", "loss.png", "held_out.json"} <= {p.name for p in run.iterdir()}
    assert json.loads((run / "held_out.json").read_text())["images"] == 4
    assert result["after"]["one"]["patch"] > result["before"]["one"]["patch"]


def test_one_rank_shards_nothing_and_losses_are_the_same(overrides, trained_run, tmp_path):
    """Regression: under ZeRO 1 one rank copied all gradients and weights at every step."""
    sharded = train(overrides, "deepspeed=zero1", "train.accumulation=1")
    assert sharded.engine.zero_stage == 0
    assert timeless(tmp_path / "run") == timeless(trained_run)


def test_a_finished_run_is_not_trained_again(overrides, finished):
    before = (finished / "metrics.jsonl").read_text()
    trainer = train(overrides)
    assert trainer.step == 6 and (finished / "metrics.jsonl").read_text() == before


def test_overwrite_starts_anew_and_keeps_foreign_files(overrides, finished):
    run = finished
    for name in ("notes.txt", "drift.json", "nonfinite_step_3.safetensors"):
        (run / name).write_text("mine, or the earlier run's")
    trainer = build(overrides, "train.overwrite=true")
    assert trainer.step == 0 and checkpoints.complete_steps(run) == [] and (run / "notes.txt").exists()
    assert not (run / "drift.json").exists() and not list(run.glob("nonfinite*"))


def test_a_folder_with_a_run_is_not_touched_unasked(overrides, finished):
    with pytest.raises(ValueError, match=r"train.resume=true.*train.overwrite=true"):
        build(overrides, "train.resume=false")


def test_an_exploding_loss_stops_the_run_and_keeps_the_last_good_checkpoint(overrides, tmp_path):
    explosive = [*overrides, "optimizer.lr_per_256=10", "train.max_loss=2", "train.steps=40"]
    with pytest.raises(DivergedError, match="last good checkpoint is step_") as caught:
        train(explosive, "train.log_every=7", "train.checkpoint_every=1")
    kept = checkpoints.complete_steps(tmp_path / "run")
    assert kept and checkpoints.tag(kept[-1]) in str(caught.value)
    trainer = build(explosive)
    assert trainer.step == kept[-1]
    assert all(torch.isfinite(p).all() for p in trainer.engine.module.parameters())


def poisoned(steps: list[int], overrides: list[str], *more: str) -> Trainer:
    """A run in which an image of each of these steps has NaN."""

    def poison(trainer, batch):
        if trainer.step in steps:
            batch.images[1] = float("nan")

    return build(overrides, *more, before_step=poison)


def test_a_step_that_is_not_finite_is_skipped_and_counted(overrides, tmp_path):
    trainer = poisoned([2, 5], overrides, "train.log_every=6", "train.checkpoint_every=2")
    trainer.run()
    path = tmp_path / "run" / "metrics.jsonl"
    record = read_metrics(path)[-1]
    assert record["step"] == 6 and record["loss"] is None  # as JSON knows no NaN
    assert "NaN" not in path.read_text()
    loss_figure(path, tmp_path / "loss.png")
    assert record["skipped_steps"] == 2 and trainer.engine.state.updates() == 4
    weights = load_file(tmp_path / "run" / "student.safetensors")
    assert all(torch.isfinite(x).all() for x in weights.values())


def test_three_steps_in_a_row_that_are_not_finite_stop_the_run_and_are_named(overrides, tmp_path):
    run = tmp_path / "run"
    more = ["train.steps=40", "train.log_every=40", "train.checkpoint_every=10"]
    trainer = poisoned([12, 14, 15, 16], overrides, *more)
    with pytest.raises(DivergedError, match="step 14 .*teacher 'one' on dataset 'images', positions 113;") as caught:
        trainer.run()
    assert "the last good checkpoint is step_0000010" in str(caught.value)
    assert checkpoints.complete_steps(run) == [10]
    found = load_file(run / "nonfinite_step_14.safetensors")
    assert found["positions"].tolist() == list(range(112, 120)) and found["step"].item() == 14
    assert found["finite"].tolist() == [[i != 1 for i in range(8)]] * 2
    assert not found["losses"].isfinite().any()  # that image has spoilt the statistics of all


def test_what_was_not_finite_is_named_though_the_disk_is_full(overrides, tmp_path):
    trainer = poisoned([0, 1, 2], overrides)
    with full_disk(4_000), pytest.raises(DivergedError, match="teacher 'one' .*'images', positions 1;") as caught:
        trainer.run()
    assert "nonfinite_step_0.safetensors with its samples could not be written" in str(caught.value)


def test_a_broken_image_is_skipped_counted_and_named(overrides, photos, tmp_path, caplog):
    folder = tmp_path / "some broken"
    shutil.copytree(photos, folder)
    (folder / "05.jpg").write_bytes((folder / "05.jpg").read_bytes()[:300])
    (folder / "07.jpg").write_bytes(b"")
    seen, more = [], [f"data.datasets.images.root='{folder}'", "data.datasets.images.holdout=0"]
    with caplog.at_level(logging.WARNING):
        trainer = train(overrides, *more, before_step=lambda _, batch: seen.append(batch))
    assert all(len(batch) == 8 for batch in seen)
    assert trainer.task.loader.broken == {"images": 2}
    assert "05.jpg" in caplog.text and "07.jpg" in caplog.text
    assert not any("05.jpg" in path or "07.jpg" in path for batch in seen for path in batch.paths)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ("output_dir=", "output_dir is empty"),  # Regression: the run wrote into the current folder
        ("data.datasets.images.root=/nowhere/at/all", "/nowhere/at/all"),
        ("data.datasets.images.root=empty", "no file ends in .jpg"),
        ("teachers.one.weights=/nowhere/weights.safetensors", "no weights file"),
        ("teachers.one.weights=damaged.safetensors", "cannot be read"),
        ("objective.sharing=none teachers.two.groups=[human]", "never gets an image"),
    ],
)
def test_wrong_input_is_explained(overrides, changes, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged.safetensors").write_bytes(b"\x10" * 100)
    with pytest.raises(ValueError, match=words):
        build(overrides, *changes.split())


def test_a_routed_run_trains_and_its_teachers_see_their_own_images(overrides, photos, tmp_path):
    cfg = compose_config([
        *overrides, "objective.sharing=none", "objective.route_by_dataset=true", "teachers.two.groups=[3d]",
        "train.steps=4", "evaluation.held_out=false",
    ])  # fmt: skip
    cfg.data.datasets["more"] = DatasetConfig(str(photos), group="3d")
    trainer = Trainer(cfg)
    seen, wanted = [], []
    plain = trainer.train_step
    trainer.train_step = lambda batch: (wanted.append((batch.group == 1, batch.group_on_host)), plain(batch))[1]
    for name in cfg.teachers:
        trunk = trainer.task.teachers.teachers[name].trunk
        trunk.register_forward_pre_hook(lambda _, args, name=name: seen.append((name, len(args[0]))))
    trainer.run()
    assert trainer.task.loader.groups == ["3d", "generic"]
    assert seen[:2] == [("one", 1), ("two", 1)]  # what counts the operations, before the first step
    for (generic, on_host), of_one, of_two in zip(wanted, seen[2::2], seen[3::2], strict=True):
        assert on_host.tolist() == generic.long().tolist()
        assert of_one == ("one", int(generic.sum())) and of_two == ("two", 8 - int(generic.sum()))
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert len(records) == 4 and all(0 < record["share/two"] < 1 for record in records)
