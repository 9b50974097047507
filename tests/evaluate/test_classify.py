"""k-NN and logistic regression on the features of a random encoder: colours are its classes."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch

from dune_fast import cli
from dune_fast.evaluate import extract as extraction
from dune_fast.evaluate.classify import chance, classes_of, features_of, fifth, knn_task, linear_task
from dune_fast.evaluate.knn import LabelError, knn_predict
from dune_fast.evaluate.ranks import Ranks
from tests.evaluate.conftest import write_colours


def test_classes_of_two_splits_and_of_one(colours):
    data = classes_of(str(colours), 0)
    assert data.classes == ("blue", "green", "red") and data.bank == 36 and len(data.labels) == 51
    assert chance(data) == pytest.approx(1 / 3)
    data = classes_of(str(colours / "val"), 0)
    assert len(data.datasets) == 1 and data.bank == 15


def test_knn_is_that_of_the_features(model, colours, own_cache):
    data = classes_of(str(colours), 0)
    features = features_of(model, data, 28, own_cache, 8, Ranks())
    found = knn_task(features, data, torch.device("cpu"))
    assert set(found) == {f"{token}/k={k}" for token in ("cls", "mean") for k in (10, 20)}
    x, seen = features.whole("mean")
    labels = data.labels
    expected = knn_predict(x[36:], x[:36], labels[:36], 3, 10)
    assert seen.all() and found["mean/k=10"] == (expected == labels[36:]).double().mean().item()
    assert found["mean/k=10"] > 0.9  # colours are easy


def test_knn_of_one_split_leaves_each_image_out(model, colours, own_cache):
    data = classes_of(str(colours / "val"), 0)
    data.labels[0] = 1 - data.labels[0]  # an image that its neighbours contradict: it must not vote for itself
    features = features_of(model, data, 28, own_cache, 8, Ranks())
    found, x = knn_task(features, data, torch.device("cpu")), features.whole("mean")[0]
    expected = knn_predict(x, x, data.labels, 3, 10, leave_one_out=True) == data.labels
    assert not expected[0] and found["mean/k=10"] == expected.double().mean().item() > 0.7


@pytest.mark.parametrize("folder", ["", "train"])
def test_linear_chooses_its_regularisation(model, colours, own_cache, folder):
    sklearn = pytest.importorskip("sklearn.linear_model")
    data = classes_of(str(colours / folder), 0)
    features = features_of(model, data, 28, own_cache, 8, Ranks())
    found = linear_task(features, data, 0)
    assert found["mean/accuracy"] > 0.9 and found == linear_task(features, data, 0)
    if not folder:
        x = torch.nn.functional.normalize(features.whole("mean")[0], dim=-1).numpy()
        fitted = sklearn.LogisticRegression(C=found["mean/C"], max_iter=1000).fit(x[:36], data.labels[:36].numpy())
        assert found["mean/accuracy"] == pytest.approx(fitted.score(x[36:], data.labels[36:].numpy()))


def test_a_fifth_is_a_fifth_of_every_class():
    labels = torch.tensor([0] * 50 + [1] * 10 + [2] * 3 + [3])
    held = fifth(labels, 0)
    assert [int(held[labels.numpy() == c].sum()) for c in range(4)] == [10, 2, 1, 0]
    assert (held == fifth(labels, 0)).all() and not (held == fifth(labels, 1)).all()
    with pytest.raises(ValueError, match="too few"):
        fifth(torch.arange(3), 0)


def test_broken_images_do_not_count(model, tmp_path, own_cache):
    for split, seed in (("train", 0), ("val", 1)):
        write_colours(tmp_path / "data" / split, 4, seed)
        (tmp_path / "data" / split / "red" / "0.png").write_bytes(b"no image")
    data = classes_of(str(tmp_path / "data"), 0)
    found = knn_task(features_of(model, data, 28, own_cache, 8, Ranks()), data, torch.device("cpu"))
    assert all(value * 11 == pytest.approx(round(value * 11)) for value in found.values())


def test_the_command_keeps_the_result_and_the_features(encoder_file, colours, tmp_path, monkeypatch, capsys):
    arguments = ["evaluate", str(encoder_file), "--data", str(colours), "--out", str(tmp_path / "r" / "knn.json")]
    assert cli.main([*arguments, "--task", "knn"]) == 0
    result = json.loads((tmp_path / "r" / "knn.json").read_text())
    assert result["metrics"]["mean/k=10"] > 0.9 and result["images"] == [36, 15] and result["size"] == 28
    assert result["options"]["task"] == "knn" and len(result["weights_sha256"]) == 64
    shown = capsys.readouterr().out
    assert "mean/k=10" in shown and "the most frequent class" in shown
    monkeypatch.setattr(extraction, "_tokens", lambda *_: pytest.fail("the features are in the cache"))
    assert cli.main([*arguments, "--task", "linear"]) == 0
    assert json.loads((tmp_path / "r" / "knn.json").read_text())["task"] == "linear"


def test_a_run_keeps_its_results(finished, colours, capsys):
    arguments = ["evaluate", str(finished), "--task", "knn", "--data", str(colours), "--size", "28"]
    assert cli.main(arguments) == 0
    assert cli.main([*arguments, "--projector", "one"]) == 0
    names = {path.name for path in (finished / "evaluation").iterdir()}
    assert names == {f"knn_{colours.name}.json", f"knn_one_{colours.name}.json"}
    result = json.loads((finished / "evaluation" / f"knn_one_{colours.name}.json").read_text())
    assert result["reading"]["projector"] == "one" and np.isfinite(list(result["metrics"].values())).all()
    assert cli.main([*arguments, "--projector", "nobody"]) == 2
    assert "none of the teachers of" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ([], "--task knn needs images: give --data FOLDER"),
        (["--data", "/nowhere"], "/nowhere is neither a folder nor a text file"),
        (["--layers", "4", "--data", "x"], "--layers is for the tasks segmentation, depth: leave it out"),
    ],
)
def test_errors_of_the_command(encoder_file, capsys, more, words):
    assert cli.main(["evaluate", str(encoder_file), "--task", "knn", *more]) == 2
    assert words in capsys.readouterr().err


def test_images_without_classes_are_explained(tmp_path, colours):
    with pytest.raises(LabelError, match="in no class's folder.*or give another --data"):
        classes_of(str(colours / "val" / "red"), 0)


def test_a_missing_scikit_learn_is_explained(encoder_file, colours, monkeypatch, capsys):
    for name in [name for name in sys.modules if name == "sklearn" or name.startswith("sklearn.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert cli.main(["evaluate", str(encoder_file), "--task", "linear", "--data", str(colours)]) == 2
    assert "needs scikit-learn: pip install" in capsys.readouterr().err


def test_data_without_a_task_is_refused(encoder_file, capsys):
    assert cli.main(["evaluate", str(encoder_file), "--data", "x"]) == 2
    assert "give --task" in capsys.readouterr().err
