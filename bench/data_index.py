"""What it costs to open millions of images and to choose among them: `python -m bench.data --index`.

Synthetic folders of shards are written for DUNE's 19 datasets in the published proportions, as `dune-fast data shard`
would write them, except that the tar files are holes of the right size. Over them, fresh processes open the real
`TrainLoader` from data=dune_shards, as the ranks of one node, and say which images each step holds and where their
bytes are; no image is read. The index leaves the page cache before each start, so the disk's part counts.

Memory is the sum over the ranks of the proportional set size (PSS: a page that two processes share counts half in
each), less what the same processes had before they opened the loader, with torch and DALI imported.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import tempfile
import time
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from dune_fast.dali_pipelines.datasets import DataConfig
from dune_fast.dali_pipelines.shards import FORMAT, MANIFEST, Manifest, Shard, Split
from dune_fast.dali_pipelines.tar_index import RECORD, write_index

DUNE_IMAGES = 20_717_467
MAX_GIGABYTES, MAX_SECONDS = 1.0, 10.0
"""Of a node, and until all of its loaders are open."""
_PER_SHARD = 4500  # about 500 MB
_STEPS = 60
_PATIENCE = 300.0  # seconds that a rank waits for the others, and they for it


@dataclass
class Opened:
    """What one node has cost."""

    ranks: int
    seconds: float
    """From the configuration to a loader (index opened, sizes and checksums looked at), of the slowest rank."""
    gigabytes: float
    """Of all ranks together, once every one has chosen the images of `_STEPS` steps."""
    choose_ms: float
    """Median over steps and ranks: which images a rank's part of a step has."""
    locate_ms: float
    """The same: in which shard and where in it their bytes are."""


def dune_shards(folder: Path) -> DataConfig:
    """data=dune_shards with its folder."""
    from dune_fast.engine.config import compose_config  # the ranks need not load it

    data = compose_config(["data=dune_shards"], complete=False).data
    for name, own in data.datasets.items():
        own.root = str(folder / name)
    return data


def share_out(images: int, sizes: list[int]) -> list[int]:
    """`images` in the proportions of `sizes`, at least one for each, adding up to `images`."""
    if images < len(sizes):
        raise ValueError(f"{images} images cannot be divided among {len(sizes)} datasets; give --index more")
    edges = np.rint(np.cumsum([0, *sizes]) / sum(sizes) * (images - len(sizes))).astype(int)
    return [int(count) + 1 for count in np.diff(edges)]


def write_synthetic(folder: Path, name: str, train: int, val: int, seed: int) -> None:
    """A folder of shards with images of 60 to 160 kB, none of which can be read."""
    rng, splits = np.random.default_rng(seed), []
    folder.mkdir(parents=True)
    for split, count in (("train", train), ("val", val)):
        if not count:
            continue
        records = np.empty(count, RECORD)
        records["shard"] = np.arange(count) // _PER_SHARD
        records["length"] = rng.integers(60_000, 160_000, count)
        records["crc"] = rng.integers(1, 1 << 32, count)
        records["width"], records["height"] = rng.integers(400, 1000, (2, count))
        taken = 512 + (-(-records["length"].astype(np.int64) // 512) + 2) * 512  # with its header and the JSON's two
        ends = taken.cumsum()
        firsts = np.arange(0, count, _PER_SHARD)
        starts = np.concatenate([[0], ends])[firsts]  # of each shard, were they one file
        records["offset"] = ends - taken + 512 - starts[records["shard"]]
        sizes = np.append(ends[firsts[1:] - 1], ends[-1]) - starts + 1024
        counts = np.diff(np.append(firsts, count))
        shards = [
            Shard(f"{split}-{i:06d}.tar", int(size), int(n), "0" * 64)
            for i, (size, n) in enumerate(zip(sizes, counts, strict=True))
        ]
        for shard in shards:
            with open(folder / shard.name, "wb") as file:
                file.truncate(shard.bytes)
        write_index(folder / f"{split}.index", records, len(shards))
        splits.append(Split(split, count, 0, f"{split}.index", "0" * 64, shards))
    (folder / MANIFEST).write_text(Manifest(FORMAT, name, "", {}, splits).dump())


def write_all(folder: Path, images: int) -> int:
    """All datasets; returns the bytes of their indexes."""
    datasets = dune_shards(folder).datasets
    train = share_out(images, [own.expected_train for own in datasets.values()])
    scale = images / DUNE_IMAGES
    for i, (name, own) in enumerate(datasets.items()):
        write_synthetic(folder / name, name, train[i], round(own.expected_val * scale), i)
    return sum(path.stat().st_size for path in folder.rglob("*.index"))


def forget(folder: Path) -> None:
    """Drops the indexes from the page cache, where the system allows it."""
    for path in folder.rglob("*.index"):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def proportional_bytes() -> int:
    """PSS of this process."""
    found = re.search(r"^Pss: +(\d+) kB", Path("/proc/self/smaps_rollup").read_text(), re.MULTILINE)
    assert found is not None
    return 1024 * int(found[1])


def _rank(connection: Connection, data: DataConfig, batch: int, rank: int, world_size: int) -> None:
    """One rank; after each answer it waits until all ranks have given theirs."""

    def say(value: object) -> None:
        connection.send(value)
        if not connection.poll(_PATIENCE):
            raise TimeoutError("the other ranks do not answer")
        connection.recv()

    from dune_fast.dali_pipelines.loader import TrainLoader
    from dune_fast.dali_pipelines.pipeline import import_dali

    import_dali()
    say(None)
    say(proportional_bytes())
    began = time.perf_counter()
    with TrainLoader(data, 336, batch, rank, world_size, 0, torch.device("cpu")) as loader:
        say((time.perf_counter() - began, loader.num_images))
        choose, locate = [], []
        for step in range(_STEPS):
            begin = time.perf_counter()
            _, _, images = loader.plans.choose(step * 997)
            chosen = time.perf_counter()
            for dataset, index in images:
                loader.datasets[dataset].train.locate(index)
            choose.append(1e3 * (chosen - begin))
            locate.append(1e3 * (time.perf_counter() - chosen))
        say((choose, locate))
        say(proportional_bytes())


def open_node(folder: Path, images: int, batch: int, ranks: int) -> Opened:
    """Opens the loaders of one node in fresh processes.

    Raises:
        RuntimeError: a rank has ended early (its message is on stderr), or a loader has another number of images.
    """
    context = multiprocessing.get_context("spawn")
    pipes, data = [context.Pipe() for _ in range(ranks)], dune_shards(folder)
    processes = [
        context.Process(target=_rank, args=(theirs, data, batch, rank, ranks)) for rank, (_, theirs) in enumerate(pipes)
    ]

    def listen() -> list:
        answers = []
        for ours, _ in pipes:
            if not ours.poll(_PATIENCE):
                raise RuntimeError(f"a rank has not answered for {_PATIENCE:g} s")
            answers.append(ours.recv())
        for ours, _ in pipes:
            ours.send(None)
        return answers

    try:
        for process, (_, theirs) in zip(processes, pipes, strict=True):
            process.start()
            theirs.close()  # so that its end is seen here
        listen()
        before = listen()
        opened = listen()
        if any(found != images for _, found in opened):
            raise RuntimeError(f"the loaders have {[found for _, found in opened]} images instead of {images}")
        times = listen()
        after = listen()
    except EOFError:
        raise RuntimeError("a rank has ended early: its message is above") from None
    finally:
        for process in processes:
            if process.pid is not None:
                process.join(5)
                process.kill()
                process.join()
    choose, locate = (median(ms for rank in times for ms in rank[i]) for i in range(2))
    return Opened(ranks, max(seconds for seconds, _ in opened), (sum(after) - sum(before)) / 1e9, choose, locate)


def measure(args: argparse.Namespace, console: Console) -> tuple[dict, bool]:
    """Writes the index, opens it on nodes of every size asked for, prints a table.

    Returns:
        What was measured, and whether it is within the limits.

    Raises:
        ValueError: fewer images than datasets, or a batch that the ranks cannot share.
    """
    if any(ranks < 1 or args.index_batch % ranks for ranks in args.index_ranks):
        raise ValueError(
            f"--index-ranks {' '.join(map(str, args.index_ranks))} cannot share --index-batch {args.index_batch}: "
            "give a multiple of each"
        )
    with tempfile.TemporaryDirectory(dir=args.index_folder) as temporary:
        folder, began = Path(temporary), time.perf_counter()
        index_bytes = write_all(folder, args.index)
        console.print(
            f"{args.index:,} images in 19 datasets, {index_bytes / 1e9:.2f} GB of index, written in "
            f"{time.perf_counter() - began:.0f} s; {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
        )
        nodes = []
        for ranks in args.index_ranks:
            forget(folder)
            nodes.append(open_node(folder, args.index, args.index_batch, ranks))
    table = Table("ranks", "open, s", "node, GB", f"choose {args.index_batch}, ms", "locate, ms", box=None)
    for node in nodes:
        figures = (f"{x:.2f}" for x in (node.seconds, node.gigabytes, node.choose_ms, node.locate_ms))
        table.add_row(str(node.ranks), *figures)
    console.print(table)
    within = all(node.gigabytes <= MAX_GIGABYTES and node.seconds <= MAX_SECONDS for node in nodes)
    if not within:
        console.print(f"[red]over the limits of {MAX_GIGABYTES:g} GB a node and {MAX_SECONDS:g} s[/red]")
    return {"index_bytes": index_bytes, "batch": args.index_batch, "nodes": [asdict(node) for node in nodes]}, within


def add_flags(parser: argparse.ArgumentParser) -> None:
    """`--index` and what belongs to it."""
    group = parser.add_argument_group("index", "memory and start over many images, instead of the comparison")
    group.add_argument(
        "--index", type=int, nargs="?", const=DUNE_IMAGES, metavar="IMAGES",
        help=f"how many synthetic images (default: DUNE's {DUNE_IMAGES:,})",
    )  # fmt: skip
    group.add_argument(
        "--index-ranks", type=int, nargs="+", default=[1, 2, 8], help="ranks of a node (default: %(default)s)"
    )
    group.add_argument("--index-batch", type=int, default=1024, help="global batch (default: %(default)s)")
    group.add_argument("--index-folder", type=Path, help="where the index is written (default: the temporary folder)")
