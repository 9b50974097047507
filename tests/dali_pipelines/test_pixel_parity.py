"""The whole loader, decoding to normalised tensors, against PIL and torchvision v2 given the same parameters."""

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed (extra: dali)")
TF = pytest.importorskip("torchvision.transforms.v2.functional")

from dune_fast.dali_pipelines.augmentation import colour_params, draw_words, resized_crops  # noqa: E402
from dune_fast.dali_pipelines.datasets import DataConfig, DatasetConfig  # noqa: E402
from dune_fast.dali_pipelines.loader import TrainLoader  # noqa: E402
from dune_fast.kernels import philox  # noqa: E402
from dune_fast.kernels.augment import IMAGENET_MEAN, IMAGENET_STD  # noqa: E402

SIZE, BATCH, STEPS, SEED = 96, 24, 6, 2


def by_torchvision(image: Image.Image, word: torch.Tensor, config: DataConfig) -> torch.Tensor:
    """float [3, S, S] in [0, 1], before normalisation: torchvision's own operations with the drawn parameters."""
    size = np.array([image.size])
    left, top, width, height = resized_crops(word[None], size, config.crop_scale, config.crop_ratio)[0].tolist()
    bicubic = TF.InterpolationMode.BICUBIC
    image = TF.resized_crop(image, top, left, height, width, [SIZE, SIZE], interpolation=bicubic, antialias=True)
    if float(philox.to_uniform(word[22])) < config.flip_probability:
        image = TF.horizontal_flip(image)
    x = TF.to_dtype(TF.pil_to_tensor(image), torch.float32, scale=True)
    params = colour_params(word[None], config)
    jitter = [TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue]
    factors = [params.brightness, params.contrast, params.saturation, params.hue]
    for kind in params.order[0].tolist():
        x = jitter[kind](x, float(factors[kind]))
    if params.grayscale:
        x = TF.rgb_to_grayscale(x, num_output_channels=3)
    if params.blur:
        x = TF.gaussian_blur(x, kernel_size=9, sigma=float(params.sigma))
    if params.solarize:
        x = TF.solarize(x, threshold=0.5)
    return x


def test_augmented_photographs_equal_torchvisions_with_the_same_parameters(real_photos, tmp_path):
    """Mean difference below 1 level, 99.9 % of the values within 8: the project's measure of parity.

    The photographs are shrunk first, to save time; at their full size the decoding is compared in test_pipeline.py.
    """
    for path in real_photos:
        with Image.open(path) as image:
            image.thumbnail((640, 640))
            image.save(tmp_path / f"{path.stem}.jpg", quality=95)
    own = DatasetConfig(root=str(tmp_path), repeat=BATCH * STEPS // len(real_photos))
    config = DataConfig(datasets={"d": own}, num_threads=2)
    decoded = {str(path): Image.open(path).convert("RGB") for path in tmp_path.iterdir()}
    differences, words = [], []
    std = torch.tensor(IMAGENET_STD)[:, None, None]
    with TrainLoader(config, SIZE, BATCH, 0, 1, SEED, torch.device("cpu")) as loader:
        batches = loader.batches()
        for _ in range(STEPS):
            batch = next(batches)
            drawn = draw_words(SEED, batch.positions.numpy())
            for image, path, word in zip(batch.images, batch.paths, drawn, strict=True):
                theirs = by_torchvision(decoded[path], word, config)
                # what the student sees: torchvision's normalisation of its own result
                theirs = (TF.normalize(theirs, IMAGENET_MEAN, IMAGENET_STD) - image) * std * 255
                differences.append(theirs.abs())
            words.append(drawn)
    params = colour_params(torch.cat(words), config)
    jittered = params.brightness != 1
    assert len({tuple(order) for order in params.order[jittered].tolist()}) == 24, "choose a seed that has all orders"
    for name in ("grayscale", "blur", "solarize"):
        assert 0.1 < getattr(params, name).float().mean() < 0.3
    together = torch.stack(differences)
    # measured: mean 0.11, the worst image 0.27; fewer than 1 in 20,000 beyond 8, in the worst image 1 in 900
    assert together.mean() < 0.25 and (together <= 8).float().mean() > 0.999
    assert together.mean((1, 2, 3)).max() < 1 and (together <= 8).float().mean((1, 2, 3)).min() > 0.99
