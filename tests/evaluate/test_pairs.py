"""Layouts of datasets with a target for each pixel, and what happens to image and target together."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dune_fast.dali_pipelines.errors import DataError
from dune_fast.evaluate import crops
from dune_fast.evaluate.crops import DepthCrop, depth_crop, photometric, scaled, segmentation_crop, square_target
from dune_fast.evaluate.pairs import class_names, mapped_labels, open_pairs
from dune_fast.kernels.nn.preprocessing import Preprocessing


def image_file(path: Path, size=(8, 6)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (10, 20, 30)).save(path)


def target_file(path: Path, values, dtype=np.uint8) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((6, 8), values, dtype)).save(path)


def test_ade20k(tmp_path):
    for split in ("training", "validation"):
        image_file(tmp_path / "images" / split / "a.jpg")
        target_file(tmp_path / "annotations" / split / "a.png", 150)
    train, val = open_pairs(tmp_path, "segmentation")
    assert train.layout == "ade20k" and len(train) == len(val) == 1
    image, labels = train.read(0)
    assert image.shape == (3, 6, 8) and image.dtype == torch.uint8
    assert labels.dtype == torch.int64 and (labels == 149).all()
    assert mapped_labels(np.array([[0, 1, 255]]), "ade20k").tolist() == [[255, 0, 255]]


def test_cityscapes(tmp_path):
    for split in ("train", "val"):
        image_file(tmp_path / "leftImg8bit" / split / "bern" / "bern_0_leftImg8bit.png")
        target_file(tmp_path / "gtFine" / split / "bern" / "bern_0_gtFine_labelIds.png", 26)
    train, _ = open_pairs(tmp_path, "segmentation")
    assert train.layout == "cityscapes" and (train.read(0)[1] == 13).all()  # a car
    ids = np.array([[0, 7, 8, 33, 34, 9]])
    assert mapped_labels(ids, "cityscapes").tolist() == [[255, 0, 1, 18, 255, 255]]
    target_file(tmp_path / "gtFine" / "train" / "bern" / "bern_0_gtFine_labelTrainIds.png", 4)
    assert (open_pairs(tmp_path, "segmentation")[0].read(0)[1] == 4).all()  # preferred, as it is


def test_nyud_lists(tmp_path):
    image_file(tmp_path / "kitchen" / "rgb_0.jpg")
    target_file(tmp_path / "kitchen" / "depth_0.png", 2500, np.uint16)
    line = "/kitchen/rgb_0.jpg /kitchen/depth_0.png 518.8579\n"
    (tmp_path / "nyu_train.txt").write_text(line + "x.jpg None 518.8579\n\n")
    (tmp_path / "nyu_test.txt").write_text(line)
    train, val = open_pairs(tmp_path, "depth")
    assert train.layout == "nyud" and len(train) == 1
    assert (val.read(0)[1] == 2.5).all() and val.read(0)[1].dtype == torch.float32
    (tmp_path / "nyu_test.txt").write_text("alone.jpg\n")
    with pytest.raises(DataError, match="nyu_test.txt, line 1: give an image and its target"):
        open_pairs(tmp_path, "depth")


def test_scannet(tmp_path):
    for split, scene in (("train", "scene0000_00"), ("val", "scene0001_00")):
        image_file(tmp_path / scene / "color" / "000000.jpg", (16, 12))  # colours have more pixels than depths
        target_file(tmp_path / scene / "depth" / "000000.png", 1500, np.uint16)
        target_file(tmp_path / scene / "label" / "000000.png", 39)
        (tmp_path / f"scannetv2_{split}.txt").write_text(f"{scene}\n")
    image, depth = open_pairs(tmp_path, "depth")[0].read(0)
    assert image.shape == (3, 6, 8) and (depth == 1.5).all()
    assert (open_pairs(tmp_path, "segmentation")[1].read(0)[1] == 19).all()


def test_plain_folders_with_npy_depths(tmp_path):
    for split in ("train", "val"):
        image_file(tmp_path / "images" / split / "x" / "a.png")
        (tmp_path / "depth" / split / "x").mkdir(parents=True)
        np.save(tmp_path / "depth" / split / "x" / "a.npy", np.array([[1.0, np.nan, -1, np.inf] * 2] * 6))
    depth = open_pairs(tmp_path, "depth")[0].read(0)[1]
    assert depth[0, :4].tolist() == [1, 0, 0, 0]


def test_faults_are_explained(tmp_path):
    with pytest.raises(DataError, match="there is no such folder"):
        open_pairs(tmp_path / "nowhere", "depth")
    with pytest.raises(DataError, match="--layout coco: choose one of ade20k"):
        open_pairs(tmp_path, "depth", "coco")
    with pytest.raises(DataError, match=r"no images with depth for train; expected is the layout plain +ROOT/images"):
        open_pairs(tmp_path, "depth")
    for split in ("train", "val"):
        image_file(tmp_path / "images" / split / "a.png", (9, 6))
        target_file(tmp_path / "labels" / split / "a.png", 0)
    train, _ = open_pairs(tmp_path, "segmentation")
    with pytest.raises(DataError, match="has 9x6 pixels, .* 8x6: they must agree$"):
        train.read(0)
    image_file(tmp_path / "images" / "train" / "a.png", (6, 8))  # the labels have 8x6
    with pytest.raises(DataError, match="EXIF orientations are not applied: write the image upright"):
        train.read(0)
    (tmp_path / "images" / "train" / "a.png").write_bytes(b"no image")
    with pytest.raises(DataError, match="cannot be read"):
        train.read(0)


def painted(height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """An image whose red channel is 10 times its label: 0 to 19 by columns of 8."""
    labels = (torch.arange(width) // 8).expand(height, width).clone()
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    image[0] = 10 * labels
    return image, labels


@pytest.mark.parametrize("size", [(60, 160), (160, 120), (20, 30)])
def test_image_and_labels_are_cut_alike(size, monkeypatch):
    monkeypatch.setattr(crops, "photometric", lambda image, _: image.float())
    monkeypatch.setattr(crops, "normalized", lambda image: image.float())
    image, labels = painted(*size)
    for seed in range(8):
        x, y = segmentation_crop(image, labels, 64, np.random.default_rng(seed))
        assert x.shape == (3, 64, 64) and y.shape == (64, 64)
        inside = y != 255
        assert (x[0] / 10 - y)[inside].abs().max() <= 1  # labels of neighbours differ by 1, edges are blurred
        assert (x[:, ~inside] == 0).all() and inside.any()


def test_a_crop_is_a_function_of_its_random_numbers():
    image, labels = painted(80, 120)
    one, same, other = (segmentation_crop(image, labels, 32, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert torch.equal(one[0], same[0]) and torch.equal(one[1], same[1]) and not torch.equal(one[0], other[0])


def test_a_crop_of_one_class_is_tried_again():
    labels = torch.zeros(64, 64, dtype=torch.long)
    labels[:, 60:] = 1
    image = torch.zeros(3, 64, 64, dtype=torch.uint8)
    shares = [(segmentation_crop(image, labels, 32, np.random.default_rng(s))[1] == 1).any().item() for s in range(40)]
    assert sum(shares) > 10


def test_scaling_keeps_the_aspect_within_the_frame():
    image = torch.zeros(3, 100, 300, dtype=torch.uint8)
    assert scaled(image, 50)[0].shape == (3, 50, 150)
    assert scaled(torch.zeros(3, 100, 1000, dtype=torch.uint8), 50)[0].shape == (3, 20, 200)  # long side 4 * 50


def test_colours_stay_colours_and_change():
    image = torch.randint(256, (3, 20, 20), dtype=torch.uint8)
    results = [photometric(image, np.random.default_rng(seed)) for seed in range(30)]
    assert all(x.shape == image.shape and x.min() >= 0 and x.max() <= 255 for x in results)
    assert any((x - image.float()).abs().mean() > 10 for x in results)


@pytest.mark.parametrize("size", [(480, 640), (300, 400)])
def test_depth_crops(size, monkeypatch):
    monkeypatch.setattr(crops, "normalized", lambda image: image.float())
    image = (torch.arange(size[1]) * 200 / size[1]).expand(3, *size).to(torch.uint8)
    depth = 1 + image[0].float()
    for seed in range(6):
        x, y = depth_crop(image, depth, DepthCrop(border=True), np.random.default_rng(seed))
        assert x.shape == (3, 416, 544) and y.shape == (416, 544)
        known = y > 0
        assert known.float().mean() > 0.9
        ratio = np.corrcoef(x[0][known].numpy(), y[known].numpy())[0, 1]
        assert ratio > 0.99  # colours may change, the ramp stays


def test_a_square_target_is_cut_as_the_image_is():
    labels = torch.arange(60 * 90).view(60, 90)
    image = labels.float().expand(3, 60, 90) / labels.numel()
    cut = Preprocessing(30, (0, 0, 0), (1, 1, 1))(image)
    ours = square_target(labels, 30)
    assert ours.shape == (30, 30)
    assert (cut[0] * labels.numel() - ours).abs().max() < 100  # less than two rows of 90


def test_a_dataset_names_its_classes(tmp_path):
    assert class_names(tmp_path) == ()
    rows = (["Idx", "Ratio", "Train", "Val", "Stuff", "Name"], list("1234") + ["wall"], list("1234") + ["sky, air"])
    (tmp_path / "objectInfo150.txt").write_text("\n".join("\t".join(row) for row in rows) + "\n")
    assert class_names(tmp_path) == ("wall", "sky, air")
    (tmp_path / "classes.txt").write_text("dark\n\nbright one\n")
    assert class_names(tmp_path) == ("dark", "bright one")
    (tmp_path / "classes.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(DataError, match="the names of the classes in .* cannot be read"):
        class_names(tmp_path)
