"""A run with a student of RADIO's family: cropped positions, windows and spectral weights, all drawn by step."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file

import dune_fast
from dune_fast.engine.checkpoints import load_run
from dune_fast.engine.optimizer import parameter_groups
from dune_fast.export.run import export
from dune_fast.teachers.config import TeacherConfig
from dune_fast.teachers.ensemble import TeacherEnsemble
from dune_fast.teachers.run_files import complete_steps, folder, tag
from tests.engine.conftest import build, same_weights, small_run, timeless, train

RADIO = [
    "student.family=radio", "student.depth=4", "student.final_norm=false", "student.layer_scale=null",
    "student.cls_per_teacher=true", "student.image_size=56", "student.radio.cpe_max_size=112",
    "student.radio.position_dropout=0.1", "student.radio.register_multiple=8", "student.radio.window_sizes=[2]",
    "student.radio.num_windowed=1", "student.radio.window_probability=0.7", "student.radio.spectral=2",
    "projector=heads", "projector.cls_head.hidden_dim=32", "projector.patch_head.hidden_dim=32",
    "train.steps=20", "train.checkpoint_every=10",
]  # fmt: skip
IMAGES = torch.randn(2, 3, 56, 84, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def radio_run(photos, tmp_path_factory):
    """The folder of a run of 20 steps, with checkpoints after 10 and 20; not to be changed."""
    folder = tmp_path_factory.mktemp("radio") / "run"
    train(small_run(photos, folder), *RADIO)
    return folder


def test_resumed_in_the_middle_it_is_the_same(radio_run, photos, tmp_path):
    """The loss falls; draws are functions of the step, singular vectors are in the checkpoint."""
    losses = [record["loss"] for record in timeless(radio_run)]
    assert len(losses) == 20 and sum(losses[-5:]) < 0.9 * sum(losses[:5])
    again = shutil.copytree(radio_run, tmp_path / "run")
    assert complete_steps(again) == [10, 20]
    shutil.rmtree(folder(again) / tag(20))
    (again / "student.safetensors").unlink()
    build(small_run(photos, again), *RADIO).run()
    assert same_weights(radio_run, again)


def test_sharded_and_recomputed_it_is_the_same(radio_run, photos, tmp_path):
    """Under ZeRO 3 a weight is whole only while its layer runs, power iteration included."""
    train(small_run(photos, tmp_path / "run"), *RADIO, "deepspeed=zero3", "train.activation_checkpointing=true")
    assert same_weights(radio_run, tmp_path / "run")


def test_encoder_and_model_of_a_run(radio_run):
    """A run's files and its checkpoint say the whole architecture; what is loaded has plain weights."""
    encoder, model = dune_fast.load_encoder(radio_run), dune_fast.load_model(radio_run)
    early = dune_fast.load_encoder(folder(radio_run) / tag(20))
    assert encoder.cfg == early.cfg and (encoder.cfg.num_cls, encoder.cfg.num_registers) == (2, 6)
    assert encoder.cfg.summaries == (0,) and encoder.cfg.radio.spectral == 0  # the second teacher has patches alone
    trained = load_file(radio_run / "student.safetensors")
    assert "encoder.blocks.0.attn.qkv.parametrizations.weight.0.parts.2._v" in trained
    assert "blocks.0.attn.qkv.weight" in encoder.state_dict()
    features = encoder(IMAGES)
    assert features["x_norm_clstoken"].shape == (2, 48) and features["x_norm_patchtokens"].shape == (2, 24, 48)
    for other in (model.encoder, early):
        torch.testing.assert_close(other(IMAGES)["x_norm_patchtokens"], features["x_norm_patchtokens"])
    teacher = TeacherConfig("radio", str(radio_run), 14, 48, ["cls", "patch"])
    found = TeacherEnsemble({"a": teacher}, 14)(IMAGES)["a"]  # as a teacher, on the images that it was trained with
    torch.testing.assert_close(found["patch"], features["x_norm_patchtokens"])
    torch.testing.assert_close(found["cls"], features["x_norm_clstoken"])


def test_table_and_tokens_do_not_decay_and_gains_do(radio_run):
    student = load_run(radio_run)[1]
    decayed, vectors, never = parameter_groups(student.requires_grad_(True), 0.1)
    names = {id(parameter): name for name, parameter in student.named_parameters()}
    assert {names[id(p)] for p in never["params"]} == {"encoder.pos_embed", "encoder.prefix_tokens"}
    assert never["weight_decay"] == vectors["weight_decay"] == 0
    assert any(names[id(p)].endswith(".scale") for p in decayed["params"])


@pytest.mark.parametrize("target", ["radio", "hf", "safetensors"])
def test_exports(radio_run, target, tmp_path):
    """Each is read back and compared at every size; a container of RADIO's is a model again, and exported again."""
    done = export(radio_run, target, tmp_path)
    assert done.every_size and done.difference < 1e-5
    if target == "radio":
        model = dune_fast.load_model(tmp_path / "radio.pth.tar")
        assert model.teachers == ["one_summary", "one", "two"]
        again = export(tmp_path / "radio.pth.tar", "radio", tmp_path / "again")
        assert again.difference < 1e-5


@pytest.mark.parametrize("target", ["timm", "onnx", "dune"])
def test_other_formats_refuse(radio_run, target, tmp_path):
    with pytest.raises(ValueError, match="no family of encoders|needs one of the encoders|of the family vit"):
        export(radio_run, target, tmp_path)
