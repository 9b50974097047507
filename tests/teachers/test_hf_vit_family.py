"""ViT and DeiT under Hugging Face's names: transformers' numbers, Theia's variants, every mistake."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from dune_fast.engine.warm_start import warm_start
from dune_fast.kernels.imagenet import IMAGENET_MEAN, IMAGENET_STD
from dune_fast.kernels.nn.theia import TheiaViT
from dune_fast.kernels.nn.vit import ViTConfig
from dune_fast.projectors.config import ProjectorConfig
from dune_fast.student import StudentConfig, build_student
from dune_fast.teachers.config import TeacherConfig
from dune_fast.teachers.containers import TeacherWeightsError
from dune_fast.teachers.ensemble import TeacherEnsemble
from dune_fast.teachers.hf_vit import HFViTTeacher
from dune_fast.teachers.registry import recognize

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}


def vit(folder):
    """(transformers' ViT of three blocks at 32 px, every weight drawn, norms' too; its tensors as a file has them)."""
    from transformers import ViTConfig as Config
    from transformers import ViTModel

    torch.manual_seed(0)
    model = ViTModel(Config(**SIZES, image_size=32, patch_size=8)).eval()
    for key, value in model.state_dict().items():
        value.normal_(1.0 if "norm" in key and key.endswith("weight") else 0.0, 0.2)
    model.save_pretrained(folder / "saved")  # names in a file and those in memory differ in newer versions
    return model, load_file(folder / "saved" / "model.safetensors")


def read(path):
    architecture, state = HFViTTeacher.read_file(path, TeacherConfig(num_heads=2))
    encoder = TheiaViT(architecture).eval()
    encoder.load_state_dict({key: state[key] for key in encoder.state_dict()})
    return encoder


@pytest.mark.parametrize("prefix", ["", "vit.", "deit."])
def test_transformers_vit(tmp_path, prefix):
    model, state = vit(tmp_path)
    path, images = tmp_path / "model.safetensors", torch.randn(2, 3, 32, 32)
    state = {prefix + key: value for key, value in state.items()}
    save_file({**state, "classifier.weight": torch.ones(5, 32)}, path)
    assert recognize(state) == "hf_vit"
    cfg = TeacherConfig("hf_vit", str(path), 8, 32, num_heads=2, mean=list(IMAGENET_MEAN), std=list(IMAGENET_STD))
    tokens = TeacherEnsemble({"teacher": cfg}, 8)(images)["teacher"]
    theirs = model(images).last_hidden_state.detach()
    torch.testing.assert_close(torch.cat([tokens["cls"][:, None], tokens["patch"]], 1), theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("registers", [0, 3])
@pytest.mark.parametrize("cls_token", [True, False])
def test_theias_variants_through_transformers_blocks(tmp_path, registers, cls_token):
    """Registers with positions of their own, behind the patches; no cls, with its row of the table left over."""
    model, state = vit(tmp_path)
    images = torch.randn(2, 3, 32, 32)
    state = {f"backbone.model.{key}": value for key, value in state.items()}
    at = "backbone.model.embeddings."
    extra = torch.randn(2, 1, registers, 32)
    if registers:
        state |= {f"{at}reg_token": extra[0], f"{at}reg_pos_embed": extra[1]}
    if not cls_token:
        del state[f"{at}cls_token"]
    save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "theia.safetensors")
    encoder = read(tmp_path / "theia.safetensors")
    x = torch.cat([model.embeddings(images)[:, int(not cls_token) :], extra.sum(0).expand(2, -1, -1)], dim=1)
    model.embeddings.register_forward_hook(lambda *_: x)
    theirs = model(images).last_hidden_state.detach()
    with torch.no_grad():
        cls, own, patches = encoder.split(encoder.norm(encoder.forward_tokens(images)))
    ours = torch.cat([*([cls[:, None]] if cls_token else []), patches, own], dim=1)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "said"),
    [({}, ""), ({"num_registers": 2}, "2 registers drawn"), ({"cls_token": False}, "cls left out"),
     ({"image_size": 48}, "positions resized from 16 to 36")],
)  # fmt: skip
def test_theias_student_starts_from_deit(tmp_path, fields, said):
    model, state = vit(tmp_path)
    path = tmp_path / "deit.safetensors"
    save_file({**{f"deit.{key}": value for key, value in state.items()}, "classifier.bias": torch.ones(5)}, path)
    sizes = {"patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "mlp_ratio": 2.0, "num_registers": 0}
    cfg = StudentConfig(**{**sizes, "image_size": 32, "layer_scale": None, "interpolate_offset": 0.0, "family": "theia",
                           "normed": True, **fields})  # fmt: skip
    student = build_student(cfg, ProjectorConfig("theia"), {"a": (5, ("patch",))})
    drawn = {name: x.clone() for name, x in student.state_dict().items()}
    found = warm_start(student, str(path))
    assert said in str(found) and found.not_taken == {"classifier": 1, "deit": 2}  # the pooler
    images, weights = torch.randn(1, 3, 32, 32), student.state_dict()
    assert all(torch.equal(drawn[name], weights[name]) for name in drawn if "register" in name or "projectors" in name)
    if not fields:
        with torch.no_grad():
            tokens = student.encoder.norm(student.encoder.forward_tokens(images))
        torch.testing.assert_close(tokens, model(images).last_hidden_state.detach(), rtol=1e-4, atol=1e-5)
    table = state["embeddings.position_embeddings"]
    assert torch.equal(weights["encoder.pos_embed"], table) == ("image_size" not in fields)


def test_theias_student_starts_from_one_of_ours(tmp_path):
    """With registers that have no positions: the same tokens, but for the norms' epsilon."""
    sizes = {"image_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_registers": 3}
    ours = build_student(ViTConfig(**sizes), ProjectorConfig(), {"a": (5, ("patch",))}, seed=1)
    save_file(ours.encoder.state_dict(), tmp_path / "encoder.safetensors")
    cfg = StudentConfig(**sizes, family="theia", normed=True)
    student = build_student(cfg, ProjectorConfig("theia"), {"a": (5, ("patch",))}, seed=2)
    warm_start(student, str(tmp_path / "encoder.safetensors"))
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        tokens, expected = (x.encoder.forward_tokens(images) for x in (student, ours))
    torch.testing.assert_close(tokens, expected, rtol=1e-3, atol=1e-4)


def test_a_file_of_several_encoders_or_with_more_inside_is_refused(tmp_path):
    state, path = vit(tmp_path)[1], tmp_path / "model.safetensors"
    save_file({**state, **{f"other.{key}": value.clone() for key, value in state.items()}}, path)
    with pytest.raises(TeacherWeightsError, match="2 encoders"):
        read(path)
    save_file({**state, "embeddings.distillation_token": torch.ones(1, 1, 32)}, path)
    cfg = TeacherConfig("hf_vit", str(path), 8, 32, num_heads=2)
    with pytest.raises(TeacherWeightsError, match="distillation_token"):
        TeacherEnsemble({"teacher": cfg}, 8)


def test_published_initialisation():
    encoder = TheiaViT.for_student(ViTConfig(image_size=64, patch_size=16, embed_dim=192, depth=2, num_heads=3), 1)
    encoder.init_weights()
    state = encoder.state_dict()
    for name in ("register_tokens", "register_positions", "cls_token", "pos_embed", "patch_embed.proj.weight"):
        assert state[name].std().item() == pytest.approx(0.02, rel=0.15), name
    assert encoder.blocks[0].norm1.eps == encoder.norm.eps == 1e-12
    assert state["patch_embed.proj.bias"].abs().max() == 0
    with pytest.raises(ValueError, match="choose student.family=radio"):
        TheiaViT.for_student(ViTConfig(), num_cls=2)
