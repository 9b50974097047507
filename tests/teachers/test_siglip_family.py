"""SigLIP and SigLIP 2: numbers of the reference cases and of transformers, and every mistake."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from bench.case import Case
from bench.cases import RUNNERS
from dune_fast.kernels.imagenet import IMAGENET_MEAN, IMAGENET_STD
from dune_fast.teachers.config import TeacherConfig
from dune_fast.teachers.containers import TeacherWeightsError
from dune_fast.teachers.ensemble import TeacherEnsemble
from dune_fast.teachers.registry import build_teacher, family_class

TOLERANCE = 1e-5  # float32; two orders of summation


def relative(ours, theirs):
    return float((ours - theirs).norm() / theirs.norm())


def config(path, **fields):
    """Images go in as they are: ImageNet's statistics, and the student's patch is the teacher's."""
    return TeacherConfig(
        **{"family": "siglip", "weights": str(path), "patch_size": 8, "num_features": 32, "num_heads": 2,
           "mean": list(IMAGENET_MEAN), "std": list(IMAGENET_STD), **fields}
    )  # fmt: skip


@pytest.fixture
def siglip(tmp_path):
    """(transformers' model, file) of a SigLIP of three blocks at 32 px, a text tower beside it."""
    from transformers import SiglipVisionConfig, SiglipVisionModel

    sizes = {"hidden_size": 32, "intermediate_size": 72, "num_hidden_layers": 3, "num_attention_heads": 2}
    model = SiglipVisionModel(SiglipVisionConfig(**sizes, image_size=32, patch_size=8))
    draw = torch.Generator().manual_seed(0)
    for key, value in model.state_dict().items():
        offset = 1.0 if "norm" in key and key.endswith("weight") else 0.0
        value.copy_(torch.randn(value.shape, generator=draw) * 0.2 + offset)
    text = {"text_model.head.weight": torch.ones(3), "logit_scale": torch.ones(1), "logit_bias": torch.ones(1)}
    image = {f"vision_model.{key}": value for key, value in model.state_dict().items()}
    save_file(image | text, tmp_path / "model.safetensors")
    return model.eval(), tmp_path / "model.safetensors"


@pytest.mark.parametrize("name", ["siglip_vision", "siglip_vision_interpolated"])
def test_reference_case(reference_dir, name):
    checks = RUNNERS["siglip_vision"](Case(reference_dir / "siblings" / f"{name}.safetensors"))
    assert len(checks) == (4 if name.endswith("interpolated") else 2)
    assert not [check for check in checks if not check.passed]


@pytest.mark.parametrize("size", [(32, 32), (48, 40)])
def test_transformers_siglip(siglip, size):
    model, path = siglip
    images = torch.randn(2, 3, *size)
    ours = TeacherEnsemble({"both": config(path), "raw": config(path, token_types=["patch"], norm=False)}, 8)(images)
    with torch.no_grad():
        theirs = model(images, interpolate_pos_encoding=True, output_hidden_states=True)
    assert relative(ours["both"]["cls"], theirs.pooler_output) < TOLERANCE
    assert relative(ours["both"]["patch"], theirs.last_hidden_state) < TOLERANCE
    assert relative(ours["raw"]["patch"], theirs.hidden_states[-1]) < TOLERANCE


def test_a_tower_alone_is_the_same(siglip, tmp_path):
    model, path = siglip
    save_file(model.state_dict(), tmp_path / "tower.safetensors")
    images = torch.randn(1, 3, 32, 32)
    one, other = (TeacherEnsemble({"a": config(p)}, 8)(images)["a"] for p in (path, tmp_path / "tower.safetensors"))
    assert relative(one["cls"], other["cls"]) < TOLERANCE  # memory of another alignment adds in another order
    assert relative(one["patch"], other["patch"]) < TOLERANCE


def test_so400m_has_the_published_heads_and_hidden_channels():
    family = family_class("siglip")
    architecture = family.architecture(config("random:0", num_features=1152, image_size=376, num_heads=None))
    assert (architecture.depth, architecture.num_heads) == (27, 16)
    with torch.device("meta"):
        vit = family.network(architecture)
    assert vit.blocks[0].mlp.fc1.weight.shape == vit.pool.mlp.fc1.weight.shape == (4304, 1152)


def test_cls_of_an_earlier_block_is_refused(siglip):
    _, path = siglip
    with pytest.raises(ValueError, match="the query that makes cls reads the last block"):
        build_teacher("a", config(path, layer=1))
    assert set(TeacherEnsemble({"a": config(path, layer=1, token_types=["patch"])}, 8)(torch.randn(1, 3, 32, 32))["a"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head.probe": torch.zeros(1, 1, 5)}, r"pool.probe has shape \[1, 1, 5\]"),
        ({"head.mlp.fc2.bias": None}, "pool.mlp.fc2.bias is missing"),
        ({"encoder.layers.2.self_attn.v_proj.weight": None}, "lacks the tensor blocks.2.attn.v_proj.weight"),
        ({"embeddings.patch_embedding.weight": torch.zeros(32, 3 * 8 * 8)}, "no ViT has"),  # NaFlex' linear layer
    ],
)
def test_a_file_that_does_not_fit(siglip, change, message, tmp_path):
    model, _ = siglip
    state = {key: change.get(key, value) for key, value in model.state_dict().items()}
    save_file({k: v for k, v in state.items() if v is not None}, tmp_path / "w.safetensors")
    with pytest.raises(TeacherWeightsError, match=message):
        build_teacher("a", config(tmp_path / "w.safetensors"))
