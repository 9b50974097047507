"""The stream of images, frozen: which image stands where, and what is done to it, on any number of ranks and after any
interruption. A hash that changes here changes every run that is under way.

Nothing is decoded: plans are made, and colours rounded to 1e-4 so that platforms agree.
"""

import hashlib
import itertools

import numpy as np
import pytest
import torch

from dune_fast.dali_pipelines.datasets import DataConfig, DatasetConfig
from dune_fast.dali_pipelines.decode import plan_ahead
from dune_fast.dali_pipelines.loader import TrainLoader, ValLoader

CPU = torch.device("cpu")
BATCH, SIZE, STEPS, RESUMED_AT = 12, 48, 9, 4
TRAIN = {0: "1f94cad22517157bbc999b86cd7ab7fd", 7: "67fcf00219a3dddb6706c5eb1444243a"}
VAL = "eb33344fbe6baea6f78432873ed379f9"


@pytest.fixture(scope="module")
def data(tmp_path_factory, write_folder) -> DataConfig:
    """Two groups of unequal share, a dataset seen twice a pass, one with images stored turned, one broken image."""
    folder = tmp_path_factory.mktemp("stream")
    roots = [write_folder(folder / name, count, first_seed=count) for name, count in (("a", 11), ("b", 6), ("c", 9))]
    (roots[0] / "photo_003.jpg").write_bytes(b"no image")
    a, b, c = (DatasetConfig(root=str(root)) for root in roots)
    a.group, b.group, b.repeat, c.group, c.rotate, c.holdout = "one", "one", 2, "two", "*_00[1-4]*", 3
    return DataConfig({"a": a, "b": b, "c": c}, {"one": 0.55, "two": 0.45}, num_threads=2, max_broken_share=0.5)


def lines(loader, start: int, steps: int) -> list[tuple[int, str]]:
    """(global position, all that belongs to the image) of every image of some steps."""
    found = []
    for plan in itertools.islice(plan_ahead(loader.plans, 2, start), steps):
        for i, (dataset, index) in enumerate(plan.images):
            path = loader._source._images[dataset].relative(index)
            parts = (part for name, part in vars(plan.geometry).items() if name != "side")  # younger than the hashes
            geometry = [np.asarray(part[i]).astype(int).tolist() for part in parts]
            colour = []
            if plan.colour is not None:
                values = (torch.as_tensor(value[i]).double() for value in vars(plan.colour).values())
                colour = [[round(1e4 * x) for x in value.reshape(-1).tolist()] for value in values]
            line = plan.step, loader.dataset_names[dataset], path, int(plan.group[i]), geometry, colour
            found.append((int(plan.positions[i]), repr(line)))
    return found


def digest(found: list[tuple[int, str]]) -> str:
    """Of the lines in the order of their positions, each of which occurs once."""
    assert len({position for position, _ in found}) == len(found)
    return hashlib.sha256("\n".join(f"{position} {line}" for position, line in sorted(found)).encode()).hexdigest()[:32]


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("seed", TRAIN)
def test_a_training_stream_is_what_it_was_on_any_number_of_ranks_and_after_a_restart(data, seed, world_size):
    whole, resumed = [], []
    for rank in range(world_size):
        with TrainLoader(data, SIZE, BATCH, rank, world_size, seed, CPU) as loader:
            own = lines(loader, 0, STEPS)
        with TrainLoader(data, SIZE, BATCH, rank, world_size, seed, CPU) as loader:
            tail = lines(loader, RESUMED_AT, STEPS - RESUMED_AT)
        assert tail == own[-len(tail) :]
        whole, resumed = whole + own, resumed + own[: -len(tail)] + tail
    assert digest(whole) == digest(resumed) == TRAIN[seed]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_validation_stream_is_what_it_was(data, world_size):
    found = []
    for rank in range(world_size):
        with ValLoader(data, SIZE, 2, rank, world_size, CPU) as loader:
            # the step is left out: it depends on the number of ranks
            found += [(at, line.partition(", ")[2]) for at, line in lines(loader, 0, 9)]
    assert len(found) == 3 and digest(found) == VAL
