"""What the loader's tests share: a configuration, some batches, ways to break a file."""

import errno
import os

import torch
from PIL import Image

from dune_fast.dali_pipelines.datasets import DataConfig, DatasetConfig
from dune_fast.dali_pipelines.loader import TrainLoader

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
    """Ways in which files are broken; the last one passes a look at the header and kills DALI's pipeline."""
    data = path.read_bytes()
    if how == "vanished":
        path.unlink()
    elif how == "a folder":
        path.unlink()
        path.mkdir()
    elif how == "forbidden":
        path.chmod(0)
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "text":
        path.write_bytes(b"<html>404 Not Found</html>")
    elif how == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif how == "truncated with a thumbnail":  # which has an end marker of its own
        path.write_bytes(data[:2] + b"\xff\xfe\x00\x06..\xff\xd9" + data[2 : len(data) // 2])
    elif how == "half a PNG":
        Image.open(path).save(path, "PNG")
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2])
    elif how == "wrong tables":
        tables = data.index(b"\xff\xc4") + 5
        path.write_bytes(data[:tables] + b"\xff" * 16 + data[tables + 16 :])


def refuse_to_open(path: str, monkeypatch) -> None:
    """What the system says to a user who may not read a file."""
    real = open

    def refuse(file, *arguments, **options):
        if str(file) == path:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return real(file, *arguments, **options)

    monkeypatch.setattr("builtins.open", refuse)
