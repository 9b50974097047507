"""Recipes of several runs in small: UNIC-L's two sizes, EUPE's proxy and its students. The student of a run teaches the
next one."""

from __future__ import annotations

import itertools
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dune_fast.distill.stored_statistics import write_statistics
from dune_fast.engine import checkpoints
from dune_fast.engine.config import ConfigError, compose_config
from dune_fast.engine.feature_statistics import measure
from dune_fast.engine.metrics import read_metrics
from dune_fast.engine.stages import stages, teacher_sizes
from dune_fast.kernels.nn.radio import RADIOConfig, RADIOViT
from dune_fast.kernels.nn.theia import TheiaConfig, TheiaViT
from dune_fast.load import load_encoder
from dune_fast.teachers.architecture import architecture_metadata
from dune_fast.teachers.config import TeacherConfig, check_config
from dune_fast.teachers.containers import TeacherWeightsError
from dune_fast.teachers.ensemble import TeacherEnsemble
from tests.engine.conftest import build, same_weights, small_run, train


def in_small(experiment: str, teachers: list[str], photos: Path, folder: Path) -> list[str]:
    """A recipe with toy teachers and a student of two blocks, for ten steps; what makes it a recipe stays."""
    own = [part for part in small_run(photos, folder) if "teachers" not in part and not part.startswith("student=")]
    replaced = [f"teachers@teachers.{name}=conv_patchify" for name in teachers]
    replaced += [f"teachers.{name}.num_features={24 + 8 * i}" for i, name in enumerate(teachers)]
    return [
        f"experiment={experiment}", *replaced, *own, "student.num_heads=3", "student.patch_size=14", "train.steps=10",
        "optimizer.lr=2e-3", "train.checkpoint_every=5", "train.accumulation=1",
    ]  # fmt: skip


def check_resume(overrides: list[str], whole: Path, parts: Path) -> None:
    """Trains; ends with the same bits when it stops at step 5 and goes on."""
    train(overrides, f"output_dir={whole}")
    shutil.copytree(whole, parts)
    shutil.rmtree(parts / "checkpoints" / checkpoints.tag(10))
    again = build(overrides, f"output_dir={parts}")
    assert again.step == 5
    again.run()
    assert same_weights(parts, whole)


def test_unic_l_in_small_goes_from_size_to_size(photos, tmp_path):
    overrides = in_small("unic_l", ["dinov2_vitgiant_14", "metaclip_vithuge_14"], photos, tmp_path)
    overrides += ["image_size=84", "progressive=[{until:0.5,image_size:56}]"]
    check_resume(overrides, tmp_path / "whole", tmp_path / "parts")
    assert load_encoder(tmp_path / "whole").cfg.image_size == 84


def stored(overrides: list[str], file: Path) -> list[str]:
    """The overrides with statistics that were measured beforehand."""
    overrides = [*overrides, f"standardization.file={file}"]
    write_statistics(file, measure(compose_config(overrides), 8))
    return overrides


def test_eupe_in_small_distils_a_proxy_and_a_student_of_the_proxy(photos, tmp_path):
    proxy = in_small("eupe_proxy", ["dinov3", "clip", "siglip"], photos, tmp_path / "proxy")
    proxy += ["student.mlp_ratio=4", "deepspeed=zero0"]
    proxy += [f"teachers.{name}.input_size=84" for name in ("clip", "siglip")]  # 6 x 6 patches, the student has 4 x 4
    train(stored(proxy, tmp_path / "proxy.safetensors"))

    student = in_small("eupe_student_sizes", [], photos, tmp_path) + ["student.embed_dim=24", "student_weights=''"]
    own = {"weights": tmp_path / "proxy", "num_features": 48, "patch_size": 14, "input_size": 84}
    student += ["teachers.proxy.input_sizes=[56,84]", *(f"teachers.proxy.{k}={v}" for k, v in own.items())]
    student += ["image_size=84", "progressive=[{until:1.0,image_sizes:[56,84],weights:[1,1]}]"]
    student = stored(student, tmp_path / "student.safetensors")
    check_resume(student, tmp_path / "student", tmp_path / "parts")
    assert load_encoder(tmp_path / "student")(torch.randn(2, 3, 56, 56))["x_norm_patchtokens"].shape == (2, 16, 24)
    losses = [record["loss"] for record in read_metrics(tmp_path / "student" / "metrics.jsonl")]
    assert losses[-1] < 0.95 * losses[0]


def test_student_and_teacher_draw_their_sizes_independently(finished, photos, tmp_path):
    """Every pair of sizes comes, with equal chances, and the teacher's grid is that of its own size."""
    cfg = compose_config(["experiment=eupe_student_sizes"])
    (stage,), sizes = stages(cfg), teacher_sizes(cfg)
    pairs = Counter((stage.size(step, cfg.train.seed), sizes(step)["proxy"]) for step in range(270))
    assert pairs.keys() == set(itertools.product((256, 384, 512), repeat=2))
    assert all(14 <= count <= 46 for count in pairs.values())  # 30 +- 3 deviations
    assert teacher_sizes(compose_config(["experiment=eupe_student"])) is None

    teacher = TeacherConfig("dune", str(finished), 14, 48, ["patch"], input_size=84, input_sizes=[56, 84], grid="own")
    ensemble, images = TeacherEnsemble({"a": teacher}, 14), torch.randn(1, 3, 56, 56)
    assert ensemble(images)["a"]["patch"].shape[1] == 36  # without a draw: input_size
    drawn = ensemble(images, None, None, None, {"a": 56})["a"]["patch"]
    teacher.input_size, teacher.input_sizes = None, []
    torch.testing.assert_close(drawn, TeacherEnsemble({"a": teacher}, 14)(images)["a"]["patch"])


def test_sizes_that_a_teacher_cannot_draw_are_refused():
    with pytest.raises(ConfigError, match=r"grid=own gives other grids from step to step: choose objective\.align"):
        compose_config(["experiment=eupe_student_sizes", "objective.align=''"])
    for size, sizes, message in ((384, [512], "largest must be input_size"), (64, [60, 64], "multiples of 16 pixels")):
        cfg = TeacherConfig("dune", "somewhere", 16, 48, input_size=size, input_sizes=sizes)
        with pytest.raises(ValueError, match=rf"teachers\.a\.input_sizes is .*{message}"):
            check_config("a", cfg)


@pytest.mark.parametrize("cls_token", [True, False])
def test_a_student_of_theias_family_teaches(tmp_path, cls_token):
    """Its registers have positions of their own, which the plain ViT has not."""
    cfg = TheiaConfig(56, 14, 48, 2, 3, num_registers=2, cls_token=cls_token)
    vit, path = TheiaViT(cfg).init_weights().eval(), tmp_path / "encoder.safetensors"
    save_file(vit.state_dict(), path, architecture_metadata(cfg))
    teacher = TeacherConfig("dune", str(path), 14, 48, ["cls", "patch"] if cls_token else ["patch"])
    images = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        found, wanted = TeacherEnsemble({"a": teacher}, 14)(images)["a"], vit(images)
    assert torch.equal(found["patch"], wanted["x_norm_patchtokens"])
    assert not cls_token or torch.equal(found["cls"], wanted["x_norm_clstoken"])
    if not cls_token:
        teacher.token_types = ["cls", "patch"]
        with pytest.raises(ValueError, match=r"has no cls token; give token_types: \[patch\]"):
            TeacherEnsemble({"a": teacher}, 14)


def test_a_student_of_radios_family_teaches_by_its_own_family(tmp_path):
    cfg, path = RADIOConfig(56, 14, 48, 1, 3), tmp_path / "encoder.safetensors"
    save_file(RADIOViT(cfg).init_weights().state_dict(), path, architecture_metadata(cfg))
    with pytest.raises(TeacherWeightsError, match=r"give teachers\.a\.family=radio"):
        TeacherEnsemble({"a": TeacherConfig("dune", str(path), 14, 48)}, 14)


def test_a_teacher_is_a_runs_folder_its_encoder_or_its_newest_checkpoint(finished):
    def teacher(weights: Path) -> torch.Tensor:
        cfg = TeacherConfig("dune", str(weights), 14, 48, ["cls", "patch"])
        return TeacherEnsemble({"a": cfg}, 14)(torch.ones(1, 3, 56, 56))["a"]["patch"]

    tokens = teacher(finished)
    assert torch.equal(teacher(finished / "encoder.safetensors"), tokens)
    for name in ("encoder.safetensors", "student.safetensors"):
        (finished / name).unlink()
    assert torch.equal(teacher(finished), tokens)
