"""The DALI pipeline against PIL and torchvision with the same parameters, and what it does with broken images."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed (extra: dali)")
TF = pytest.importorskip("torchvision.transforms.v2.functional")

from image_helpers import encode  # noqa: E402

from dune_fast.dali_pipelines.augmentation import (  # noqa: E402
    Geometry,
    draw_words,
    resized_crops,
    train_geometry,
    validation_geometry,
)
from dune_fast.dali_pipelines.datasets import DataConfig, DataError  # noqa: E402
from dune_fast.dali_pipelines.pipeline import DecodeError, Decoder, import_dali  # noqa: E402
from dune_fast.kernels import philox  # noqa: E402

CPU = torch.device("cpu")
BICUBIC = TF.InterpolationMode.BICUBIC


def decode(encoded: list[bytes], geometry, size: int) -> np.ndarray:
    decoder = Decoder(len(encoded), size, 2, CPU)
    decoder.submit([np.frombuffer(data, np.uint8) for data in encoded], geometry)
    images, event = decoder.receive()
    assert event is None and images.dtype == torch.uint8 and images.shape == (len(encoded), size, size, 3)
    turn = torch.from_numpy(geometry.turn)[:, None, None, None]
    return torch.where(turn, images.rot90(-1, (1, 2)), images).numpy()


def by_torchvision(image: Image.Image, size: int, turned: bool, word: torch.Tensor | None) -> np.ndarray:
    image = image.convert("RGB")
    if turned:
        image = image.rotate(-90, expand=True)
    if word is None:
        return np.asarray(TF.center_crop(TF.resize(image, [size], interpolation=BICUBIC), [size, size]))
    left, top, width, height = resized_crops(word[None], np.array([image.size]), [0.4, 1.0], [3 / 4, 4 / 3])[0].tolist()
    image = TF.resized_crop(image, top, left, height, width, [size, size], interpolation=BICUBIC, antialias=True)
    return np.asarray(TF.horizontal_flip(image) if float(philox.to_uniform(word[22])) < 0.5 else image)


@pytest.mark.parametrize("training", [True, False])
def test_real_photographs_equal_pil_and_torchvision(real_photos, training):
    """A third of them as if they were stored turned."""
    size = 112
    images = [Image.open(path) for path in real_photos]
    sizes, turn = np.array([image.size for image in images]), np.arange(len(images)) % 3 == 0
    words = draw_words(0, np.arange(len(images)))
    if training:
        geometry = train_geometry(words, sizes, turn, size, DataConfig())
    else:
        geometry = validation_geometry(sizes, turn, size)
    ours = decode([path.read_bytes() for path in real_photos], geometry, size)
    theirs = [by_torchvision(image, size, turn[i], words[i] if training else None) for i, image in enumerate(images)]
    for mine, other in zip(ours, theirs, strict=True):
        difference = np.abs(mine.astype(int) - other)
        # measured: mean 0.09 to 0.16, 99.9 % within 2
        assert difference.mean() < 0.5 and (difference <= 8).mean() > 0.999


def test_batches_come_back_in_order_and_sizes_may_vary(photo):
    data = [encode(photo(i, 40, 40), "PNG") for i in range(9)]
    decoder = Decoder(4, 16, 2, CPU, depth=2)
    parts = [data[:4], data[4:7], data[7:]]
    geometries = [validation_geometry(np.full((len(p), 2), 40), np.zeros(len(p), bool), 16) for p in parts]
    for part, geometry in zip(parts[:2], geometries, strict=False):
        decoder.submit([np.frombuffer(d, np.uint8) for d in part], geometry)
    first, _ = decoder.receive()
    decoder.submit([np.frombuffer(d, np.uint8) for d in parts[2]], geometries[2])
    rest = [decoder.receive()[0] for _ in range(2)]
    together = torch.cat([first, *rest]).numpy()
    expected = decode(data, validation_geometry(np.full((9, 2), 40), np.zeros(9, bool), 16), 16)
    np.testing.assert_array_equal(together, expected)


def test_broken_images_are_found_among_good_ones_and_the_decoder_lives_again(photo):
    good = encode(photo(0, 64, 64), "JPEG")
    data = [good] * 7
    data[2], data[5] = good[: len(good) // 2], b"no image at all"
    arrays = [np.frombuffer(d, np.uint8) for d in data]
    geometry = validation_geometry(np.full((7, 2), 64), np.zeros(7, bool), 32)
    decoder = Decoder(4, 32, 2, CPU)
    decoder.submit(arrays[:4], geometry[list(range(4))])
    with pytest.raises(DecodeError):
        decoder.receive()
    assert set(decoder.refused(arrays, geometry)) == {2, 5}
    decoder.submit(arrays[:2], geometry[[0, 1]])
    assert decoder.receive()[0].shape == (2, 32, 32, 3)


def test_batches_of_two_sizes_are_in_flight_and_broken_ones_are_found_among_both(photo):
    """As at a border of progressive resolution: one pipeline decodes both sizes."""
    good = encode(photo(0, 64, 64), "JPEG")
    arrays = [np.frombuffer(data, np.uint8) for data in [good, good, good, good[: len(good) // 2]]]
    small, large = (validation_geometry(np.full((2, 2), 64), np.zeros(2, bool), size) for size in (16, 32))
    decoder = Decoder(2, 32, 2, CPU, depth=2)
    decoder.submit(arrays[:2], small)
    decoder.submit(arrays[:2], large)
    for size, geometry in ((16, small), (32, large)):
        images = decoder.receive()[0]
        np.testing.assert_array_equal(images.numpy(), decode([good, good], geometry, size))
        decoder.submit(arrays[:2], small)
    alone = Decoder(2, 32, 2, CPU)
    assert set(alone.refused(arrays, Geometry.concatenate([small, large]), "broken")) == {3}


def test_failure_that_is_not_the_images_fault_blames_none(photo, monkeypatch):
    """Out of memory, say: else every image would be set aside."""
    decoder = Decoder(1, 32, 1, CPU)
    monkeypatch.setattr(Decoder, "_try", lambda self, data, geometry: "out of memory")
    geometry = validation_geometry(np.full((1, 2), 64), np.zeros(1, bool), 32)
    with pytest.raises(DataError, match="even a good image.*out of memory"):
        decoder.refused([np.frombuffer(encode(photo(0, 64, 64), "JPEG"), np.uint8)], geometry)


def test_missing_dali_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(DataError, match=r"pip install nvidia-dali-cuda130"):
        import_dali()
