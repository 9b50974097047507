"""Addresses of object stores where only local paths will do: a sentence, and no local folder called "s3:"."""

import os
from pathlib import Path

import pytest

from dune_fast import load_encoder
from dune_fast.cli import main
from dune_fast.engine.config import ConfigError, compose_config
from dune_fast.export.run import export
from dune_fast.teachers.files import cache_dir
from dune_fast.teachers.local_paths import AddressError, ResultPathError, local_path, result_file, result_folder
from dune_fast.teachers.weights import weights_path

ADDRESS = "s3://bucket/x"


@pytest.fixture(autouse=True)
def nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    assert os.listdir(tmp_path) == []


COMMANDS = (
    f"data shard data=folder data.datasets.images.root=/nowhere --out {ADDRESS}",
    f"data list-keys a.pkl --out {ADDRESS}",
    f"data list-keys {ADDRESS} --out a.txt",
    f"resume {ADDRESS}",
    f"export {ADDRESS} --to timm",
    f"export runs/mine --to timm --output {ADDRESS}",
    f"evaluate {ADDRESS}",
    f"evaluate {ADDRESS} --task knn --data /nowhere",
    f"evaluate a.pth --task knn --data /nowhere --out {ADDRESS}",
    f"features {ADDRESS} asset:foolbox --out f",
    f"features a.pth asset:foolbox --out {ADDRESS}",
    f"figures {ADDRESS}",
    f"figures runs/mine --out {ADDRESS}",
    f"teachers verify {ADDRESS}",
    f"distill experiment=demo output_dir={ADDRESS}",
    f"distill experiment=demo student_weights={ADDRESS}",
    f"distill experiment=demo teachers.semantic.weights={ADDRESS}",
)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_refuses_an_address_of_a_model_a_run_or_a_result(command, capsys, caplog):
    try:
        status = main(command.split())
    except SystemExit as error:  # argparse's
        status = error.code
    said = capsys.readouterr().err + caplog.text
    assert status == 2 and "bucket/x, an address" in said and "aws s3 cp" in said and "Traceback" not in said


def test_functions_refuse_it_too(monkeypatch):
    for refused in (
        lambda: load_encoder(ADDRESS),
        lambda: load_encoder(Path(ADDRESS)),  # which has one slash left
        lambda: export(ADDRESS, "timm"),
        lambda: weights_path("gs://bucket/a.pth"),
        lambda: local_path("https://host/a.pth", "x"),
    ):
        with pytest.raises(AddressError, match="an address"):
            refused()
    with pytest.raises(ConfigError, match=f"output_dir is {ADDRESS}"):
        compose_config(["experiment=demo", f"output_dir={ADDRESS}"])
    monkeypatch.setenv("DUNE_FAST_CACHE", ADDRESS)
    with pytest.raises(AddressError, match="DUNE_FAST_CACHE"):
        cache_dir()


def test_local_paths_are_what_they_are():
    assert local_path("~/a", "x") == Path.home() / "a"
    for path in ("a:b/c", "/data/x:/y", "./s3://a", "timm:vit@/a/b.pth", "random:1", "C:/a"):
        assert local_path(path, "x") == Path(path)


def test_places_of_results_are_tried_before_the_work(tmp_path_factory, monkeypatch):
    root = tmp_path_factory.mktemp("places")
    assert result_folder(root / "a" / "b").is_dir() and result_file(root / "c" / "x.json").parent.is_dir()
    (root / "file").touch()
    for place in (root / "file", root / "file" / "x"):
        with pytest.raises(ResultPathError, match=r"cannot be a folder \("):
            result_folder(place)
    with pytest.raises(ResultPathError, match="a is a folder, and the result is a file"):
        result_file(root / "a")
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    with pytest.raises(ResultPathError, match="this user cannot write to the folder"):
        result_folder(root / "a")
