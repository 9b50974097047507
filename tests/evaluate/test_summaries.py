"""An encoder whose `x_norm_clstoken` is several summary tokens, one behind the other: as wide as its features say."""

from __future__ import annotations

import pytest
import torch

from dune_fast.evaluate.dense import build_head
from dune_fast.evaluate.extract import extract
from dune_fast.evaluate.feature_files import images_of
from dune_fast.evaluate.model import frozen_encoder
from dune_fast.heads.files import load_head, save_head
from dune_fast.heads.head import HeadError
from dune_fast.heads.tokens import encode
from dune_fast.infer.dense import check_model
from dune_fast.kernels.nn.radio import RADIOConfig, RADIOViT
from tests.evaluate.conftest import write_colours
from tests.evaluate.test_dense import job

WIDTH = 24


@pytest.fixture(scope="module")
def vit() -> RADIOViT:
    """Two summaries of three, patches standardized after the last block."""
    torch.manual_seed(0)
    cfg = RADIOConfig(
        image_size=56, patch_size=14, embed_dim=WIDTH, depth=4, num_heads=2, num_registers=1, num_cls=3,
        summaries=(0, 2), normalized=True, layer_scale=None,
    )  # fmt: skip
    vit = RADIOViT(cfg).init_weights().eval()
    with torch.no_grad():
        vit.feature_mean.normal_()
        vit.feature_matrix.normal_()
    return vit


def test_features_are_the_encoders_own(vit, tmp_path):
    write_colours(tmp_path / "images", 2, 3)
    model, images = frozen_encoder("radio", vit), images_of(str(tmp_path / "images"))
    found = extract(model, images, 28, ["cls", "mean", "patch"], folder=tmp_path / "f", batch=4)
    x = torch.randn(2, 3, 28, 42, generator=torch.Generator().manual_seed(0))
    (patch, cls), wanted = model.encode(x)[0], vit(x)
    torch.testing.assert_close(cls, wanted["x_norm_clstoken"])
    torch.testing.assert_close(patch.flatten(2).transpose(1, 2), wanted["x_norm_patchtokens"])
    torch.testing.assert_close(encode(vit, x).patch, wanted["x_norm_patchtokens"])
    torch.testing.assert_close(vit.get_intermediate_layers(x, 1)[0], wanted["x_norm_patchtokens"])
    assert found.whole("cls")[0].shape[1] == vit.cls_channels == 2 * WIDTH
    assert found.whole("mean")[0].shape[1] == WIDTH


def test_a_depth_head_reads_all_summaries(vit, squares, tmp_path):
    model = frozen_encoder("radio", vit)
    head = build_head(job(squares, "depth"), model)
    assert head.conv_depth.in_channels == WIDTH + 2 * WIDTH
    save_head(head, tmp_path / "depth.safetensors")
    again = load_head(tmp_path / "depth.safetensors")
    x = torch.randn(1, 3, 56, 56)
    torch.testing.assert_close(again(encode(vit, x)), head.from_layers(frozen_encoder("r", vit, how={
        "norm": False, "layers": 1, "precision": "fp32", "projector": ""}).encode(x)))  # fmt: skip
    check_model(again, model)
    one = RADIOViT(RADIOConfig(image_size=56, embed_dim=WIDTH, depth=4, num_heads=2)).eval()
    with pytest.raises(HeadError, match="and 48 of a class token; one gives 24 of 14 px and 24 of a class token"):
        check_model(again, frozen_encoder("one", one))
    with pytest.raises(HeadError, match="reads a cls token of 48 channels, which the encoder has not .24"):
        again(encode(one, x))
