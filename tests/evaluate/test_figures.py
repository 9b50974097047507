"""Figures of a run: their numbers against plain computations, and the files that the command writes."""

from __future__ import annotations

import csv
import itertools
import json
import logging
import math

import numpy as np
import pytest
import torch
from PIL import Image

from dune_fast import cli
from dune_fast.dali_pipelines.errors import DataError
from dune_fast.dali_pipelines.loader import ValLoader
from dune_fast.engine.config import ConfigError, compose_config, load_config
from dune_fast.engine.conflicts import MIN_STEPS
from dune_fast.engine.metrics import read_metrics
from dune_fast.engine.trainer import Trainer
from dune_fast.evaluate.draw import draw_run, photographs, variance_spectra
from dune_fast.evaluate.figure_numbers import (
    Covariance,
    cls_attention,
    components_for,
    explained_variance,
    loss_changes,
    smooth,
    write_csv,
)
from dune_fast.evaluate.held_out import pca_rgb
from dune_fast.evaluate.pictures import curves
from dune_fast.evaluate.run import open_trained
from dune_fast.kernels.nn.vit import VisionTransformer, ViTConfig
from tests.engine.conftest import small_run

CPU = torch.device("cpu")
CURVES, FEATURES = ["loss", "keep_rates"], ["pca", "attention", "variance"]


def losses(count: int, seed: int = 0, every: int = 1) -> list[dict]:
    """Records of three teachers; b follows a, c opposes it."""
    random = np.random.default_rng(seed)
    a = random.normal(1, 0.1, count)
    b, c = a + random.normal(0, 0.05, count), 2 - a + random.normal(0, 0.05, count)
    return [
        {"step": every * (i + 1), "loss": a[i], "loss/a": a[i], "loss/b": b[i], "loss/c": c[i], "loss/a/cls/total": 9.0}
        for i in range(count)
    ]


def test_smooth_leaves_out_what_is_not_finite():
    x = np.random.default_rng(0).normal(size=40)
    x[[3, 11, 12]] = np.nan
    expected = [np.nanmean(x[max(0, i - 2) : i + 3]) for i in range(40)]
    np.testing.assert_allclose(smooth(x, 5), expected)
    assert np.isnan(smooth([np.nan, np.nan], 1)).all()


def test_correlation_of_loss_changes():
    records = losses(60, every=5)
    records[7]["loss/b"] = None  # was not finite: left out for all teachers
    records.insert(9, {"step": 45, "held_out/a": 3.0, "held_out_images": 4.0})
    kept = [r for r in records if "loss" in r and r["loss/b"] is not None]
    found = loss_changes(records)
    assert found.teachers == ["a", "b", "c"] and (found.count, found.interval) == (58, 5)
    for i, first in enumerate("abc"):
        for j, second in enumerate("abc"):
            x, y = (
                [after[f"loss/{name}"] - before[f"loss/{name}"] for before, after in itertools.pairwise(kept)]
                for name in (first, second)
            )
            cx, cy = np.array(x) - np.mean(x), np.array(y) - np.mean(y)
            expected = (cx * cy).sum() / math.sqrt((cx**2).sum() * (cy**2).sum())
            assert found.pearson[i, j] == pytest.approx(expected)
            assert found.agreement[i, j] == sum((p > 0) == (q > 0) for p, q in zip(x, y, strict=True)) / 58
    assert found.pearson[0, 1] > 0.8 and found.pearson[0, 2] < -0.8
    assert found.recorded == {}


def test_a_loss_that_never_changes_has_no_pearson():
    records = [{**r, "loss/b": 1.0} for r in losses(20)]
    found = loss_changes(records)
    assert np.isnan(found.pearson[0, 1]) and np.isfinite(found.agreement).all()


def test_too_few_changes_give_what_the_run_has_recorded():
    records = losses(MIN_STEPS)
    assert loss_changes(records) is None and loss_changes([]) is None
    assert loss_changes([{k: v for k, v in r.items() if k in ("step", "loss", "loss/a")} for r in losses(50)]) is None
    for name, value in (("b_vs_a", 0.5), ("a_vs_c", -0.25)):  # in the order of the configuration, not of the alphabet
        records[-1] |= {f"conflict/{name}/pearson": value, f"conflict/{name}/sign_agreement": value**2}
    found = loss_changes(records)
    assert found.count == 0 and found.steps.tolist() == [MIN_STEPS]
    assert found.pearson[0].tolist() == [1, 0.5, -0.25]
    conflicts = {picture.name: picture for picture in curves(records)}["conflicts"]
    assert conflicts.table[1][0] == ["a", "b", 0, None, None, None, 0.5, 0.25]


def test_streaming_covariance_is_that_of_all_vectors():
    x = torch.randn(700, 12) @ torch.randn(12, 12) + 3000.0  # float32 sums of squares would lose it
    streamed, at = Covariance(12, CPU), 0
    for size in (1, 0, 300, 7, 392):
        streamed.add(x[at : at + size].reshape(-1, 1, 12))
        at += size
    assert streamed.count == 700
    torch.testing.assert_close(streamed.value(), torch.cov(x.double().T, correction=0), rtol=1e-9, atol=1e-9)
    assert Covariance(3, CPU).value().tolist() == [[0.0] * 3] * 3


def test_explained_variance_is_that_of_singular_values():
    x = torch.randn(200, 6, dtype=torch.float64) * torch.tensor([9, 4, 2, 1, 0.5, 0.1])
    x = x - x.mean(0)
    strength = np.linalg.svd(x.numpy(), compute_uv=False) ** 2
    found = explained_variance(x.T @ x / 200)
    np.testing.assert_allclose(found, strength.cumsum() / strength.sum())
    assert components_for(found, 0.9) == int((found < 0.9).sum()) + 1
    assert components_for(np.array([0.5, 1.0]), 1.0) == 2
    constant = explained_variance(torch.zeros(4, 4))
    assert np.isnan(constant).all() and components_for(constant, 0.9) is None


@pytest.mark.parametrize("registers", [0, 2])
def test_attention_of_the_cls_token(registers):
    cfg = ViTConfig(28, embed_dim=48, depth=3, num_heads=3, num_registers=registers, layer_scale=None)
    torch.manual_seed(0)
    encoder = VisionTransformer(cfg).init_weights().eval()
    images = torch.randn(2, 3, 28, 42)
    found = cls_attention(encoder, images)
    with torch.no_grad():
        block = encoder.blocks[-1]
        x = torch.nn.functional.layer_norm(encoder.block_outputs(images, [1])[1], (48,), eps=1e-6)
        q, k, _ = (x @ block.attn.qkv.weight.T + block.attn.qkv.bias).split(48, -1)
        for head in range(3):
            part = slice(16 * head, 16 * head + 16)
            weights = torch.softmax(q[:, :1, part] @ k[:, :, part].transpose(1, 2) / 4, -1)[:, 0, 1 + registers :]
            torch.testing.assert_close(found[:, head], weights.unflatten(1, (2, 3)), rtol=1e-4, atol=1e-6)
    assert not encoder.blocks[-1].attn.qkv._forward_hooks


def test_one_range_for_a_whole_map():
    tokens = torch.randn(100, 3) * torch.tensor([10.0, 3.0, 1.0])
    colours = pca_rgb(tokens, 10, 10, whole_map=True)
    spans = colours.amax((0, 1)) - colours.amin((0, 1))
    assert colours.min() == 0 and colours.max() == 1 and spans[0] > spans[1] > spans[2]


def test_csv_has_empty_fields_for_what_is_not_there(tmp_path):
    write_csv(tmp_path / "x.csv", ["a", "b, c"], [[1, None], [math.nan, 'say "x"']])
    found = list(csv.reader((tmp_path / "x.csv").read_text().splitlines()))
    assert found == [["a", "b, c"], ["1", ""], ["", 'say "x"']]


def test_photographs_are_spread_evenly(trained_run, photos):
    data = load_config(trained_run / "config.yaml").data
    (all_of_it,) = photographs(data, [], 256)
    (two,) = photographs(data, [], 2)
    assert len(all_of_it.val) == 4
    assert [two.val.relative(i) for i in range(2)] == [all_of_it.val.relative(i) for i in (0, 3)]
    (others,) = photographs(data, [f"{photos}/"], 5)
    assert (others.name, len(others.val)) == (photos.name, 5)
    data.datasets["images"].holdout = 0
    with pytest.raises(ValueError, match="--data"):
        photographs(data, [], 5)


def test_spectra_of_teachers_and_projections(trained_run):
    opened = open_trained(trained_run, True, CPU)
    datasets = photographs(opened.cfg.data, [], 4)
    teachers = opened.teachers()
    spectra, (header, rows) = variance_spectra(opened, teachers, datasets)
    assert spectra.keys() == {("one", "images"), ("two", "images")}
    with ValLoader(opened.cfg.data, 56, 4, 0, 1, CPU, datasets) as loader, torch.no_grad():
        (batch,) = loader
        features, projections = teachers(batch.images), opened.students["after"](batch.images)
    for name, width in (("one", 24), ("two", 32)):
        mean, scale = opened.statistics.running()[name]["patch"]
        raw = features[name]["patch"].flatten(0, 1).double()
        expected = {
            "teacher": (raw - mean) * scale, "raw teacher": raw, "projection": projections[name]["patch"].flatten(0, 1)
        }  # fmt: skip
        for what, x in expected.items():
            strength = torch.linalg.svdvals(x.double() - x.double().mean(0)).square().numpy()
            shares = np.ones(width)
            shares[: len(strength)] = strength.cumsum() / strength.sum()
            np.testing.assert_allclose(spectra[name, "images"][what], shares, atol=1e-6)
    assert len(rows) == 3 * (24 + 32) and rows[0][:6] == ["one", "images", "patch", 64, "teacher", 1]
    assert len(header) == len(rows[0])


def test_phi_s_changes_no_spectrum(photos, tmp_path):
    """It rotates and scales all channels alike: the raw features' variance is shared among as many components."""
    run = tmp_path / "run"
    convention = ["standardization.convention=phi_s", "standardization.phi_s_batches=2", "train.steps=2"]
    Trainer(compose_config([*small_run(photos, run), *convention, "logging.tensorboard=false"])).run()
    opened = open_trained(run, True, CPU)
    teachers, datasets = opened.teachers(), photographs(opened.cfg.data, [], 4)
    spectra, _ = variance_spectra(opened, teachers, datasets)
    with ValLoader(opened.cfg.data, 56, 4, 0, 1, CPU, datasets) as loader, torch.no_grad():
        raw = teachers(next(iter(loader)).images)["two"]["patch"].flatten(0, 1).double()
    for what in ("teacher", "raw teacher"):
        expected = explained_variance(torch.cov(raw.T))
        np.testing.assert_allclose(spectra["two", "images"][what], expected, atol=1e-5)


def test_the_command_writes_pictures_and_tables(finished, photos, tmp_path, capsys):
    out = tmp_path / "drawn"
    arguments = ["figures", str(finished), "--out", str(out), "--data", str(photos), "--images", "3", "--device", "cpu"]
    assert cli.main(arguments) == 0
    names = sorted(CURVES + FEATURES)
    expected = [f"{name}.{suffix}" for name in names for suffix in ("csv", "png")]
    assert sorted(p.name for p in out.iterdir()) == sorted([*expected, "report.html"])
    assert not (finished / "report.html").exists()
    tables = {}
    for name in names:
        assert np.asarray(Image.open(out / f"{name}.png").convert("L")).std() > 5
        tables[name] = list(csv.DictReader((out / f"{name}.csv").read_text().splitlines()))
    records = read_metrics(finished / "metrics.jsonl")
    assert [float(row["loss/one"]) for row in tables["loss"]] == [r["loss/one"] for r in records]
    assert [float(row["kept/two"]) for row in tables["keep_rates"]] == [r["kept/two"] for r in records]
    maps = {"one", "two", "student, before", "student, after"}
    assert len(tables["pca"]) == 2 * 16 * 4 and {row["features"] for row in tables["pca"]} == maps
    assert len(tables["attention"]) == 2 * 2 * 3 * 16
    assert {(row["dataset"], row["vectors"]) for row in tables["variance"]} == {(photos.name, "48")}
    assert (out / "report.html").read_text().count("data:image/png;base64,") == 5


def test_what_cannot_be_drawn_is_said_and_the_rest_is_drawn(finished, caplog):
    (finished / "metrics.jsonl").unlink()
    (finished / "student.safetensors").write_bytes(b"no weights")
    caplog.set_level(logging.WARNING)
    files = draw_run(finished, device=CPU)
    assert files == [finished / "report.html"]
    text = files[0].read_text()
    assert "curves" in caplog.text and "attention, pca, variance" in caplog.text
    assert text.count("Left out: ") == 2 and "student.safetensors is damaged" in text


def test_curves_need_no_teacher(finished):
    for folder in ("checkpoints", "encoder.safetensors", "student.safetensors"):
        path = finished / folder
        path.rename(finished / f"moved {folder}")
    files = {path.name for path in draw_run(finished, device=CPU)}
    assert files == {"loss.png", "loss.csv", "keep_rates.png", "keep_rates.csv", "report.html"}
    assert (finished / "figures" / "loss.png").is_file()


def test_attention_maps_need_no_teacher(finished, tmp_path):
    path = finished / "config.yaml"
    path.write_text(path.read_text().replace("weights: random:2", f"weights: {tmp_path / 'gone.pth'}"))
    drawn = {path.stem for path in draw_run(finished, device=CPU)}
    assert drawn == {*CURVES, "attention", "report"}
    assert "gone.pth" in (finished / "report.html").read_text()


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="not the folder of a run"):
        draw_run(tmp_path)
    with pytest.raises(ValueError, match="--images 0"):
        draw_run(tmp_path, per_dataset=0)


def test_photographs_that_are_not_there_are_an_error(finished):
    with pytest.raises(DataError, match="nowhere"):
        draw_run(finished, data=["/nowhere"])
    assert not (finished / "figures").exists()


def test_held_out_losses_of_a_run_are_drawn():
    records = losses(12)
    values = {"held_out/a": 1.0, "held_out/b": 0.5, "held_out/a/x": 2.0, "held_out_images": 4.0}
    records += [{"step": 6, **values}, {"step": 12, **values}]
    found = {picture.name: picture for picture in curves(json.loads(json.dumps(records)))}
    assert found["held_out"].table == (["step", "held_out/a", "held_out/b"], [[6, 1.0, 0.5], [12, 1.0, 0.5]])
    assert list(found) == ["loss", "held_out", "conflicts"]
