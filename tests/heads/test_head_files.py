"""Heads as files: ours, DINOv2's, those of earlier evaluations, and files that are none."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import dune_fast
from dune_fast.engine.config import ConfigError
from dune_fast.evaluate.model import frozen_encoder
from dune_fast.heads.files import KIND, OPTIONS, head_bytes, save_head
from dune_fast.heads.head import KINDS, HeadError, check_encoder, head_class
from dune_fast.heads.linear.depth import DepthHead
from dune_fast.heads.linear.segmentation import SegmentationHead
from dune_fast.heads.mast3r.head import Mast3rHead
from dune_fast.heads.multihmr.head import MultiHmrHead
from dune_fast.heads.tokens import encode
from dune_fast.kernels.nn.vit import VisionTransformer, ViTConfig
from dune_fast.tasks.training import start_from
from dune_fast.teachers.architecture import architecture_metadata

SMALL = {"dec_dim": 8, "dec_heads": 2, "layer_dims": [4] * 4, "feature_dim": 4, "last_dim": 4, "desc_dim": 3}
HEADS = {
    "seg": lambda: SegmentationHead(24, 3, 7, names=("a", "b", "c"), window=28, stride=14, projector="two"),
    "depth": lambda: DepthHead(24, 7, layers=4, with_cls=False, max_depth=80.0),
}
OTHERS = {
    "mast3r": lambda: Mast3rHead(8, 14, dec_depth=4, conf_mode=("exp", 1, None), **SMALL),
    "multihmr": lambda: MultiHmrHead(8, 56, depth=1, heads=2, head_dim=4, dim=12, hidden=12, num_betas=11),
}


@pytest.mark.parametrize("name", HEADS)
def test_a_head_is_read_as_it_was_saved(tmp_path, name):
    head = HEADS[name]().eval()
    save_head(head, tmp_path / "new" / "head.safetensors")
    layers = [(torch.randn(2, 24, 3, 4), None)] * head.layers
    for path in (tmp_path / "new" / "head.safetensors", tmp_path / "new"):
        found = dune_fast.load_head(path)
        assert type(found) is type(head) and found.options() == json.loads(json.dumps(head.options()))
        assert not found.training and not any(p.requires_grad for p in found.parameters())
        assert torch.equal(found.from_layers(layers), head.from_layers(layers))
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["head.safetensors"]


@pytest.mark.parametrize("name", OTHERS)
def test_other_heads_are_read_as_they_were_saved(tmp_path, name):
    head = OTHERS[name]()
    save_head(head, tmp_path / "h.safetensors")
    found, state = dune_fast.load_head(tmp_path / "h.safetensors"), head.state_dict()
    assert type(found) is type(head) and found.options() == json.loads(json.dumps(head.options()))
    assert all(torch.equal(x, state[key]) for key, x in found.state_dict().items()) and found.repeated
    written = {"format": "pt", KIND: head.kind, OPTIONS: json.dumps(head.options() | {head.repeated[0]: 9_000_000})}
    save_file({key: x.contiguous() for key, x in state.items()}, tmp_path / "h.safetensors", written)
    with pytest.raises(HeadError, match="more parts than the file has tensors"):  # at once
        dune_fast.load_head(tmp_path / "h.safetensors")


def old_file(head, path) -> None:
    """As DINOv2's authors and earlier evaluations have saved it: tensors alone."""
    state = {f"decode_head.{name}": x.contiguous() for name, x in head.state_dict().items()}
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        conv = {"decode_head.conv_seg.weight": torch.zeros(1, 4, 1, 1), "decode_head.conv_seg.bias": torch.zeros(1)}
        torch.save({"meta": {"epoch": 1}, "state_dict": conv | state}, path)


@pytest.mark.parametrize("name", ["head.safetensors", "vits14_nyu_linear_head.pth"])
@pytest.mark.parametrize("kind", ["linear_seg", "linear_depth"])
def test_published_linear_heads_are_of_the_last_block(tmp_path, name, kind):
    head = (SegmentationHead(16, 5) if kind == "linear_seg" else DepthHead(16)).eval()
    old_file(head, tmp_path / name)
    found = dune_fast.load_head(tmp_path / name)
    assert found.options() == head.options() and found.kind == kind
    layers = [(torch.randn(1, 16, 2, 3), torch.randn(1, 16))]
    assert torch.equal(found.from_layers(layers), head.from_layers(layers))


@pytest.mark.parametrize(
    ("name", "kind", "layers", "options"),
    [
        ("dinov2_vitb14_nyu_linear4_head.pth", "depth", (4, 768), {"max_depth": 10.0}),
        ("dinov2_vits14_kitti_linear4_head.pth", "depth", (4, 384), {"max_depth": 80.0}),  # or one block of ViT-g
        ("dinov2_vitg14_reg4_nyu_linear_head.pth", "depth", (1, 1536), {"max_depth": 10.0}),
        ("renamed.pth", "depth", (4, 1024), {"max_depth": 10.0}),
        ("dinov2_vitl14_ade20k_linear_head.pth", "seg", (1, 1024), {"window": 512}),
        ("dinov2_vits14_voc2012_ms_head.pth", "seg", (4, 384), {"window": 640, "stride": 320, "last_blocks": True}),
        ("mine.pth", "seg", (1, 192), {"window": 512}),  # no published width: the last block
    ],
)
def test_published_names_and_channels_say_which_blocks_are_read(tmp_path, caplog, name, kind, layers, options):
    count, width = layers
    parts = {"depth": ("conv_depth", 256, 2 * count * width), "seg": ("conv_seg", 21, count * width)}
    conv, outputs, channels = parts[kind]
    state = {f"{conv}.weight": torch.zeros(outputs, channels, 1, 1), f"{conv}.bias": torch.zeros(outputs)}
    if kind == "seg":
        state |= {f"bn.{part}": torch.ones(channels) for part in ("weight", "bias", "running_mean", "running_var")}
        state["bn.num_batches_tracked"] = torch.tensor(5)
    torch.save({"state_dict": {f"decode_head.{key}": x for key, x in state.items()}}, tmp_path / name)
    with caplog.at_level("INFO"):
        head = dune_fast.load_head(tmp_path / name)
    found = head.options()
    assert (head.layers, head.width) == layers and options.items() <= found.items()
    assert f"taken as DINOv2's: {count} x {width} channels" in caplog.text
    assert ("a guess" in caplog.text) == (name == "renamed.pth")
    ends = (3, 6, 9, 12) if kind == "depth" else (9, 10, 11, 12)
    assert head.blocks(12) == (() if count == 1 else tuple(i - 1 for i in ends))
    save_head(head, tmp_path / "again.safetensors")
    assert dune_fast.load_head(tmp_path / "again.safetensors").options() == found


@pytest.mark.parametrize(
    ("name", "kind", "change", "words"),
    [
        ("head.pth", "depth", {}, "may read one block of 1536 channels or four of 384, and neither .* name say which"),
        ("head.pth", "seg", {}, "may read one block of 1536 channels or four of 384"),
        ("dinov2_vits14_ade20k_head.pth", "seg", {"bn.running_var": None}, "lacks decode_head.bn.running_var: "),
        ("head.pth", "seg", {"convs.0.conv.weight": torch.zeros(2)}, "more than a linear head, such as .*convs.0.conv"),
        ("head.pth", "depth", {"project.weight": torch.zeros(2)}, "more than a linear head, such as .*project.weight"),
    ],
)
def test_linear_heads_that_cannot_be_told_are_refused(tmp_path, name, kind, change, words):
    head = DepthHead(1536) if kind == "depth" else SegmentationHead(1536, 3)
    old_file(head, tmp_path / name)
    content = torch.load(tmp_path / name)["state_dict"]
    content |= {f"decode_head.{key}": x for key, x in change.items()}
    torch.save({key: x for key, x in content.items() if x is not None}, tmp_path / name)
    with pytest.raises(HeadError, match=words):
        dune_fast.load_head(tmp_path / name)


def test_a_head_of_an_earlier_evaluation_is_what_its_result_says(tmp_path):
    head = DepthHead(24, 7, layers=4, with_cls=False, max_depth=6.0)
    path = tmp_path / "depth_nyu.head.safetensors"
    old_file(head, path)
    result = {
        "reading": {"projector": "", "architecture": {"cls_token": False, "patch_size": 7}},
        "options": {"layers": 4, "max_depth": 6.0}, "recipe": {"size": 512, "stride": 341},
    }  # fmt: skip
    (tmp_path / "depth_nyu.json").write_text(json.dumps(result))
    assert dune_fast.load_head(path).options() == head.options()
    (tmp_path / "depth_nyu.json").write_text("{")
    with pytest.raises(HeadError, match=r"depth_nyu.json, which belongs to .* cannot be read"):
        dune_fast.load_head(path)


def changed(path, metadata=None, **tensors) -> None:
    """A file of a head, with other metadata and tensors."""
    head = HEADS["seg"]()
    path.write_bytes(head_bytes(head))
    written = {"format": "pt", KIND: head.kind, OPTIONS: json.dumps(head.options())}
    save_file(load_file(path) | tensors, path, written | (metadata or {}))


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({KIND: "telepathy"}, "holds a head of the kind 'telepathy'; this version knows linear_seg"),
        ({OPTIONS: "{"}, "options do not make a linear_seg head"),
        ({OPTIONS: "[]"}, "options do not make a linear_seg head"),
        ({OPTIONS: '{"width": 24}'}, "options do not make a linear_seg head .*classes"),
        ({OPTIONS: '{"width": 24, "classes": 3, "surprise": 1}'}, "options do not make a linear_seg head .*surprise"),
        ({OPTIONS: '{"width": "24", "classes": 3}'}, "options do not make a linear_seg head"),
        ({OPTIONS: '{"width": -24, "classes": 3}'}, "options do not make a linear_seg head"),
        ({OPTIONS: '{"width": 99999999999, "classes": 3}'}, "options do not make a linear_seg head"),
        ({OPTIONS: '{"width": 24, "classes": 3, "window": 5.5}'}, "window is 5.5: give a whole number above 0"),
        ({OPTIONS: '{"width": 24, "classes": 3, "projector": 5}'}, "projector is 5: give a teacher's name"),
        ({OPTIONS: '{"width": 24, "classes": 3, "names": ["a"]}'}, "1 names for 3 classes"),
        ({OPTIONS: "[" * 9999}, "options do not make a linear_seg head"),
        ({OPTIONS: '{"width": 48, "classes": 3}'}, r"bn.weight has shape \[24\] instead of \[48\]"),
    ],
)
def test_metadata_that_make_no_head_are_refused(tmp_path, metadata, words):
    changed(tmp_path / "h.safetensors", metadata)
    with pytest.raises(HeadError, match=words):
        dune_fast.load_head(tmp_path / "h.safetensors")


def test_tensors_that_make_no_head_are_refused(tmp_path):
    path = tmp_path / "h.safetensors"
    for tensors, words in (
        ({"extra": torch.zeros(2)}, "extra is not known"),
        ({"conv_seg.bias": torch.tensor([0.0, torch.nan, 0.0])}, "conv_seg.bias has values that are not finite"),
        ({"bn.weight": torch.ones(24, dtype=torch.int32)}, "bn.weight has the type torch.int32"),
    ):
        changed(path, **tensors)
        with pytest.raises(HeadError, match=words):
            dune_fast.load_head(path)


def test_files_that_are_no_heads_are_named(tmp_path):
    with pytest.raises(HeadError, match="there is no head .*nowhere"):
        dune_fast.load_head(tmp_path / "nowhere")
    path = tmp_path / "h.safetensors"
    changed(path)
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(HeadError, match="cannot be read: truncated, damaged .*get the file again, or give another one"):
        dune_fast.load_head(path)
    cfg = ViTConfig(28, embed_dim=48, depth=1, num_heads=3)
    save_file(VisionTransformer(cfg).state_dict(), path, architecture_metadata(cfg))
    with pytest.raises(HeadError, match="holds an encoder and no head: give it as the encoder"):
        dune_fast.load_head(path)
    torch.save({"weights": {"a.b": torch.zeros(2)}, "x.y": torch.zeros(3)}, tmp_path / "h.pth")
    with pytest.raises(HeadError, match=r"holds no head that is known.*its first tensors are x\.y"):
        dune_fast.load_head(tmp_path / "h.pth")
    with pytest.raises(HeadError, match="heads are saved as safetensors"):
        save_head(HEADS["seg"](), tmp_path / "h.pth")


def test_an_address_is_refused():
    with pytest.raises(ValueError, match="the head is s3://"):
        dune_fast.load_head("s3://bucket/head.safetensors")


def test_every_kind_has_a_class_and_an_official_reader():
    for kind in KINDS:
        assert head_class(kind).kind == kind
    with pytest.raises(HeadError, match="there is no head 'walking'; the kinds are linear_seg"):
        head_class("walking")


def test_inference_reads_the_blocks_that_the_head_does(tmp_path):
    torch.manual_seed(0)
    encoder = VisionTransformer(ViTConfig(28, 14, 24, 6, 2)).init_weights().eval()
    head, images = SegmentationHead(24, 3, layers=4, last_blocks=True).eval(), torch.randn(1, 3, 28, 28)
    how = {"norm": True, "layers": 4, "last_blocks": head.last_blocks, "projector": ""}
    model = frozen_encoder("six blocks", encoder, how=how)
    assert model.reading["blocks"] == [2, 3, 4, 5]
    with torch.no_grad():
        expected = head(encode(encoder, images, head.blocks(6)))
        torch.testing.assert_close(head.from_layers(model.encode(images)), expected)
    save_head(head, tmp_path / "h.safetensors")
    with pytest.raises(ConfigError, match=r"reads the blocks \[9, 10, 11, 12\] of an encoder of 12 blocks, this head"):
        start_from(SegmentationHead(24, 3, layers=4), str(tmp_path / "h.safetensors"))


def test_the_encoder_must_be_the_heads():
    encoder = VisionTransformer(ViTConfig(28, 14, 48, 1, 3)).init_weights().eval()
    check_encoder(SegmentationHead(48, 2), encoder)
    with pytest.raises(HeadError, match="reads 24 channels of 14 x 14 px patches, the encoder gives 48 of 14 x 14"):
        check_encoder(SegmentationHead(24, 2), encoder)
    with pytest.raises(HeadError, match="reads 48 channels of 7 x 7 px"):
        check_encoder(SegmentationHead(48, 2, 7), encoder)
    with pytest.raises(HeadError, match="reads the projector of dino, not the encoder"):
        check_encoder(SegmentationHead(48, 2, projector="dino"), encoder)
    with pytest.raises(HeadError, match="reads 4 blocks: give encode"):
        SegmentationHead(48, 2, layers=4)(encode(encoder, torch.zeros(1, 3, 28, 28)))
