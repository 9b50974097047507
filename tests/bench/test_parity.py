"""The published numbers, case by case, through the same functions as `python -m bench.parity`."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from bench.case import Case, Check, relative_error
from bench.cases import RUNNERS
from bench.parity import main
from bench.train_case import run_train

CASES = (
    "checkpoint/dinov2_reg_tiny", "checkpoint/mast3r_tiny", "checkpoint/multihmr_tiny", "checkpoint/official_ddp",
    "checkpoint/unic_dbotft_tiny", "checkpoint/unic_deit3_tiny", "checkpoint/unic_dino_tiny",
    "checkpoint/unic_ibot_tiny",
    "encoder/noreg_noscale", "encoder/reg4_antialias", "encoder/reg4_layerscale",
    "loss/degenerate_rows", "loss/drop_all_but_hardest", "loss/large_values", "loss/none_bf16", "loss/none_fp32",
    "loss/none_fp32_dim1024", "loss/odd_shapes", "loss/own_and_generic_data", "loss/own_data",
    "projector/lp_all_blocks", "projector/lp_sparse_every3_norms", "projector/tp_head64", "projector/tp_small",
    "rope2d/rope2d_head16_5x9", "rope2d/rope2d_head64_24x24",
    "teacher_norm/ema_schedule", "teacher_norm/tiny_std", "teacher_norm/unic_running",
)  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_reference_case(reference_dir, name):
    case = Case(reference_dir / f"{name}.safetensors")
    failed = [check for check in RUNNERS[case.kind](case) if not check.passed]
    assert not failed


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
@pytest.mark.parametrize("name", ["train_none", "train_hardest"])
def test_training_trajectory(reference_dir, name, zero_stage):
    case = Case(reference_dir / "train" / f"{name}.safetensors")
    failed = [check for check in run_train(case, zero_stage) if not check.passed]
    assert not failed


def _write(path, info, tensors):
    save_file(tensors, path, {"case": json.dumps(info)})


def test_parity_fails_on_a_wrong_number(reference_dir, tmp_path, capsys):
    source = reference_dir / "rope2d" / "rope2d_head16_5x9.safetensors"
    info, tensors = Case(source).info, load_file(source)
    _write(tmp_path / "right.safetensors", info, tensors)
    assert main([str(tmp_path)]) == 0
    tensors["out"][0, 0, 0, 0] += 0.01
    _write(tmp_path / "wrong.safetensors", info, tensors)
    assert main([str(tmp_path)]) == 1
    assert "FAIL" in capsys.readouterr().out


def test_a_kind_that_nothing_computes_is_counted_apart_and_named(tmp_path, capsys):
    _write(tmp_path / "new.safetensors", {"kind": "diffusion"}, {"x": torch.zeros(1)})
    assert main([str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "diffusion     not built" in out and "0 pass, 0 fail, 1 not built" in out
    (tmp_path / "cut.safetensors").write_bytes(b"no case")
    assert main([str(tmp_path)]) == 1
    assert "0 pass, 1 fail, 1 not built" in capsys.readouterr().out


def test_parity_fails_on_an_empty_folder(tmp_path, capsys):
    assert main([str(tmp_path)]) == 1
    assert "no reference case" in capsys.readouterr().out


def test_nan_never_passes():
    assert relative_error(torch.tensor([float("nan")]), torch.ones(1)) != 0
    assert not Check("x", float("nan"), 1.0).passed


def test_a_published_clipping_of_all_parameters_together_would_be_noticed(reference_dir, monkeypatch):
    """The trap of the published training: each parameter is clipped on its own."""
    import dune_fast.engine.deepspeed_engine as engine
    from dune_fast.engine.optimizer import OptimizerConfig, scale_gradients

    def global_clip(gradients, norms, indices, cfg):
        together = OptimizerConfig(clip_per_parameter=0.0, clip_global=cfg.clip_per_parameter)
        scale_gradients(gradients, norms, indices, together)

    monkeypatch.setattr(engine, "scale_gradients", global_clip)
    case = Case(reference_dir / "train" / "train_hardest.safetensors")
    assert not all(check.passed for check in run_train(case))
