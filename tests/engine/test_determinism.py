"""`train.deterministic`: what it sets and restores, what it refuses, and on a GPU the same bits."""

from __future__ import annotations

import os
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dune_fast.distill.objective import ownership
from dune_fast.distill.standardization import TeacherStatistics
from dune_fast.distill.step import DistillationStep
from dune_fast.engine.config import RunConfig
from dune_fast.engine.determinism import NotDeterministicError, deterministic_algorithms, explained
from dune_fast.student import StudentConfig, build_student
from dune_fast.teachers.config import TeacherConfig
from dune_fast.teachers.ensemble import TeacherEnsemble
from tests.engine.conftest import build, same_weights, train
from tests.engine.fake_tensors import faked

NO_DETERMINISTIC_FORM = {
    "aten::upsample_bicubic2d_backward", "aten::_upsample_bicubic2d_aa_backward", "aten::upsample_bilinear2d_backward",
    "aten::upsample_linear1d_backward", "aten::cumsum", "aten::median", "aten::kthvalue", "aten::histc",
    "aten::bincount", "aten::put_", "aten::grid_sampler_2d_backward", "aten::nll_loss2d_forward",
    "aten::adaptive_avg_pool2d_backward", "aten::_adaptive_avg_pool2d_backward", "aten::reflection_pad2d_backward",
    "aten::avg_pool3d_backward", "aten::max_unpool2d", "aten::_ctc_loss_backward", "aten::scatter_reduce",
}  # fmt: skip
"""Operations that torch refuses on CUDA: its list in the documentation of `use_deterministic_algorithms`."""
CONVOLUTIONS = {"aten::convolution", "aten::convolution_backward", "aten::cudnn_convolution"}


def state() -> tuple:
    return (
        torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory, torch.backends.cudnn.deterministic,
        torch.backends.cudnn.benchmark, os.environ.get("CUBLAS_WORKSPACE_CONFIG"), os.environ.get("NCCL_ALGO"),
    )  # fmt: skip


def test_sets_every_flag_and_restores_what_was(monkeypatch):
    monkeypatch.delenv("NCCL_ALGO", raising=False)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")  # deterministic too, so it stays
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    before = state()
    with pytest.raises(KeyError), deterministic_algorithms():
        assert state() == (True, False, False, True, False, ":16:8", "^NVLS")
        raise KeyError
    assert state() == before and before[4]


@pytest.mark.parametrize(("name", "value"), [("CUBLAS_WORKSPACE_CONFIG", ":0:0"), ("NCCL_ALGO", "NVLSTree")])
def test_an_environment_that_asks_for_the_opposite_is_refused(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    before = state()
    with pytest.raises(ValueError, match=f"train.deterministic=true, but the variable {name} is '{value}'; unset it"):
        deterministic_algorithms().__enter__()
    assert state() == before


def test_an_operation_without_a_deterministic_form_is_named_with_its_cure():
    torchs = "{} does not have a deterministic implementation, but you set 'torch.use_deterministic_algorithms(True)'."
    resize = "upsample_bicubic2d_backward_out_cuda"
    with pytest.raises(NotDeterministicError, match=f"{resize} has no .*student.image_size"), explained():
        raise RuntimeError(torchs.format(resize))
    with pytest.raises(NotDeterministicError, match="cumsum_cuda_kernel .* train.deterministic=false"), explained():
        raise RuntimeError(torchs.format("cumsum_cuda_kernel"))
    with pytest.raises(RuntimeError, match="^out of luck$"), explained():
        raise RuntimeError("out of luck")


def test_no_operation_of_a_step_lacks_a_deterministic_form():
    """Nor is any a convolution, whose benchmark is off and whose gradient cuDNN adds atomically."""
    half = [0.5] * 3
    cfg = RunConfig(
        image_size=168,  # tokens enough for the attention of long sequences
        student=StudentConfig(image_size=168, embed_dim=48, depth=2, num_heads=3),
        teachers={
            "dinov2": TeacherConfig("dinov2", "random:1", 14, 192, image_size=56, num_registers=4, groups=["generic"]),
            "mast3r": TeacherConfig("mast3r", "random:2", 16, 192, ["patch"], mean=half, std=half, groups=["3d"]),
        },
    )
    seen: Counter[str] = Counter()

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen[func._schema.name] += 1
            return func(*args, **(kwargs or {}))

    student = build_student(cfg.student, cfg.projector, cfg.teacher_features, 0)
    student.compute_in(torch.bfloat16)
    teachers = TeacherEnsemble(cfg.teachers, 14, torch.bfloat16)
    groups = {name: teacher.groups for name, teacher in cfg.teachers.items()}
    own = ownership(groups, ["generic", "3d"], cfg.objective)
    with faked(student, teachers) as calls, Names():
        distill = DistillationStep(*calls, TeacherStatistics(cfg.teacher_features), own, cfg.objective)
        index = torch.zeros(4, dtype=torch.long)
        distill(torch.empty(4, 3, 168, 168), index, index, 0, 0.5).loss.backward()
    assert seen["aten::mm"] > 20 and seen["aten::_scaled_dot_product_flash_attention_for_cpu_backward"], "not seen"
    assert not seen.keys() & (NO_DETERMINISTIC_FORM | CONVOLUTIONS)


def test_a_run_sets_the_flags_until_it_has_ended(overrides):
    before = state()
    trainer = build(overrides, "train.steps=2", "train.deterministic=true")
    assert state()[:4] == (True, False, False, True)
    trainer.run()
    assert state() == before


def test_a_run_that_cannot_begin_restores_the_flags(overrides, monkeypatch):
    before = state()
    with pytest.raises(ValueError, match="not a multiple"):
        build(overrides, "train.accumulation=3", "train.deterministic=true")
    assert state() == before


@pytest.mark.gpu
def test_gpu_two_runs_and_one_that_is_killed_give_the_same_bits(overrides, tmp_path):
    vit = ["teachers.one.family=dinov2", "teachers.one.num_features=192", "teachers.one.image_size=56"]
    common = [*overrides, *vit, "train.precision=bf16", "train.deterministic=true"]

    def die(trainer, batch):
        if trainer.step == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(common, f"output_dir={tmp_path / 'killed'}", before_step=die)
    for name in ("first", "second", "killed"):  # the last from the checkpoint of step 3
        train(common, f"output_dir={tmp_path / name}")
    assert all(same_weights(tmp_path / name, tmp_path / "first") for name in ("second", "killed"))
