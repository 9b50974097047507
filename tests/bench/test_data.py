"""`python -m bench.data`: the contenders do the same work, the record is complete, mistakes are named."""

import itertools
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed (extra: dali)")

from bench import data  # noqa: E402
from dune_fast.dali_pipelines.datasets import DataConfig  # noqa: E402

CPU = torch.device("cpu")


@pytest.fixture
def photographs(tmp_path):
    """Eight JPEGs of 90 x 120 pixels, in a folder as `prepare_images` makes it."""
    (tmp_path / "given").mkdir()
    for i in range(8):
        coarse = np.random.default_rng(i).integers(0, 256, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((90, 120)).save(tmp_path / "given" / f"{i}.jpg", quality=95)
    return data.prepare_images(tmp_path / "given", 0, tmp_path / "images")


def test_photographs_are_shrunk_to_the_shorter_side_or_left_alone(tmp_path, photographs):
    smaller = data.prepare_images(tmp_path / "given", 60, tmp_path / "smaller")
    assert {Image.open(path).copy().size for path in smaller} == {(60, 80)}
    assert {Image.open(path).copy().size for path in photographs} == {(90, 120)}
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no JPEG"):
        data.prepare_images(tmp_path / "empty", 60, tmp_path / "nothing")


def test_the_transform_draws_the_same_distribution_as_ours(photographs):
    """Means over many draws of both, in standard deviations of a normalised channel."""
    transform = data.build_transform(24, DataConfig())
    torch.manual_seed(0)
    files = data.Files(photographs, 24)
    assert files[3].shape == (3, 24, 24) and files[3].dtype == torch.float32
    images = [Image.open(path).convert("RGB") for path in photographs]
    theirs = torch.stack([transform(image) for image in images * 60])
    ours = torch.cat(list(itertools.islice(data.ours(photographs, 24, 48, 2, CPU), 10)))
    assert ours.shape == theirs.shape
    for statistic in (torch.mean, torch.std):
        assert float(statistic(ours)) == pytest.approx(float(statistic(theirs)), abs=0.06)


def test_workers_are_ended_before_they_are_waited_for():
    """torch's abort now and then where they are left to end by themselves, and are waited for in vain, 5 s each."""
    ended = []

    def batches():
        worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        try:
            while True:
                yield torch.zeros(5)
        finally:
            ended.append(worker.wait(10))

    rate, cpu = data.take_turn(batches(), 0.01, 1)
    assert ended == [-15] and rate > 0 and cpu >= 0


def test_a_run_compares_and_leaves_a_record(tmp_path, photographs):
    arguments = ["--images", str(photographs[0].parent), "--size", "24", "--batch", "4", "--threads", "1"]
    arguments += ["--rounds", "2", "--seconds", "0.05", "--ahead", "1", "--output", str(tmp_path / "results")]
    assert data.main(arguments) == 0
    (path,) = (tmp_path / "results").glob("*/data.json")
    record = json.loads(path.read_text())["24 px from 512 px"]
    assert [line["name"] for line in record["contenders"]][-1:] == [data.BASELINE]
    for line in record["contenders"]:
        assert len(line["rates"]) == len(line["cpu_ms"]) == 2
        assert np.isfinite(line["rates"]).all() and min(line["rates"]) > 0
