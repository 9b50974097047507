"""`python -m bench.heads_proof mast3r`: MASt3R's head learns matches and poses on a frozen ViT-S.

Rendered rooms with photographs on their walls, an encoder that nobody trains here, a small decoder, the published
criterion, and the engine: `dune-fast heads train`. The head is measured before and after training on rooms with other
textures and on a stereo pair of photographs with measured depth.
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

import torch
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
from dune_fast.heads.mast3r.head import Mast3rHead
from dune_fast.heads.mast3r.pair_folders import PairDatasetConfig, open_pairs
from dune_fast.heads.mast3r.pairs import PairDataConfig
from dune_fast.heads.mast3r.scenes import SceneConfig, write_scenes
from dune_fast.load import load_encoder
from dune_fast.tasks.head_task import FrozenEncoder
from dune_fast.tasks.mast3r_validation import measure
from dune_fast.teachers.architecture import architecture_metadata

logger = logging.getLogger("bench.heads_proof")
HEAD = {
    "dec_dim": 128, "dec_depth": 4, "dec_heads": 2, "desc_dim": 16, "layer_dims": [24, 48, 96, 192],
    "feature_dim": 48, "last_dim": 32,
}  # fmt: skip
COLUMNS = {
    "match_px": "match (px)", "match_5px": "within 5 px", "average_precision": "AP", "rotation_deg": "rotation (deg)",
    "translation_m": "translation (m)", "points_invariant": "points",
}  # fmt: skip
LIMITS: dict[str, dict[str, float]] = {
    "rooms": {"match_px": 25.0, "rotation_deg": 20.0},
    "stereo": {"match_px": 22.0},
}
"""What the trained head has to reach at most, on each of the sets to measure on. Set with a margin after a first run,
which was measured on other rooms (test_seed 2: 17.7 px and 10 degrees) and on the same stereo pair (14.6 px)."""


@dataclass(frozen=True)
class Settings:
    """Sizes of the proof."""

    rooms: SceneConfig = field(default_factory=lambda: SceneConfig(
        seed=1, size=(216, 162), overlap=(0.6, 0.95), baseline=(0.1, 0.5)))
    test_seed: int = 3
    """Of the rooms to measure on: other textures, other places."""
    train: int = 60
    """Rooms to train on."""
    test: int = 5
    """Rooms to measure on."""
    size: tuple[int, int] = (112, 84)
    steps: int = 3000
    batch: int = 1
    lr: float = 5e-4
    n_corres: int = 512
    matching_weight: float = 1.0
    """The published 0.075 left descriptors at chance after 160 steps; with 1, they leave it after 500 to 900."""


def write_encoder(path: Path) -> None:
    """The demo's ViT-S/14 after its tenth block, as a file."""
    vit = encoder_of_the_demo()
    cfg = dataclasses.replace(vit.cfg, depth=len(vit.blocks))
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: x.contiguous() for name, x in vit.state_dict().items()}, path, architecture_metadata(cfg))


def prepare(cfg: Settings, work: Path) -> dict[str, Path]:
    """Everything that the training reads, made once: encoder, rooms, stereo pair."""
    code = Path(scenes.__file__).read_bytes()
    mark = hashlib.sha256(repr((cfg.rooms, cfg.test_seed, cfg.train, cfg.test)).encode() + code).hexdigest()[:12]
    places = {name: work / f"{name}_{mark}" for name in ("train", "rooms")}
    places |= {"encoder": work / "encoder.safetensors", "stereo": work / "stereo"}
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
        "head.data.crop=centre", "head.data.jitter=[0,0,0,0]", f"optimizer.lr={cfg.lr}",
        "optimizer.warmup_fraction=0.1", f"train.steps={cfg.steps}",
        f"train.global_batch={cfg.batch}", "train.log_every=10", "train.checkpoint_every=50",
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


def measured(cfg: Settings, places: dict[str, Path], head: Mast3rHead) -> dict[str, dict[str, float]]:
    """Metrics on both sets."""
    encoder = FrozenEncoder(load_encoder(places["encoder"]))
    data = PairDataConfig(sizes=[list(cfg.size)], n_corres=cfg.n_corres)
    found = {}
    for name in LIMITS:
        folder = open_pairs(name, PairDatasetConfig(str(places[name])))
        metrics = measure(head, encoder, folder, data, Ranks())
        found[name] = {key: round(metrics[key], 4) for key in COLUMNS}
        logger.info("%s: %s", name, found[name])
    return found


def prove(cfg: Settings, work: Path, out: Path) -> dict[str, Any]:
    """Runs the proof; writes mast3r.json and mast3r.md."""
    began = time.monotonic()
    places = prepare(cfg, work)
    made = time.monotonic()
    mark = hashlib.sha256(json.dumps([dataclasses.asdict(cfg), HEAD]).encode()).hexdigest()[:12]
    run = work / f"run_{mark}"
    train(cfg, places, run)
    trained = time.monotonic()
    head = load_head(run)
    assert isinstance(head, Mast3rHead)
    torch.manual_seed(0)
    untrained = Mast3rHead(**head.options()).eval().requires_grad_(False)
    rows = {"untrained": measured(cfg, places, untrained), "trained": measured(cfg, places, head)}
    checks = [
        {"set": name, "metric": metric, "limit": limit, "untrained": rows["untrained"][name][metric],
         "trained": rows["trained"][name][metric]}
        for name, limits in LIMITS.items() for metric, limit in limits.items()
    ]  # fmt: skip
    passed = all(c["trained"] <= c["limit"] and c["trained"] < c["untrained"] for c in checks)
    losses = [r["loss"] for r in read_metrics(run / "metrics.jsonl") if "loss" in r]
    counts = {n: len(open_pairs(n, PairDatasetConfig(str(places[n])))) for n in ("train", *LIMITS)}
    parameters = sum(p.numel() for p in head.parameters())
    result = {
        "passed": passed, "checks": checks, "metrics": rows, "pairs": counts, "parameters": parameters,
        "settings": dataclasses.asdict(cfg), "head": HEAD, "loss": [round(x, 3) for x in losses],
        "seconds": {"data": round(made - began), "training": round(trained - made),
                    "all": round(time.monotonic() - began)},
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
        f"{cfg['size'][0]} x {cfg['size'][1]} px, {result['seconds']['all']} s in all. A head of "
        f"{result['parameters'] / 1e6:.1f} M parameters reads the demo's ViT-S/14 after its tenth block. It is trained "
        f"on {pairs['train']} pairs of rendered rooms by MASt3R's criterion, the matching's weight "
        f"{cfg['matching_weight']:g}.", "",
        f"Measured on {pairs['rooms']} pairs of rooms with other textures and photographs, and on {pairs['stereo']} "
        "pairs of windows of a stereo pair of photographs. Match: distance of the nearest descriptor from the true "
        "place, median; within 5 px: share; pose by PnP, medians; points: mean distance without scale and shift.", "",
        f"| set | head | {' | '.join(COLUMNS.values())} |", "|---|---|" + "---|" * len(COLUMNS),
    ]  # fmt: skip
    for name in LIMITS:
        for row, metrics in result["metrics"].items():
            values = " | ".join("none" if math.isinf(metrics[name][key]) else f"{metrics[name][key]:.3g}"
                                for key in COLUMNS)  # fmt: skip
            lines.append(f"| {name} | {row} | {values} |")
    lines += ["", "What it has to show:", ""]
    for c in result["checks"]:
        holds = c["trained"] <= c["limit"] and c["trained"] < c["untrained"]
        lines.append(
            f"- {'pass' if holds else 'FAIL'}: {c['set']}, {COLUMNS[c['metric']]}: {c['trained']:.3g}, at most "
            f"{c['limit']:g} is asked for; untrained {c['untrained']:.3g}"
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
