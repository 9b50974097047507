"""Student and projectors: initial weights, what is trained, token order."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dune_fast.kernels.nn.block import Block
from dune_fast.kernels.nn.vit import ViTConfig
from dune_fast.projectors.base import StudentShape
from dune_fast.projectors.config import HeadShape, ProjectorConfig
from dune_fast.student import Projectors, build_student

TEACHERS = {"a": (24, ["cls", "patch"]), "b": (40, ["patch"])}
ENCODER = ViTConfig(image_size=56, embed_dim=48, depth=4, num_heads=3)


@pytest.mark.parametrize(
    "projector",
    [
        ProjectorConfig("tp"),
        ProjectorConfig("sp", hidden_dim=32, version=1),
        ProjectorConfig("sp", hidden_dim=32, version=2, num_inner=2),
        ProjectorConfig("lp", hidden_dim=16, last_hidden_dim=32),
        ProjectorConfig("heads", cls_head=HeadShape("v1", 16), patch_head=HeadShape("attn", 16)),
        ProjectorConfig("heads", patch_head=HeadShape("v2", 16, 1, prenorm=True, bias=False)),
        ProjectorConfig("lp", which_blocks=[1, 3], hidden_dim=16, last_hidden_dim=32, prenorm=True, midnorm=True),
    ],
)
def test_every_trainable_parameter_gets_a_gradient(projector):
    """A parameter that no loss reaches must be frozen: ZeRO and DDP would wait for it."""
    student = build_student(ENCODER, projector, TEACHERS)
    out = student(torch.randn(2, 3, 56, 56))
    assert {n: {t: tuple(x.shape) for t, x in tokens.items()} for n, tokens in out.items()} == {
        "a": {"cls": (2, 24), "patch": (2, 16, 24)},
        "b": {"patch": (2, 16, 40)},
    }
    sum(x.square().sum() for tokens in out.values() for x in tokens.values()).backward()
    without = [name for name, p in student.named_parameters() if p.requires_grad and p.grad is None]
    assert not without
    frozen = {name for name, p in student.named_parameters() if not p.requires_grad}
    assert frozen == {"encoder.norm.weight", "encoder.norm.bias"}


@pytest.mark.parametrize("kind", ["tp", "sp", "lp", "heads"])
def test_of_a_student_without_cls_every_token_is_a_patch(kind):
    """Regression: three kinds took the first patch for the cls token and gave one patch too few."""
    teachers = {"a": (24, ["patch"])}
    student = build_student(replace(ENCODER, cls_token=False), ProjectorConfig(kind), teachers)
    images = torch.randn(2, 3, 56, 56)
    found = student(images)["a"]["patch"]
    assert found.shape == (2, 16, 24)


def test_initial_weights_are_a_function_of_the_seed_alone():
    torch.manual_seed(1)
    first = build_student(ENCODER, ProjectorConfig(), TEACHERS, seed=3).state_dict()
    state = torch.get_rng_state()
    second = build_student(ENCODER, ProjectorConfig(), TEACHERS, seed=3).state_dict()
    assert torch.equal(state, torch.get_rng_state())
    other = build_student(ENCODER, ProjectorConfig(), TEACHERS, seed=4).state_dict()
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert not torch.equal(first["encoder.pos_embed"], other["encoder.pos_embed"])


def test_published_initialisation():
    student = build_student(ViTConfig(embed_dim=192, depth=2, num_heads=3), ProjectorConfig(), TEACHERS)
    state = student.state_dict()
    assert state["encoder.blocks.0.mlp.fc1.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    assert state["encoder.pos_embed"].std().item() == pytest.approx(0.02, rel=0.05)
    assert state["encoder.blocks.1.attn.qkv.bias"].abs().max() == 0
    assert 0 < state["encoder.register_tokens"].abs().max() < 1e-5
    assert torch.all(state["encoder.blocks.0.ls1.gamma"] == 1e-4)
    # projectors keep PyTorch's default: uniform in 1 / sqrt(fan in)
    weight = state["projectors.a.linear.weight"]
    assert weight.abs().max() <= 192**-0.5 and weight.std().item() == pytest.approx((1 / (3 * 192)) ** 0.5, rel=0.05)


def test_registers_never_reach_the_projectors():
    student = build_student(ENCODER, ProjectorConfig("sp", hidden_dim=32), TEACHERS).eval()
    x = torch.randn(1, 3, 56, 56)
    with torch.no_grad():
        tokens = student.tokens(x)[3]
        cls, _, patches = student.encoder.split(student.encoder.forward_tokens(x))
    torch.testing.assert_close(tokens, torch.cat([cls[:, None], patches], 1))


def test_a_head_gives_the_cells_of_a_patch_in_their_places():
    """A cell's number, written into the last layer's bias, must show at its place on the finer grid."""
    heads = Projectors(
        ProjectorConfig("heads", teachers={"a": {"patch_head": {"upsample": 2, "num_inner": 0, "hidden_dim": 8}}}),
        StudentShape(48, 4, 3), {"a": (1, ["patch"]), "b": (1, ["patch"])},
    )  # fmt: skip
    assert heads["a"].patch.fc1.out_features == 16 and heads["b"].patch.fc1.out_features == 1024
    torch.nn.init.zeros_(heads["a"].patch.last.weight)
    heads["a"].patch.last.bias.data = torch.arange(4.0)
    out = heads({3: torch.randn(2, 1 + 6, 48)}, grid=(2, 3))["a"]["patch"]
    rows = torch.tensor([[0.0, 1.0], [2.0, 3.0]]).repeat(2, 3)
    torch.testing.assert_close(out, rows.flatten()[None, :, None].expand(2, 24, 1))


def test_a_teachers_own_fields_are_checked():
    with pytest.raises(ValueError, match=r"projector\.teachers\.a has width; it may have .*hidden_dim"):
        ProjectorConfig(teachers={"a": {"width": 3}}).of("a")
    with pytest.raises(ValueError, match=r"teachers\.a\.cls_head is 3; give fields of it"):
        ProjectorConfig(teachers={"a": {"cls_head": 3}}).of("a")


def test_ladder_is_the_sum_of_its_rungs():
    torch.manual_seed(0)
    projectors = Projectors(
        ProjectorConfig("lp", which_blocks=[0, 2], hidden_dim=8), StudentShape(48, 4, 3), {"a": (5, ["patch"])}
    )
    tokens = {0: torch.randn(2, 5, 48), 2: torch.randn(2, 5, 48)}
    ladder = projectors["a"]
    expected = ladder.patch["0"](tokens[0][:, 1:]) + ladder.patch["2"](tokens[2][:, 1:])
    torch.testing.assert_close(projectors(tokens)["a"]["patch"], expected)


@pytest.mark.parametrize(
    ("projector", "words"),
    [
        (ProjectorConfig("mlp"), "tp.*lp.*sp"),
        (ProjectorConfig("lp", which_blocks=[9]), "0 to 3"),
        (ProjectorConfig("sp", version=3), "1 or 2"),
    ],
)
def test_wrong_projectors_are_explained(projector, words):
    with pytest.raises(ValueError, match=words):
        build_student(ENCODER, projector, TEACHERS)


def test_bf16_reaches_the_matrix_products_under_deepspeed():
    """DeepSpeed's engine switches off an autocast around it; ours is inside."""
    from dune_fast.engine.deepspeed_engine import Engine, init_distributed
    from dune_fast.engine.optimizer import OptimizerConfig

    device = init_distributed()
    student = build_student(ENCODER, ProjectorConfig(), TEACHERS)
    student.compute_in(torch.bfloat16)
    engine = Engine(student, OptimizerConfig(), 2, zero_stage=0)
    out = engine(torch.randn(2, 3, 56, 56, device=device))
    assert out["a"]["patch"].dtype == torch.bfloat16
    assert all(parameter.dtype == torch.float32 for parameter in engine.module.parameters())


@pytest.mark.parametrize("projector", [ProjectorConfig(), ProjectorConfig("lp", hidden_dim=8, last_hidden_dim=8)])
def test_a_bf16_stream_is_bf16_from_the_embedding_to_the_projectors(projector):
    """Every block of encoder and projectors; weights and their gradients stay float32."""
    student = build_student(ENCODER, projector, TEACHERS)
    student.compute_in(torch.bfloat16, "bf16")
    seen = []
    for module in student.modules():
        if isinstance(module, Block):
            module.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    student.projectors.register_forward_pre_hook(lambda _, args: seen.extend(x.dtype for x in args[0].values()))
    outputs = student(torch.randn(2, 3, 56, 56))
    sum(x.float().square().mean() for kinds in outputs.values() for x in kinds.values()).backward()
    assert len(seen) > len(student.encoder.blocks) and set(seen) == {torch.bfloat16}
    trained = [p for p in student.parameters() if p.requires_grad]
    assert all(p.dtype == p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in trained)


def test_a_bf16_stream_needs_no_autocast_around_the_encoder():
    """Regression: figures call the encoder in float32, whose linear layers take no bf16 tokens."""
    plain, narrow = (build_student(ENCODER, ProjectorConfig(), TEACHERS) for _ in range(2))
    narrow.compute_in(torch.bfloat16, "bf16")
    x = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        torch.testing.assert_close(narrow.encoder(x), plain.encoder(x), rtol=0, atol=0)


def test_the_stream_follows_the_products():
    student = build_student(ENCODER, ProjectorConfig(), TEACHERS)
    for dtype, stream, expected in (
        (torch.bfloat16, "fp32", None), (None, "bf16", None), (torch.bfloat16, "bf16", torch.bfloat16),
    ):  # fmt: skip
        student.compute_in(dtype, stream)
        assert student.encoder.stream_dtype is expected and student.autocast_dtype is dtype
