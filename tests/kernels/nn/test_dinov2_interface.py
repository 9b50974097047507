"""What users of DINOv2 and DUNE call on an encoder."""

from __future__ import annotations

import pytest
import torch

from dune_fast.kernels.nn.vit import VisionTransformer, ViTConfig

X = torch.randn(2, 3, 42, 56, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def encoder() -> VisionTransformer:
    torch.manual_seed(0)
    model = VisionTransformer(ViTConfig(image_size=56, embed_dim=48, depth=3, num_heads=3, layer_scale=0.5))
    return model.init_weights().eval().requires_grad_(False)


def test_negative_layers_count_from_the_end(encoder):
    layers = encoder.get_intermediate_layers(X, [0, 1, 2])
    for asked, expected in (([-1], [2]), ([-3, -1], [0, 2]), ([2, 0], [2, 0]), (1, [2]), (3, [0, 1, 2])):
        found = encoder.get_intermediate_layers(X, asked)
        assert len(found) == len(expected)
        assert all(torch.equal(one, layers[i]) for one, i in zip(found, expected, strict=True)), asked


@pytest.mark.parametrize("asked", [0, 4, -1, 12, [3], [-4], [], [0, 13]])
def test_layers_that_there_are_not(encoder, asked):
    """13 of 12 blocks gave the embedding first, [-1] the embedding alone."""
    with pytest.raises(ValueError, match="encoder with 3 blocks: give a number of last blocks from 1 to 3"):
        encoder.get_intermediate_layers(X, asked)


def test_what_users_read(encoder):
    assert (encoder.embed_dim, encoder.num_features, encoder.patch_size, encoder.n_blocks) == (48, 48, 14, 3)
    assert (encoder.num_register_tokens, encoder.num_heads) == (4, 3)


def test_forward_features_and_tokens(encoder):
    features = encoder.forward_features(X)
    assert features.pop("masks") is None
    assert all(torch.equal(value, encoder(X)[key]) for key, value in features.items())
    assert torch.equal(encoder.prepare_tokens_with_masks(X), encoder.embed(X))
    for call in (encoder.forward_features, encoder.prepare_tokens_with_masks):
        with pytest.raises(ValueError, match="no mask token"):
            call(X, torch.ones(2, 12, dtype=torch.bool))


def test_tokens_before_the_norm_under_the_same_names(encoder):
    """As DUNE's projectors read them: `encoder(image, apply_norm=False)`."""
    normed, raw = encoder(X), encoder(X, apply_norm=False)
    cls, registers, patches = encoder.split(normed["x_prenorm"])
    assert torch.equal(raw["x_norm_clstoken"], cls) and torch.equal(raw["x_norm_patchtokens"], patches)
    torch.testing.assert_close(encoder.norm(raw["x_norm_patchtokens"]), normed["x_norm_patchtokens"])
    assert torch.equal(encoder.forward_features(X, apply_norm=False)["x_norm_regtokens"], registers)


def test_export_with_a_dynamic_batch(encoder):
    """len(x) of a tensor made it the number of the example."""
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(encoder, (X,), dynamic_shapes=({0: batch},))
    for count in (1, 5):
        images = torch.randn(count, 3, 42, 56)
        for key, value in program.module()(images).items():
            torch.testing.assert_close(value, encoder(images)[key], rtol=1e-5, atol=1e-6)
