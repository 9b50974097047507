"""The training loader: what a batch holds, any number of ranks, restarts, groups."""

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed (extra: dali)")

from loader_helpers import CPU, config, damage, take  # noqa: E402

from dune_fast.dali_pipelines.augmentation import colour_params, draw_words  # noqa: E402
from dune_fast.dali_pipelines.datasets import DataConfig, DataError  # noqa: E402
from dune_fast.dali_pipelines.loader import TrainLoader  # noqa: E402
from dune_fast.kernels.augment import augment_colour  # noqa: E402


def test_batch_has_the_documented_fields(two_folders):
    batch = take(config(*two_folders), 1)[0]
    assert batch.images.shape == (8, 3, 32, 32) and batch.images.dtype == torch.float32 and batch.images.is_contiguous()
    assert batch.positions.tolist() == list(range(8)) and batch.step == 0 and len(batch) == 8
    for index, path in zip(batch.dataset.tolist(), batch.paths, strict=True):
        assert path.startswith(str(two_folders[index]))
    assert batch.group.tolist() == batch.dataset.tolist() and sorted(batch.group.tolist()) == [0] * 4 + [1] * 4
    assert torch.isfinite(batch.images).all() and float(batch.images.std()) > 0.1


def stream(data: DataConfig, start: int, steps: int, world: int) -> list[list[tuple]]:
    """Of every step, and of every image in it over all ranks: path, position, group, dataset, and the pixels' bits."""
    ranks = [take(data, steps, start, 12, rank, world) for rank in range(world)]
    fields = "positions", "group", "dataset"
    return [
        [
            (batch.step, path, *(int(getattr(batch, name)[i]) for name in fields), batch.images[i].numpy().tobytes())
            for batch in parts
            for i, path in enumerate(batch.paths)
        ]
        for parts in zip(*ranks, strict=True)
    ]


@pytest.mark.parametrize("kind", ["files", "shards"])
def test_stream_is_the_same_to_the_bit_on_any_number_of_ranks_and_after_a_resume(kind, request):
    """One process without a break, against 1, 2 and 3 ranks that stop after two steps and go on as 3, 1 and 2."""
    roots = request.getfixturevalue("two_folders") if kind == "files" else [request.getfixturevalue("sharded")]
    data = config(*roots)
    whole = stream(data, 0, 4, 1)
    assert [image[2] for step in whole for image in step] == list(range(48))
    assert all((".tar@" in image[1]) == (kind == "shards") for step in whole for image in step)
    for before, after in ((1, 3), (2, 1), (3, 2)):
        assert stream(data, 0, 2, before) + stream(data, 2, 2, after) == whole
    other = take(data, 1, batch=12, seed=1)[0]
    assert other.images[0].numpy().tobytes() != whole[0][0][-1]


def test_batch_is_decoded_pixels_through_the_colour_augmentation(tmp_path, photo):
    """With crops switched off the batch can be made by hand from the file."""
    photo(0, 32, 32).save(tmp_path / "only.png")
    data = config(tmp_path, crop_scale=[1.0, 1.0], crop_ratio=[1.0, 1.0], flip_probability=0.0)
    batch = take(data, 1, start=3, batch=4)[0]
    pixels = torch.from_numpy(np.array(Image.open(tmp_path / "only.png")))[None].expand(4, -1, -1, -1)
    params = colour_params(draw_words(0, np.arange(12, 16)), data)
    torch.testing.assert_close(batch.images, augment_colour(pixels, params), atol=1e-5, rtol=0)


def test_image_in_a_shard_is_the_image_of_the_file(sharded, photos):
    """The same bytes, decoded the same way, whatever they came from; without crops, since the places differ."""
    still = {"crop_scale": [1.0, 1.0], "flip_probability": 0.0, "jitter_probability": 0.0, "blur_probability": 0.0}
    still |= {"grayscale_probability": 0.0, "solarize_probability": 0.0, "crop_ratio": [1.0, 1.0]}
    loose = {tuple(image.flatten().tolist()) for batch in take(config(photos, **still), 3) for image in batch.images}
    shards = {tuple(image.flatten().tolist()) for batch in take(config(sharded, **still), 3) for image in batch.images}
    assert len(shards) == 20 and shards < loose


def test_groups_follow_their_weights_and_repeats(two_folders):
    data = config(*two_folders, group_weights={"g0": 3, "g1": 1})
    assert torch.stack([batch.group for batch in take(data, 2)]).float().mean() == 0.25
    data.datasets["d1"].group, data.group_weights = "g0", {}
    data.datasets["d1"].repeat = 2
    seen = [path for batch in take(data, 1, batch=23) for path in batch.paths]  # one pass: 11 + 2 * 6
    assert {seen.count(path) for path in seen if path.startswith(str(two_folders[1]))} == {2}
    assert len(set(seen)) == 17
    data.group_weights = {"g1": 1.0}
    with pytest.raises(DataError, match=r"names the groups \['g1'\], the datasets have \['g0'\]"):
        take(data, 1)


def test_tiny_images_are_refused(photos):
    with pytest.raises(DataError, match="image size is 4"):
        TrainLoader(config(photos), 4, 8, 0, 1, 0, CPU)


def test_real_photographs_with_shrunk_copies(real_photos, tmp_path, own_cache):
    (tmp_path / "list.txt").write_text("\n".join(map(str, real_photos)))
    data = config(tmp_path / "list.txt")
    data.datasets["d0"].shrink = 256
    batch = take(data, 1, batch=12)[0]
    assert len(set(batch.paths)) == 12 and batch.images.shape == (12, 3, 32, 32)
    assert len(list((tmp_path / "cache" / "shrunk").iterdir())) == 12


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_batches_equal_the_cpus(photos):
    """nvJPEG and the GPU's resize round differently, by a level or two of 255; 1 / std is 4.4."""
    expected = take(config(photos), 3)
    damage(photos / sorted(set(path.rsplit("/", 1)[1] for path in expected[0].paths))[0], "half a PNG")
    with TrainLoader(config(photos), 32, 8, 0, 1, 0, torch.device("cuda", 0)) as loader:
        batches = loader.batches()
        for before in expected:
            batch = next(batches)
            same = [i for i, path in enumerate(batch.paths) if path == before.paths[i]]
            assert batch.images.is_cuda and batch.positions.is_cuda and len(same) >= 6
            assert float((batch.images.cpu() - before.images)[same].abs().mean()) < 0.05


def test_one_switch_leaves_the_crop_and_the_flip_alone(photos):
    off = {f"{name}_probability": 0.0 for name in ("jitter", "grayscale", "blur", "solarize")}
    for plain, switched in zip(take(config(photos, **off), 3), take(config(photos, colour=False), 3), strict=True):
        assert plain.paths == switched.paths
        torch.testing.assert_close(plain.images, switched.images, atol=1e-6, rtol=0)
