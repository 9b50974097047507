"""Validation batches: every image once over all ranks, broken and turned ones."""

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed (extra: dali)")

from loader_helpers import CPU, config, damage, take  # noqa: E402

from dune_fast.dali_pipelines.loader import ValLoader  # noqa: E402


@pytest.mark.parametrize("world", [1, 2, 3])
def test_validation_sees_every_image_once_over_all_ranks(two_folders, world):
    data = config(*two_folders, holdout=5)
    seen, positions = [], []
    for rank in range(world):
        with ValLoader(data, 32, 3, rank, world, CPU) as loader:
            batches = list(loader)
            assert len(batches) == len(loader) and all(len(batch) <= 3 for batch in batches) and loader.num_images == 10
            assert [batch.images.shape[0] for batch in batches] == [len(batch) for batch in batches]
        seen += [path for batch in batches for path in batch.paths]
        positions += [p for batch in batches for p in batch.positions.tolist()]
    assert len(seen) == len(set(seen)) == 10 and sorted(positions) == list(range(10))
    trained = {path for batch in take(data, 4) for path in batch.paths}
    assert not trained & set(seen)


def test_validation_leaves_broken_images_out_and_can_run_twice(photos):
    data = config(photos, holdout=7)
    with ValLoader(data, 32, 2, 0, 1, CPU) as loader:
        victims = [batch.paths for batch in loader][1]
        for path, how in zip(victims, ("half a PNG", "empty"), strict=True):
            damage(photos / path.rsplit("/", 1)[1], how)
        rest = [path for batch in loader for path in batch.paths]
        assert len(rest) == 5 and not set(rest) & set(victims) and loader.broken == {"d0": 2}
        assert [path for batch in loader for path in batch.paths] == rest


def test_no_validation_images_is_no_error(photos):
    with ValLoader(config(photos), 32, 2, 0, 1, CPU) as loader:
        assert loader.num_images == len(loader) == 0 and list(loader) == []


def test_shards_bring_their_own_validation_images_and_show_each_image_once_a_pass(sharded):
    assert len({path for batch in take(config(sharded), 2) for path in batch.paths}) == 16
    with ValLoader(config(sharded), 32, 3, 0, 1, CPU) as loader:
        assert loader.num_images == 4 and sum(len(batch) for batch in loader) == 4


def test_turned_images_are_turned_back(tmp_path):
    """BEDLAM's close-ups: the left edge of the stored image becomes the top."""
    stored = np.zeros((40, 60, 3), np.uint8)
    stored[:, :30] = 255
    for name in ("plain.png", "closeup.png"):
        Image.fromarray(stored).save(tmp_path / name)
    data = config(tmp_path)
    data.datasets["d0"].val_root, data.datasets["d0"].rotate = str(tmp_path), "*closeup*"
    with ValLoader(data, 16, 2, 0, 1, CPU) as loader:
        batch = next(iter(loader))
    images = dict(zip((path.rsplit("/", 1)[1] for path in batch.paths), batch.images, strict=True))
    assert (images["closeup.png"][:, 0] > 0).all() and (images["closeup.png"][:, -1] < 0).all()
    assert (images["plain.png"][:, :, 0] > 0).all() and (images["plain.png"][:, :, -1] < 0).all()
