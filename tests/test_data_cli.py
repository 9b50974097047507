"""`dune-fast data shard` from the command line."""

import numpy as np
import pytest

from dune_fast.cli import build_parser, main
from dune_fast.dali_pipelines.datasets import DataConfig, DatasetConfig, index_datasets
from dune_fast.dali_pipelines.tar_index import open_index


@pytest.fixture
def folder(tmp_path):
    from PIL import Image

    (tmp_path / "images").mkdir()
    for i in range(6):
        Image.effect_noise((40 + i, 30), 60).convert("RGB").save(tmp_path / "images" / f"{i}.jpg")
    return tmp_path / "images"


def test_shard_writes_what_the_loader_reads_and_says_what_it_wrote(folder, tmp_path, capsys):
    command = ["data", "shard", "data=folder", f"data.datasets.images.root={folder}"]
    command += ["data.datasets.images.holdout=2", "--out", str(tmp_path / "out"), "--workers", "1"]
    assert main(command) == 0
    header, train, val = capsys.readouterr().out.splitlines()
    assert header.split() == ["dataset", "split", "images", "broken", "shards", "MB"]
    assert train.split()[:5] == ["images", "train", "4", "0", "1"] and val.split()[:4] == ["images", "val", "2", "0"]
    config = DataConfig(datasets={"images": DatasetConfig(root=str(tmp_path / "out" / "images"))})
    (dataset,) = index_datasets(config)
    assert (len(dataset.train), len(dataset.val)) == (4, 2)


def test_mistakes_are_said_in_a_sentence(folder, tmp_path, capsys):
    def said(*arguments: str) -> str:
        assert main(["data", "shard", *arguments, "--out", str(tmp_path / "out")]) == 2
        return " ".join(capsys.readouterr().err.split())

    assert "no dataset is configured" in said()
    unknown = said("data=folder", f"data.datasets.images.root={folder}", "--only", "x")
    assert "--only x: no such dataset is configured, there are: images" in unknown


def test_shrink_of_the_configuration_is_the_default(folder, tmp_path):
    args = ["data", "shard", "data=folder", f"data.datasets.images.root={folder}", "data.datasets.images.shrink=20"]
    args = build_parser().parse_args([*args, "--out", str(tmp_path / "out"), "--workers", "1"])
    assert args.run_command(args) == 0
    records = open_index(tmp_path / "out" / "images" / "train.index", 1)
    assert np.minimum(records["width"], records["height"]).tolist() == [20] * 6
