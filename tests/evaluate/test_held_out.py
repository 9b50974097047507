"""Held-out agreement and the colours of figures."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from bench.toy.conv_patchify import toy_teacher
from dune_fast.dali_pipelines.loader import Batch
from dune_fast.distill.standardization import TeacherStatistics
from dune_fast.evaluate.figures import loss_figure, pca_figure, smooth, to_display
from dune_fast.evaluate.held_out import cut, held_out_cosines, pca_rgb, window_knn
from dune_fast.kernels.imagenet import IMAGENET_MEAN, IMAGENET_STD
from dune_fast.kernels.nn.vit import ViTConfig
from dune_fast.projectors.config import ProjectorConfig
from dune_fast.student import build_student
from dune_fast.teachers.ensemble import TeacherEnsemble

TEACHERS = {"a": toy_teacher("random:1", 14, 24)}
WIDTHS = {"a": (24, ["cls", "patch"])}


def batches(sizes, seed=0):
    g = torch.Generator().manual_seed(seed)
    at = 0
    for size in sizes:
        index = torch.arange(at, at + size)
        at += size
        zero = torch.zeros(size, dtype=torch.long)
        yield Batch(torch.randn(size, 3, 56, 56, generator=g), index, zero, zero, [""] * size, 0)


@pytest.fixture
def teachers():
    return TeacherEnsemble(TEACHERS, 14)


@pytest.fixture
def statistics(teachers):
    statistics = TeacherStatistics(WIDTHS)
    statistics.update(teachers(torch.randn(8, 3, 56, 56)), 1.0)
    return statistics


def test_a_teacher_on_a_finer_grid_is_compared_where_the_run_compares_it():
    """A map that is constant over each 2 x 2 cells, and a student that knows the cells."""

    class Finer(torch.nn.Module):
        def forward(self, images):
            coarse = images.unfold(2, 14, 14).unfold(3, 14, 14).mean((4, 5))  # [B, 3, 4, 4]
            return {"a": {"patch": coarse.repeat_interleave(2, 2).repeat_interleave(2, 3).flatten(2).mT}}

    def student(images):
        return {"a": {"patch": images.unfold(2, 14, 14).unfold(3, 14, 14).mean((4, 5)).flatten(2).mT}}

    statistics = TeacherStatistics({"a": (3, ["patch"])}, "none")
    result = held_out_cosines({"own": student}, Finer(), statistics, batches([3]), align="smaller")
    assert result["own"]["a"]["patch"] == pytest.approx(1, abs=1e-5)


def test_a_student_that_is_its_teacher_has_cosine_one(teachers, statistics):
    standardizers = statistics.running()["a"]

    def perfect(images):
        return {
            "a": {
                t: 3.0 * (x - standardizers[t].mean) * standardizers[t].inv_std
                for t, x in teachers(images)["a"].items()
            }
        }

    def opposite(images):
        return {"a": {t: -x for t, x in perfect(images)["a"].items()}}

    result = held_out_cosines({"same": perfect, "opposite": opposite}, teachers, statistics, batches([3, 2]))
    assert result["same"]["a"] == pytest.approx({"cls": 1.0, "patch": 1.0}, abs=1e-5)
    assert result["opposite"]["a"] == pytest.approx({"cls": -1.0, "patch": -1.0}, abs=1e-5)


def test_batches_of_any_size_give_the_same_mean(teachers, statistics):
    student = build_student(ViTConfig(56, embed_dim=48, depth=2, num_heads=3), ProjectorConfig(), WIDTHS)
    images = torch.cat([b.images for b in batches([7])])

    def split(sizes):
        at = np.cumsum([0, *sizes])
        zero = torch.zeros(7, dtype=torch.long)
        for a, b in zip(at[:-1], at[1:], strict=True):
            yield Batch(images[a:b], zero[a:b], zero[a:b], zero[a:b], [""] * (b - a), 0)

    one = held_out_cosines({"s": student}, teachers, statistics, split([7]))
    other = held_out_cosines({"s": student}, teachers, statistics, split([4, 1, 2]))
    assert one["s"]["a"] == pytest.approx(other["s"]["a"], abs=1e-6)


def test_no_held_out_image_is_explained(teachers, statistics):
    with pytest.raises(ValueError, match="holdout"):
        held_out_cosines({"s": teachers}, teachers, statistics, [])


def test_pca_colours_are_the_three_strongest_directions():
    torch.manual_seed(0)
    coordinates = torch.randn(400, 3) * torch.tensor([30.0, 10.0, 4.0])
    basis = torch.linalg.qr(torch.randn(16, 16)).Q[:, :3]
    tokens = coordinates @ basis.T + 0.01 * torch.randn(400, 16) + 5.0
    colours = pca_rgb(tokens, 16, 25).reshape(400, 3)
    assert colours.amin(0).abs().max() == 0 and torch.all(colours.amax(0) == 1)
    for i in range(3):
        correlation = torch.corrcoef(torch.stack([colours[:, i], coordinates[:, i]]))[0, 1]
        assert abs(correlation) > 0.95


def test_pca_of_constant_tokens_is_finite():
    assert torch.isfinite(pca_rgb(torch.ones(6, 8), 2, 3)).all()


def test_display_undoes_the_normalisation():
    rgb = torch.rand(3, 4, 4)
    mean, std = (torch.tensor(v)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
    torch.testing.assert_close(to_display((rgb - mean) / std), rgb.permute(1, 2, 0))


def test_moving_average_keeps_length_and_constants():
    assert np.allclose(smooth([2.0] * 7, 4), 2.0) and len(smooth([1, 2, 3], 9)) == 3


def test_figures_are_written_and_not_blank(teachers, tmp_path):
    student = build_student(ViTConfig(56, embed_dim=48, depth=2, num_heads=3), ProjectorConfig(), WIDTHS)
    pca_figure(torch.randn(2, 3, 56, 56), teachers, {"student": student}, tmp_path / "pca.png")
    records = [{"step": i, "loss": 1 / (i + 1), "loss/a": 2 / (i + 1), "loss/a/cls/cosine": 0} for i in range(30)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records) + '{"step": 30, "lo')
    loss_figure(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    for name in ("pca.png", "loss.png"):
        pixels = np.asarray(Image.open(tmp_path / name).convert("L"))
        assert pixels.std() > 10


def test_a_teacher_with_a_grid_of_its_own_is_drawn_on_it(tmp_path):
    own = TeacherEnsemble({"a": toy_teacher("random:1", 14, 24, input_size=84, grid="own")}, 14)
    student = build_student(ViTConfig(56, embed_dim=48, depth=1, num_heads=3), ProjectorConfig(), WIDTHS)
    maps = pca_figure(torch.randn(2, 3, 56, 56), own, {"student": student}, tmp_path / "pca.png")
    assert {title: x[0].shape for title, x in maps.items()} == {"a": (6, 6, 3), "student": (4, 4, 3)}


def test_titles_are_whole_and_apart(teachers, tmp_path):
    """The rows of pixels above the pictures: blank at the top, and between the titles of the columns."""
    student = build_student(ViTConfig(56, embed_dim=48, depth=2, num_heads=3), ProjectorConfig(), WIDTHS)
    students = {"dune_vitbase14_448_paper_another_try": student, "multihmr_vitlarge_14_672_another_try": student}
    pca_figure(torch.randn(1, 3, 56, 56), teachers, students, tmp_path / "pca.png")
    pixels = np.asarray(Image.open(tmp_path / "pca.png").convert("L"))
    assert (pixels[0] == 255).all()
    quarter = pixels.shape[1] // 4
    assert (pixels[:20, 3 * quarter - 2 : 3 * quarter + 2] == 255).all()


def test_windows_find_their_own_photograph_if_features_tell_it():
    images = torch.arange(2.0)[:, None, None, None].expand(2, 3, 12, 12) + torch.arange(12.0) / 100
    windows = cut(images, 4)
    assert windows.shape == (18, 3, 4, 4)
    assert torch.equal(windows[1], images[0, :, :4, 4:8]) and torch.equal(windows[3], images[0, :, 4:8, :4])
    assert torch.equal(windows[9:], windows[:9] + 1)
    own = torch.eye(4)[:, None].expand(4, 9, 4)
    assert window_knn(own) == 1.0
    places = torch.randn(1, 9, 8).expand(4, 9, 8)  # the same in every photograph: the three others vote against it
    assert window_knn(places) < 0.5
