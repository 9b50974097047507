"""What is there of a dataset, how much is missing, and whether it can be decoded: `dune-fast data check`."""

from __future__ import annotations

import os
from contextlib import closing
from dataclasses import dataclass, field

import numpy as np
import torch

from dune_fast.dali_pipelines.datasets import DataConfig, Dataset, DatasetConfig, index_dataset
from dune_fast.dali_pipelines.errors import BrokenImage, DataError
from dune_fast.dali_pipelines.order import Permutation
from dune_fast.dali_pipelines.pipeline import Decoder, whole_images
from dune_fast.dali_pipelines.shards import is_manifest_folder, read_manifest, verify_shards
from dune_fast.dali_pipelines.source import Image, ImageSource
from dune_fast.teachers.progress import Progress

OK, WARN, FAIL = "ok", "warn", "fail"
TOLERATED = 0.01
"""Share of the expected images that may be missing without being a failure: lists differ by a few broken files."""
_BATCH = 16  # images that DALI decodes at a time
_SIZE = 64  # pixels; the whole image is decoded, only the resize is cheap


@dataclass
class Report:
    """What was found of one dataset."""

    name: str
    group: str
    status: str = OK
    """"ok", "warn" (usable, but not as expected) or "fail"."""
    train: int = 0
    val: int = 0
    sampled: int = 0
    """Images that were read and decoded."""
    broken: list[tuple[str, str]] = field(default_factory=list)
    """(path, reason) of each sampled image that is broken."""
    smallest: int = 0
    """Pixels of the shortest side in the sample."""
    median: tuple[int, int] = (0, 0)
    """Median width and median height in the sample."""
    notes: list[str] = field(default_factory=list)
    """What is wrong, and what to do."""

    def note(self, status: str, text: str) -> None:
        """Adds a sentence and lowers the status."""
        self.status = max(self.status, status, key=(OK, WARN, FAIL).index)
        self.notes.append(text)


def check_dataset(name: str, config: DataConfig, sample: int | None = 64, full: bool = False, seed: int = 0) -> Report:
    """Counts the images of `config.datasets[name]`, compares with what is expected, decodes some, says what is wrong.

    Args:
        sample: images of each split to decode, drawn by `seed`; None decodes all.
        full: of shards, read every byte and compare with the manifest's checksums.

    Raises:
        DataError: a negative sample. Whatever is wrong with the dataset is in the report instead.
    """
    if sample is not None and sample < 0:
        raise DataError(f"a sample of {sample} images cannot be drawn: give 0 or more")
    own = config.datasets[name]
    report = Report(name, own.group)
    try:
        dataset = index_dataset(name, own)
    except (ValueError, OSError) as error:  # DataError, AssetError, a folder that may not be read
        report.note(FAIL, _with_access(str(error), own))
        return report
    report.train, report.val = len(dataset.train), len(dataset.val)
    if contents := dataset.contents():
        report.note(OK, contents)
    _compare(report, own)
    try:
        if is_manifest_folder(folder := os.path.expanduser(own.root)):
            _check_shards(report, folder, full)
        _decode_sample(report, dataset, config, sample, seed)
    except (DataError, OSError) as error:  # the storage does not answer, or there is no decoder
        report.note(FAIL, str(error))
    return report


def _with_access(problem: str, config: DatasetConfig) -> str:
    if config.layout:
        problem += f"; wanted: {config.layout}"
    if config.homepage:
        problem += f"; ask for access at {config.homepage}"
        problem += f" (licence: {config.licence})" if config.licence else ""
    return problem


def _compare(report: Report, config: DatasetConfig) -> None:
    """Numbers of images against the expected ones. A holdout is ours: it moves images, so there the sum counts."""
    expected = {"train": config.expected_train, "val": config.expected_val}
    found = {"train": report.train, "val": report.val}
    if config.holdout and all(expected.values()):
        expected, found = {"train and val": sum(expected.values())}, {"train and val": sum(found.values())}
    for split, wanted in expected.items():
        if not wanted or found[split] == wanted:
            continue
        difference = found[split] - wanted
        status = FAIL if -difference > TOLERATED * wanted else WARN
        text = f"{split}: {found[split]:,} images, {wanted:,} expected: {abs(difference):,} "
        text += "missing" if difference < 0 else "more"
        key = split.partition(" ")[0]
        cure = f"if this is on purpose, set data.datasets.{report.name}.expected_{key}=0"
        report.note(status, _with_access(text, config) + f"; {cure}" if status == FAIL else f"{text}; {cure}")


def _check_shards(report: Report, folder: str, full: bool) -> None:
    """Broken images that the sharding left out, and, on demand, every checksum."""
    splits = read_manifest(folder).splits
    if left_out := sum(split.broken for split in splits):
        report.note(WARN, f"{left_out} broken images of the source are in no shard, see {folder}/quarantine.jsonl")
    if full:
        size = sum(shard.bytes for split in splits for shard in split.shards)
        with Progress(f"reading {report.name}", size >> 20, "MiB") as progress:
            for problem in verify_shards(folder, lambda count: progress.advance(count / (1 << 20), count)):
                report.note(FAIL, problem)


def _decode_sample(report: Report, dataset: Dataset, config: DataConfig, sample: int | None, seed: int) -> None:
    """Reads and decodes images of both splits as training would, without stopping at broken ones."""
    chosen = {}
    for split, images in (("train", dataset.train), ("val", dataset.val)):
        count = len(images) if sample is None else min(len(images), sample)
        if count:
            chosen[split] = np.sort(Permutation(len(images), seed)(np.arange(count))).tolist()
    report.sampled, sizes = sum(map(len, chosen.values())), []
    decoder = Decoder(_BATCH, _SIZE, config.num_threads, torch.device("cpu"))
    with Progress(f"decoding {dataset.name}", report.sampled) as progress, closing(decoder):
        for split, indices in chosen.items():
            with closing(ImageSource([dataset], split, config)) as source:
                for start in range(0, len(indices), _BATCH):
                    batch = [(0, index) for index in indices[start : start + _BATCH]]
                    progress.advance(len(batch), _decode(report, source, decoder, batch, sizes))
    if sizes:
        report.smallest = int(np.min(sizes))
        width, height = np.median(sizes, axis=0)
        report.median = int(width), int(height)
    if report.broken:
        share = len(report.broken) / report.sampled
        status = FAIL if share > config.max_broken_share and len(report.broken) > 1 else WARN
        report.note(status, f"{len(report.broken)} of {report.sampled} sampled images are broken ({share:.1%})")


def _decode(report: Report, source: ImageSource, decoder: Decoder, images: list[Image], sizes: list) -> int:
    """Decodes a batch; appends its broken images to the report, and the sizes of the others. Returns the bytes read."""
    good = []
    for image, result in zip(images, source.read_all(images), strict=True):
        if isinstance(result, BrokenImage):
            report.broken.append((source.path(*image), str(result)))
        else:
            good.append((image, result))
    encoded = [result.data for _, result in good]
    for i, reason in decoder.refused(encoded, whole_images([result.size for _, result in good], _SIZE)).items():
        image = good[i][0]
        if (broken := source.refused(image, encoded[i], reason)) is not None:
            report.broken.append((source.path(*image), str(broken)))
    sizes += [result.size for _, result in good]
    return sum(map(len, encoded))
