"""k-NN against scikit-learn, and the classes of folders."""

from __future__ import annotations

import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from dune_fast.dali_pipelines.datasets import DataConfig, Dataset, DatasetConfig, index_dataset
from dune_fast.dali_pipelines.listing import PathList
from dune_fast.dali_pipelines.sharding import ShardSettings, shard_dataset
from dune_fast.dali_pipelines.storage import Reader
from dune_fast.evaluate.knn import TEMPERATURE, LabelError, choose, knn_predict, labelled

neighbors = pytest.importorskip("sklearn.neighbors")


def blobs(count: int, classes: int, spread: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Features [count, 12] around the classes' centres, of lengths that must not count."""
    g = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, 12, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(classes, (count,), generator=g)
    x = centres[labels] + spread * torch.randn(count, 12, generator=g)
    return x * torch.rand(count, 1, generator=g).add(0.1), labels


def sklearn_knn(k: int):
    weights = lambda distance: np.exp((1 - distance) / TEMPERATURE)  # noqa: E731
    return neighbors.KNeighborsClassifier(k, metric="cosine", weights=weights)


@pytest.mark.parametrize("k", [1, 10, 20])
def test_the_vote_is_scikit_learns(k):
    bank, labels = blobs(1300, 7, 1.2, 1)
    queries, truth = blobs(1100, 7, 1.2, 2)  # more than a chunk
    ours = knn_predict(queries, bank, labels, 7, k)
    theirs = sklearn_knn(k).fit(bank.numpy(), labels.numpy()).predict(queries.numpy())
    assert (ours.numpy() == theirs).mean() > 0.998  # rounding may decide between two neighbours
    assert 0.5 < (ours == truth).float().mean() < 0.99


def test_nobody_votes_for_itself():
    bank, labels = blobs(1100, 5, 1.5, 3)
    ours = knn_predict(bank, bank, labels, 5, 10, leave_one_out=True)
    for i in range(0, 1100, 100):
        others = np.arange(1100) != i
        knn = sklearn_knn(10).fit(bank[others].numpy(), labels[others].numpy())
        assert ours[i] == knn.predict(bank[i : i + 1].numpy())[0]
    assert (knn_predict(bank, bank, labels, 5, 1) == labels).all()
    assert not (knn_predict(bank, bank, labels, 5, 1, leave_one_out=True) == labels).all()


def test_fewer_images_than_neighbours():
    bank, labels = blobs(4, 2, 0.1, 4)
    assert knn_predict(bank, bank, labels, 2, 20, leave_one_out=True).shape == (4,)


def dataset(train: list[str], val: list[str]) -> Dataset:
    return Dataset("animals", DatasetConfig("/data"), PathList(train, "/data"), PathList(val, "/val"))


def test_classes_are_the_folders_below_the_root():
    train = [f"{kind}/{place}/{i}.jpg" for kind in ("cat", "dog", "newt") for place in "ab" for i in range(50)]
    val = [f"{kind}/{i}.jpg" for kind in ("newt", "cat") for i in range(9)]
    found = labelled(dataset(train, val), 60, seed=1)
    assert found.classes == ("cat", "dog", "newt") and found.bank == 60 and len(found.labels) == 60 + 18
    bank, queries = (part.val for part in found.datasets)
    names = [images.relative(i).split("/")[0] for images in (bank, queries) for i in range(len(images))]
    assert [found.classes[label] for label in found.labels] == names
    assert bank[0].startswith("/data/") and queries[0].startswith("/val/")
    alone = labelled(dataset(train, []), 60, seed=1)
    assert len(alone.datasets) == 1 and len(alone.labels) == 60


def test_the_choice_is_a_function_of_the_seed():
    images = PathList(map(str, range(1000)))
    first = choose(images, 100, 0, 0)
    assert first == choose(images, 100, 0, 0) and first == sorted(set(first)) and len(first) == 100
    assert first != choose(images, 100, 1, 0) and first != choose(images, 100, 0, 1)
    assert choose(images, 5000, 0, 0) == list(range(1000))


@pytest.mark.parametrize(
    ("train", "val", "words"),
    [
        (["a.jpg", "b/c.jpg"], [], "/data/a.jpg is in no class's folder"),
        (["a/1.jpg", "b/2.jpg"], ["1.jpg"], "/val/1.jpg is in no class's folder"),
        (["a/1.jpg", "a/2.jpg"], [], "all images are of one class, 'a'"),
    ],
)
def test_images_without_classes_are_explained(train, val, words):
    with pytest.raises(LabelError, match=words):
        labelled(dataset(train, val), 10, 0)


def class_folders(root, kinds=("cat", "dog")):
    """Six images of each."""
    for kind in kinds:
        (root / kind).mkdir(parents=True)
        for i in range(6):
            pixels = np.random.randint(0, 256, (20, 24, 3), np.uint8)
            Image.fromarray(pixels).save(root / kind / f"{i}.jpg")
    return root


def names_of(found) -> list[str]:
    return [found.classes[label] for label in found.labels]


def test_classes_of_shards_are_the_folders_of_their_source(tmp_path, caplog):
    pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed (extra: dali)")
    root, val = class_folders(tmp_path / "images"), class_folders(tmp_path / "val")
    data = DataConfig(datasets={"d": DatasetConfig(root=str(root), val_root=str(val))})
    shard_dataset("d", data, tmp_path / "shards", ShardSettings(megabytes=0.02), 1)
    dataset = index_dataset("d", DatasetConfig(root=str(tmp_path / "shards")))
    with caplog.at_level("INFO"):
        found = labelled(dataset, 10, seed=0)
    assert "k-NN on d: 2 classes in 10 images and 10 images (cat, dog)" in caplog.text
    stored = {path.read_bytes(): path.parent.name for path in [*root.rglob("*.jpg"), *val.rglob("*.jpg")]}
    read = Reader(0)
    bytes_of = [read.read(part.val.locate(i)).tobytes() for part in found.datasets for i in range(len(part.val))]
    assert names_of(found) == [stored[data] for data in bytes_of] and len(bytes_of) == 20


def test_classes_of_other_tools_shards_are_the_folders_of_their_members(tmp_path, monkeypatch):
    monkeypatch.setenv("DUNE_FAST_CACHE", str(tmp_path / "cache"))
    root = class_folders(tmp_path / "images")
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(root, ".")
    found = labelled(index_dataset("d", DatasetConfig(root=str(tmp_path / "a.tar"))), 12, seed=0)
    assert found.classes == ("cat", "dog") and sorted(names_of(found)) == ["cat"] * 6 + ["dog"] * 6


def test_splits_taken_for_classes_are_warned_of(tmp_path, caplog):
    root = class_folders(tmp_path / "images", ("train", "val"))
    labelled(index_dataset("d", DatasetConfig(root=str(root))), 12, seed=0)
    assert "train and val among the classes" in caplog.text and "data.datasets.d.root" in caplog.text
