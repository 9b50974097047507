"""What the loader's tests share: a configuration, some batches, ways to break a file."""

import errno
import os

import torch
from image_helpers import encode
from PIL import Image

from dune_fast.dali_pipelines.datasets import DataConfig, DatasetConfig
from dune_fast.dali_pipelines.loader import Batch, TrainLoader

CPU = torch.device("cpu")


def config(*roots, **options) -> DataConfig:
    holdout = options.pop("holdout", 0)
    datasets = {f"d{i}": DatasetConfig(root=str(root), group=f"g{i}", holdout=holdout) for i, root in enumerate(roots)}
    return DataConfig(datasets=datasets, num_threads=2, **options)


def take(data: DataConfig, steps: int, start: int = 0, batch: int = 8, rank: int = 0, world: int = 1, seed: int = 0):
    with TrainLoader(data, 32, batch, rank, world, seed, CPU) as loader:
        batches = loader.batches(start)
        return [next(batches) for _ in range(steps)]


def damage(path, how: str) -> None:
    """Ways in which JPEGs are broken; the last one passes a look at the header and kills DALI's pipeline."""
    data, png = path.read_bytes(), encode(Image.open(path), "PNG")
    half, tables = data[: len(data) // 2], data.index(b"\xff\xc4") + 5
    contents = {
        "empty": b"",
        "text": b"<html>404 Not Found</html>",
        "truncated": half,
        "truncated with a thumbnail": half[:2] + b"\xff\xfe\x00\x06..\xff\xd9" + half[2:],  # with its own end marker
        "half a PNG": png[: len(png) // 2],
        "wrong tables": data[:tables] + b"\xff" * 16 + data[tables + 16 :],
    }
    if how == "forbidden":
        path.chmod(0)
        return
    path.unlink()
    if how == "a folder":
        path.mkdir()
    elif how != "vanished":
        path.write_bytes(contents[how])


def broken_paths(loader: TrainLoader) -> list[str]:
    return [loader._source.path(*image) for image in loader._source.quarantine._broken]


def assert_others_unchanged(before: list[Batch], after: list[Batch], lost: set[str]) -> None:
    """Each image is where it was, but for those that were lost, which are nowhere."""
    for whole, batch in zip(before, after, strict=True):
        assert len(batch) == len(whole) and not lost & set(batch.paths)
        kept = [i for i, path in enumerate(whole.paths) if path not in lost]
        assert [batch.paths[i] for i in kept] == [whole.paths[i] for i in kept]
        torch.testing.assert_close(batch.images[kept], whole.images[kept], atol=1e-6, rtol=0)


def refuse_to_open(path: str, monkeypatch) -> None:
    """What the system says to a user who may not read a file."""
    real = open

    def refuse(file, *arguments, **options):
        if str(file) == path:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return real(file, *arguments, **options)

    monkeypatch.setattr("builtins.open", refuse)
