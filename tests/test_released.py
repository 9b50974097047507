"""Published checkpoints: what is missing is an error, what could run code is refused."""

from __future__ import annotations

import argparse
import os

import pytest
import torch

from dune_fast.released import load_released
from teachers.containers import read_container
from teachers.dune import flat_blocks
from teachers.weights import TeacherWeightsError


@pytest.fixture
def container(reference_dir):
    return read_container(reference_dir / "checkpoint" / "official_ddp.pth")


def test_chunk_index_and_mask_token_go():
    state = {
        "encoder.blocks.0.11.norm1.weight": 1,
        "encoder.mask_token": 2,
        "projectors.a.blocks.0.norm1.weight": 3,
        "blocks.1.attn.qkv.bias": 4,
    }
    assert flat_blocks(state) == {
        "encoder.blocks.11.norm1.weight": 1,
        "projectors.a.blocks.0.norm1.weight": 3,
        "blocks.1.attn.qkv.bias": 4,
    }


def test_compiled_and_unwrapped_names_load_too(container, tmp_path):
    model = {k.replace("module.", "module._orig_mod."): v for k, v in container["model"].items()}
    model["module.something_else.weight"] = torch.zeros(1)
    torch.save({"model": model, "args": container["args"], "epoch": 3}, tmp_path / "compiled.pth")
    student, statistics = load_released(tmp_path / "compiled.pth")
    assert student.encoder.cfg.depth == 12 and len(list(statistics.buffers())) == 8


def test_a_missing_tensor_is_named(container, tmp_path):
    del container["model"]["module.encoder.blocks.0.3.attn.proj.bias"]
    torch.save(container, tmp_path / "short.pth")
    with pytest.raises(TeacherWeightsError, match="blocks.3.attn.proj.bias is missing"):
        load_released(tmp_path / "short.pth")


def test_another_kind_of_checkpoint_is_named(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "other.pth")
    with pytest.raises(TeacherWeightsError, match="not a DUNE checkpoint"):
        load_released(tmp_path / "other.pth")


class Payload:
    def __reduce__(self):
        return os.system, ("touch executed",)


def test_a_pickle_that_runs_a_command_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {}, "args": argparse.Namespace(x=Payload())}, "hostile.pth")
    with pytest.raises(TeacherWeightsError, match=r"asks for the type \S*system"):
        load_released(tmp_path / "hostile.pth")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04" + bytes(50)])
def test_damaged_files_are_named(content, tmp_path):
    path = tmp_path / "damaged.pth"
    path.write_bytes(content)
    with pytest.raises(TeacherWeightsError, match="damaged.pth"):
        load_released(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(TeacherWeightsError, match="there is no checkpoint"):
        load_released(tmp_path / "nothing.pth")
