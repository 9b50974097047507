"""MASt3R's and DUNE-MASt3R's containers: written here as `torch.save` writes them, read, compared; hostile ones too."""

from __future__ import annotations

import argparse
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dune_fast.heads.mast3r.head import Mast3rHead
from dune_fast.heads.mast3r.official import read, recognize
from dune_fast.heads.tokens import encode
from dune_fast.kernels.nn.vit import VisionTransformer, ViTConfig
from dune_fast.load import load_encoder
from dune_fast.teachers.containers import TeacherWeightsError, read_container

SIZES = {
    "width": 64, "dec_dim": 16, "dec_depth": 4, "dec_heads": 2, "desc_dim": 3, "layer_dims": [4, 5, 6, 7],
    "feature_dim": 6, "last_dim": 5,
}  # fmt: skip
CALL = (
    "AsymmetricMASt3R(pos_embed='RoPE100', patch_embed_cls='ManyAR_PatchEmbed', img_size=(512, 512), "
    "head_type='catmlp+dpt', output_mode='pts3d+desc3', depth_mode=('exp', -inf, inf), conf_mode=('exp', 1, inf), "
    "enc_embed_dim=64, enc_depth=1, enc_num_heads=1, dec_embed_dim=16, dec_depth=4, dec_num_heads=2, two_confs=True, "
    "desc_conf_mode=('exp', 0, inf))"
)


def released_names(head: Mast3rHead) -> dict[str, Tensor]:
    """A head's tensors as a release has them: `layer_rn` twice, an unused unit in refinenet4."""
    state = {key.removeprefix("decoder."): value for key, value in head.state_dict().items() if key[:5] != "norm."}
    for key, value in list(state.items()):
        for i in range(4):
            if key.endswith(f"scratch.layer_rn.{i}.weight"):
                state[key.replace(f"layer_rn.{i}", f"layer{i + 1}_rn")] = value
        if "refinenet4.resConfUnit2" in key:
            state[key.replace("resConfUnit2", "resConfUnit1")] = torch.randn_like(value)
    return state


def mast3r_content(call: Any = CALL, drop: str = "", **changed: Tensor) -> tuple[dict[str, Any], Mast3rHead]:
    """A MASt3R container with its encoder, and the head that is in it."""
    head = Mast3rHead(**SIZES, patch_size=16, own_norm=False)
    vit = VisionTransformer(
        ViTConfig(16, 16, 64, 1, 1, num_registers=0, layer_scale=None, cls_token=False, pos_embed="rope2d")
    ).init_weights()
    state = {"mask_token": torch.zeros(1, 1, 16), **released_names(head), **changed}
    for key, value in vit.state_dict().items():
        state[key.replace("blocks.", "enc_blocks.") if key[:5] != "norm." else f"enc_{key}"] = value
    state = {key: value for key, value in state.items() if not drop or not key.startswith(drop)}
    return {"args": argparse.Namespace(model=call, batch_size=4), "model": OrderedDict(state)}, head


def dune_content(call: Any = CALL, **changed: Tensor) -> tuple[dict[str, Any], Mast3rHead]:
    """Likewise DUNE-MASt3R's, which has no encoder."""
    head = Mast3rHead(**SIZES, patch_size=14)
    torch.nn.init.normal_(head.norm.weight)
    state = {f"mast3r.{key}": value.half() for key, value in released_names(head).items()}
    state |= {f"norm.{key}": value for key, value in head.norm.state_dict().items()}
    state |= {"mast3r.enc_norm.weight": torch.ones(64), "imagenet_mean": torch.zeros(3), **changed}
    named = "dune_vitbase_14_448_paper_encoder"
    return {"dune_backbone_name": named, "mast3r_model_str": call, "model": state}, head


@pytest.fixture(scope="module")
def content() -> dict[str, Any]:
    """MASt3R's; tests that change it do so in a copy."""
    return mast3r_content()[0]


def same(ours: Mast3rHead, wanted: Mast3rHead, tolerance: float = 0.0) -> None:
    expected = wanted.state_dict()
    assert ours.state_dict().keys() == expected.keys()
    for key, value in ours.state_dict().items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, expected[key], rtol=tolerance, atol=tolerance)


def through_file(content: dict[str, Any], path: Path) -> Mast3rHead:
    """What is read of the container once it is written."""
    torch.save(content, path)
    content = read_container(path)
    assert recognize(content)
    return read(content, path)


def test_mast3rs_file_with_its_encoder(tmp_path):
    content, wanted = mast3r_content()
    same(head := through_file(content, path := tmp_path / "mast3r.pth"), wanted)
    assert head.options() == wanted.options() and not head.training
    encoder = load_encoder(path)  # of the same file; its normalised tokens feed the head
    tokens = encode(encoder, torch.randn(1, 3, 32, 48))
    one, _ = head(tokens, tokens)
    assert one["pts3d"].shape == (1, 32, 48, 3) and one["pts3d"].isfinite().all()


def test_dunes_file(tmp_path):
    content, wanted = dune_content()
    same(head := through_file(content, tmp_path / "dune.pth"), wanted, 1e-3)  # it was stored in half precision
    assert head.options() == {**wanted.options(), "encoder_name": "dune_vitbase_14_448_paper_encoder"}


@pytest.mark.parametrize("name", ["x" * 201, "a\n[31mb"])
def test_an_encoders_name_is_a_line(tmp_path, name):
    """It is logged as it stands in the file."""
    content, _ = dune_content()
    with pytest.raises(TeacherWeightsError, match="encoder_name has to be a line of at most 200 characters"):
        through_file(content | {"dune_backbone_name": name}, tmp_path / "dune.pth")


def test_modes_and_one_confidence():
    call = CALL.replace("two_confs=True", "two_confs=False").replace("desc3", "desc4")
    call = call.replace("depth_mode=('exp', -inf, inf), conf_mode=('exp', 1, inf)", "conf_mode=('sigmoid', 0.5, 2)")
    call = call.replace(", desc_conf_mode=('exp', 0, inf)", "")
    modes = read(mast3r_content(call)[0], Path("x.pth")).modes
    assert not modes.two_confs and modes.conf == ("sigmoid", 0.5, 2) and modes.desc_conf is None
    assert modes.depth.kind == "exp"


def test_a_file_without_the_second_decoder_uses_the_first_for_both():
    content, wanted = mast3r_content(drop="dec_blocks2.")
    wanted.decoder.dec_blocks2.load_state_dict(wanted.decoder.dec_blocks.state_dict())
    same(read(content, Path("x.pth")), wanted)


def test_nothing_else_is_taken_for_one():
    assert not recognize({"model": {"blocks.0.norm1.weight": torch.zeros(2)}})
    assert not recognize({"dec_blocks.0.norm1.weight": torch.zeros(2)})
    assert not recognize({})


WRONG_CALLS = {
    "__import__('os').system('true')": "is not a plain call",
    7: "is not a plain call",
    CALL.replace("RoPE100", "cosine"): "pos_embed='cosine'; 'RoPE100' is supported",
    CALL.replace("catmlp+dpt", "linear"): "head_type='linear'; 'catmlp",
    CALL.replace("pts3d+desc3", "pts3d"): "output_mode='pts3d'; pts3d.descN is supported",
    CALL.replace("desc3", "desc4"): "which is no square",
    CALL.replace("dec_num_heads=2", "dec_num_heads=3"): "16 channels with 3 attention heads",
    CALL.replace("dec_num_heads=2", "dec_num_heads='2'"): "dec_heads is '2'",
    CALL.replace("dec_num_heads=2, ", ""): "does not say dec_num_heads",
    CALL.replace("dec_depth=4", "dec_depth=12"): "says dec_depth=12, but its tensors have 4",
    CALL.replace("two_confs=True", "two_confs=1"): "two_confs=1; it is True or False",
    CALL.replace("('exp', 1, inf)", "('exp', 1, open)"): "",
    CALL.replace("('exp', 1, inf)", "('log', 1, inf)"): "conf_mode is .*; the kinds are exp, sigmoid",
    CALL.replace("('exp', -inf, inf)", "('exp', -1, inf)"): "points have no bounds",
}


@pytest.mark.parametrize("call", WRONG_CALLS, ids=range(len(WRONG_CALLS)))
def test_a_senseless_call_is_refused(content, call):
    changed = {**content, "args": argparse.Namespace(model=call)}
    if not WRONG_CALLS[call]:  # an argument that is no literal counts as not given
        assert read(changed, Path("x.pth")).modes.conf == ("exp", 1, float("inf"))
        return
    with pytest.raises(TeacherWeightsError, match=WRONG_CALLS[call]) as caught:
        read(changed, Path("x.pth"))
    assert "x.pth" in str(caught.value) and "\n" not in str(caught.value)


def test_a_senseless_call_of_dunes_file_is_refused():
    with pytest.raises(TeacherWeightsError, match="'mast3r_model_str' is not a plain call"):
        read(dune_content("exit()+1")[0], Path("x.pth"))


TWIN = "downstream_head1.dpt.scratch.layer2_rn.weight"
WRONG_TENSORS = {
    TWIN: (torch.zeros(6, 5, 3, 3), "layer_rn.1.weight are one tensor, and differ"),
    "dec_blocks.999999999.norm1.weight": (torch.zeros(16), "but not all before it"),
    "dec_blocks.x.norm1.weight": (torch.zeros(16), "its shape is wrong"),
    "dec_norm.weight": (torch.zeros(15), r"dec_norm.weight has shape \[15\] instead of \[16\]"),
    "dec_norm.bias": (torch.full((16,), torch.nan), "not finite"),
    "decoder_embed.weight": (torch.zeros(3), "its shape is wrong"),
    "lora.weight": (torch.zeros(3), "lora.weight is not known"),
    "dec_blocks.0.norm1.weight": (torch.zeros(1).expand(16), "claims more values than the file holds"),
}


@pytest.mark.parametrize("name", WRONG_TENSORS)
def test_senseless_tensors_are_refused(content, name):
    value, said = WRONG_TENSORS[name]
    with pytest.raises(TeacherWeightsError, match=said):
        read({**content, "model": {**content["model"], name: value}}, Path("x.pth"))


@pytest.mark.parametrize(
    "drop, said",
    [
        ("downstream_head1.head_local", "DUSt3R"),
        ("downstream_head2", "downstream_head2.* is missing"),
        ("decoder_embed", "lacks a tensor that says a size"),
    ],
)
def test_files_that_lack_a_part_are_refused(content, drop, said):
    state = {key: value for key, value in content["model"].items() if not key.startswith(drop)}
    with pytest.raises(TeacherWeightsError, match=said):
        read({**content, "model": state}, Path("x.pth"))


def test_containers_that_lack_an_entry_are_refused(content):
    for changed, said in (
        (dune_content(other=torch.zeros(1))[0], "tensor other, which no DUNE-MASt3R file has"),
        ({"mast3r_model_str": CALL, "model": [1]}, "no state dict under 'model'"),
        ({"model": content["model"]}, "has no 'args.model'"),
    ):
        with pytest.raises(TeacherWeightsError, match=said):
            read(changed, Path("x.pth"))


class Malice:
    def __reduce__(self):
        return open, ("made_by_a_pickle", "w")


def test_a_file_that_asks_for_code_is_refused(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TeacherWeightsError, match="asks for the type .*open and is not loaded"):
        through_file({**content, "args": argparse.Namespace(model=Malice())}, tmp_path / "head.pth")
    assert not (tmp_path / "made_by_a_pickle").exists()
