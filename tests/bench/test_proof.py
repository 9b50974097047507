"""The proof: images, measurements, cells that resume, the page."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
import subprocess
import tarfile
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from PIL import Image

from bench.proof import cells as proof
from bench.proof.__main__ import README, RESULTS, main
from bench.proof.cells import SMOKE, Cell, Places, Settings, all_cells, finished, run_cell, training_overrides
from bench.proof.evaluation import (
    EvaluationConfig,
    best_threshold,
    fit_probe,
    foreground_iou,
    stereo_matching,
    stereo_views,
)
from bench.proof.packages import PACKAGES, PackageError, fetch_package
from bench.proof.scenes import CLASSES, Sources, make_scenes, packaged_sources, split_sources
from bench.proof.smoke import drawn_sources, drawn_stereo
from bench.proof.table import page, rows, verdicts, with_table
from dune_fast.engine.config import compose_config
from dune_fast.teachers.files import file_sha256

SCENES = SMOKE.scenes


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Sources:
    return drawn_sources(tmp_path_factory.mktemp("sources"))


@pytest.fixture(scope="module")
def places(tmp_path_factory, sources) -> Places:
    top = tmp_path_factory.mktemp("proof")
    return Places(top / "work", make_scenes(top / "scenes", SCENES, sources), drawn_stereo(top / "stereo"), top / "out")


def files_of(given: Sources) -> set[Path]:
    return {path for paths in given.cutouts.values() for path in paths} | {*given.natural, *given.interior}


def test_no_image_is_in_both_parts_and_the_study_never_sees_what_the_proof_tests_on(sources):
    final, study = (split_sources(sources, dataclasses.replace(SCENES, split=s)) for s in ("final", "study"))
    for found in (final, study):
        assert not files_of(found.train) & files_of(found.test)
        assert all(found.test.cutouts[name] and found.train.cutouts[name] for name in sources.cutouts)
        assert found.test.natural and found.test.interior
    assert files_of(study.train) | files_of(study.test) == files_of(final.train)


def test_images_are_the_same_every_time_and_kept(sources, places, tmp_path):
    again = make_scenes(tmp_path / "again", SCENES, sources)
    files = sorted(p.relative_to(again) for p in again.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(places.scenes) for p in places.scenes.rglob("*") if p.is_file())
    assert all((again / file).read_bytes() == (places.scenes / file).read_bytes() for file in files)
    before = (again / "scenes.json").stat().st_mtime_ns
    make_scenes(again, SCENES, sources)
    assert (again / "scenes.json").stat().st_mtime_ns == before
    other = make_scenes(again, dataclasses.replace(SCENES, objects=8), sources)
    assert len(list((other / "train" / "objects").iterdir())) == 8


def test_masks_cover_the_cutout_alone(places):
    masks = sorted((places.scenes / "test_masks").rglob("*.png"))
    images = sorted((places.scenes / "test").rglob("*.jpg"))
    assert [p.stem for p in masks] == [p.stem for p in images]
    for path in masks:
        mask = np.array(Image.open(path))
        assert set(np.unique(mask)) == {0, 255} and 0.02 < (mask > 0).mean() < 0.8


def test_the_pinned_cutouts_are_those_that_are_described(monkeypatch, tmp_path):
    """Without the packages: folders of the archive by their names, drawings left out."""
    top = tmp_path / "usr/share/tuxpaint/stamps"
    for name in ("animals/mammals/aquatic/orca.png", "animals/mammals/cow.png", "animals/birds/cartoon/owl.png"):
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).touch()
    monkeypatch.setattr("bench.proof.scenes.fetch_package", lambda name: tmp_path)
    monkeypatch.setattr("bench.proof.scenes.fetch", lambda name: tmp_path / name)
    (tmp_path / "skimage/data").mkdir(parents=True)
    found = packaged_sources().cutouts
    assert [p.name for p in found["fish"]] == ["orca.png"] and [p.name for p in found["mammal"]] == ["cow.png"]
    assert not found["bird"] and set(found) == set(CLASSES)


def deb(path: Path, members: dict[str, bytes]) -> None:
    """A Debian package with these files."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:xz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(f"./{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    with open(path, "wb") as sink:
        sink.write(b"!<arch>\n")
        for name, content in (("debian-binary", b"2.0"), ("data.tar.xz", data.getvalue())):
            sink.write(f"{name:<16}{0:<12}{0:<6}{0:<6}{644:<8}{len(content):<10}`\n".encode())
            sink.write(content + b"\n" * (len(content) % 2))


def test_a_package_is_verified_and_only_what_is_wanted_is_unpacked(monkeypatch, tmp_path):
    monkeypatch.setenv("DUNE_FAST_CACHE", str(tmp_path / "cache"))
    downloads = tmp_path / "cache" / "downloads"
    downloads.mkdir(parents=True)
    made = tmp_path / "made.deb"
    deb(made, {"usr/a.jpg": b"one", "usr/b.txt": b"two", "../out.jpg": b"three"})
    package = dataclasses.replace(
        PACKAGES["mate-backgrounds"], filename="made.deb", sha256=file_sha256(made), members=("*.jpg",),
        command=("cp", str(made), "."),
    )  # fmt: skip
    monkeypatch.setitem(PACKAGES, "made", package)
    folder = fetch_package("made")
    assert [p.name for p in folder.rglob("*") if p.is_file() and p.name != ".sha256"] == ["a.jpg"]
    assert fetch_package("made") == folder and not list(downloads.iterdir())
    monkeypatch.setitem(PACKAGES, "other", dataclasses.replace(package, sha256="0" * 64))
    with pytest.raises(PackageError, match="expected 000"):
        fetch_package("other")
    monkeypatch.setitem(PACKAGES, "none", dataclasses.replace(package, filename="x.deb", command=("false",)))
    with pytest.raises(PackageError, match="put x.deb into"):
        fetch_package("none")


def test_the_probe_finds_a_linear_foreground(tmp_path):
    x = torch.randn(6, 16, 5)
    shares = (x @ torch.tensor([1.0, -2.0, 0.0, 0.5, 0.0]) > 0.3).float()
    w, b = fit_probe(x, shares, EvaluationConfig(probe_penalty=0.0))
    assert ((x @ w + b > 0) == (shares > 0.5)).float().mean() > 0.95
    masks = []
    for i, row in enumerate(shares):
        masks.append(tmp_path / f"{i}.png")
        image = Image.fromarray((255 * row.reshape(4, 4)).byte().numpy())
        image.resize((4, 4), Image.Resampling.NEAREST).save(masks[-1])
    logits = 10 * (2 * shares - 1)
    assert foreground_iou(logits, masks, 0.0) == 1.0
    assert foreground_iou(logits, masks, best_threshold(logits, masks)) == 1.0
    assert foreground_iou(-logits, masks, 0.0) == 0.0


def test_matching_is_perfect_for_an_encoder_that_sees_where_it_is(tmp_path):
    """A pair whose colours are a code of the place: features that read it find every match, constant ones none."""
    rows, columns = np.mgrid[0:320, 0:560]
    wide = np.stack([rows * 255 // 320, columns * 255 // 560, 0 * rows], -1).astype(np.uint8)
    for name, at in (("left", 0), ("right", 35)):
        Image.fromarray(wide[:, at : at + 500]).save(tmp_path / f"motorcycle_{name}.png")
    np.savez(tmp_path / "motorcycle_disp.npz", arr_0=np.full((320, 500), 35, np.float32))
    cfg = EvaluationConfig(stereo_size=112, stereo_views=3)

    def encoder(images: torch.Tensor):
        at = torch.nn.functional.avg_pool2d(images[:, :2], 14).flatten(2).transpose(1, 2)
        return None, torch.cat([at.sin(), at.cos()], -1)  # of one length: the nearest by cosine is the nearest place

    assert stereo_matching(encoder, tmp_path, cfg) > 0.97
    assert stereo_matching(lambda x: (None, torch.ones(len(x), 64, 3)), tmp_path, cfg) < 0.2
    left, right, target = next(stereo_views(tmp_path, cfg))
    assert left.shape == right.shape == (3, 112, 112) and target.shape == (112, 112, 2)


def result(cell: Cell, **values: float) -> dict:
    machine = {"device": "cpu", "threads": 1}
    return {"values": values, "seconds": {"training": 60.0, "evaluation": 0.0}, "machine": machine, "identity": {}}


def test_the_page_says_what_holds_and_what_does_not():
    cells = [cell for cell in all_cells(SMOKE) if cell.part == "main"]
    level = {"random": 0.2, "student of all": 0.5, "student of semantic": 0.45}
    results = {}
    for cell in cells:
        at = level.get(cell.row, 0.4) + 0.01 * cell.seed
        cls = {} if cell.row == "teacher saliency" else {"knn_cls": at}
        results[cell.name] = result(cell, **cls, knn_patch=at, iou=at, match=at)
    table = rows(cells, results)
    assert table["student of all"]["knn"] == pytest.approx((0.505, 0.00707, 2), abs=1e-5)
    assert [holds for holds, _ in verdicts(table)] == [True] * 5
    assert "pass: k-NN: +0.300 over random weights" in page(cells, results)
    results["student_of_all-1"]["values"]["iou"] = 0.1  # a wide spread, and nothing gained
    checks = verdicts(rows(cells, results))
    assert [holds for holds, _ in checks] == [True, False, True, True, False]
    assert checks[-1][1] == "above the weights that it started from, but for IoU"
    assert "FAIL: IoU" in page(cells, results)
    del results["random-0"], results["random-1"]
    text = page(cells, results)
    assert "What it has to show" not in text and "Not run yet: random-0, random-1" in text


def test_readmes_table_is_the_results_that_are_here():
    """`python -m bench.proof --table` changes nothing."""
    cells = all_cells(Settings())
    results = proof.read_results(RESULTS, cells)
    text, page_text = README.read_text(), (RESULTS / "README.md").read_text()
    assert results and with_table(text, cells, results) == text and page(cells, results) == page_text
    with pytest.raises(ValueError, match="lacks the markers"):
        with_table("# README", cells, results)


def test_a_gpu_trains_a_wider_student_from_a_start_of_its_own(places):
    settings = Settings(small=True)
    student = next(cell for cell in all_cells(settings) if cell.row == "student of all, ViT-S/14")
    cfg = compose_config(training_overrides(student, settings, places))
    assert (cfg.student.embed_dim, cfg.start.teacher, cfg.student_weights) == (384, "semantic", "")
    random = next(cell for cell in all_cells(settings) if cell.row == "random ViT-S/14")
    assert proof.compose(settings, places, random.overrides).student == cfg.student
    assert not any(cell.part == "small" for cell in all_cells(Settings()))


@pytest.mark.slow
def test_a_killed_cell_goes_on_and_a_finished_one_is_not_run_again(places, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    counted = MagicMock(side_effect=subprocess.run)  # commands that `train` starts; they run
    monkeypatch.setattr(proof.subprocess, "run", counted)
    cell = next(cell for cell in all_cells(SMOKE) if cell.row == "student of all")
    mark = json.loads((places.scenes / "scenes.json").read_text())["fingerprint"]
    run = places.work / "runs" / cell.name
    assert not finished(cell, SMOKE, places, mark)
    run_cell(cell, SMOKE, places, mark)
    assert finished(cell, SMOKE, places, mark) and counted.call_count == 2  # the start's and its own
    first = (run / "encoder.safetensors").read_bytes()
    # as a kill between the checkpoint of step 2 and the end leaves it
    (run / "encoder.safetensors").unlink()
    (places.results / "cells" / f"{cell.name}.json").unlink()
    for folder in run.rglob("step_*4"):
        shutil.rmtree(folder)
    run_cell(cell, SMOKE, places, mark)
    assert counted.call_count == 3 and (run / "encoder.safetensors").read_bytes() == first
    assert "step 2" in run.with_suffix(".log").read_text()
    longer = dataclasses.replace(cell, steps=6)
    assert not finished(longer, SMOKE, places, mark)
    run_cell(longer, SMOKE, places, mark)  # another length: from the beginning
    assert finished(longer, SMOKE, places, mark) and (run / "encoder.safetensors").read_bytes() != first


def test_a_result_is_of_the_recipe_as_it_is(monkeypatch, tmp_path):
    """Of the proof's, and of one that a cell names itself."""
    recipes = [tmp_path / "experiment" / f"{name}.yaml" for name in ("proof_smoke", "radio_demo")]
    recipes[0].parent.mkdir()
    for recipe in recipes:
        shutil.copy(proof.packaged_folder() / "experiment" / recipe.name, recipe)
    plain = next(cell for cell in all_cells(SMOKE) if cell.kind == "student")
    cell = dataclasses.replace(plain, overrides=("experiment=radio_demo",))
    before = proof.identity(cell, SMOKE, "mark")
    monkeypatch.setattr(proof, "packaged_folder", lambda: tmp_path)
    for recipe in recipes:
        assert proof.identity(cell, SMOKE, "mark") == before
        recipe.write_text(recipe.read_text() + "# changed")
        assert proof.identity(cell, SMOKE, "mark") != before
        before = proof.identity(cell, SMOKE, "mark")


def test_a_single_teachers_cell_leaves_the_others_out(places):
    cell = next(cell for cell in all_cells(SMOKE) if cell.row == "student of geometric")
    overrides = training_overrides(cell, SMOKE, places)
    assert {"~teachers.semantic", "~teachers.saliency"} <= set(overrides) and "~teachers.geometric" not in overrides
    assert {f"student_weights={places.start(0)}", "start.teacher="} <= set(overrides)


@pytest.mark.slow
def test_the_command_from_images_to_page(tmp_path, caplog):
    caplog.set_level("INFO")
    arguments = ["--smoke", "--work", str(tmp_path), "--only", "random-0,teacher_geometric-0,LP-0", "--jobs", "2"]
    assert main(arguments) == 0
    text = (tmp_path / "cells_smoke" / "results" / "README.md").read_text()
    assert "| teacher geometric | 1 |" in text and "| LP | 1 |" in text
    caplog.clear()
    assert main([*arguments, "--list"]) == 0
    assert caplog.text.count("finished") == 3
    with pytest.raises(SystemExit, match="no cell matches 'nothing'"):
        main(["--smoke", "--work", str(tmp_path), "--only", "nothing"])


def test_the_siblings_table_in_the_docs_is_that_of_its_results():
    """docs/siblings.md repeats three columns of the page that `python -m bench.siblings --table` writes."""
    page = (README.parent / "bench/results/siblings/README.md").read_text()
    guide = (README.parent / "docs/siblings.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")] for line in page.splitlines() if "±" in line]
    assert len(rows) == 4
    for _, row, knn, _, iou, match, _, _ in rows:
        assert f"| {knn} | {iou} | {match} |" in guide, row
