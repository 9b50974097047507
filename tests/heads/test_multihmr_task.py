"""Multi-HMR's head trained by the engine, on a folder of images with people files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dune_fast
from bench.heads_proof.bodies import write_body_model
from bench.heads_proof.people import draw_parameters
from dune_fast import cli
from dune_fast.engine.config import ConfigError, compose_config
from dune_fast.engine.metrics import read_metrics
from dune_fast.engine.trainer import Trainer
from dune_fast.evaluate.ranks import Ranks
from dune_fast.heads.multihmr.camera import default_intrinsics
from dune_fast.heads.multihmr.people_files import write_people
from dune_fast.heads.multihmr.smplx import load_body_model
from dune_fast.heads.multihmr.targets import PARTS
from dune_fast.infer.bodies import draw_bodies
from dune_fast.tasks.multihmr import MultiHmrTask
from dune_fast.tasks.run import HeadEvaluation
from dune_fast.tasks.training import HeadTraining
from tests.evaluate.conftest import encoder_file, own_cache

__all__ = ["encoder_file", "own_cache"]  # fixtures
SIDE = 56


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train/ and val/ with drawn people, and the body model."""
    root = tmp_path_factory.mktemp("people")
    model = load_body_model(write_body_model(root / "SMPLX_NEUTRAL.npz", 20))
    k, rng = default_intrinsics(SIDE).numpy(), np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 3)):
        (root / split).mkdir()
        for i in range(count):
            people = draw_parameters(rng, i % 3)
            given = {name: torch.from_numpy(x) for name, x in people.items()}
            body = model(given["betas"], model.matrices(*(given[name] for name in PARTS)))
            vertices = (body.vertices + given["transl"][:, None]).numpy()
            image = draw_bodies(np.full((SIDE, SIDE, 3), 90, np.uint8), vertices, model.faces.numpy(), k, opacity=1.0)
            Image.fromarray(image).save(root / split / f"{i}.png")
            write_people(root / split / f"{i}.npz", {**people, "K": k})
    return root


def overrides(encoder: Path, data: Path, run: Path) -> list[str]:
    return [
        "experiment=hmr_bedlam", f"head.encoder={encoder}", f"head.data.root={data}", f"head.data.body_model={data}",
        f"head.data.size={SIDE}", "head.options.dim=32", "head.options.hidden=32", "head.options.heads=2",
        "head.options.head_dim=8", "train.steps=6", "train.global_batch=4", "train.log_every=1", "train.precision=fp32",
        "train.checkpoint_every=3", "evaluation.every=0", "logging.tensorboard=false", "deepspeed=zero0",
        "optimizer.lr=0.002", f"output_dir={run}",
    ]  # fmt: skip


def test_a_run_learns_is_measured_and_gives_a_head(encoder_file, data, tmp_path):
    cfg = compose_config([*overrides(encoder_file, data, tmp_path / "run"), "evaluation.every=6"])
    Trainer(cfg, HeadEvaluation(), HeadTraining(cfg)).run()
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    found = [r["loss"] for r in records if "loss" in r]
    assert len(found) == 6 and found[-1] < 0.9 * found[0]
    terms = next(r for r in records if "loss/v3d" in r)
    names = ("bce", "offset", "rotmat", "shape", "dist", "transl", "j3d", "v3d")
    assert {f"loss/{name}" for name in names} <= set(terms)
    assert any("val/f1" in r for r in records)
    head = dune_fast.load_head(tmp_path / "run")
    assert head.kind == "multihmr" and head.image_size == SIDE and head.width == 48
    assert json.loads((tmp_path / "run" / "run.json").read_text())["starts"][0]["encoder"]


def test_examples_are_a_function_of_seed_step_and_slot(encoder_file, data, tmp_path):
    tasks = [MultiHmrTask(compose_config(overrides(encoder_file, data, tmp_path / "run"))) for _ in range(2)]
    assert [task.open(Ranks()) for task in tasks] == [{data.name: 6}] * 2
    for step, slot in ((5, 1), (0, 3)):
        one, other = (task.example(step, slot) for task in tasks)
        assert torch.equal(one.image, other.image) and torch.equal(one.people["body"], other.people["body"])
    pixels = [tasks[0].example(step, slot).image for step in range(3) for slot in range(4)]
    assert len({float(x.sum()) for x in pixels}) > 5


def test_missing_data_and_body_model_are_named(encoder_file, data, tmp_path, capsys):
    given = overrides(encoder_file, data, tmp_path / "run")
    assert cli.main(["heads", "check", *given]) == 0
    capsys.readouterr()
    assert cli.main(["heads", "check", *given, f"head.data.root={tmp_path}", f"head.data.body_model={tmp_path}"]) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "bedlam.is.tue.mpg.de" in said and "smpl-x.is.tue.mpg.de" in said
    assert "head.data.root=" in said and "head.data.body_model=" in said


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("head.options.num_betas=12", "head.options: num_betas is 10 or 11"),
        ("head.options.center=knee", "head.options: center='knee': choose one of head"),
        ("head.data.size=0", "head.data: size=0: give pixels"),
        ("+head.loss.v3d=-1", "head.loss: the weight v3d=-1"),
        ("+head.loss.v4d=1", "head.loss: .*v4d.* its fields are bce"),
    ],
)
def test_options_are_checked(override, sentence):
    with pytest.raises(ConfigError, match=sentence):
        MultiHmrTask(compose_config(["experiment=hmr_bedlam", override]))


def test_sizes_that_the_encoder_cannot_read_are_refused(encoder_file, data, tmp_path):
    task = MultiHmrTask(compose_config([*overrides(encoder_file, data, tmp_path / "run"), "head.data.size=60"]))
    with pytest.raises(ConfigError, match="head.data.size=60.*no multiple of the patch size 14: take 56 or 70"):
        task.build_head(dune_fast.load_encoder(encoder_file))
