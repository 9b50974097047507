"""A run with a student of RADIO's family: cropped positions, windows and spectral weights, all drawn by step; with
RADIO's losses."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file

import dune_fast
from dune_fast.engine.checkpoints import load_run
from dune_fast.engine.config import compose_config
from dune_fast.engine.optimizer import parameter_groups
from dune_fast.export.run import export
from dune_fast.student import Student
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
    "standardization.cls=none", "standardization.patch=phi_s_running", "standardization.phi_s_period=3",
    "objective.cls={cosine: 0.0, smooth_l1: 0.0, angle: 1.0}", "objective.tokens=sum",
    "objective.patch={cosine: 0.0, smooth_l1: 0.0, mse: 1.0}", "objective.drop_probability=0",
    "train.steps=12", "train.checkpoint_every=6",
]  # fmt: skip
IMAGES = torch.randn(2, 3, 56, 84, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def radio_run(photos, tmp_path_factory):
    """The folder of a run of 12 steps, with checkpoints after 6 and 12; not to be changed."""
    folder = tmp_path_factory.mktemp("radio") / "run"
    train(small_run(photos, folder), *RADIO)
    return folder


def test_resumed_in_the_middle_it_is_the_same(radio_run, photos, tmp_path):
    """The loss falls; draws are functions of the step, singular vectors are in the checkpoint."""
    losses = [record["loss"] for record in timeless(radio_run)]
    assert len(losses) == 12 and sum(losses[-4:]) < sum(losses[:4])
    again = shutil.copytree(radio_run, tmp_path / "run")
    assert complete_steps(again) == [6, 12]
    shutil.rmtree(folder(again) / tag(12))
    (again / "student.safetensors").unlink()
    trainer = build(small_run(photos, again), *RADIO)
    trainer.run()
    assert same_weights(radio_run, again)
    undone = {id(x) for x in trainer.task.live()}  # where a step is skipped
    vectors = [x for name, x in trainer.engine.module.named_buffers() if name.endswith(("._u", "._v"))]
    assert len(vectors) == 4 * 2 * (3 + 1 + 1 + 1) and all(id(x) in undone for x in vectors)


def test_sharded_and_recomputed_it_is_the_same(radio_run, photos, tmp_path):
    """Under ZeRO 3 a weight is whole only while its layer runs, power iteration included."""
    train(small_run(photos, tmp_path / "run"), *RADIO, "deepspeed=zero3", "train.activation_checkpointing=true")
    assert same_weights(radio_run, tmp_path / "run")


def test_encoder_and_model_of_a_run(radio_run):
    """A run's files and its checkpoint say the whole architecture; what is loaded has plain weights."""
    encoder, model = dune_fast.load_encoder(radio_run), dune_fast.load_model(radio_run)
    early = dune_fast.load_encoder(folder(radio_run) / tag(12))
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
    with pytest.raises(ValueError, match="no family of encoders|standardized per channel|of the family vit"):
        export(radio_run, target, tmp_path)


def test_a_plain_student_is_none_of_radios(trained_run, tmp_path):
    with pytest.raises(ValueError, match="needs a student of RADIO's family"):
        export(trained_run, "radio", tmp_path)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("train.compile=true", "train.compile=true with student.radio.window_sizes"),
        ("student.radio.window_sizes=[3,4]", "none divides the 4 x 4 patches of image_size=56"),
        ("student.radio.cpe_max_size=28", "cpe_max_size=28 is below student.image_size=56"),
        ("student.radio.cpe_max_size=56", "cpe_max_size=56 is student.image_size, so positions are not cropped"),
        ("student.radio.num_windowed=0", "leave none: lower num_global"),
        ("student.pos_embed=rope2d", "learned position table"),
        ("student.radio.spectral=3", "choose 0"),
        ("student.family=radioo", "choose one of vit, radio"),
        ("student.family=vit", "student.radio.cpe_max_size=112 with student.family=vit, which does not read it"),
        ("projector.cls_head.version=attn", "teacher 'one': projector.cls_head reads one token"),
        ("+projector.teachers.two.patch_head={upsample: 0}", "teachers.two.patch_head.upsample=0; it must be"),
        ("+projector.teachers.two.patch_head={hidden_dim: 1.5}", "patch_head.hidden_dim is 1.5; give a value like 32"),
        ("+projector.teachers.two.num_heads=0", "projector.teachers.two.num_heads=0; it must be at least 1"),
    ],
)
def test_options_that_do_not_fit(photos, more, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        compose_config([*small_run(photos, tmp_path / "run"), *RADIO, more])


def test_a_huge_student_has_the_parameters_of_transformers(photos, tmp_path):
    """RADIO's ViT-H/16 for 2,048 px, as `RadioModel` counts it, without its LayerScale of 1."""
    from transformers import RadioConfig, RadioModel

    more = ["image_size=224", "evaluation.figure_size=224", "student.embed_dim=1280", "student.depth=32"]
    cfg = compose_config([*small_run(photos, tmp_path / "run"), "student=radio_huge16", "projector=heads", *more])
    with torch.device("meta"):
        ours = Student(cfg.student, cfg.projector, cfg.teacher_features).encoder
        theirs = RadioModel(RadioConfig(num_cls_tokens=ours.cfg.num_cls, num_registers=ours.cfg.num_registers))
    counts = [sum(p.numel() for p in network.parameters()) for network in (ours, theirs)]
    assert counts[0] == counts[1] - 32 * 2 * 1280 and ours.num_prefix_tokens == 8
