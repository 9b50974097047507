"""A student of RADIO's family that starts from other weights computes what they do."""

from __future__ import annotations

import argparse

import pytest
import torch
from safetensors.torch import save_file

from dune_fast.engine.warm_start import WarmStartError, warm_start
from dune_fast.engine.warm_start_radio import STARTED_ANEW
from dune_fast.kernels.nn.radio_options import RADIOOptions
from dune_fast.kernels.nn.radio_positions import resized_projection, resized_table
from dune_fast.kernels.nn.vit import VisionTransformer, ViTConfig
from dune_fast.projectors.config import ProjectorConfig
from dune_fast.student import Student, StudentConfig, build_student

SIZES = {"image_size": 64, "patch_size": 16, "embed_dim": 64, "depth": 2, "num_heads": 1, "num_registers": 0}
IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def student(seed: int = 0, radio: dict | None = None, **fields) -> Student:
    options = RADIOOptions(**{"conditioner": "", "patch_bias": True} | (radio or {}))
    sizes = SIZES | {"layer_scale": None, "final_norm": False, "family": "radio", "radio": options} | fields
    return build_student(StudentConfig(**sizes), ProjectorConfig("heads"), {"a": (5, ("cls", "patch"))}, seed)


def plain(path) -> VisionTransformer:
    """A ViT as of DINOv2's release, with LayerScale that matters."""
    torch.manual_seed(1)
    vit = VisionTransformer(ViTConfig(**SIZES, layer_scale=1.0)).init_weights().requires_grad_(False)
    for name, parameter in vit.named_parameters():
        if name.endswith(("gamma", "bias")):
            parameter.normal_(0.5, 0.2)
    save_file(vit.state_dict() | {"mask_token": torch.zeros(1, 64)}, path)
    return vit


@pytest.mark.parametrize("spectral", [0, 2])
def test_a_plain_vit(spectral, tmp_path):
    """LayerScale goes into the layers before it, cls takes its position with it, singular values keep their weights."""
    vit, ours = plain(tmp_path / "vit.safetensors"), student(radio={"spectral": spectral})
    found = warm_start(ours, str(tmp_path / "vit.safetensors"))
    with torch.no_grad():
        wanted, tokens = vit.forward_tokens(IMAGES), ours.encoder.forward_tokens(IMAGES)
    torch.testing.assert_close(tokens, wanted, rtol=1e-3, atol=1e-4)
    said = "; ".join(found.fitted)
    assert "4 LayerScales worked into" in said and "the cls token taken for each of 1 summary" in said
    assert ("gains of the spectral" in said) == bool(spectral) and "resized" not in said


def test_another_grid_and_patch(tmp_path):
    vit = plain(tmp_path / "vit.safetensors")
    ours = student(patch_size=8, radio={"cpe_max_size": 96, "patch_bias": False})
    found = "; ".join(warm_start(ours, str(tmp_path / "vit.safetensors")).fitted)
    assert torch.equal(ours.encoder.pos_embed, resized_table(vit.pos_embed[:, 1:], 12))
    assert torch.equal(ours.encoder.patch_embed.proj.weight, resized_projection(vit.patch_embed.proj.weight, 8))
    for part in ("resized from 16 to 144 patches", "from 16 to 8 pixels", "bias of the patch projection left"):
        assert part in found


@pytest.mark.parametrize("target", [{"spectral": 2}, {}])
def test_one_of_its_own_family(target, tmp_path):
    first = student(seed=3, radio={"spectral": 2})
    save_file({k: v.contiguous() for k, v in first.encoder.state_dict().items()}, tmp_path / "radio.safetensors")
    ours = student(radio=target)
    warm_start(ours, str(tmp_path / "radio.safetensors"))
    with torch.no_grad():  # plain weights are made after one more power iteration
        wanted, tokens = first.encoder.forward_tokens(IMAGES), ours.encoder.forward_tokens(IMAGES)
    torch.testing.assert_close(tokens, wanted, rtol=2e-2, atol=2e-2)
    assert torch.equal(ours.encoder.prefix_tokens, first.encoder.prefix_tokens)


@pytest.mark.parametrize(("source", "target"), [(1, 2), (2, 1), (2, 2)])
def test_spectral_weights_of_another_version_or_with_layer_scale(source, target, tmp_path):
    """Regression: LayerScale went into the bias alone where the weight was reparametrised on both sides."""
    first = student(seed=3, radio={"spectral": source}, layer_scale=1.0)
    with torch.no_grad():
        for name, parameter in first.encoder.named_parameters():
            if name.endswith(("gamma", "bias")):
                parameter.normal_(0.5, 0.2)
    save_file({k: v.contiguous() for k, v in first.encoder.state_dict().items()}, tmp_path / "radio.safetensors")
    ours = student(radio={"spectral": target})
    said = warm_start(ours, str(tmp_path / "radio.safetensors")).fitted
    assert any("4 LayerScales worked into" in x for x in said) and STARTED_ANEW in said
    with torch.no_grad():  # plain weights are made after one more power iteration
        wanted, tokens = first.encoder.forward_tokens(IMAGES), ours.encoder.forward_tokens(IMAGES)
    torch.testing.assert_close(tokens, wanted, rtol=2e-2, atol=2e-2)


def container(first: Student, path, *names_of_teachers: str) -> None:
    """RADIO's, of a student's encoder."""
    names = {"pos_embed": "patch_generator.pos_embed", "patch_embed.proj.bias": "patch_generator.embedder.bias"}
    state = {f"base_model.{names.get(k, k)}": v for k, v in first.encoder.state_dict().items()}
    state["base_model.patch_generator.cls_token.token"] = state.pop("base_model.prefix_tokens")[0]
    state["base_model.patch_generator.embedder.weight"] = state.pop("base_model.patch_embed.proj.weight").flatten(1)
    teachers = [{"name": name} for name in names_of_teachers]
    args = argparse.Namespace(teachers=teachers, cpe_max_size=128, model_kwargs={"num_heads": 1})
    torch.save({"state_dict": state, "args": args}, path)


def test_a_spectral_student_of_a_spectral_container(tmp_path):
    """Regression: its weights were taken, its gains kept from the student's first weights."""
    first = student(seed=3, radio={"spectral": 2, "cpe_max_size": 128})
    container(first, tmp_path / "radio.pth.tar", "a")
    ours = student(radio={"spectral": 2, "cpe_max_size": 128})
    assert STARTED_ANEW in warm_start(ours, str(tmp_path / "radio.pth.tar")).fitted
    with torch.no_grad():
        wanted, tokens = first.encoder.forward_tokens(IMAGES), ours.encoder.forward_tokens(IMAGES)
    torch.testing.assert_close(tokens, wanted, rtol=2e-2, atol=2e-2)


def test_summary_tokens_and_registers_keep_to_their_kind(tmp_path):
    """A source with two teachers and six registers, a student with one and seven: as many tokens, of other kinds."""
    options = {"cpe_max_size": 128, "register_multiple": 8}
    first, ours, fresh = (student(seed, options) for seed in (3, 0, 0))
    container(first, tmp_path / "radio.pth.tar", "a", "b")
    said = warm_start(ours, str(tmp_path / "radio.pth.tar")).fitted
    assert "1 of 2 summary tokens taken, and 6 of 6 registers" in said and any(x.startswith("1 summary") for x in said)
    theirs, found = first.encoder.prefix_tokens, ours.encoder.prefix_tokens
    assert torch.equal(found[:, 0], theirs[:, 0]) and torch.equal(found[:, 1:7], theirs[:, 2:])
    assert torch.equal(found[:, 7], fresh.encoder.prefix_tokens[:, 7])


def test_what_does_not_fit(tmp_path):
    plain(tmp_path / "vit.safetensors")
    with pytest.raises(WarmStartError, match="is not an encoder of the student's architecture"):
        warm_start(student(depth=3), str(tmp_path / "vit.safetensors"))
    radio = {k: v.contiguous() for k, v in student().encoder.state_dict().items()}
    save_file(radio, tmp_path / "radio.safetensors")
    vit = build_student(ViTConfig(**SIZES), ProjectorConfig(), {"a": (5, ("cls", "patch"))})
    with pytest.raises(WarmStartError, match="of the family radio, whose network is another than this student's"):
        warm_start(vit, str(tmp_path / "radio.safetensors"))
