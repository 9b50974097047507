"""`python -m bench.data`: the contenders do the same work, the record is complete, mistakes are named."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed (extra: dali)")
pytest.importorskip("psutil")

from bench import data, data_contenders, data_index, data_turns  # noqa: E402
from bench.records import Measured, write_steps  # noqa: E402
from dune_fast.dali_pipelines.datasets import DataConfig, DatasetConfig, index_dataset  # noqa: E402

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
    transform = data_contenders.build_transform(24, DataConfig())
    torch.manual_seed(0)
    files = data_contenders._Files(photographs, 24, DataConfig())
    assert files[3].shape == (3, 24, 24) and files[3].dtype == torch.float32
    images = [Image.open(path).convert("RGB") for path in photographs]
    theirs = torch.stack([transform(image) for image in images * 60])
    ours = torch.cat(list(itertools.islice(data_contenders.ours(photographs, 24, 48, 2, CPU), 10)))
    assert ours.shape == theirs.shape
    for statistic in (torch.mean, torch.std):
        assert float(statistic(ours)) == pytest.approx(float(statistic(theirs)), abs=0.06)


def test_workers_are_ended_before_they_are_waited_for():
    """torch's abort now and then where they are left to end by themselves, and are waited for in vain, 5 s each."""

    class Batches:
        def __init__(self):
            self.worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])

        def __next__(self):
            return torch.zeros(1)

        def close(self):
            assert self.worker.wait(10) < 0

    contender = data_turns.Running(Batches)
    contender.warm_up()
    contender.close()
    assert contender._batches.worker.poll() is not None


def test_a_run_compares_all_three_and_leaves_a_record(tmp_path, photographs, capsys):
    arguments = ["--images", str(photographs[0].parent), "--size", "24", "--batch", "4", "--threads", "1"]
    arguments += ["--rounds", "2", "--seconds", "0.05", "--ahead", "1", "--output", str(tmp_path / "results")]
    assert data.main(arguments) == 0
    (path,) = (tmp_path / "results").glob("*/data.json")
    record = json.loads(path.read_text())["24 px from 512 px"]
    assert [line["name"] for line in record["contenders"]][-2:] == [data.BASELINE, "webdataset"]
    for line in record["contenders"]:
        assert len(line["rates"]) == len(line["cpu_ms"]) == 2
        assert np.isfinite(line["rates"]).all() and min(line["rates"]) > 0
    assert set(record["parts_ms"]) == {"read", "parameters", "decode, crop, resize", "colour"}
    assert record["fastest_step"] is None and "no step measured on this device" in capsys.readouterr().out

    steps = [Measured(name, 1, 1.0, 1.0, 1.0, {}, rate) for name, rate in (("eager", 5.0), ("fused", 9.0))]
    write_steps(path.with_name("step.json"), "dune", "cpu", "torch", steps)
    assert data.fastest_step(path.parent) == ("dune, fused", 9.0)


# -- the index ---------------------------------------------------------------------------------------------------------


def test_images_are_shared_out_in_proportion_and_none_is_lost():
    sizes = [own.expected_train for own in data_index.dune_shards(Path("/x")).datasets.values()]
    assert len(sizes) == 19 and sum(sizes) == data_index.DUNE_IMAGES
    assert data_index.share_out(data_index.DUNE_IMAGES, sizes) == pytest.approx(sizes, abs=20)
    few = data_index.share_out(30, sizes)
    assert sum(few) == 30 and min(few) == 1 and max(few) == few[sizes.index(max(sizes))]
    with pytest.raises(ValueError, match="18 images cannot be divided among 19 datasets"):
        data_index.share_out(18, sizes)


def test_synthetic_shards_are_what_the_loader_takes_for_real_ones(tmp_path, monkeypatch):
    """Members follow each other without gaps or overlaps, and end where the file does."""
    monkeypatch.setattr(data_index, "_PER_SHARD", 7)
    data_index.write_synthetic(tmp_path / "d", "d", 30, 3, 0)
    dataset = index_dataset("d", DatasetConfig(root=str(tmp_path / "d")))
    assert (len(dataset.train), len(dataset.val), len(dataset.train.shards)) == (30, 3, 5)
    ends: dict[str, int] = {}
    for i in range(30):
        where = dataset.train.locate(i)
        assert where.offset == ends.get(where.path, 0) + 512 and 60_000 <= where.length < 160_000
        ends[where.path] = where.offset + -(-where.length // 512) * 512 + 1024  # the JSON's header and block
    assert ends == {path: os.path.getsize(path) - 1024 for path in dataset.train.shards}


def test_index_is_opened_by_several_ranks_and_judged(tmp_path, capsys, monkeypatch):
    arguments = ["--index", "30000", "--index-ranks", "2", "--index-batch", "12", "--output", str(tmp_path)]
    assert data.main(arguments) == 0
    (path,) = tmp_path.glob("*/data_index.json")
    record = json.loads(path.read_text())["30000 images"]
    (node,) = record["nodes"]
    assert node["ranks"] == 2 and record["index_bytes"] >= 24 * 30000 and node["choose_ms"] > 0 < node["locate_ms"]
    # the index is 0.7 MB, and each loader has its threads and lists
    assert 0 < node["seconds"] < data_index.MAX_SECONDS and 0.0005 < node["gigabytes"] < 0.2
    assert data.main(["--index", "18"]) == 2 and "give --index more" in capsys.readouterr().out
    assert data.main(["--index", "--index-ranks", "3"]) == 2 and "cannot share" in capsys.readouterr().out
    monkeypatch.setattr(data_index, "open_node", lambda *_: data_index.Opened(2, 11.0, 0.5, 1.0, 1.0))
    assert data.main(arguments) == 1 and "over the limits of 1 GB a node and 10 s" in capsys.readouterr().out
