"""One encoder, many tasks: the tokens are DINOv2's, and one pass serves all heads."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import dune_fast
from dune_fast.evaluate.model import frozen_encoder
from dune_fast.heads.files import save_head
from dune_fast.heads.head import Head, HeadError
from dune_fast.heads.linear.depth import DepthHead
from dune_fast.heads.linear.segmentation import SegmentationHead
from dune_fast.heads.tokens import EncoderTokens, encode
from dune_fast.kernels.nn.vit import VisionTransformer, ViTConfig


@pytest.fixture(scope="module")
def encoder() -> VisionTransformer:
    torch.manual_seed(0)
    cfg = ViTConfig(28, embed_dim=24, depth=5, num_heads=3, num_registers=2, layer_scale=None)
    return VisionTransformer(cfg).init_weights().eval().requires_grad_(False)


IMAGES = torch.randn(4, 3, 28, 42, generator=torch.Generator().manual_seed(1))


class Twice(Head):
    """Of pairs: the sum of both views' patch tokens, times a factor."""

    kind, views, width, patch_size = "twice", 2, 24, 14

    def forward(self, first: EncoderTokens, second: EncoderTokens, factor: float = 1.0) -> Any:
        return factor * (first.patch + second.patch)


def test_tokens_are_the_encoders_own(encoder):
    tokens, features = encode(encoder, IMAGES, [0, 3]), encoder(IMAGES)
    assert torch.equal(tokens.cls, features["x_norm_clstoken"]) and tokens.grid == (2, 3)
    assert torch.equal(tokens.patch, features["x_norm_patchtokens"])
    assert torch.equal(tokens.raw_cls, features["x_prenorm"][:, 0])
    assert torch.equal(tokens.raw_patch, features["x_prenorm"][:, 3:])
    assert list(tokens.blocks) == [0, 3]
    found = encoder.get_intermediate_layers(IMAGES, [0, 3], return_class_token=True)
    for (patch, cls), block in zip(found, tokens.blocks.values(), strict=True):
        torch.testing.assert_close(block.patch, patch)
        torch.testing.assert_close(block.cls, cls)
        torch.testing.assert_close(encoder.norm(block.raw_patch), patch)
    some = tokens.images(slice(1, 3))
    assert torch.equal(some.raw_patch, tokens.raw_patch[1:3]) and torch.equal(
        some.blocks[3].cls, tokens.blocks[3].cls[1:3]
    )


@pytest.mark.parametrize("layers", [1, 4])
@pytest.mark.parametrize("kind", [SegmentationHead, DepthHead])
def test_heads_see_what_the_evaluation_trains_them_on(encoder, layers, kind):
    more = {"classes": 3} if kind is SegmentationHead else {}
    head = kind(24, layers=layers, **more).eval()
    how = {"norm": kind is SegmentationHead, "layers": layers, "precision": "", "projector": ""}
    trained_on = frozen_encoder("e", encoder, None, how).encode(IMAGES)
    found = head(encode(encoder, IMAGES, head.blocks(5)))
    torch.testing.assert_close(found, head.from_layers(trained_on))


def test_one_pass_serves_all_heads(encoder, monkeypatch):
    heads = {
        "seg": SegmentationHead(24, 3, layers=4), "depth": DepthHead(24, max_depth=5.0), "pairs": Twice()
    }  # fmt: skip
    model = dune_fast.EncoderWithHeads(encoder, heads).eval()
    passes, plain = [], VisionTransformer.block_outputs
    monkeypatch.setattr(VisionTransformer, "block_outputs", lambda *args: passes.append(1) or plain(*args))
    found = model(IMAGES, given={"pairs": {"factor": 2.0}})
    assert passes == [1] and list(found) == ["seg", "depth", "pairs"]
    assert torch.equal(found["seg"], heads["seg"](encode(encoder, IMAGES, heads["seg"].blocks(5))))
    assert torch.equal(found["depth"], heads["depth"](encode(encoder, IMAGES)))
    patch = encoder(IMAGES)["x_norm_patchtokens"]
    torch.testing.assert_close(found["pairs"], 2 * (patch[[0, 2]] + patch[[1, 3]]))
    assert list(model(IMAGES, ["depth"])) == ["depth"]


def test_heads_come_from_files(encoder, tmp_path):
    heads = {"seg": SegmentationHead(24, 3).eval(), "depth": DepthHead(24)}
    for name, head in heads.items():
        save_head(head, tmp_path / f"{name}.safetensors")
    model = dune_fast.EncoderWithHeads.from_files(encoder, {name: tmp_path / f"{name}.safetensors" for name in heads})
    assert torch.equal(model(IMAGES)["seg"], heads["seg"](encode(encoder, IMAGES)))


def test_what_does_not_fit_is_said(encoder):
    with pytest.raises(HeadError, match="no head is given"):
        dune_fast.EncoderWithHeads(encoder, {})
    with pytest.raises(HeadError, match="small: the linear_depth head reads 12 channels"):
        dune_fast.EncoderWithHeads(encoder, {"small": DepthHead(12)})
    for name in ("a.b", "", "train", 1):
        with pytest.raises(HeadError, match="a head's name is none for torch .*: call it something else"):
            dune_fast.EncoderWithHeads(encoder, {name: DepthHead(24)})
    model = dune_fast.EncoderWithHeads(encoder, {"pairs": Twice()})
    with pytest.raises(HeadError, match="reads pairs of images, and 3 are given"):
        model(IMAGES[:3])
    for wrong in ({"names": ["seg"]}, {"given": {"seg": {}}}):
        with pytest.raises(HeadError, match="there is no head 'seg'; the heads are pairs"):
            model(IMAGES, **wrong)
    with pytest.raises(ValueError, match="image height 27 is not a multiple of the patch size 14"):
        model(IMAGES[:, :, :27])
    bare = VisionTransformer(ViTConfig(28, embed_dim=24, depth=1, num_heads=3, cls_token=False, num_registers=0))
    with pytest.raises(HeadError, match="reads a cls token of 24 channels, which the encoder has not .it has none"):
        dune_fast.EncoderWithHeads(bare, {"depth": DepthHead(24)})(IMAGES)
