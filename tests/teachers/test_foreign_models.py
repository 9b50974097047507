"""Teachers that are not ours: any timm model, any module by import path."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from dune_fast.teachers.config import TeacherConfig
from dune_fast.teachers.containers import TeacherWeightsError
from dune_fast.teachers.ensemble import TeacherEnsemble
from dune_fast.teachers.registry import build_teacher


def timm_config(model, patch_size, num_features, tokens=("patch",), **fields):
    return TeacherConfig(
        **{"family": "timm", "weights": "random:3", "model": model, "patch_size": patch_size,
           "num_features": num_features, "token_types": list(tokens), **fields}
    )  # fmt: skip


@pytest.mark.parametrize(
    ("model", "patch_size", "num_features", "tokens", "options"),
    [
        ("vit_tiny_patch16_224", 16, 192, ("cls", "patch"), {"depth": 2}),
        ("vit_base_patch16_siglip_224", 16, 768, ("patch",), {"depth": 1}),
        ("vit_base_patch16_clip_224.openai", 16, 768, ("cls", "patch"), {"depth": 1}),
        ("vit_small_patch16_dinov3", 16, 384, ("cls", "patch"), {"depth": 2}),
        ("samvit_base_patch16", 16, 256, ("patch",), {"depth": 1}),
        ("convnext_atto", 32, 320, ("patch",), {}),
        ("resnet18", 32, 512, ("patch",), {}),
    ],
)
def test_timm_models_of_all_kinds_give_the_students_grid(model, patch_size, num_features, tokens, options):
    cfg = timm_config(model, patch_size, num_features, tokens, model_args=options)
    ensemble = TeacherEnsemble({"a": cfg}, 14)
    images = torch.randn(2, 3, 56, 84)
    outputs = ensemble(images)["a"]
    assert {kind: tuple(x.shape) for kind, x in outputs.items()} == {
        kind: (2, num_features) if kind == "cls" else (2, 4 * 6, num_features) for kind in tokens
    }
    assert not any(p.requires_grad for p in ensemble.parameters())


def test_timm_map_and_tokens_are_read_row_by_row():
    images = torch.randn(2, 3, 64, 96)
    ensemble = TeacherEnsemble({"a": timm_config("resnet18", 32, 512)}, 32)
    map_ = ensemble.trunks[0].model.forward_features(images)  # [B, C, 2, 3]
    patch = ensemble(images)["a"]["patch"]
    assert torch.equal(patch[:, 4], map_[:, :, 1, 1])
    ensemble = TeacherEnsemble({"a": timm_config("vit_tiny_patch16_224", 16, 192, ("cls", "patch"))}, 16)
    tokens = ensemble.trunks[0].model.forward_features(images)
    assert torch.equal(ensemble(images)["a"]["cls"], tokens[:, 0])
    assert torch.equal(ensemble(images)["a"]["patch"], tokens[:, 1:])


@pytest.mark.parametrize(
    ("model", "tokens", "channels"),
    [("vit_tiny_patch16_224", ("cls", "patch"), 192), ("samvit_base_patch16", ("patch",), 256)],
)
def test_timm_blocks_are_read_in_one_pass_with_the_output(model, tokens, channels):
    """What `layer` meant was ignored for timm's models."""
    options = {"depth": 3} | ({"embed_dim": 48, "global_attn_indexes": [2]} if "sam" in model else {})
    width = options.get("embed_dim", 192)
    read = {f"block{i}": timm_config(model, 16, width, tokens, model_args=options, layer=i, norm=False) for i in (1, 3)}
    normed = timm_config(model, 16, width, tokens, model_args=options, layer=3)
    ensemble = TeacherEnsemble({**read, "normed": normed}, 16)
    images = torch.randn(2, 3, 64, 96)
    outputs = ensemble(images)
    found: list[torch.Tensor] = []
    (trunk,) = ensemble.trunks
    for block in trunk.model.blocks:
        block.register_forward_hook(lambda module, inputs, output: found.append(output))
    trunk.model(images)
    for name, x in (("block1", found[0]), ("block3", found[2])):
        x = x.flatten(1, 2) if x.ndim == 4 else x
        assert torch.equal(outputs[name]["patch"], x[:, trunk.num_prefix_tokens :])
        assert "cls" not in tokens or torch.equal(outputs[name]["cls"], x[:, 0])
    expected = torch.nn.functional.layer_norm(outputs["block3"]["patch"], (width,), eps=1e-6)
    torch.testing.assert_close(outputs["normed"]["patch"], expected)
    last = timm_config(model, 16, channels, tokens, model_args=options)
    both = TeacherEnsemble({"last": last, "block1": read["block1"]}, 16)
    if width == channels:  # drawn weights are known by their width too
        assert len(both.trunks) == 1
    alone = TeacherEnsemble({"last": last}, 16)(images)["last"]
    assert all(torch.equal(both(images)["last"][kind], x) for kind, x in alone.items())


def test_timm_weights_come_from_a_file(tmp_path):
    import timm

    model = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=10).eval()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    weights = str(tmp_path / "model.safetensors")
    cfg = timm_config("vit_tiny_patch16_224", 16, 192, weights=weights, model_args={"depth": 1})
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        expected = model.forward_features(images)[:, 1:]
    assert torch.equal(TeacherEnsemble({"a": cfg}, 16)(images)["a"]["patch"], expected)
    cfg.model_args = {"depth": 2}
    with pytest.raises(TeacherWeightsError, match=r"blocks\.1\.\S+ is missing"):
        build_teacher("a", cfg)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": "vit_tiny_patch16_225"}, "timm does not know"),
        ({"model": ""}, "timm does not know"),
        ({"model_args": {"wings": 2}}, "model_args .*wings.* do not suit"),
        ({"num_features": 100}, "num_features is 100"),
        ({"patch_size": 14}, "patch_size is 14"),
        ({"weights": "nowhere.safetensors"}, "no weights file"),
        ({"model": "resnet18", "patch_size": 32, "num_features": 512, "token_types": ["cls"]}, "has no cls token"),
        ({"layer": 13}, "layer is 13; vit_tiny_patch16_224 has 12 blocks"),
        ({"model": "resnet18", "patch_size": 32, "num_features": 512, "layer": 1}, "resnet18 has no blocks"),
        ({"norm": False}, "norm is false: of a model of timm, `layer` must name"),
    ],
)
def test_timm_mistakes_are_explained(fields, message):
    with pytest.raises(ValueError, match=message):
        right = {"model": "vit_tiny_patch16_224", "patch_size": 16, "num_features": 192}
        build_teacher("a", timm_config(**(right | fields)))


class Pooled(nn.Module):
    """A module as a user would write it."""

    patch_size = 7

    def __init__(self, num_features=12, output="map", wide=False):
        super().__init__()
        self.num_features = num_features
        self.output = output
        self.conv = nn.Conv2d(3, num_features, 7, stride=7, bias=wide)

    def forward(self, images):
        x = self.conv(images)
        if self.output == "map":
            return x
        tokens = x.flatten(2).transpose(1, 2)
        return {"tokens": tokens, "dict": {"cls": tokens.mean(1), "patch": tokens}, "list": [tokens]}[self.output]


def module_config(**fields):
    return TeacherConfig(
        **{"family": "module", "weights": "own", "model": f"{__name__}:Pooled", "patch_size": 7, "num_features": 12,
           "token_types": ["patch"], **fields}
    )  # fmt: skip


def test_every_form_of_a_modules_output_is_understood(tmp_path):
    torch.save(Pooled().state_dict(), tmp_path / "w.pth")
    weights = str(tmp_path / "w.pth")
    images = torch.randn(2, 3, 28, 42)
    patches = [
        TeacherEnsemble({"a": module_config(weights=weights, model_args={"output": output})}, 14)(images)["a"]["patch"]
        for output in ("map", "tokens", "dict")
    ]
    assert patches[0].shape == (2, 6, 12)
    assert torch.equal(patches[0], patches[1]) and torch.equal(patches[0], patches[2])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": "Pooled"}, "write package.module:factory"),
        ({"model": "os;system:x"}, "write package.module:factory"),
        ({"model": "no_such_package.x:y"}, "no_such_package.x cannot be imported"),
        ({"model": f"{__name__}:Poled"}, "has no function or class 'Poled'"),
        ({"model": "builtins:dict"}, "gives a dict, not a torch.nn.Module"),
        ({"model_args": {"wings": 2}}, "model_args do not suit"),
        ({"patch_size": 14}, "patch_size is 14"),
        ({"num_features": 13}, "num_features is 13"),
    ],
)
def test_module_mistakes_are_explained(fields, message):
    with pytest.raises(ValueError, match=message):
        build_teacher("a", module_config(**fields))


def test_module_that_gives_something_else_is_named():
    images = torch.randn(1, 3, 28, 28)
    with pytest.raises(ValueError, match="Pooled gives list; a teacher gives"):
        TeacherEnsemble({"a": module_config(model_args={"output": "list"})}, 14)(images)
    with pytest.raises(ValueError, match="asks for cls; .* gives patch"):
        TeacherEnsemble({"a": module_config(token_types=["cls"])}, 14)(images)


def test_modules_weights_must_fit(tmp_path):
    torch.save(Pooled(wide=True).state_dict(), tmp_path / "w.pth")
    with pytest.raises(TeacherWeightsError, match="conv.bias is not known"):
        build_teacher("a", module_config(weights=str(tmp_path / "w.pth")))


def test_building_teachers_leaves_the_random_state_alone():
    """Otherwise the student's initial weights would depend on which teachers a run has."""
    before = torch.get_rng_state()
    build_teacher("a", module_config())
    build_teacher("b", timm_config("resnet18", 32, 512))
    build_teacher("c", TeacherConfig("dinov2", "random:0", 14, 192, image_size=56))
    assert torch.equal(torch.get_rng_state(), before)


def test_timm_can_be_imported_beside_a_torch_without_cuda():
    # torchvision is built for CUDA; the tests' own set-up would hide that
    code = "from dune_fast.teachers.timm_model import create; create('a', 'resnet18', {})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
