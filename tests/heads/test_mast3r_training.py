"""MASt3R's head trained by the engine on rendered rooms: it learns, its batches are whole, its metrics are those of
the truth."""

from __future__ import annotations

import dataclasses
import shutil

import numpy as np
import pytest
import torch

import dune_fast
from dune_fast.engine.config import ConfigError, compose_config
from dune_fast.engine.metrics import read_metrics
from dune_fast.engine.trainer import Trainer
from dune_fast.evaluate.ranks import Ranks
from dune_fast.heads.mast3r.correspondences import back_project
from dune_fast.heads.mast3r.head import Mast3rHead
from dune_fast.heads.mast3r.loss import Mast3rLoss, Mast3rLossConfig
from dune_fast.heads.mast3r.pair_folders import PairDatasetConfig, open_pairs, write_pairs
from dune_fast.heads.mast3r.pairs import PairDataConfig
from dune_fast.heads.mast3r.training import both_orders_outputs, truth
from dune_fast.heads.tokens import encode
from dune_fast.load import load_encoder
from dune_fast.tasks import mast3r_validation
from dune_fast.tasks.head_task import FrozenEncoder
from dune_fast.tasks.mast3r import Mast3rTask
from dune_fast.tasks.mast3r_validation import MEANS, match_errors, measure
from dune_fast.tasks.run import HeadEvaluation, doubts
from dune_fast.tasks.training import HeadTraining
from tests.evaluate.conftest import encoder_file, own_cache

__all__ = ["encoder_file", "own_cache"]  # fixtures

TINY = {"dec_dim": 16, "dec_depth": 4, "dec_heads": 2, "desc_dim": 4, "feature_dim": 8, "last_dim": 8}


@pytest.fixture
def overrides(encoder_file, rooms, tmp_path) -> list[str]:
    options = ",".join(f"{name}:{value}" for name, value in TINY.items())
    return [
        "experiment=mast3r_dune", f"head.encoder={encoder_file}", f"+head.data.datasets.rooms.root={rooms}",
        f"head.options={{{options},layer_dims:[4,4,8,8]}}", "head.data.sizes=[[56,28]]", "head.data.n_corres=64",
        "train.steps=12", "train.global_batch=2", "train.log_every=1", "train.checkpoint_every=100",
        "train.precision=fp32", "evaluation.every=0", "logging.tensorboard=false", "deepspeed=zero0",
        "optimizer.lr=0.003", f"output_dir={tmp_path / 'run'}",
    ]  # fmt: skip


def test_a_head_learns(overrides, rooms, tmp_path):
    shutil.copytree(rooms, tmp_path / "val")
    write_pairs(tmp_path / "val", open_pairs("rooms", PairDatasetConfig(str(rooms))).pairs[:1])
    cfg = compose_config([*overrides, f"+head.data.validation.rooms.root={tmp_path / 'val'}", "evaluation.every=12"])
    Trainer(cfg, HeadEvaluation(), HeadTraining(cfg)).run()
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    losses = [r["loss"] for r in records if "loss" in r]
    assert len(losses) == 12 and np.mean(losses[-3:]) < np.mean(losses[:3])
    assert {"point_1", "point_conf_2", "matching", "matching_conf"} <= records[0].keys()
    found = next(r for r in records if "val/match_px" in r)
    assert found["val/points_invariant"] > 0 and 0 <= found["val/average_precision"] <= 1
    head = dune_fast.load_head(tmp_path / "run")
    assert head.kind == "mast3r" and head.options()["desc_dim"] == 4


def test_every_parameter_gets_a_gradient(overrides):
    task, head, encoder = opened(overrides)
    batch = task.collate([task.example(0, slot) for slot in (0, 1)])
    found = task.loss(head, encoder, batch, 0)
    found.loss.backward()
    assert not [name for name, p in head.named_parameters() if p.requires_grad and p.grad is None]


def opened(overrides: list[str]) -> tuple[Mast3rTask, Mast3rHead, FrozenEncoder]:
    cfg = compose_config(overrides)
    task = Mast3rTask(cfg)
    assert task.missing() == []
    task.open(Ranks())
    torch.manual_seed(0)
    network = load_encoder(cfg.head.encoder)
    return task, task.build_head(network), FrozenEncoder(network)


def test_a_batch_of_any_orientation_is_its_pairs_one_by_one(overrides, encoder_file):
    """Grouped, transposed and put together again, outputs and loss are those of each pair in each order."""
    task, head, encoder = opened(overrides)
    examples = [task.example(0, slot) for slot in (0, 1, 0, 1)]
    for example, portrait in zip(examples, ((True, False), (False, False), (True, True), (False, False)), strict=True):
        example["portrait"] = portrait
    batch = task.collate(examples)
    images = [batch[view]["image"].permute(0, 3, 1, 2) / 255.0 for view in ("view1", "view2")]
    outputs = both_orders_outputs(head, lambda x, _: encoder(x), *images, batch["groups"], batch["views"])
    gt = truth(batch)

    def single(i: int, order: int) -> tuple[dict, dict]:
        turned = [g[:2] for g in batch["groups"] for _ in range(g[2], g[3])][i]
        upright = [x[i : i + 1].mT if t else x[i : i + 1] for x, t in zip(images, turned, strict=True)]
        tokens = [encode(encoder.network, x) for x in upright]
        pair, turned = (tokens[::-1], turned[::-1]) if order else (tokens, turned)
        return tuple({n: x.transpose(1, 2) if t else x for n, x in out.items()}
                     for out, t in zip(head(*pair), turned, strict=True))  # fmt: skip

    assert [len(x) for x in (batch["groups"], outputs[0]["conf"], gt[0]["corres"])] == [3, 8, 8]
    for row in range(8):
        expected = single(row % 4, row // 4)
        for ours, wanted in zip(outputs, expected, strict=True):
            assert all(torch.allclose(ours[name][row : row + 1], x, atol=1e-5) for name, x in wanted.items())
    # the order of the pairs in a batch is nothing to the loss
    loss = Mast3rLoss(Mast3rLossConfig())
    shuffled = torch.randperm(8)
    again = loss(*({n: x[shuffled] for n, x in part.items()} for part in (*gt, *outputs)))[0]
    assert torch.allclose(again, loss(*gt, *outputs)[0], rtol=1e-5)


def test_kept_tokens_are_those_of_the_images(overrides):
    """Every view is encoded once, whatever it is a pair with, and the loss stays what it is."""
    fixed = ["head.data.crop=centre", "head.data.jitter=[0,0,0,0]"]
    losses, encoded = {}, []
    for keep in (False, True):
        task, head, encoder = opened([*overrides, *fixed, f"head.data.keep_tokens={keep}"])

        def counted(images, encoder=encoder, keep=keep):
            encoded.extend([len(images)] * keep)
            return encoder(images)

        batches = [task.collate([task.example(step, slot) for slot in (0, 1)]) for step in range(3)]
        losses[keep] = torch.stack([task.loss(head, counted, batch, 0).loss.detach() for batch in batches])
    torch.testing.assert_close(losses[True], losses[False], rtol=1e-5, atol=1e-5)
    views = {name for batch in batches for pair in batch["views"] for name in pair}
    assert encoded == [1] * len(views) and len(views) < 12
    for change in ("head.data.crop=auto", "head.data.jitter=[0,0.1,0,0]", "head.data.sizes=[[56,28],[56,42]]"):
        with pytest.raises(ConfigError, match="images that do not change"):
            opened([*overrides, *fixed, "head.data.keep_tokens=true", change])


class TrueHead:
    """Gives true points and, as descriptors, their places in the world."""

    def __init__(self, views):
        self.views = views

    def __call__(self, *tokens):
        to_first = np.linalg.inv(self.views[0].pose)
        outputs = []
        for view in self.views:
            points = torch.from_numpy(back_project(view.depth, view.intrinsics, view.pose)).float()
            # a random feature map of the place: nearby points have nearby descriptors
            desc = torch.cat([torch.sin(points @ self.waves), torch.cos(points @ self.waves)], -1)
            flat = (points @ torch.from_numpy(to_first[:3, :3].T).float()) + torch.from_numpy(to_first[:3, 3]).float()
            ones = torch.ones(1, *view.depth.shape)
            outputs.append({"pts3d": flat[None], "conf": ones, "desc": desc[None] / len(self.waves[0]) ** 0.5,
                            "desc_conf": 2 * ones})  # fmt: skip
        first, second = outputs
        second["pts3d_in_other_view"] = second.pop("pts3d")
        return first, second

    waves = 3 * torch.randn(3, 64, generator=torch.Generator().manual_seed(0))


def test_metrics_of_the_truth_are_those_of_the_resolution(rooms):
    pytest.importorskip("cv2")
    folder = open_pairs("rooms", PairDatasetConfig(str(rooms)))
    cfg = PairDataConfig(sizes=[[56, 42]], n_corres=64)
    read = {}

    class Folder:
        name = "rooms"

        def __len__(self):
            return 2

        def read(self, index):
            read["views"] = folder.read(index)
            return read["views"]

    def head(*tokens):
        return TrueHead(read["views"])(*tokens)

    found = measure(head, lambda images: None, Folder(), cfg, Ranks())
    assert found["points"] < 1e-5 and found["points_invariant"] < 1e-4
    assert found["match_px"] < 1 and found["match_5px"] > 0.9 and found["average_precision"] > 0.5
    assert found["rotation_deg"] < 1 and found["translation_m"] < 0.1 and found["direction_deg"] < 10
    views = folder.read(0)
    first, second = TrueHead(views)()
    random = torch.randn(second["desc"][0].shape)
    points = back_project(views[0].depth, views[0].intrinsics, views[0].pose)
    assert np.median(match_errors(first["desc"][0], random, points, *views)) > 5


def test_pairs_without_depth_tell_of_the_pose_alone(overrides, rooms, tmp_path, monkeypatch):
    """Regression: points that nobody knows were 0 away from the found ones, as those of a perfect head."""
    poses = iter([(1.0, 2.0, 3.0), (3.0, 2.0, 1.0)] * 3)
    monkeypatch.setattr(mast3r_validation, "pose_errors", lambda *views: next(poses))
    shutil.copytree(rooms, tmp_path / "val")
    pairs = open_pairs("rooms", PairDatasetConfig(str(rooms))).pairs
    write_pairs(tmp_path / "val", pairs[:2])
    _, head, encoder = opened(overrides)
    cfg = PairDataConfig(sizes=[[56, 42]], n_corres=64)
    folder = open_pairs("v", PairDatasetConfig(str(tmp_path / "val")))
    alone = measure(head, encoder, dataclasses.replace(folder, pairs=pairs[1:2]), cfg, Ranks())
    assert pairs[0][1] not in pairs[1]
    path = tmp_path / "val" / f"{pairs[0][1]}.depth.npy"
    np.save(path, 0 * np.load(path))
    part = measure(head, encoder, folder, cfg, Ranks())
    assert {name: part[name] for name in MEANS} == {name: alone[name] for name in MEANS}
    assert part["rotation_deg"] == 2.0 and alone["rotation_deg"] == 1.0
    for name in {view for pair in pairs[:2] for view in pair}:
        path = tmp_path / "val" / f"{name}.depth.npy"
        np.save(path, 0 * np.load(path))
    assert set(measure(head, encoder, folder, cfg, Ranks())) == {"rotation_deg", "direction_deg", "translation_m"}


def test_the_check_looks_at_the_validation_too(overrides, rooms, tmp_path):
    shutil.copytree(rooms, tmp_path / "val")
    for path in (tmp_path / "val").glob("*/*.npz"):
        path.write_bytes(b"")
    task = Mast3rTask(compose_config([*overrides, f"+head.data.validation.v.root={tmp_path / 'val'}"]))
    assert task.missing() == [] and "v: view" in task.problems()[0]


def test_the_check_builds_the_head(overrides):
    """Regression: nothing was missing to train a head that could not be built."""
    for change, words in (
        ("head.data.sizes=[[50,28]]", "give multiples of the encoder's patches, 14 px"),
        ("head.options.dec_heads=3", "16 channels with 3 attention heads"),
    ):
        (said,) = doubts(compose_config([*overrides, change]))
        assert words in said


def test_what_does_not_go_together_is_refused(overrides, tmp_path):
    def task(*more):
        return Mast3rTask(compose_config([*overrides, *more]))

    with pytest.raises(ConfigError, match="multiple"):
        task("head.data.n_corres=100", "head.loss.matching.blocksize=64")
    with pytest.raises(ConfigError, match="head.data"):
        task("+head.data.size=3")
    with pytest.raises(ConfigError, match="multiples of the encoder's patches"):
        opened([*overrides, "head.data.sizes=[[50,28]]"])
    (missing,) = task(f"head.data.datasets.rooms.root={tmp_path}").missing()
    assert "pairs.txt" in missing.what and "head.data.datasets.rooms.root=" in missing.where
    assert "megadepth" in missing.ask
    (missing,) = Mast3rTask(compose_config(["experiment=mast3r_dune"])).missing()
    assert missing.where == "head.data.datasets is empty"
