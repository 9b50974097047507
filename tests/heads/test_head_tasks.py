"""The tasks of Multi-HMR and MASt3R on the engine: sizes of the full heads, tiny runs that go on bit by bit."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dune_fast
from bench.heads_proof.bodies import write_body_model
from dune_fast import cli
from dune_fast.engine import checkpoints
from dune_fast.engine.config import ConfigError, RunConfig, compose_config
from dune_fast.engine.metrics import read_metrics
from dune_fast.heads.files import save_head
from dune_fast.heads.linear.segmentation import SegmentationHead
from dune_fast.heads.multihmr.camera import default_intrinsics
from dune_fast.heads.multihmr.people_files import write_people
from dune_fast.heads.multihmr.targets import PARTS
from dune_fast.kernels.nn.vit import VisionTransformer, ViTConfig
from dune_fast.tasks.run import doubts
from dune_fast.tasks.training import HeadTraining, head_task
from tests.engine.conftest import same_weights, timeless
from tests.evaluate.conftest import encoder_file, own_cache, squares
from tests.heads.test_head_training import small, start

__all__ = ["encoder_file", "own_cache", "squares"]  # fixtures
HEAD = "head.safetensors"


def parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.fixture(scope="module")
def vit_base() -> VisionTransformer:
    """DUNE's encoder, without memory."""
    with torch.device("meta"):
        return VisionTransformer(ViTConfig(448, embed_dim=768, depth=12, num_heads=12, num_registers=4))


def test_the_people_head_has_the_published_size(vit_base):
    with torch.device("meta"):
        head = head_task(compose_config(["experiment=multihmr_dune"])).build_head(vit_base)
    assert round(parameters(head.x_attention_head) / 1e6, 1) == 9.9
    assert round(parameters(head.mlp_classif) / 1e6 + parameters(head.mlp_offset) / 1e6, 1) == 1.2


@pytest.mark.parametrize(
    ("width", "patch", "own_norm", "millions"),
    [(768, 14, True, 347.4), (384, 14, True, 323.5), (1024, 16, False, 386.0)],
)
def test_the_pair_head_has_the_published_size(width, patch, own_norm, millions):
    """On DUNE's ViT-B and ViT-S, and on MASt3R's own encoder; with what published files have and nothing reads: a
    patch embedding, and two 3x3 convolutions in each DPT."""
    size = 32 * patch
    sizes = f"head.data.sizes=[[{size},{size}]]"
    task = head_task(compose_config(["experiment=mast3r_dune", sizes, f"++head.options.own_norm={own_norm}"]))
    with torch.device("meta"):
        encoder = VisionTransformer(ViTConfig(size, patch, embed_dim=width, depth=1, num_heads=8))
        head = task.build_head(encoder)
    unread = 2 * 2 * (9 * 256**2 + 256) + (3 * patch**2 + 1) * width
    assert parameters(head) + unread == pytest.approx(millions * 1e6, abs=0.5e6 if millions == 386 else 0.05e6)


@pytest.fixture(scope="module")
def people(tmp_path_factory) -> Path:
    """train/ and val/ of grey images; one of them shows nobody. The body model lies beside them."""
    root, random = tmp_path_factory.mktemp("people"), np.random.default_rng(0)
    write_body_model(root / "body.npz", 20)
    for split, count in (("train", 5), ("val", 2)):
        (root / split).mkdir()
        for i in range(count):
            Image.fromarray(random.integers(0, 256, (56, 56, 3), dtype=np.uint8)).save(root / split / f"{i}.png")
            n = i % 3
            arrays = {name: 0.1 * random.normal(size=(n, joints, 3)) for name, joints in PARTS.items()}
            arrays["root"] = arrays["root"] + np.array([math.pi, 0, 0])
            places = [(x, 0.0, 4.0 + x) for x in random.uniform(-1, 1, n)]
            write_people(root / split / f"{i}.npz", arrays | {
                "betas": random.normal(size=(n, 10)), "transl": np.array(places).reshape(n, 3),
                "K": default_intrinsics(56).numpy(),
            })  # fmt: skip
    return root


def people_run(encoder: Path, data: Path, run: Path) -> list[str]:
    """Overrides of a training of six steps."""
    return [
        "experiment=multihmr_dune", f"head.encoder={encoder}", f"head.data.root={data}",
        f"head.data.body_model={data / 'body.npz'}", "head.options.image_size=56", "+head.options.depth=1",
        "+head.options.heads=2", "+head.options.head_dim=8", "+head.options.dim=24", "+head.options.hidden=24",
        "head.loss.start_2d=3", "optimizer.lr=0.001", "train.steps=6", "train.global_batch=4", "train.log_every=1",
        "train.checkpoint_every=3", "train.precision=fp32", "evaluation.every=6", "logging.tensorboard=false",
        "deepspeed=zero0", f"output_dir={run}",
    ]  # fmt: skip


def resumed_is_whole(overrides: list[str], tmp_path: Path) -> list[dict]:
    """Trains, and once more from the middle; the records of the first."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    start(overrides).run()
    shutil.copytree(run, whole)
    for path in ((run / "checkpoints" / checkpoints.tag(6)), run / HEAD):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    trainer = start(overrides)
    assert trainer.step == 3
    trainer.run()
    assert same_weights(run, whole, HEAD) and timeless(run) == timeless(whole)
    return read_metrics(whole / "metrics.jsonl")


def test_people_are_trained_on_and_a_run_goes_on(encoder_file, people, tmp_path):
    records = resumed_is_whole(people_run(encoder_file, people, tmp_path / "run"), tmp_path)
    losses = [r for r in records if "loss" in r]
    assert all(math.isfinite(r["loss"]) and r["skipped_steps"] == 0 for r in losses)
    jump = losses[3]["loss"] - losses[2]["loss"]  # pixels count from the fourth step on
    assert jump > 0.5 * (losses[3]["loss/j2d"] + losses[3]["loss/v2d"])
    assert losses[5]["loss/dist"] < losses[0]["loss/dist"]
    assert {"val/images", "val/f1"} <= records[-1].keys() and records[-1]["val/images"] == 2
    assert dune_fast.load_head(tmp_path / "run").options()["image_size"] == 56


def test_the_body_model_and_the_people_are_asked_for(encoder_file, people, tmp_path, capsys):
    overrides = people_run(encoder_file, people, tmp_path / "run")
    assert cli.main(["heads", "check", *overrides]) == 0
    assert cli.main(["heads", "check", *overrides, "head.data.body_model=nope.npz", f"head.data.root={tmp_path}"]) == 1
    said = capsys.readouterr().out
    assert "register at https://smpl-x.is.tue.mpg.de" in said and "head.data.body_model=nope.npz" in said
    assert "bedlam.is.tue.mpg.de" in said and f"head.data.root={tmp_path}" in said
    with pytest.raises(ConfigError, match="head.options: image_size 50 is no multiple of the patch size 14"):
        HeadTraining(compose_config([*overrides, "head.options.image_size=50"])).checkpoint_bytes()


def with_head(cfg: RunConfig, part: str, **changed: object) -> RunConfig:
    """The configuration with other fields in a free part of `head`."""
    return replace(cfg, head=replace(cfg.head, **{part: {**getattr(cfg.head, part), **changed}}))


def test_check_reads_what_training_would_refuse(encoder_file, people, tmp_path):
    """Regression: a damaged body model, impossible options and a head of another kind were "nothing is missing"."""
    cfg = compose_config(people_run(encoder_file, people, tmp_path / "run"))
    assert doubts(cfg) == []
    (tmp_path / "pickle.npz").write_bytes(b"\x80\x04K\x01.")
    (said,) = doubts(with_head(cfg, "data", body_model=str(tmp_path / "pickle.npz")))
    assert "pickle.npz is a pickle, which is not read" in said
    (said,) = doubts(with_head(cfg, "options", image_size=50))
    assert "image_size 50 is no multiple of the patch size 14" in said
    save_head(SegmentationHead(48, 2), tmp_path / "other.safetensors")
    (said,) = doubts(replace(cfg, head=replace(cfg.head, weights=str(tmp_path / "other.safetensors"))))
    assert "is a linear_seg head, not a multihmr head" in said


def test_check_says_which_label_no_class_has(encoder_file, squares, tmp_path):
    """Regression: such labels were found in the middle of a run, negative ones by a traceback."""
    labels = shutil.copytree(squares, tmp_path / "data") / "labels" / "val"
    cfg = compose_config(small(encoder_file, tmp_path / "data", tmp_path / "run"))
    (tmp_path / "data" / "classes.txt").write_text("dark\nbright\n")
    assert doubts(cfg) == []
    with torch.device("meta"):
        head = head_task(cfg).build_head(HeadTraining(cfg).network)
    assert head.names == ("dark", "bright")  # which `dune-fast infer seg` shows
    (said,) = doubts(with_head(cfg, "data", classes=3))
    assert "2 names for 3 classes" in said
    with Image.open(labels / "1.png") as image:
        values = np.array(image).astype(np.int64)
    (labels / "1.png").unlink()
    for label in (7, -1):
        values[3, 4] = label
        np.save(labels / "1.npy", values)
        (said,) = doubts(cfg)
        assert f"1.npy has the label {label}; there are 2 classes" in said


def test_check_doubts_depths_of_another_unit(encoder_file, squares, tmp_path):
    """0 stands for an unknown depth; a map of 8 bits that is read as millimetres ends at a quarter of a metre."""
    folder = shutil.copytree(squares, tmp_path / "data") / "depth"
    cfg = compose_config(small(encoder_file, tmp_path / "data", tmp_path / "run", "depth_nyud"))
    assert doubts(cfg) == []
    for scale, sentence in ((0.01, "is head.data.depth_scale=1000 units a metre right?"), (0, "no pixel has a depth")):
        for path in folder.rglob("*.png"):
            with Image.open(path) as image:
                values = np.array(image)
            Image.fromarray((scale * values).astype(np.uint16)).save(path)
        said = doubts(cfg)
        assert len(said) == 2 and all(sentence in each for each in said)
