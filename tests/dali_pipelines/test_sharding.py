"""Writing shards: what is in them, whatever the number of workers."""

import base64
import io
import json
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from loader_helpers import damage
from PIL import Image
from sharding_helpers import SETTINGS, configured, contents, digests, read, webdataset

from dune_fast.dali_pipelines.datasets import DatasetConfig, index_dataset
from dune_fast.dali_pipelines.images import plain_jpeg
from dune_fast.dali_pipelines.pipeline import Decoder
from dune_fast.dali_pipelines.shard_writer import Item, Job, ShardSettings, Tally, prepare, write_shard
from dune_fast.dali_pipelines.sharding import shard_dataset
from dune_fast.dali_pipelines.shards import open_manifest_folder
from dune_fast.dali_pipelines.storage import Location, Reader
from dune_fast.dali_pipelines.tar_index import open_index

BROKEN = {"cut.jpg", "text.jpg", "half.png", "float.tiff"}


@pytest.fixture(scope="module")
def source(tmp_path_factory, write_folder, photo) -> Path:
    """26 images: JPEGs, other formats, turned ones, and four broken ones."""
    root = write_folder(tmp_path_factory.mktemp("source") / "images", 12)
    (root / "closeup").mkdir()
    photo(20, 60, 40).save(root / "closeup" / "turned.png")
    photo(21, 60, 40).save(root / "closeup" / "turned.jpg")
    photo(22, 70, 50).save(root / "rgb.png")
    photo(23, 70, 50).convert("RGBA").save(root / "rgba.png")
    photo(24, 70, 50).convert("L").save(root / "gray.jpg")
    photo(25, 70, 50).convert("CMYK").save(root / "cmyk.jpg")
    photo(26, 70, 50).save(root / "ünï cödé.webp", lossless=True)
    photo(27, 70, 50).save(root / "a jpeg.png", "JPEG")
    Image.fromarray((np.arange(50 * 70).reshape(50, 70) * 18).astype(np.uint16)).save(root / "deep.png")
    photo(28, 300, 200).save(root / "big.jpg")
    whole = (root / "photo_000.jpg").read_bytes()
    (root / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (root / "text.jpg").write_text("<html>404 Not Found</html>")
    (root / "half.png").write_bytes((root / "rgb.png").read_bytes()[:3000])
    Image.fromarray(np.ones((9, 9), np.float32)).save(root / "float.tiff")
    return root


@pytest.fixture(scope="module")
def made(source, tmp_path_factory):
    """(folder, manifest) of the source's shards, made by two workers."""
    folder = tmp_path_factory.mktemp("made") / "d"
    return folder, shard_dataset("d", configured(source, holdout=6, rotate="closeup/*"), folder, SETTINGS, 2)


def test_every_good_image_is_there_once_and_jpegs_keep_their_bytes(made, source):
    folder, manifest = made
    found = contents(folder)
    everything = {str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()}
    assert len(everything) == 26 and set(found) == everything - BROKEN
    for path in found.keys() - {"closeup/turned.jpg"}:
        if Image.open(io.BytesIO((source / path).read_bytes())).format == "JPEG":
            assert found[path][0] == (source / path).read_bytes(), path
    for path, (encoded, about) in found.items():
        image = Image.open(io.BytesIO(encoded))
        assert image.format == "JPEG" and about == {
            "dataset": "d", "path": path, "width": image.size[0], "height": image.size[1],
        }  # fmt: skip
    assert [(split.name, split.images + split.broken) for split in manifest.splits] == [("train", 20), ("val", 6)]


def test_index_leads_to_the_same_bytes_and_sizes(made):
    folder, _ = made
    seen = {}
    for split, images in open_manifest_folder(str(folder)).items():
        records = open_index(folder / f"{split}.index", len(images.shards))
        for i, record in enumerate(records):
            assert images.locate(i).crc is not None
            seen[read(images, i)] = (record["width"], record["height"])
    assert seen == {encoded: (about["width"], about["height"]) for encoded, about in contents(folder).values()}


def test_split_is_the_one_of_the_loose_files(made, source):
    """The held-out images of the shards are those that would be held out without shards."""
    folder, _ = made
    held = {index_dataset("d", DatasetConfig(root=str(source), holdout=6)).val.relative(i) for i in range(6)}
    val = webdataset.WebDataset(sorted(map(str, folder.glob("val-*.tar"))), shardshuffle=False)
    assert {json.loads(sample["json"])["path"] for sample in val} == held - BROKEN


def test_other_formats_become_jpeg_quality_95_without_subsampling(made, source):
    found = contents(made[0])
    reference = io.BytesIO()
    Image.new("RGB", (8, 8)).save(reference, "JPEG", quality=95, subsampling=0)
    tables = Image.open(reference).quantization
    for path in ("rgb.png", "rgba.png", "ünï cödé.webp", "deep.png", "closeup/turned.png"):
        image = Image.open(io.BytesIO(found[path][0]))
        assert image.quantization == tables and [layer[1:3] for layer in image.layer] == [(1, 1)] * 3, path
    for path in ("rgb.png", "rgba.png", "ünï cödé.webp"):
        pixels = np.asarray(Image.open(io.BytesIO(found[path][0])), int)
        assert np.abs(pixels - np.asarray(Image.open(source / path).convert("RGB"))).mean() < 3, path
    deep = np.asarray(Image.open(io.BytesIO(found["deep.png"][0])), int)
    assert np.abs(deep[..., 0] - np.arange(50 * 70).reshape(50, 70) * 18 // 256).mean() < 2


def test_turned_images_are_turned_upright(made, source, photo):
    found = contents(made[0])
    for path in ("closeup/turned.png", "closeup/turned.jpg"):
        upright = np.rot90(np.asarray(Image.open(source / path)), -1)
        pixels = np.asarray(Image.open(io.BytesIO(found[path][0])), int)
        assert pixels.shape == (60, 40, 3) and np.abs(pixels - upright).mean() < 3
    data = np.fromfile(source / "closeup" / "turned.png", np.uint8)
    encoded, size = prepare(data, ShardSettings(turned_canvas="keep"), True)
    kept = np.asarray(Image.open(io.BytesIO(encoded)), int)
    assert size == (60, 40) and np.abs(kept[:, 10:50] - np.rot90(photo(20, 60, 40), -1)[10:50]).mean() < 3
    assert kept[:, :8].max() < 20 and kept[:, -8:].max() < 20


def test_broken_images_are_listed_with_the_reason(made):
    folder, manifest = made
    entries = [json.loads(line) for line in (folder / "quarantine.jsonl").read_text().splitlines()]
    assert {entry["path"] for entry in entries} == BROKEN and all(entry["dataset"] == "d" for entry in entries)
    reasons = {entry["path"]: entry["reason"] for entry in entries}
    assert "no known image format" in reasons["text.jpg"] and "ends too early" in reasons["cut.jpg"]
    assert sum(split.broken for split in manifest.splits) == 4


def test_images_are_shuffled_over_all_shards(made):
    folder, manifest = made
    assert len(manifest.splits[0].shards) >= 3
    keys, paths = [], []
    for sample in webdataset.WebDataset(sorted(map(str, folder.glob("train-*.tar"))), shardshuffle=False):
        keys.append(sample["__key__"])
        paths.append(json.loads(sample["json"])["path"])
    assert keys == sorted(keys) and paths != sorted(paths) and max(map(int, keys)) <= 19


def test_number_of_workers_changes_nothing(made, source, tmp_path):
    shard_dataset("d", configured(source, holdout=6, rotate="closeup/*"), tmp_path / "d", SETTINGS, 1)
    assert digests(tmp_path / "d") == digests(made[0])


def test_files_of_a_folder_are_those_of_the_first_version(tmp_path):
    """To the byte, so that old shards are read and old folders go on. The JPEG is copied, not encoded."""
    tiny = (
        "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDABALDA4MChAODQ4SERATGCgaGBYWGDEjJR0oOjM9PDkzODdASFxOQERXRTc4UG1RV19iZ2hnPk1xeX"
        "BkeFxlZ2P/wAALCAAIAAgBAREA/8QAFAABAAAAAAAAAAAAAAAAAAAABP/EABQQAQAAAAAAAAAAAAAAAAAAAAD/2gAIAQEAAD8AA//Z"
    )
    (tmp_path / "images").mkdir()
    for i in range(5):
        (tmp_path / "images" / f"{i}.jpg").write_bytes(base64.b64decode(tiny))
    (tmp_path / "images" / "no.jpg").write_bytes(b"no image")
    settings = ShardSettings(megabytes=0.005, seed=3)
    shard_dataset("d", configured(tmp_path / "images", holdout=2), tmp_path / "d", settings, 1)
    assert {name: digest[:12] for name, digest in digests(tmp_path / "d").items()} == {
        "manifest.json": "63812f1e2a71", "quarantine.jsonl": "e2b927629237", "records/plan.json": "5491dd403961",
        "train.index": "f8d5752d27de", "train-000000.tar": "fb3d3339afad", "train-000001.tar": "3b78f89ce16b",
        "val.index": "fe90cd70b1b9", "val-000000.tar": "e7eb6ba79a5b",
        "records/train-000000.json": "2e4d4044c49a", "records/train-000000.index": "fe90cd70b1b9",
        "records/train-000001.json": "3ac2d9863fa0", "records/train-000001.index": "331470bef1d4",
        "records/val-000000.json": "c9e3558e5833", "records/val-000000.index": "fe90cd70b1b9",
    }  # fmt: skip


def test_shards_of_other_tools_can_be_made_into_ours(sharded, tmp_path):
    """Their images come out of the tar files, byte for byte."""
    root = tmp_path / "foreign"
    root.mkdir()
    for tar in sharded.glob("train-*.tar"):
        tar.rename(root / tar.name)
    expected = {encoded for encoded, _ in contents(root).values()}
    shard_dataset("d", configured(root), tmp_path / "d", ShardSettings(megabytes=0.1), 1)
    assert {encoded for encoded, _ in contents(tmp_path / "d").values()} == expected and len(expected) == 20


@pytest.mark.parametrize("turned, expected", [(False, (75, 50)), (True, (50, 75))])
def test_larger_images_are_shrunk_to_the_shorter_side(source, turned, expected):
    data = np.fromfile(source / "big.jpg", np.uint8)
    encoded, size = prepare(data, ShardSettings(shorter_side=50), turned)
    assert size == expected == Image.open(io.BytesIO(encoded)).size
    small = np.fromfile(source / "photo_000.jpg", np.uint8)
    assert prepare(small, ShardSettings(shorter_side=50), False)[0] == small.tobytes()


def test_image_that_dali_refuses_is_encoded_anew_or_broken(photos, tmp_path, monkeypatch):
    """Its bytes were copied, since Pillow could read them, and every run then called it broken."""
    refused, broken = sorted(photos.iterdir())[3:5]
    damage(broken, "wrong tables")  # DALI and Pillow refuse it, while its header is that of a plain JPEG
    really = Decoder.refused

    def refuse(self, encoded, geometry):
        extra = {i: "refused" for i, data in enumerate(encoded) if data.tobytes() == refused.read_bytes()}
        return really(self, encoded, geometry) | extra

    monkeypatch.setattr(Decoder, "refused", refuse)
    items = [Item(i, Location(str(path)), path.name, False) for i, path in enumerate(sorted(photos.iterdir()))]
    (tmp_path / "out" / "records").mkdir(parents=True)
    job = Job(tmp_path / "out", "train-000000", "d", SETTINGS, items)
    record = write_shard(job, Reader(0), Decoder(16, 64, 1, torch.device("cpu")), Tally(get_context("spawn")))
    assert [(entry["path"], entry["reason"]) for entry in record.broken] == [
        (broken.name, "broken data stream when reading image file")
    ]
    found = contents(tmp_path / "out")
    for path in photos.iterdir():
        if path == refused:
            assert found[path.name][0] != path.read_bytes() and plain_jpeg(found[path.name][0])
        elif path != broken:
            assert found[path.name][0] == path.read_bytes()
