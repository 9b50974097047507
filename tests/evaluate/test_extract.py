"""Features are computed once: parts, fingerprints, kills; and files for other programs."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file

import dune_fast
from dune_fast import cli
from dune_fast.dali_pipelines.listing import PathList
from dune_fast.evaluate import extract as module
from dune_fast.evaluate import feature_files
from dune_fast.evaluate.extract import FeatureError, extract
from dune_fast.evaluate.feature_files import images_of, write_features
from dune_fast.evaluate.model import open_model
from dune_fast.evaluate.ranks import Ranks
from dune_fast.teachers.containers import TeacherWeightsError
from tests.evaluate.conftest import write_colours, write_encoder


@pytest.fixture
def images(tmp_path) -> list[PathList]:
    """15 images in two lists."""
    write_colours(tmp_path / "images", 5, 3)
    (folder,) = images_of(str(tmp_path / "images"))
    return [folder.select(range(9)), folder.select(range(9, 15))]


@pytest.fixture
def counted(model):
    """The model, and how many images it has encoded."""
    seen = []

    def encode(x):
        seen.append(len(x))
        return model.encode(x)

    return replace(model, encode=encode), seen


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(module, "_PART_IMAGES", 4)


def test_features_are_the_encoders_own(model, images, encoder_file, tmp_path):
    found = extract(model, images, 28, ["cls", "mean", "patch"], folder=tmp_path / "f", batch=4)
    assert found.parts == 4 and found.shapes["patch"] == [2, 2, 48]
    encoder = dune_fast.load_encoder(encoder_file)
    rows = {token: found.whole(token)[0] for token in found.shapes}
    assert found.whole("cls")[1].all()
    for row, path in enumerate([*images[0], *images[1]]):
        with Image.open(path) as image, torch.no_grad():
            expected = encoder(encoder.transform(image)[None])
        patches = expected["x_norm_patchtokens"][0]
        # DALI and Pillow resize with small differences
        torch.testing.assert_close(rows["cls"][row], expected["x_norm_clstoken"][0], atol=0.05, rtol=0.05)
        torch.testing.assert_close(rows["mean"][row], patches.mean(0), atol=0.05, rtol=0.05)
        torch.testing.assert_close(rows["patch"][row].flatten(0, 1), patches, atol=0.05, rtol=0.05)


def test_any_batch_and_ranks_give_the_same_parts(model, images, tmp_path):
    one = extract(model, images, 28, ["cls"], folder=tmp_path / "one", batch=15)
    for rank in (1, 0):  # one after the other: each does its own parts
        pair = Ranks(rank, 2)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Ranks, "barrier", lambda self: None)
            other = extract(model, images, 28, ["cls"], folder=tmp_path / "two", batch=2, ranks=pair)
        assert sum(other.part_path(i).is_file() for i in range(4)) == (2 if rank else 4)
    torch.testing.assert_close(one.whole("cls")[0], other.whole("cls")[0])


def test_the_cache_is_hit_by_the_same_and_missed_by_all_else(counted, images, tmp_path, own_cache):
    model, seen = counted

    def computed(**changed) -> int:
        seen.clear()
        given = {"model": model, "images": images, "size": 28, "tokens": ["cls"], "cache": own_cache} | changed
        extract(**given)
        return sum(seen)

    assert computed() == 15 and computed() == 0 and computed(batch=3) == 0
    assert computed(size=42) == 15 and computed(dtype="fp16") == 15 and computed(tokens=["cls", "mean"]) == 15
    assert computed(images=images[:1]) == 9
    path = images[0][2]
    before = os.stat(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert computed() == 15
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert computed() == 0
    other = open_model(str(write_encoder(tmp_path / "other.safetensors", 1)), torch.device("cpu"), precision="fp32")
    assert computed(model=replace(model, module=other.module)) == 15
    assert computed(model=replace(model, reading=model.reading | {"norm": False})) == 15
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "FORMAT", 2)
        assert computed() == 15
    assert computed() == 0


def test_a_copy_of_the_weights_by_another_name_is_the_same(model, encoder_file, tmp_path):
    shutil.copy(encoder_file, tmp_path / "copy.safetensors")
    copy = open_model(str(tmp_path / "copy.safetensors"), torch.device("cpu"), precision="fp32")
    assert copy.weights_sha256 == model.weights_sha256 and copy.reading == model.reading


def test_a_broken_image_is_a_row_of_nan(model, images, tmp_path):
    (tmp_path / "images" / "blue" / "0.png").write_bytes(b"no image")
    done = write_features(model, images, tmp_path / "f", 28, ["cls", "mean"], "fp32", "npy", 4, Ranks())
    assert done["broken"] == [str(tmp_path / "images" / "blue" / "0.png")]
    x = np.load(tmp_path / "f" / "cls.npy")
    assert np.isnan(x).all(1).nonzero()[0].tolist() == [0] and x.shape == (15, 48)


@pytest.mark.parametrize(("form", "dtype"), [("npy", "fp16"), ("safetensors", "fp32"), ("safetensors", "fp16")])
def test_files(model, images, tmp_path, form, dtype):
    out, tokens = tmp_path / "f", ["cls", "mean", "patch"]
    done = write_features(model, images, out, 42, tokens, dtype, form, 4, Ranks())
    expected = {"npy": {"cls.npy", "mean.npy", "patch.npy"}, "safetensors": {"features.safetensors"}}[form]
    assert {path.name for path in out.iterdir()} == expected | {"names.txt", "features.json"}
    assert (out / "names.txt").read_text().splitlines() == [*images[0], *images[1]]
    assert json.loads((out / "features.json").read_text()) == done and done["shapes"]["patch"] == [15, 3, 3, 48]
    whole = extract(model, images, 42, tokens, folder=tmp_path / "again", dtype=dtype)
    if form == "safetensors":
        found = load_file(out / "features.safetensors")
    else:
        found = {token: np.load(out / f"{token}.npy", mmap_mode="r") for token in tokens}
    for token in tokens:
        np.testing.assert_array_equal(found[token], whole.whole(token)[0].numpy())
        assert found[token].dtype == {"fp16": np.float16, "fp32": np.float32}[dtype]


def test_parquet_without_pyarrow_is_explained(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(FeatureError, match="needs the package pyarrow"):
        feature_files.check_format("parquet")


def test_parquet(model, images, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    write_features(model, images, tmp_path / "f", 28, ["cls", "patch"], "fp32", "parquet", 4, Ranks())
    table = parquet.read_table(tmp_path / "f" / "features.parquet")
    assert table["name"].to_pylist() == [*images[0], *images[1]]
    expected = extract(model, images, 28, ["cls", "patch"], folder=tmp_path / "again").whole("patch")[0]
    np.testing.assert_array_equal(np.stack(table["patch"].to_numpy()), expected.flatten(1).numpy())


def test_a_killed_command_goes_on(images, encoder_file, counted, tmp_path):
    """SIGKILL in the middle: the parts that were done are not computed again, and the result is that of one go."""
    out, folder = tmp_path / "f", str(tmp_path / "images")
    kill = (
        "import os, signal, sys\n"
        "from dune_fast import cli\n"
        "from dune_fast.evaluate import extract\n"
        "extract._PART_IMAGES, plain, calls = 4, extract._tokens, []\n"
        "def tokens(*given):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 5: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return plain(*given)\n"
        "extract._tokens = tokens\n"
        "sys.exit(cli.main(sys.argv[1:]))\n"
    )
    command = ["features", str(encoder_file), folder, "--out", str(out), "--batch", "2", "--precision", "fp32"]
    killed = subprocess.run([sys.executable, "-c", kill, *command], capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (out / "features.json").exists()
    there = len(list((out / "parts").glob("*.st")))
    assert 0 < there < 4
    model, seen = counted
    images = images_of(folder)
    write_features(model, images, out, 28, ["cls", "mean"], "fp32", "npy", 2, Ranks())
    assert sum(seen) == 15 - 4 * there
    write_features(model, images, tmp_path / "one_go", 28, ["cls", "mean"], "fp32", "npy", 2, Ranks())
    for name in ("cls.npy", "mean.npy", "names.txt"):
        assert (out / name).read_bytes() == (tmp_path / "one_go" / name).read_bytes()
    seen.clear()
    write_features(model, images, out, 28, ["cls", "mean"], "fp32", "npy", 2, Ranks())
    assert not seen


def test_a_folder_with_other_features_is_not_mixed(model, images, tmp_path):
    for size in (28, 42):
        extract(model, images, size, ["cls"], folder=tmp_path / str(size))
    with pytest.raises(FeatureError, match=r"something else \(size differ\).*another --out"):
        extract(model, images, 28, ["cls"], folder=tmp_path / "42")
    write_features(model, images, tmp_path / "f", 28, ["cls"], "fp32", "npy", 4, Ranks())
    with pytest.raises(FeatureError, match=r"\(dtype differ\)"):
        write_features(model, images, tmp_path / "f", 28, ["cls"], "fp16", "npy", 4, Ranks())


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--size", "30"], "--size 30: sides of images .* multiples of 14; the nearest are 28 and 42"),
        (["--device", "cuda:7"], "--device cuda:7: this machine has"),
        (["--projector", "x"], "holds an encoder without projectors"),
        (["--batch", "0"], "the batch is 0 images"),
        (["--out", __file__], "test_extract.py cannot be a folder"),
    ],
)
def test_errors_of_the_command(images, encoder_file, tmp_path, capsys, more, words):
    command = ["features", str(encoder_file), str(tmp_path / "images"), "--out", str(tmp_path / "f"), *more]
    assert cli.main(command) == 2
    assert re.search(words, capsys.readouterr().err)


def test_features_of_a_teacher_that_has_no_cls(tmp_path, capsys):
    write_colours(tmp_path / "images", 2, 3)
    command = ["features", "mine", str(tmp_path / "images"), "--out", str(tmp_path / "f"), "--size", "64"]
    (tmp_path / "own" / "teachers").mkdir(parents=True)
    text = "family: mast3r\nweights: random:1\nnum_features: 192\npatch_size: 16\ntoken_types: [patch]\n"
    (tmp_path / "own" / "teachers" / "mine.yaml").write_text(text)
    assert cli.main([*command, "--config-dir", str(tmp_path / "own"), "--tokens", "cls"]) == 2
    assert "has no cls token" in capsys.readouterr().err
    assert cli.main([*command, "--config-dir", str(tmp_path / "own"), "--tokens", "mean", "patch"]) == 0
    assert np.load(tmp_path / "f" / "patch.npy").shape == (6, 4, 4, 192)


def test_images_of_a_list_and_of_tar_files(model, tmp_path):
    write_colours(tmp_path / "images", 2, 3)
    (tmp_path / "list.txt").write_text("images/red/0.png\nimages/blue/1.png\n")
    with tarfile.open(tmp_path / "train-000000.tar", "w") as tar:
        for name in ("blue/1", "red/0"):
            tar.add(tmp_path / "images" / f"{name}.png", f"{name.replace('/', '_')}.png")
    rows = []
    for given in ("list.txt", "train-{000000..000000}.tar"):
        images = images_of(str(tmp_path / given))
        found = extract(model, images, 28, ["cls"], folder=tmp_path / given.partition(".")[0])
        assert len(found.whole("cls")[0]) == 2
        rows.append(found.whole("cls")[0])
    assert torch.equal(*rows)


def test_an_unknown_name_is_explained(tmp_path, capsys):
    write_colours(tmp_path / "images", 1, 0)
    assert cli.main(["features", "runs/nothing", str(tmp_path / "images"), "--out", str(tmp_path / "f")]) == 2
    said = capsys.readouterr().err
    assert "there is no model 'runs/nothing'" in said and "teachers list" in said
    assert cli.main(["features", "dinov2_vitx", str(tmp_path / "images"), "--out", str(tmp_path / "f")]) == 2
    assert "there is no teacher 'dinov2_vitx': did you mean" in capsys.readouterr().err


@pytest.mark.parametrize("target", ["safetensors", "timm", "hf"])
def test_an_export_has_the_features_of_its_run(finished, images, tmp_path, target):
    if target != "safetensors":
        pytest.importorskip({"timm": "timm", "hf": "transformers"}[target])
    assert cli.main(["export", str(finished), "--to", target, "--output", str(tmp_path / "export")]) == 0
    found = []
    for name in (finished, tmp_path / "export"):
        network = open_model(str(name), torch.device("cpu"), precision="fp32")
        size = 56  # what the run was trained at: libraries resize positions in other ways
        found.append(extract(network, images, size, ["cls", "mean"], folder=tmp_path / name.name).whole("cls")[0])
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)


def test_a_damaged_export_is_explained(finished, tmp_path):
    pytest.importorskip("transformers")
    folder = tmp_path / "export"
    assert cli.main(["export", str(finished), "--to", "hf", "--output", str(folder)]) == 0
    config = json.loads((folder / "config.json").read_text())
    for text, words in (
        ("{", "is no JSON"),
        (json.dumps({key: config[key] for key in config if key != "hidden_size"}), "lacks 'hidden_size'"),
        (json.dumps(config | {"num_hidden_layers": 3}), "blocks.2.* is missing"),
    ):
        (folder / "config.json").write_text(text)
        with pytest.raises(TeacherWeightsError, match=words):
            open_model(str(folder), torch.device("cpu"))


def test_the_folder_of_a_checkpoint(finished, images, tmp_path):
    checkpoint = finished / "checkpoints" / "step_0000006"
    found = []
    for name in (finished, checkpoint):
        network = open_model(str(name), torch.device("cpu"), precision="fp32")
        found.append(extract(network, images, 56, ["cls"], folder=tmp_path / name.name).whole("cls")[0])
    assert torch.equal(*found)
