"""What `bench.data` compares: this loader, PIL + torchvision in a DataLoader, and webdataset.

The same files, the same distributions of the augmentation, the same number of worker processes or threads. The
baselines run the colour operations on PIL images, which for them is faster than on tensors (24 ms an image at 336
pixels against 30), and give [B, 3, S, S] normalised float32 as this loader does.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dune_fast.dali_pipelines.datasets import DataConfig, DatasetConfig
from dune_fast.dali_pipelines.loader import TrainLoader
from dune_fast.kernels.augment import IMAGENET_MEAN, IMAGENET_STD
from dune_fast.teachers.timm_model import import_torchvision

_PREFETCH = 2  # batches ahead: of each worker, and of this loader
_ENDLESS = 1 << 40


def build_transform(size: int, config: DataConfig):
    """torchvision v2's transform with the distributions of `config`, of a PIL image; a callable that can be pickled."""
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


class _Transform:
    """A PIL image's file to a tensor. The transform is built in the worker: torchvision is its business."""

    def __init__(self, size: int, config: DataConfig) -> None:
        self.size, self.config = size, config
        self._transform = None

    def __call__(self, file: Path | io.BytesIO) -> Tensor:
        self._transform = self._transform or build_transform(self.size, self.config)
        with Image.open(file) as image:
            return self._transform(image.convert("RGB"))

    def sample(self, sample: dict) -> Tensor:
        """The same of webdataset's sample."""
        return self(io.BytesIO(sample["jpg"]))


class _Files(Dataset):
    """Image files without end, in a random order."""

    def __init__(self, paths: list[Path], size: int, config: DataConfig) -> None:
        self.paths, self.transform = paths, _Transform(size, config)

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, index: int) -> Tensor:
        return self.transform(self.paths[torch.randint(len(self.paths), ()).item()])


def ours(paths: list[Path], size: int, batch: int, workers: int, device: torch.device) -> Iterator[Tensor]:
    """This project's loader."""
    own = DatasetConfig(root=str(paths[0].parent))
    config = DataConfig(datasets={"images": own}, num_threads=workers, prefetch=_PREFETCH)
    with TrainLoader(config, size, batch, 0, 1, 0, device) as loader:
        for item in loader.batches():
            yield item.images


def torchvision_loader(paths: list[Path], size: int, batch: int, workers: int) -> Iterator[Tensor]:
    """PIL and torchvision v2 in worker processes, which start at once."""
    files = _Files(paths, size, DataConfig())
    loader = DataLoader(files, batch, num_workers=workers, prefetch_factor=_PREFETCH, multiprocessing_context="spawn")
    return (batch for batch in loader)  # unlike a function that yields, this asks for the iterator, and workers, now


def webdataset_loader(paths: list[Path], size: int, batch: int, workers: int) -> Iterator[Tensor]:
    """webdataset's reader of tar files, one a worker, before the same decoding and transform; workers start at once."""
    import webdataset

    folder = paths[0].parent.parent / "shards"
    folder.mkdir(exist_ok=True)
    for number in range(workers):
        with tarfile.open(folder / f"{number:03d}.tar", "w", dereference=True) as tar:
            for i, path in enumerate(paths):
                tar.add(path, f"{i:06d}.jpg")
    shards = [str(path) for path in sorted(folder.glob("*.tar"))]
    pipeline = webdataset.DataPipeline(
        webdataset.ResampledShards(shards),
        webdataset.tarfile_to_samples(),
        webdataset.shuffle(1000),
        webdataset.map(_Transform(size, DataConfig()).sample),
        webdataset.batched(batch, collation_fn=torch.stack),
    )
    loader = DataLoader(
        pipeline, None, num_workers=workers, prefetch_factor=_PREFETCH, multiprocessing_context="spawn"
    )
    return (batch for batch in loader)
