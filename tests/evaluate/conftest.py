"""A tiny random encoder as a file, and images whose classes, segments and depths it can tell apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from dune_fast.evaluate.model import FrozenModel, open_model
from dune_fast.kernels.nn.vit import VisionTransformer, ViTConfig
from dune_fast.teachers.architecture import architecture_metadata
from tests.engine.conftest import finished, photos, trained_run

__all__ = ["finished", "photos", "trained_run"]  # fixtures

COLOURS = {"red": (200, 40, 40), "green": (40, 200, 40), "blue": (40, 40, 200)}


def write_encoder(path: Path, seed: int = 0, depth: int = 2) -> Path:
    """A random ViT, 48 wide, patches of 14 px: its tokens follow the pixels."""
    cfg = ViTConfig(28, embed_dim=48, depth=depth, num_heads=3, num_registers=1, layer_scale=None)
    torch.manual_seed(seed)
    state = VisionTransformer(cfg).init_weights().state_dict()
    save_file({name: x.contiguous() for name, x in state.items()}, path, architecture_metadata(cfg))
    return path


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch) -> Path:
    """Every test has a cache folder of its own."""
    monkeypatch.setenv("DUNE_FAST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def encoder_file(tmp_path_factory) -> Path:
    return write_encoder(tmp_path_factory.mktemp("encoder") / "encoder.safetensors")


@pytest.fixture
def model(encoder_file) -> FrozenModel:
    return open_model(str(encoder_file), torch.device("cpu"), precision="fp32")


def write_colours(folder: Path, count: int, seed: int) -> None:
    """`count` images of each class of COLOURS, in its folder: noise about the colour."""
    random = np.random.default_rng(seed)
    for name, colour in COLOURS.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = np.array(colour) + random.normal(0, 30, (34, 40, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / name / f"{i}.png")


@pytest.fixture(scope="session")
def colours(tmp_path_factory) -> Path:
    """ROOT/train/CLASS and ROOT/val/CLASS."""
    root = tmp_path_factory.mktemp("colours")
    write_colours(root / "train", 12, 0)
    write_colours(root / "val", 5, 1)
    return root


@pytest.fixture(scope="session")
def squares(tmp_path_factory) -> Path:
    """The plain layout: bright squares on dark noise are class 1; the depth is a ramp that the brightness shows."""
    root, random = tmp_path_factory.mktemp("squares"), np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 4)):
        for kind in ("images", "labels", "depth"):
            (root / kind / split).mkdir(parents=True)
        for i in range(count):
            image, label = random.integers(0, 60, (70, 84, 3)), np.zeros((70, 84), np.uint8)
            top, left = random.integers(0, 3) * 14, random.integers(0, 4) * 14
            image[top : top + 28, left : left + 28] += 180
            label[top : top + 28, left : left + 28] = 1
            label[0] = 255
            Image.fromarray(image.astype(np.uint8)).save(root / "images" / split / f"{i}.png")
            Image.fromarray(label).save(root / "labels" / split / f"{i}.png")
            depth = (1000 * (1 + 4 * image.mean(2) / 255)).astype(np.uint16)
            Image.fromarray(depth).save(root / "depth" / split / f"{i}.png")
    return root
