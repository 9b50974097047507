"""Segmentation and depth end to end on a random encoder: schedules, windows, learning, going on after a kill."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from PIL import Image

import dune_fast
from dune_fast import cli
from dune_fast.engine.launch import free_port
from dune_fast.evaluate import probe
from dune_fast.evaluate.crops import DepthCrop, normalized
from dune_fast.evaluate.dense import DenseTask, flip_averaged_depth, resized_argmax, run_dense, window_logits, windows
from dune_fast.evaluate.model import open_model
from dune_fast.evaluate.pairs import open_pairs
from dune_fast.evaluate.probe import RECIPES, recipe, sample
from dune_fast.evaluate.ranks import Ranks
from dune_fast.evaluate.task import result_table
from dune_fast.heads.linear.depth import DepthHead
from dune_fast.heads.linear.layers import resize
from dune_fast.heads.linear.segmentation import SegmentationHead
from tests.evaluate.conftest import write_encoder


def test_the_rates_are_the_recipes():
    seg, depth = RECIPES["segmentation"], RECIPES["depth"]
    assert seg.rate(0) == pytest.approx(1e-3 * 1e-6) and seg.rate(750) == pytest.approx(
        1e-3 * (1 - 750 / 40000) * (1 - 0.5 * (1 - 1e-6))
    )
    assert seg.rate(1500) == pytest.approx(1e-3 * (1 - 1500 / 40000)) and seg.rate(39_999) == pytest.approx(2.5e-8)
    assert seg.momentum(5) == 0.9
    assert depth.rate(0) == pytest.approx(1e-7)
    assert depth.rate(19_200) == pytest.approx(1e-4 * (1e-8 + (1 - 1e-8) * 0.5))
    assert depth.rate(6_400) == pytest.approx(
        1e-4 * (1 + math.cos(math.pi / 6)) / 2 * (1 - 0.5 * 0.999), rel=1e-6
    )
    assert [depth.momentum(i) for i in (0, 11_519, 38_399)] == pytest.approx([0.95, 0.85, 0.95])
    short = recipe("segmentation", iterations=400, size=256)
    assert short.warm_up == 15 and short.stride == 170 and short.lr == 1e-3
    with pytest.raises(ValueError, match="--batch is 0"):
        recipe("depth", batch=0)


def test_every_image_is_drawn_once_a_pass():
    drawn = [[sample(7, 7 * p + i, 3)[0] for i in range(7)] for p in range(2)]
    assert sorted(drawn[0]) == sorted(drawn[1]) == list(range(7)) and drawn[0] != drawn[1]


def test_windows_cover_the_image():
    assert windows(512, 512, 341) == [0] and windows(300, 512, 341) == [0]
    assert windows(683, 512, 341) == [0, 171] and windows(1400, 512, 341) == [0, 341, 682, 888]


def test_logits_are_means_where_windows_overlap(model):
    head, seen = SegmentationHead(48, 3, window=28, stride=18).eval(), []
    image = torch.randint(256, (3, 28, 70), dtype=torch.uint8)
    head.bn.register_forward_hook(lambda module, args, output: seen.append(len(output)))

    with torch.no_grad():
        ours = window_logits(image, model, head, torch.device("cpu"))
        assert sum(seen) == len(windows(70, 28, 18)) and ours.shape == (1, 3, 28, 70)
        alone = resize(head.from_layers(model.padded(normalized(image[:, :, :28])[None])), (28, 28))
    torch.testing.assert_close(ours[..., :18], alone[..., :18])  # one window alone


def test_classes_in_chunks_are_those_of_all_at_once():
    logits = torch.randn(1, 80, 5, 6)
    assert torch.equal(resized_argmax(logits, (20, 31)), resize(logits, (20, 31))[0].argmax(0))


def test_images_of_any_size_are_padded_in_the_middle(model):
    x = torch.randn(1, 3, 30, 41)
    padded = torch.zeros(1, 3, 42, 42)
    padded[:, :, 6:36, :41] = x  # 0 left, 1 right; 6 above, 6 below
    torch.testing.assert_close(model.padded(x)[0][0], model.encode(padded)[0][0])


def test_depth_is_averaged_with_the_mirror_image(model):
    head, image = DepthHead(48).eval(), torch.randint(256, (3, 28, 42), dtype=torch.uint8)
    with torch.no_grad():
        ours = flip_averaged_depth(image, model, head, torch.device("cpu"))
        mirrored = flip_averaged_depth(image.flip(-1), model, head, torch.device("cpu"))
    assert ours.shape == (28, 42)
    torch.testing.assert_close(ours, mirrored.flip(-1))


def job(squares, task, **changed) -> DenseTask:
    train, val = open_pairs(squares, task)
    given = {"size": 56} if task == "segmentation" else {}
    cfg = recipe(task, **{"iterations": 30, "lr": 0.05, "batch": 4, **given, **changed.pop("recipe", {})})
    return DenseTask(task, train, val, cfg, crop=DepthCrop(56, 56), max_depth=6.0, threads=1, **changed)


@pytest.mark.parametrize("cached", [0, 56])
def test_bright_squares_are_segmented(model, squares, own_cache, cached):
    metrics, head = run_dense(job(squares, "segmentation", cached=cached), model, own_cache, Ranks())
    assert metrics["miou"] > 0.75 and head.conv_seg.out_channels == 2  # as the labels say; all dark gives 0.4


@pytest.mark.parametrize("cached", [0, 56])
def test_the_depth_of_bright_squares_is_learned(encoder_file, squares, own_cache, cached):
    model = open_model(str(encoder_file), torch.device("cpu"), norm=False, precision="fp32")
    cfg = {"lr": 0.02, "iterations": 25}
    metrics, _ = run_dense(job(squares, "depth", cached=cached, recipe=cfg), model, own_cache, Ranks())
    assert metrics["rmse"] < 0.85  # the best constant gives 0.95: dark is 1.5 m, bright 4.3 m away


def test_training_goes_on_after_a_kill(model, squares, own_cache, monkeypatch, caplog):
    """The state is of the last save; the numbers are those of a run that was not killed."""
    whole, head = run_dense(job(squares, "segmentation", recipe={"iterations": 12}), model, own_cache / "a", Ranks())
    monkeypatch.setattr(probe, "_SAVE_SECONDS", -1.0)  # every step
    plain, steps = probe._save, []

    def save(head, optimizer, step, path):
        plain(head, optimizer, step, path)
        steps.append(step)
        if len(steps) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(probe, "_save", save)
    again = job(squares, "segmentation", recipe={"iterations": 12})
    with pytest.raises(KeyboardInterrupt):
        run_dense(again, model, own_cache / "b", Ranks())
    with caplog.at_level("INFO"):
        metrics, other = run_dense(again, model, own_cache / "b", Ranks())
    assert steps == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12] and "after step 5" in caplog.text
    assert metrics == whole
    assert all(torch.equal(x, y) for x, y in zip(head.state_dict().values(), other.state_dict().values(), strict=True))
    changed = job(squares, "segmentation", recipe={"iterations": 12, "seed": 1})
    run_dense(changed, model, own_cache / "b", Ranks())
    assert len(steps) == 24  # another fingerprint


def test_the_command_and_its_files(encoder_file, squares, tmp_path, capsys):
    command = ["evaluate", str(encoder_file), "--data", str(squares), "--batch", "4", "--threads", "1"]
    out = tmp_path / "seg.json"
    more = ["--task", "segmentation", "--size", "56", "--iterations", "4", "--out", str(out)]
    assert cli.main([*command, *more]) == 0
    result = json.loads(out.read_text())
    assert result["recipe"]["stride"] == 37 and result["layout"] == "plain" and result["images"] == [12, 4]
    assert result["changed"] == ["iterations", "batch", "size"] and 0 < result["metrics"]["miou"] < 1
    head = dune_fast.load_head(out.with_suffix(".head.safetensors"))
    assert (head.kind, head.width, head.classes, head.window, head.stride) == ("linear_seg", 48, 2, 56, 37)
    assert "miou" in capsys.readouterr().out
    out = tmp_path / "depth.json"
    more = ["--task", "depth", "--cached", "56", "--iterations", "3", "--max-depth", "6", "--out", str(out)]
    assert cli.main([*command, *more]) == 0
    result = json.loads(out.read_text())
    assert result["reading"]["norm"] is False and result["metrics"]["rmse"] > 0
    head = dune_fast.load_head(out.with_suffix(".head.safetensors"))
    assert (head.kind, head.width, head.cls_width, head.max_depth) == ("linear_depth", 48, 48, 6.0)


def test_segmentation_reads_a_projector_as_the_paper_does(finished, squares):
    command = ["evaluate", str(finished), "--task", "segmentation", "--data", str(squares), "--projector", "tw"]
    assert cli.main([*command, "--size", "56", "--iterations", "2", "--batch", "4", "--threads", "1"]) == 0
    (path,) = (finished / "evaluation").glob("*.head.safetensors")
    assert path.name == f"segmentation_tw_{squares.name}.head.safetensors"
    head = dune_fast.load_head(path)
    assert head.width == 32 and head.projector == "two"  # which `tw` is the beginning of


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--task", "depth", "--layout", "nyud"], "no images with depth for train; expected is the layout nyud"),
        (["--task", "segmentation", "--classes", "1"], "there are labels of 1 class"),
        (["--task", "segmentation", "--layout", "ade20k"], "expected is the layout ade20k"),
        (["--task", "segmentation", "--cached", "50"], "--size 50: sides of images"),
        (["--task", "depth", "--iterations", "0"], "--iterations is 0: it must be above 0"),
        (["--task", "depth", "--max-depth", "0"], "--max-depth is 0.0: give metres"),
    ],
)
def test_errors_of_the_command(encoder_file, squares, capsys, more, words):
    assert cli.main(["evaluate", str(encoder_file), "--data", str(squares), *more]) == 2
    assert words in capsys.readouterr().err


def test_a_label_that_no_class_has_is_named(model, squares, own_cache):
    """Regression: on a GPU it would be a device assertion."""
    wrong = job(squares, "segmentation", classes=3, recipe={"iterations": 2})
    path = wrong.train.files[3][1]
    changed = Image.open(path)
    before = changed.copy()
    changed.putpixel((5, 5), 7)
    changed.save(path)
    try:
        with pytest.raises(ValueError, match=r"png has the label 7; there are 3 classes .*correct the number"):
            run_dense(replace(wrong, recipe=replace(wrong.recipe, batch=12)), model, own_cache, Ranks())
    finally:
        before.save(path)


def test_four_layers_of_a_deeper_encoder(squares, own_cache, tmp_path):
    path = str(write_encoder(tmp_path / "deep.safetensors", depth=4))
    model = open_model(path, torch.device("cpu"), norm=False, layers=4, precision="fp32")
    metrics, head = run_dense(job(squares, "depth", layers=4, recipe={"iterations": 2}), model, own_cache, Ranks())
    assert head.conv_depth.in_channels == 4 * 2 * 48 and metrics["rmse"] > 0


def test_the_paper_stands_beside_the_same_task():
    result = {
        "task": "depth", "layout": "nyud", "model": "m", "images": [3, 2], "changed": ["iterations"],
        "metrics": {"rmse": 0.5},
    }  # fmt: skip
    table = result_table(result)
    cells = [*table.columns[0].cells]
    assert "DUNE ViT-B/14, 448 px" in cells and any("not by its recipe: iterations" in cell for cell in cells)
    assert len([*result_table(result | {"layout": "plain"}).columns[0].cells]) == 1


@pytest.mark.slow
@pytest.mark.parametrize("task", ["knn", "segmentation"])
def test_two_processes_give_the_numbers_of_one(encoder_file, squares, colours, tmp_path, task):
    data = colours if task == "knn" else squares
    command = ["evaluate", str(encoder_file), "--data", str(data), "--task", task, "--precision", "fp32"]
    if task == "segmentation":
        command += ["--size", "56", "--iterations", "6", "--batch", "4", "--threads", "1"]
    results = []
    for count in (1, 2):
        out = tmp_path / f"{count}.json"
        launch = ["-m", "torch.distributed.run", "--nproc-per-node", str(count), "--master-port", str(free_port())]
        environment = {**os.environ, "DUNE_FAST_CACHE": str(tmp_path / str(count))}
        run = [sys.executable, *launch, "-m", "dune_fast", *command, "--out", str(out)]
        done = subprocess.run(run, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        results.append(json.loads(out.read_text()))
    assert results[1]["processes"] == 2
    assert results[1]["metrics"] == pytest.approx(results[0]["metrics"], abs=1e-6)
