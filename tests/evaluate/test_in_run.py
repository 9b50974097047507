"""Evaluation within a run: the numbers are those of a plain computation, and the training does not notice."""

from __future__ import annotations

import os
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file

from dune_fast.dali_pipelines.datasets import DatasetConfig
from dune_fast.dali_pipelines.loader import ValLoader
from dune_fast.distill.objective import teacher_losses
from dune_fast.engine import checkpoints
from dune_fast.engine.checkpoints import load_run
from dune_fast.engine.config import compose_config
from dune_fast.engine.metrics import CLOCK, read_metrics
from dune_fast.engine.trainer import Trainer
from dune_fast.evaluate.in_run import HeldOutLoss, InRunEvaluation
from dune_fast.teachers.ensemble import TeacherEnsemble
from tests.engine.conftest import overrides, photos, small_run, trained_run

__all__ = ["overrides", "photos", "trained_run"]  # fixtures
SUMMARIES = ["student.family=radio", "student.cls_per_teacher=true", "teachers.two.token_types=[cls,patch]"]
"""A student whose cls features are two tokens wide."""


@pytest.fixture(scope="session")
def classes(photos, tmp_path_factory):
    """The photographs in folders of three classes, and a broken one."""
    folder = tmp_path_factory.mktemp("classes")
    for i, path in enumerate(sorted(photos.iterdir())):
        place = folder / "abc"[i % 3]
        place.mkdir(exist_ok=True)
        shutil.copy(path, place)
    (folder / "a" / "broken.jpg").write_bytes(b"no image")
    return folder


def started(arguments: list[str]) -> tuple[Trainer, InRunEvaluation]:
    cfg = compose_config([*arguments, "logging.tensorboard=false"])
    evaluate = InRunEvaluation(cfg)
    return Trainer(cfg, evaluate), evaluate


def records(run) -> tuple[list[dict], list[dict]]:
    """Those of the training, and those of evaluations, without what depends on the machine."""
    left_out = (*CLOCK, "conflict/")
    found = [{k: v for k, v in r.items() if not k.startswith(left_out)} for r in read_metrics(run / "metrics.jsonl")]
    return [r for r in found if "loss" in r], [r for r in found if "loss" not in r]


def same_weights(one, other) -> bool:
    ours, theirs = (load_file(run / "student.safetensors") for run in (one, other))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_run_that_is_evaluated_trains_as_one_that_is_not(overrides, trained_run, tmp_path):
    run = tmp_path / "run"
    trainer, evaluate = started([*overrides, "evaluation.every=4", "evaluation.batch=3"])
    with evaluate:
        trainer.run()
    training, evaluations = records(run)
    assert training == records(trained_run)[0] and same_weights(run, trained_run)
    assert [r["step"] for r in evaluations] == [4, 6]  # every fourth, and the last
    assert all(r["held_out_images"] == 4 for r in evaluations)

    # the last one's numbers, from what the run has exported
    cfg, student, statistics = load_run(run)
    teachers = TeacherEnsemble(cfg.teachers, 14)
    with ValLoader(cfg.data, cfg.image_size, 4, 0, 1, torch.device("cpu")) as loader, torch.no_grad():
        (batch,) = loader
        features = teachers(batch.images)
        losses, parts = teacher_losses(student(batch.images), features, statistics.running(), cfg.objective)
    for i, name in enumerate(cfg.teachers):
        expected = pytest.approx(losses[i].mean().item(), rel=1e-5)
        assert evaluations[-1][f"held_out/{name}/images"] == expected == evaluations[-1][f"held_out/{name}"]
    cosine = 1 - parts["one/cls/cosine"].mean().item()
    assert evaluations[-1]["held_out_cosine/one/cls"] == pytest.approx(cosine, rel=1e-5)


@pytest.mark.parametrize("student", [[], SUMMARIES], ids=["one cls", "two summaries"])
def test_knn_of_a_dataset_whose_folders_are_classes(overrides, classes, tmp_path, caplog, student):
    arguments = [*overrides, *student, f"data.datasets.images.root={classes}", "train.steps=2"]
    arguments += ["data.max_broken_spared=4", "data.datasets.images.holdout=0"]
    arguments += ["evaluation.every=2", "evaluation.knn_dataset=images"]
    trainer, evaluate = started([*arguments, "evaluation.knn_k=3"])
    with evaluate:
        trainer.run()
    (record,) = records(tmp_path / "run")[1]
    assert not any(key.startswith("held_out") for key in record)  # there are no such images
    assert record["knn/images"] * 24 == pytest.approx(round(record["knn/images"] * 24))  # 24 of 25: one is broken
    assert 0 <= record["knn/images"] < 1 and "broken.jpg" in caplog.text


def test_knn_of_a_dataset_that_is_not_trained_on(overrides, classes, trained_run, tmp_path, caplog):
    cfg = compose_config([*overrides, "logging.tensorboard=false"])
    cfg.data.datasets["classes"] = DatasetConfig(root=str(classes), group="other", evaluation_only=True)
    cfg.evaluation.every, cfg.evaluation.knn_dataset = 6, "classes"
    evaluate = InRunEvaluation(cfg)
    with caplog.at_level("INFO"):
        trainer = Trainer(cfg, evaluate)
    with evaluate:
        trainer.run()
    training, evaluations = records(tmp_path / "run")
    assert training == records(trained_run)[0] and 0 <= evaluations[-1]["knn/classes"] <= 1
    assert "k-NN on classes: 3 classes in 25 images (a, b, c)" in caplog.text


@pytest.mark.parametrize("step", [4, 6])
def test_a_signal_breaks_the_evaluation_off_and_the_run_goes_on_with_it(overrides, trained_run, tmp_path, step):
    """At a step on the way, and at the last one."""
    run = tmp_path / "run"
    arguments = [*overrides, "evaluation.every=2", "evaluation.batch=1", "train.checkpoint_every=100"]
    trainer, evaluate = started(arguments)
    plain, said = trainer.watchdog.at, []

    def at(doing):
        said.append(doing)
        if doing == f"evaluation after step {step}, held-out images, batch 2 of 4":
            os.kill(os.getpid(), signal.SIGTERM)
        plain(doing)

    trainer.watchdog.at = at
    with evaluate:
        trainer.run()
    assert trainer.stopped and trainer.step == step and checkpoints.complete_steps(run) == [step]
    assert f"evaluation after step {step}, held-out images, batch 3 of 4" not in said
    assert [r["step"] for r in records(run)[1]] == [2, 4][: step // 2 - 1]
    for _ in range(2 if step == 4 else 1):  # as if a kill had hit the first before it saved again
        shutil.copytree(run / "checkpoints", tmp_path / "kept", dirs_exist_ok=True)
        trainer, evaluate = started(arguments)
        with evaluate:
            trainer.run()
        assert [r["step"] for r in records(run)[1]] == [2, 4, 6] and same_weights(run, trained_run)
        shutil.rmtree(run / "checkpoints")
        shutil.copytree(tmp_path / "kept", run / "checkpoints")


def test_shares_of_ranks_add_up_to_the_whole():
    g = torch.Generator().manual_seed(0)
    cfg = compose_config(["experiment=demo"])
    shape = {"a": {"cls": (7, 5), "patch": (7, 9, 5)}, "b": {"patch": (7, 9, 6)}}
    ours, theirs = (
        {name: {t: torch.randn(s, generator=g) for t, s in tokens.items()} for name, tokens in shape.items()}
        for _ in range(2)
    )
    plain = {
        name: {t: (torch.zeros(s[-1]), torch.ones(s[-1])) for t, s in tokens.items()} for name, tokens in shape.items()
    }
    dataset = torch.tensor([0, 2, 2, 0, 0, 2, 2])
    found = [HeldOutLoss(shape, ["x", "nothing", "y"], torch.device("cpu")) for _ in range(3)]
    for sums, rows in zip(found, (slice(None), slice(0, 5), slice(5, 7)), strict=True):
        cut = [{n: {t: x[rows] for t, x in tokens.items()} for n, tokens in f.items()} for f in (ours, theirs)]
        sums.add(*cut, plain, cfg.objective, dataset[rows])
    found[1].sums += found[2].sums
    whole, parts = found[0].result(), found[1].result()
    assert parts == pytest.approx(whole) and whole["held_out_images"] == 7
    losses, _ = teacher_losses(ours, theirs, plain, cfg.objective)
    assert whole["held_out/b/y"] == pytest.approx(losses[1, dataset == 2].mean().item())
    assert whole["held_out/b"] == pytest.approx(losses[1].mean().item())
    assert not any("nothing" in key for key in whole)
    assert HeldOutLoss(shape, ["x"], torch.device("cpu")).result() == {"held_out_images": 0}


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["data.datasets.images.holdout=0"], "evaluation.every=2, but there is no held-out image"),
        (["evaluation.knn_dataset=images"], "is in no class's folder"),
    ],
)
def test_a_run_with_nothing_to_evaluate_does_not_start(photos, tmp_path, more, words):
    with pytest.raises(ValueError, match=words):
        started([*small_run(photos, tmp_path / "run"), "evaluation.every=2", *more])
