"""`python -m bench.heads_proof mast3r`: MASt3R's head learns matches and poses on a frozen ViT-S.

Rendered rooms with photographs on their walls, an encoder that nobody trains here, a small decoder, the published
criterion, and the engine: `dune-fast heads train`. The head is measured before and after training on rooms with other
textures and on a stereo pair of photographs with measured depth, beside what needs no head: the encoder's tokens for
matches, and the guess that the camera has not moved for poses.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import logging
import math
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from bench.heads_proof.multihmr import RESULTS, encoder_of_the_demo
from bench.heads_proof.people import photographs
from bench.heads_proof.stereo import write_stereo
from bench.proof.cells import stereo_folder
from dune_fast.engine.metrics import read_metrics
from dune_fast.engine.provenance import versions
from dune_fast.evaluate.ranks import Ranks
from dune_fast.heads.files import load_head
from dune_fast.heads.mast3r import scenes
from dune_fast.heads.mast3r.correspondences import back_project
from dune_fast.heads.mast3r.crops import resize_and_cut
from dune_fast.heads.mast3r.head import Mast3rHead
from dune_fast.heads.mast3r.pair_folders import PairDatasetConfig, PairFolder, open_pairs
from dune_fast.heads.mast3r.pairs import PairDataConfig
from dune_fast.heads.mast3r.scenes import SceneConfig, write_scenes
from dune_fast.kernels.augment import augment_colour
from dune_fast.load import load_encoder
from dune_fast.tasks.head_task import FrozenEncoder
from dune_fast.tasks.mast3r_validation import match_errors, measure, off
from dune_fast.teachers.architecture import architecture_metadata

logger = logging.getLogger("bench.heads_proof")
Metrics = dict[str, float]
"""Of COLUMNS, by name."""
HEAD = {
    "dec_dim": 128, "dec_depth": 4, "dec_heads": 2, "desc_dim": 8, "layer_dims": [16, 32, 64, 128],
    "feature_dim": 32, "last_dim": 16,
}  # fmt: skip
COLUMNS = {
    "match_px": "match (px)", "match_5px": "within 5 px", "average_precision": "AP", "rotation_deg": "rotation (deg)",
    "direction_deg": "direction (deg)", "translation_m": "translation (m)", "points_invariant": "points",
}  # fmt: skip
BLOCKS = 6
"""Of the demo's ViT-S/14, whose output the head reads. In a head's 20 minutes, place matters more than meaning: tokens
of the sixth block match 8 px off, those of the tenth 11."""
LIMITS: dict[str, dict[str, float]] = {
    "rooms": {"match_px": 8.0, "rotation_deg": 11.0, "direction_deg": 65.0, "translation_m": 0.7},
    "stereo": {"match_px": 8.0},
}
"""What the trained head has to reach at most, on each of the sets to measure on. Set after the same training had been
measured on rooms of test_seed 12: 6.8 px, 8.6 degrees, 50 degrees, 0.63 m, with no motion 17 degrees, 90 degrees and
0.74 m. No pose is asked for on the stereo pair: its focal length is twice that of the rooms, so its points are metres
off."""
BEATS = ("no motion", "untrained")
"""Rows that the trained head has to be better than. Its median match is about as far off as that of the encoder's own
tokens, so they are shown and not asked for."""


@dataclass(frozen=True)
class Settings:
    """Sizes of the proof."""

    rooms: SceneConfig = field(default_factory=lambda: SceneConfig(
        seed=11, size=(112, 84), samples=3, overlap=(0.5, 0.95), baseline=(0.4, 1.2), focal=(1, 1), off_centre=0.0,
    ))  # fmt: skip
    """To train on, seen by one camera: a head cannot see the focal length, and with one that it does not know its
    points lie on wrong rays. Views are far enough apart that "no motion" is a bad guess: at 0.1 to 0.5 m, a head whose
    matches were 15 px off did not beat it."""
    test_seed: int = 13
    """Of the rooms to measure on: other textures, other places."""
    train: int = 300
    """Rooms to train on."""
    test: int = 30
    """Rooms to measure on."""
    size: tuple[int, int] = (112, 84)
    steps: int = 3000
    batch: int = 2
    lr: float = 1e-3
    n_corres: int = 1024
    matching_weight: float = 0.3
    """The published 0.075 had left descriptors at chance after 160 steps; with 0.3 they leave it after 250."""


def write_encoder(path: Path) -> None:
    """The demo's ViT-S/14 after its block BLOCKS, as a file."""
    vit = encoder_of_the_demo()
    vit.blocks = vit.blocks[:BLOCKS]
    cfg = dataclasses.replace(vit.cfg, depth=len(vit.blocks))
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: x.contiguous() for name, x in vit.state_dict().items()}, path, architecture_metadata(cfg))


def prepare(cfg: Settings, work: Path) -> dict[str, Path]:
    """Everything that the training reads, made once: encoder, rooms, stereo pair."""
    code = Path(scenes.__file__).read_bytes()
    made_of = {"train": (cfg.rooms, cfg.train), "rooms": (cfg.rooms, cfg.test_seed, cfg.test)}
    places = {name: work / f"{name}_{hashlib.sha256(repr(what).encode() + code).hexdigest()[:12]}"
              for name, what in made_of.items()}  # fmt: skip
    places |= {"encoder": work / f"encoder_{BLOCKS}.safetensors", "stereo": work / "stereo"}
    if not places["encoder"].is_file():
        write_encoder(places["encoder"])
    pictures = photographs()
    half = len(pictures) // 2  # of the photographs, each set has its own
    write_scenes(places["train"], cfg.train, cfg.rooms, pictures[:half])
    write_scenes(places["rooms"], cfg.test, dataclasses.replace(cfg.rooms, seed=cfg.test_seed), pictures[half:])
    write_stereo(places["stereo"], stereo_folder())
    return places


def overrides(cfg: Settings, places: dict[str, Path], run: Path) -> list[str]:
    """Of `dune-fast heads train`: the published recipe, but for sizes and the schedule's length."""
    options = [f"head.options.{name}={json.dumps(value)}".replace(" ", "") for name, value in HEAD.items()]
    return [
        "experiment=mast3r_dune", "name=mast3r_proof", f"output_dir={run}", f"head.encoder={places['encoder']}",
        f"+head.data.datasets.rooms.root={places['train']}", *options,
        f"head.data.sizes=[[{cfg.size[0]},{cfg.size[1]}]]", f"head.data.n_corres={cfg.n_corres}",
        f"head.loss.matching_weight={cfg.matching_weight}",
        "head.data.crop=centre", "head.data.jitter=[0,0,0,0]", "head.data.keep_tokens=true", f"optimizer.lr={cfg.lr}",
        "optimizer.warmup_fraction=0.1", f"train.steps={cfg.steps}",
        f"train.global_batch={cfg.batch}", "train.log_every=10", "train.checkpoint_every=500",
        "train.keep_checkpoints=1", "train.precision=fp32", "evaluation.every=0", "logging.tensorboard=false",
        "deepspeed=zero0",
    ]  # fmt: skip


def train(cfg: Settings, places: dict[str, Path], run: Path) -> None:
    """Runs `dune-fast heads train`, which goes on where an earlier call was stopped.

    Raises:
        RuntimeError: it has failed; its log is beside the run's folder.
    """
    if (run / "head.safetensors").is_file():
        return
    log = run.with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a") as sink:
        call = [sys.executable, "-m", "dune_fast", "heads", "train", *overrides(cfg, places, run)]
        status = subprocess.run(call, stdout=sink, stderr=sink, env=os.environ, check=False).returncode
    if status:
        last = (log.read_text(errors="replace").strip().splitlines() or [""])[-1]
        raise RuntimeError(f"the training ended with status {status} ({log}): {last}")


def measured(cfg: Settings, places: dict[str, Path], heads: dict[str, Mast3rHead]) -> dict[str, dict[str, Metrics]]:
    """Row of the table -> set -> metrics: what needs no head, then heads by name."""
    encoder = FrozenEncoder(load_encoder(places["encoder"]))
    data = PairDataConfig(sizes=[list(cfg.size)], n_corres=cfg.n_corres)
    folders = {name: open_pairs(name, PairDatasetConfig(str(places[name]))) for name in LIMITS}
    rows = {
        "no motion": {name: no_motion(folder) for name, folder in folders.items()},
        "tokens": {name: token_matches(encoder, folder, cfg.size) for name, folder in folders.items()},
    }
    for row, head in heads.items():
        rows[row] = {}
        for name, folder in folders.items():
            metrics = measure(head, encoder, folder, data, Ranks())
            rows[row][name] = {key: round(metrics[key], 4) for key in COLUMNS}
            logger.info("%s, %s: %s", row, name, rows[row][name])
    return rows


def no_motion(folder: PairFolder) -> Metrics:
    """Errors of the guess that both views have one pose: medians over pairs."""
    poses = [[view.pose.astype(np.float64) for view in folder.read(index)] for index in range(len(folder))]
    errors = [off(np.eye(4), np.linalg.inv(first) @ second) for first, second in poses]
    names = ("rotation_deg", "direction_deg", "translation_m")
    return {name: round(float(np.median(column)), 4) for name, column in zip(names, zip(*errors, strict=True),
                                                                              strict=True)}  # fmt: skip


def token_matches(encoder: FrozenEncoder, folder: PairFolder, size: tuple[int, int]) -> Metrics:
    """Errors of matches by the encoder's tokens, less their image's mean, bilinear between centres of patches."""
    medians, shares = [], []
    for index in range(len(folder)):
        views = [resize_and_cut(view, size) for view in folder.read(index)]
        tokens = [encoder(augment_colour(torch.from_numpy(view.image)[None], None)) for view in views]
        maps = [(t.patch - t.patch.mean(1, keepdim=True)).mT.unflatten(2, t.grid) for t in tokens]
        desc = [F.normalize(F.interpolate(x, size[::-1], mode="bilinear")[0].movedim(0, -1), dim=-1) for x in maps]
        points = back_project(views[0].depth, views[0].intrinsics, views[0].pose)
        errors = match_errors(*desc, points, *views)
        medians.append(np.median(errors))
        shares.append((errors < 5).mean())
    return {"match_px": round(float(np.median(medians)), 4), "match_5px": round(float(np.mean(shares)), 4)}


def checked(rows: dict[str, dict[str, Metrics]]) -> list[dict[str, Any]]:
    """Of each limit, what was found: the trained head has to keep it and to be better than the rows of BEATS."""
    found = []
    for name, limits in LIMITS.items():
        for metric, limit in limits.items():
            trained = rows["trained"][name][metric]
            others = {row: rows[row][name][metric] for row in BEATS if metric in rows[row][name]}
            holds = trained <= limit and all(trained < value for value in others.values())
            found.append({"set": name, "metric": metric, "limit": limit, "passed": holds, "trained": trained,
                          "others": others})  # fmt: skip
    return found


def prove(cfg: Settings, work: Path, out: Path) -> dict[str, Any]:
    """Runs the proof; writes mast3r.json and mast3r.md."""
    began = time.monotonic()
    places = prepare(cfg, work)
    made = time.monotonic()
    trained_by = {k: v for k, v in dataclasses.asdict(cfg).items() if not k.startswith("test")}
    mark = hashlib.sha256(json.dumps([trained_by, HEAD, BLOCKS]).encode()).hexdigest()[:12]
    run = work / f"run_{mark}"
    train(cfg, places, run)
    head = load_head(run)
    assert isinstance(head, Mast3rHead)
    torch.manual_seed(0)
    untrained = Mast3rHead(**head.options()).eval().requires_grad_(False)
    rows = measured(cfg, places, {"untrained": untrained, "trained": head})
    checks = checked(rows)
    passed = all(check["passed"] for check in checks)
    records = [r for r in read_metrics(run / "metrics.jsonl") if "loss" in r]
    steps = [0, *(r["step"] for r in records)]  # a record's seconds are the mean of its steps
    seconds = sum(r["step_seconds"] * (b - a) for r, a, b in zip(records, steps, steps[1:], strict=False))
    counts = {n: len(open_pairs(n, PairDatasetConfig(str(places[n])))) for n in ("train", *LIMITS)}
    parameters = sum(p.numel() for p in head.parameters())
    result = {
        "passed": passed, "checks": checks, "metrics": rows, "pairs": counts, "parameters": parameters,
        "settings": dataclasses.asdict(cfg), "head": HEAD, "loss": [round(r["loss"], 3) for r in records],
        "seconds": {"data": round(made - began), "steps": round(seconds), "all": round(time.monotonic() - began)},
        "versions": versions(),
    }  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    (out / "mast3r.json").write_text(json.dumps(result, indent=1) + "\n")
    (out / "mast3r.md").write_text(page(result))
    logger.info("%s", json.dumps({"passed": passed, "checks": checks, "seconds": result["seconds"]}))
    return result


def page(result: dict[str, Any]) -> str:
    """The page of the results."""
    cfg, pairs = result["settings"], result["pairs"]
    lines = [
        "# MASt3R's head on a frozen encoder", "",
        f"`python -m bench.heads_proof mast3r`: {cfg['steps']} steps, pairs of a step in both orders: {cfg['batch']}; "
        f"{cfg['size'][0]} x {cfg['size'][1]} px, {result['seconds']['steps']} s of training. A head of "
        f"{result['parameters'] / 1e6:.1f} M parameters reads the demo's ViT-S/14 after block {BLOCKS}. It is trained "
        f"on {pairs['train']} pairs of rendered rooms by MASt3R's criterion, the matching's weight "
        f"{cfg['matching_weight']:g}.", "",
        f"Measured on {pairs['rooms']} pairs of rooms with other textures and photographs, and on {pairs['stereo']} "
        "pairs of windows of a stereo pair of photographs. Match: distance of the nearest descriptor from the true "
        "place, median; within 5 px: share; pose by PnP, medians: rotation, translation's direction, translation; "
        "points: mean distance without scale and shift. No motion: the guess that both views have one pose. Tokens: "
        "matches by the encoder's tokens, bilinear between patches.", "",
        f"| set | | {' | '.join(COLUMNS.values())} |", "|---|---|" + "---|" * len(COLUMNS),
    ]  # fmt: skip
    for name in LIMITS:
        for row, metrics in result["metrics"].items():
            values = [metrics[name].get(key, math.nan) for key in COLUMNS]
            cells = ("" if math.isnan(x) else "none" if math.isinf(x) else f"{x:.3g}" for x in values)
            lines.append(f"| {name} | {row} | {' | '.join(cells)} |")
    lines += ["", "What it has to show:", ""]
    for c in result["checks"]:
        others = [f"{row} {value:.3g}" for row, value in c["others"].items()]
        lines.append(
            f"- {'pass' if c['passed'] else 'FAIL'}: {c['set']}, {COLUMNS[c['metric']]}: {c['trained']:.3g}, at most "
            f"{c['limit']:g} is asked for, and less than {', '.join(others)}"
        )
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; 1 if the trained head misses a limit."""
    parser = argparse.ArgumentParser(prog="python -m bench.heads_proof mast3r", description=__doc__)
    for name in ("train", "test", "steps", "batch"):
        parser.add_argument(f"--{name}", type=int, default=getattr(Settings, name), help="(%(default)s)")
    parser.add_argument("--work", type=Path, default=Path("runs/heads_proof/mast3r"), help="(%(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="JSON and page (bench/results/heads)")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    cfg = Settings(train=args.train, test=args.test, steps=args.steps, batch=args.batch)
    return 0 if prove(cfg, args.work, args.results)["passed"] else 1
