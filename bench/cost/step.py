"""The time of a training step at DUNE's proportions, option by option, on a CPU.

A quarter of the widths, of the heads and of the grid's area, the same depths: every block's products keep their
proportions to each other, and teachers and student to one another, at 1/64 of the operations an image. Steps take
turns, and processor time is what counts, so that other work on the machine disturbs all alike.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from bench.proof.cells import machine_name
from bench.step_variants import ROUTED, Variant, configure, synthetic_config
from dune_fast.dali_pipelines.datasets import DataConfig, DatasetConfig
from dune_fast.dali_pipelines.storage import write_whole
from dune_fast.engine.cache_build import build
from dune_fast.engine.config import RunConfig, compose_config
from dune_fast.engine.deepspeed_engine import init_distributed
from dune_fast.engine.flops import run_flops
from dune_fast.engine.stages import at_size
from dune_fast.engine.trainer import Trainer
from dune_fast.teachers.architecture import architecture_metadata, random_vit_state
from dune_fast.teachers.ensemble import TeacherEnsemble
from dune_fast.teachers.registry import family_class

NARROWER = 4
BATCH = 8
LIVE = "live"

VARIANTS = (
    Variant(LIVE, "every teacher on every image"),
    Variant("routed", "each teacher on its own images", objective=ROUTED),
    Variant("pre-sampled", "teachers dropped before they run", objective={"presample": True}),
    Variant("one teacher an image", "the same", objective={"presample": True, "drop_probability": 1.0}),
    Variant("half scale", "teachers at half the size", teachers={"scale": 0.5}),
    Variant("half of the patches", "the loss on half of the patches", objective={"patch_share": 0.5}),
)
CACHES = ("fp32", "bf16", "int8")
"""Formats of caches that a step reads."""
STAGES = {"progressive, 1/3 of the side": 3, "progressive, 2/3 of the side": 1.5}
"""Name -> what the images' side is divided by: a step of each stage of 112, 224, 336 px."""
_GROUPS, _IMAGES, _SIDE = ("generic", "3d", "human"), 8, 192


def reduced_config(
    folder: Path, experiment: str = "dune_336", narrower: int = NARROWER, batch: int = BATCH
) -> RunConfig:
    """DUNE's recipe `narrower` times narrower, on a grid of 1 / sqrt(narrower) of the patches a side; drawn teachers of
    the published depths, whose files are written to `folder`."""
    cfg = compose_config([f"experiment={experiment}", "deepspeed=zero0"])
    grid = round(cfg.image_size // cfg.student.patch_size / narrower**0.5)
    size = grid * cfg.student.patch_size
    teachers = {}
    for i, (name, teacher) in enumerate(cfg.teachers.items()):
        whole = family_class(teacher.family).architecture(teacher)
        vit = dataclasses.replace(
            whole, embed_dim=whole.embed_dim // narrower, num_heads=max(1, whole.num_heads // narrower)
        )
        path = folder / f"{name}.safetensors"
        save_file(random_vit_state(vit, i + 1), path, metadata=architecture_metadata(vit))
        teachers[name] = dataclasses.replace(
            teacher, family="dinov2", weights=str(path), num_features=vit.embed_dim, num_heads=vit.num_heads
        )
    student = dataclasses.replace(
        cfg.student, image_size=size, embed_dim=cfg.student.embed_dim // narrower,
        num_heads=max(1, cfg.student.num_heads // narrower),
    )  # fmt: skip
    files = {name: teacher.weights for name, teacher in teachers.items()}
    cfg = synthetic_config(dataclasses.replace(cfg, image_size=size, student=student, teachers=teachers), batch, 1000)
    for name, weights in files.items():
        cfg.teachers[name].weights = weights
    return dataclasses.replace(cfg, data=_images(folder / "images"))


def _images(folder: Path) -> DataConfig:
    """A few photographs of smooth noise for each group."""
    for i, group in enumerate(_GROUPS):
        (folder / group).mkdir(parents=True)
        for j in range(_IMAGES):
            coarse = np.random.default_rng(i * _IMAGES + j).integers(0, 256, (12, 12, 3), dtype=np.uint8)
            image = Image.fromarray(coarse).resize((_SIDE, _SIDE), Image.Resampling.BICUBIC)
            image.save(folder / group / f"{j}.jpg", quality=92)
    datasets = {group: DatasetConfig(root=str(folder / group), group=group) for group in _GROUPS}
    return DataConfig(datasets=datasets, num_threads=1)


def in_turns(steps: Mapping[str, Callable[[int], Any]], rounds: int) -> dict[str, list[float]]:
    """Processor seconds of each step in every round but the first."""
    found: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(rounds + 1):
        for name, step in steps.items():
            began = time.process_time()
            step(i)
            if i:
                found[name].append(time.process_time() - began)
    return found


def time_variants(
    cfg: RunConfig, folder: Path, variants: Sequence[Variant], caches: Sequence[str], stages: Mapping[str, float],
    rounds: int,
) -> dict[str, Any]:  # fmt: skip
    """Name -> seconds, their range (first to last fifth) and the live step's arithmetic over its own. The first variant
    is the live step; runs and caches are written to `folder`."""
    device = init_distributed()
    configs = {variant.name: configure(copy.deepcopy(cfg), variant) for variant in variants}
    for form in caches:
        cache = dataclasses.replace(cfg.cache, folder=str(folder / f"cache_{form}"), format=form)
        data = dataclasses.replace(cfg.data, views=1)
        configs[f"cached, {form}"] = dataclasses.replace(copy.deepcopy(cfg), cache=cache, data=data)
        build(configs[f"cached, {form}"])
    for name, divisor in stages.items():
        # the table of positions stays that of the whole size
        patch = cfg.student.patch_size
        configs[name] = at_size(copy.deepcopy(cfg), round(cfg.image_size / divisor / patch) * patch)
    trunks = _trunks(cfg, device)
    shares, live = run_flops(cfg, trunks), _training(cfg, trunks)
    result: dict[str, Any] = {"teachers_share": shares.all_teachers / shares.training, "steps": {}}
    with ExitStack() as stack:
        steps = {
            name: _step(dataclasses.replace(one, output_dir=str(folder / f"run_{i}")), stack)
            for i, (name, one) in enumerate(configs.items())
        }
        times = in_turns(steps, rounds)
    for name, values in times.items():
        cuts = quantiles(values, n=5) if len(values) > 1 else values * 4
        result["steps"][name] = {
            "seconds": median(values), "range": [cuts[0], cuts[-1]],
            "arithmetic": live / _training(configs[name], trunks),
        }  # fmt: skip
    return result


def _step(cfg: RunConfig, stack: ExitStack) -> Callable[[int], None]:
    """The trainer's own step, with the reading and decoding of its images and of its cache."""
    trainer = Trainer(cfg)
    stack.callback(trainer.task.loader.close)
    batches = trainer.task.loader.batches(0)

    def step(i: int) -> None:
        trainer.train_step(next(batches))

    return step


def _trunks(cfg: RunConfig, device: torch.device) -> dict[str, torch.nn.Module]:
    ensemble = TeacherEnsemble(cfg.teachers, cfg.student.patch_size, None, device)
    return {name: teacher.trunk for name, teacher in ensemble.teachers.items()}


def _training(cfg: RunConfig, trunks: Mapping[str, torch.nn.Module]) -> int:
    flops = run_flops(copy.deepcopy(cfg), trunks).training
    assert flops is not None, "a teacher that is built has an arithmetic"
    return flops


def measure_steps(results: Path, rounds: int) -> Path:
    """Measures, writes step.json; returns its path. SystemExit on a GPU, whose steps `bench.step` measures."""
    if torch.cuda.is_available():
        raise SystemExit("--step is for CPUs; on a GPU: python -m bench.step")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        cfg = reduced_config(Path(folder))
        found = time_variants(cfg, Path(folder), VARIANTS, CACHES, STAGES, rounds)
    live = found["steps"][LIVE]["seconds"]
    about = (
        f"`python -m bench.cost --step`: `dune_336` {NARROWER} times narrower at {cfg.image_size} px, {BATCH} images, "
        f"three ViT-L and the ViT-B with their depths and projectors; the teachers have "
        f"{100 * found['teachers_share']:.0f} % of the arithmetic. Steps in turns, medians of {rounds} (first to last "
        f"fifth), processor time on {machine_name()}, which other work shared: one thread for the products, and "
        "those that read and decode images and cache, whose files lie in the operating system's memory."
    )
    ratios = {name: live / one["seconds"] for name, one in found["steps"].items() if name.startswith("cached")}
    results.mkdir(parents=True, exist_ok=True)
    path = results / "step.json"
    write_whole(path, (json.dumps({"about": about, "ratios": ratios, **found}, indent=1) + "\n").encode())
    return path
