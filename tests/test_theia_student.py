"""Theia's translators as projectors of a student, and its containers in both directions."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from dune_fast.distill.standardization import TeacherStatistics
from dune_fast.export.check import ExportError
from dune_fast.export.run import export
from dune_fast.export.to_theia import write
from dune_fast.kernels.nn.theia import TheiaConfig
from dune_fast.kernels.nn.vit import ViTConfig
from dune_fast.load import DistilledModel, load_encoder, load_model
from dune_fast.projectors.base import StudentShape, TeacherFeatures, build_projector
from dune_fast.projectors.config import ProjectorConfig
from dune_fast.released_theia import HEADS, published_state
from dune_fast.student import StudentConfig, build_student
from dune_fast.teachers.containers import TeacherWeightsError

ENCODER = {"patch_size": 16, "embed_dim": 64, "depth": 2, "num_heads": 1, "num_registers": 0, "layer_scale": None,
           "interpolate_offset": 0.0, "family": "theia", "normed": True}  # fmt: skip


def encoder(grid: int, **fields) -> StudentConfig:
    return StudentConfig(**{**ENCODER, "image_size": 16 * grid, **fields})


def translator(kind: str, source: int, target: int, channels: int = 5, tokens=("patch",), **fields):
    cfg = ProjectorConfig("theia", translator=kind, **{"hidden_dim": 16, **fields})
    return build_projector(cfg, StudentShape(8, 2, 2, True, source), TeacherFeatures(channels, tokens, "", target))


@pytest.mark.parametrize("translator", ["lconv", "conv", "mlp", "transformer"])
@pytest.mark.parametrize("registers", [0, 3])
def test_every_trainable_parameter_gets_a_gradient_and_parts_are_shared(translator, registers):
    grid = 16 if translator == "conv" else 4
    teachers = {"a": TeacherFeatures(24, ("patch",)), "b": TeacherFeatures(40, ("patch",), "", grid)}
    if translator == "lconv":
        teachers["a"] = TeacherFeatures(24, ("cls", "patch"))
    cfg = ProjectorConfig("theia", translator=translator, hidden_dim=32)
    student = build_student(encoder(grid, num_registers=registers), cfg, teachers)
    images = torch.randn(2, 3, 16 * grid, 16 * grid)
    out = student(images)
    assert out["a"]["patch"].shape == (2, grid**2, 24) and out["b"]["patch"].shape == (2, grid**2, 40)
    sum(x.square().sum() for tokens in out.values() for x in tokens.values()).backward()
    without = [name for name, p in student.named_parameters() if p.grad is None]
    assert not without  # the final norm, too
    shared = [name for name in student.state_dict() if "shared" in name]
    assert bool(shared) == (translator != "lconv") and not any(".b." in name for name in shared)
    twin = copy.deepcopy(student)
    for parameter in twin.projectors.parameters():
        parameter.data.zero_()
    changed, again = twin(images), student(images)  # the copy's are its own, of all teachers
    assert all(not torch.equal(changed[n]["patch"], out[n]["patch"]) for n in teachers)
    assert all(torch.equal(again[n]["patch"], out[n]["patch"]) for n in teachers)


@pytest.mark.parametrize("kind", ["lconv", "conv", "mlp", "transformer"])
def test_products_in_bfloat16(kind):
    """As on a GPU: features within bfloat16's rounding, gradients that are finite, weights in float32."""
    student = build_student(
        encoder(16), ProjectorConfig("theia", translator=kind, hidden_dim=32), {"a": TeacherFeatures(24, ("patch",))}
    )
    images = torch.randn(2, 3, 256, 256)
    exact = student(images)["a"]["patch"].detach()
    student.compute_in(torch.bfloat16, "bf16")
    out = student(images)["a"]["patch"]
    out.float().square().sum().backward()
    assert (out.float() - exact).norm() < 0.05 * exact.norm() and not torch.equal(out, exact)
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in student.parameters())


def test_lconv_is_the_layers_of_the_paper():
    """16 to 64 with cls, by functions of torch on the module's weights."""
    module = translator("lconv", 16, 64, tokens=("cls", "patch"))
    tokens = torch.randn(1, 257, 8)
    layers = module.patch.adapter
    x = tokens[:, 1:].transpose(1, 2).reshape(1, 8, 16, 16)
    x = F.layer_norm(x, (8, 16, 16), layers[0].weight, layers[0].bias)
    x = F.conv_transpose2d(x, layers[1].weight, layers[1].bias, stride=2, padding=1).relu()
    x = F.layer_norm(x, (8, 31, 31), layers[3].weight, layers[3].bias)
    x = F.conv_transpose2d(x, layers[4].weight, layers[4].bias, stride=2, output_padding=1).relu()
    x = F.layer_norm(x, (8, 64, 64), layers[6].weight, layers[6].bias).flatten(2).transpose(1, 2)
    out = module({1: tokens})
    torch.testing.assert_close(out["patch"], F.linear(x, layers[8].weight, layers[8].bias))
    torch.testing.assert_close(out["cls"], F.linear(tokens[:, 0], module.cls.weight, module.cls.bias))


@pytest.mark.parametrize(
    ("kind", "grids"),
    [("lconv", [(14, 14), (14, 7), (14, 16), (14, 64), (16, 16), (64, 64), (64, 16), (5, 5)]),
     ("conv", [(14, 16), (14, 64), (16, 16), (64, 16)]), ("mlp", [(14, 20), (20, 14), (3, 3)]),
     ("transformer", [(4, 4), (4, 6)])],
)  # fmt: skip
def test_pairs_of_grids(kind, grids):
    for source, target in grids:
        module = translator(kind, source, target, hidden_dim=8, translator_heads=2)
        assert module({1: torch.randn(1, 1 + source**2, 8)})["patch"].shape == (1, target**2, 5)


@pytest.mark.parametrize(
    ("kind", "source", "target"),
    [("lconv", 14, 20), ("lconv", 16, 7), ("lconv", 13, 16), ("lconv", 16, 14), ("conv", 14, 14), ("conv", 14, 7),
     ("conv", 8, 8)],
)  # fmt: skip
def test_other_pairs_are_refused_by_a_sentence(kind, source, target):
    with pytest.raises(ValueError, match=f"from {source} x {source} patches to {target} x {target}.*mlp"):
        translator(kind, source, target)


def test_what_translators_cannot_do_is_refused():
    with pytest.raises(ValueError, match="translator=mlp has no cls"):
        translator("mlp", 4, 4, tokens=("cls", "patch"))
    with pytest.raises(ValueError, match="translator_heads=8 do not divide projector.hidden_dim=12"):
        translator("transformer", 4, 4, hidden_dim=12)
    with pytest.raises(ValueError, match="choose one of lconv"):
        ProjectorConfig("theia", translator="linear")
    with pytest.raises(ValueError, match="4 x 4 patches, and got 2 x 8"):
        translator("lconv", 4, 4)({0: torch.randn(1, 17, 8)}, None, (2, 8))
    cfg = ProjectorConfig("theia", translator="mlp", teachers={"b": {"hidden_dim": 24}})
    teachers = {name: TeacherFeatures(5, ("patch",)) for name in "ab"}
    with pytest.raises(ValueError, match="different hidden_dim"):
        build_student(encoder(4), cfg, teachers)
    with pytest.raises(ValueError, match="ends with a convolution"):
        translator("conv", 16, 16).last_layers()


def released(grid: int = 14, **fields):
    """A student as Theia's released models, weights drawn, two teachers."""
    teachers = {"dinov2": TeacherFeatures(6, ("cls", "patch"), "", 16), "own": TeacherFeatures(4, ("patch",), "", 14)}
    student = build_student(encoder(grid, **fields), ProjectorConfig("theia"), teachers, seed=1)
    for parameter in student.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    return student.eval()


@pytest.mark.parametrize("fields", [{}, {"num_registers": 2}])
def test_containers_in_both_directions(tmp_path, fields):
    student, path = released(**fields), tmp_path / "theia.safetensors"
    state = published_state(student)
    assert {key.split(".adapter")[0] for key in state if key.startswith(HEADS) and "adapter" in key} == {
        f"{HEADS}facebook/dinov2-large", f"{HEADS}facebook/dinov2-large_cls", f"{HEADS}own",
    }  # fmt: skip
    save_file(state, path)
    images = torch.randn(2, 3, 224, 224)
    model, loaded = load_model(path), load_encoder(path)
    with torch.no_grad():
        wanted, found = student(images), model.projections(images)
        tokens = student.encoder.norm(student.encoder.forward_tokens(images))
        assert torch.equal(loaded.norm(loaded.forward_tokens(images)), tokens)
    for name, own in wanted.items():  # convolutions of weights that lie elsewhere sum in another order
        for token, x in own.items():
            torch.testing.assert_close(found[name][token], x, rtol=1e-5, atol=1e-5)
    assert all(normalizer.mean.isnan().all() for _, _, normalizer in model.statistics.items())
    exported = export(path, "theia")  # compared with what is read back
    assert exported.difference < 1e-5 and exported.files[0].name == "model.safetensors"
    again = export(path, "safetensors").files[0]
    with torch.no_grad():
        assert torch.equal(load_encoder(again)(images)["x_prenorm"], student.encoder(images)["x_prenorm"])


def test_what_theias_container_cannot_hold_is_refused(tmp_path):
    student, state = released(), published_state(released())
    for part, wrong, what in (
        (student, {"normed": False}, "normed=true"),
        (student.encoder, {"cfg": ViTConfig(224, 16, 64, 2, 1)}, "family theia"),
        (student.encoder, {"cfg": TheiaConfig(224, 16, 64, 2, 2)}, "heads of 64 channels"),
        (student.projectors, {"own": translator("conv", 16, 16)}, "lconv"),
        (student.projectors, {"dinov2": translator("lconv", 16, 16)}, "14 x 14 patches of its positions"),
    ):
        with pytest.MonkeyPatch.context() as patch:
            for name, value in wrong.items():
                patch.setattr(part, name, value)
            with pytest.raises(ExportError, match=what):
                write(DistilledModel(student, TeacherStatistics({})), tmp_path)
    save_file({**state, "translator.backbone_adapter.0.weight": torch.ones(64)}, tmp_path / "other.safetensors")
    with pytest.raises(TeacherWeightsError, match="another translator than lconv"):
        load_model(tmp_path / "other.safetensors")
    small = build_student(encoder(8), ProjectorConfig("theia"), {"own": TeacherFeatures(4, ("patch",), "", 8)})
    elsewhere = {key: value for key, value in published_state(small).items() if key.startswith(HEADS)}
    save_file({**state, **elsewhere}, tmp_path / "grids.safetensors")
    with pytest.raises(TeacherWeightsError, match="no convolutions from 14 x 14 patches to 8 x 8"):
        load_model(tmp_path / "grids.safetensors")
    lacking = {key: value for key, value in state.items() if not key.endswith("own.adapter.8.weight")}
    save_file(lacking, tmp_path / "lacking.safetensors")
    with pytest.raises(TeacherWeightsError, match="own is no lconv"):
        load_model(tmp_path / "lacking.safetensors")
