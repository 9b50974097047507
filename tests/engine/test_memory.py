"""The model of a device's memory against what steps keep, and the parts it gives."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dune_fast.distill.alignment import View
from dune_fast.distill.phi_s_running import RunningPhiS
from dune_fast.distill.standardization import TeacherStatistics
from dune_fast.distill.step import DistillationStep
from dune_fast.distill.terms import TermWeights
from dune_fast.engine.config import RunConfig, compose_config
from dune_fast.engine.fake_memory import Alive, without_content
from dune_fast.engine.memory import (
    SPARE,
    Fit,
    _projector,
    cached_bytes,
    device_memory,
    fit,
    image_bytes,
    kept_bytes,
    memory_bytes,
    phases,
    teacher_parameters,
    trained_parameters,
)
from dune_fast.engine.projector_cost import projector_cost
from dune_fast.engine.stages import at_size
from dune_fast.kernels.library import traced
from dune_fast.kernels.nn.routing import PatchSubset
from dune_fast.student import Student
from dune_fast.teachers.config import given_patches
from tests.engine.fake_tensors import faked

GIB = 2**30


@pytest.mark.parametrize(
    ("overrides", "batch", "counted"),
    [  # GiB at the peak of a step, bf16, ZeRO 0
        (["experiment=dune_336"], 128, 38.7),
        (["experiment=dune_448"], 128, 66.1),
        (["experiment=dune_336"], 32, 12.0),
        (["experiment=dune_336", "student=vit_small14"], 128, 21.7),
        (["experiment=dune_336", "student=vit_large14"], 128, 86.4),
        (["experiment=dune_336", "train.activation_checkpointing=true"], 128, 15.5),
        (["experiment=dune_336", "train.student_stream=bf16"], 128, 35.7),
        (["experiment=dune_sp"], 128, 34.4),
        (["experiment=dune_lp"], 128, 38.17),
        (["experiment=unic"], 128, 19.53),
    ],
)
def test_the_model_finds_what_was_counted(overrides, batch, counted):
    """By a whole step of each on fake tensors, with teachers, backward pass and update."""
    cfg = compose_config(overrides)
    held = sum(memory_bytes(cfg, 1).values()) + batch * 12 * cfg.image_size**2
    assert (held + batch * image_bytes(cfg)) / GIB == pytest.approx(counted, rel=0.1)


def kept(cfg: RunConfig, images: int) -> int:
    """Bytes of what the student's forward pass saves for the backward pass, and of its outputs."""
    with torch.device("meta"):
        student = Student(cfg.student, cfg.projector, cfg.teacher_features)
    student.compute_in(torch.bfloat16, cfg.train.student_stream)
    student.encoder.activation_checkpointing = cfg.train.activation_checkpointing
    storages = {}

    def save(x: torch.Tensor) -> torch.Tensor:
        storages[x.untyped_storage()._cdata] = x.untyped_storage()
        return x

    share = cfg.objective.patch_share
    subset = PatchSubset(share, 0, 0) if share < 1 else None
    with faked(student) as (call,), torch.autograd.graph.saved_tensors_hooks(save, lambda x: x):
        for tokens in call(torch.empty(images, 3, cfg.image_size, cfg.image_size), None, None, subset).values():
            for x in tokens.values():
                save(x)
        return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize(
    "overrides",
    [
        ["experiment=dune_336"], ["experiment=dune_336", "student=vit_small14"], ["experiment=dune_sp"],
        ["experiment=dune_336", "train.activation_checkpointing=true"], ["experiment=dune_lp"], ["experiment=unic"],
        ["experiment=dune_336", "train.student_stream=bf16"],
        ["experiment=dune_336", "objective.patch_share=0.25"], ["experiment=dune_sp", "objective.patch_share=0.25"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_the_model_finds_what_the_forward_pass_keeps(overrides):
    """A change of the blocks or projectors that keeps more must reach the model."""
    cfg = compose_config(overrides)
    each = (kept(cfg, 48) - kept(cfg, 32)) / 16  # weights in bf16 are kept once
    assert each < kept_bytes(cfg) < 1.13 * each


@pytest.mark.parametrize(
    ("stage", "weights", "gradients", "moments"), [(0, 1, 1, 1), (1, 1, 1, 8), (2, 1, 8, 8), (3, 8, 8, 8)]
)
def test_memory_by_zero_stage(stage, weights, gradients, moments):
    cfg = compose_config(["experiment=dune_336", f"deepspeed.zero_stage={stage}"])
    count, memory = sum(trained_parameters(cfg)), memory_bytes(cfg, 8)
    assert memory["weights"] == 4 * count // weights
    assert memory["gradients"] == 4 * count // gradients
    assert memory["Adam's moments"] == 8 * count // moments


@pytest.mark.parametrize(
    ("overrides", "low_precision", "each"),
    [([], True, 2), ([], False, 4), (["teachers.mast3r_vitlarge_16.precision=fp8"], True, 5 / 3)],
)
def test_memory_of_teachers_by_precision(overrides, low_precision, each):
    cfg = compose_config(["experiment=dune_336", *overrides])
    three = 3 * 304e6  # ViT-L encoders
    assert memory_bytes(cfg, 1, low_precision)["teachers"] == pytest.approx(each * three, rel=0.01)


def test_a_run_from_a_cache_has_features_in_place_of_teachers():
    live = compose_config(["experiment=dune_336"])
    cached = compose_config(["experiment=dune_336", "data.views=2", "cache.folder=x"])
    assert memory_bytes(cached, 1)["teachers"] == 0
    evaluated = compose_config(["experiment=dune_336", "data.views=2", "cache.folder=x", "evaluation.every=100"])
    assert memory_bytes(evaluated, 1)["teachers"] == memory_bytes(live, 1)["teachers"]
    values = 3 * 576 * 1024 + 1024  # patches of all teachers, one cls
    assert cached_bytes(cached) == 2 * values and cached_bytes(live) == 0
    whole, parts = (fit(cached, 8, 80 * GIB, parts=parts).needed for parts in (1, 2))
    each = image_bytes(cached)
    assert whole - parts == 64 * each - 128 * 2 * values
    features, forward, inputs = 3 * 576 * 2 * 1024, 12 * 576 * 2 * 1024, 12 * 384**2
    backward = features + 2 * 581 * 2 * 4 * 768  # their gradients, those of an MLP
    assert image_bytes(live) - each == features + inputs + forward - backward
    some = compose_config(["experiment=dune_336", "data.views=2", "cache.folder=x", "cache.patch_share=0.5"])
    assert cached_bytes(some) == pytest.approx(values, rel=1e-3) and image_bytes(some) < each


def test_economies_take_less():
    live = compose_config(["experiment=dune_336"])
    drawn = compose_config(["experiment=dune_336", "objective.presample=true"])
    saved = kept_bytes(live) - kept_bytes(drawn)
    projectors = kept_bytes(live) - 12 * 581 * 768 * (2 * 4 + 2 * 16) - 4 * 768 * 577
    assert saved == pytest.approx((1 - 0.5417) * projectors, rel=1e-3)  # 1 - p + p^3 / 3
    assert kept_bytes(drawn, images=1) == kept_bytes(live)  # its one image may be every teacher's
    assert kept_bytes(drawn) < kept_bytes(drawn, images=128) < kept_bytes(drawn, images=32) < kept_bytes(live)
    scaled = [f"teachers.{name}.scale=0.5" for name in live.teachers]
    half, grid = compose_config(["experiment=dune_336", *scaled]), 24
    inputs = {14: 0, 16: 12 * (grid * 16) ** 2}  # of a teacher that has the student's patches: its images
    before = sum(inputs[t.patch_size] for t in live.teachers.values())
    after = sum(12 * (grid // 2 * t.patch_size) ** 2 for t in half.teachers.values())
    gradients = 3 * grid**2 * 2 * 1024 + 2 * 581 * 2 * 4 * 768  # of the backward pass: larger than a quarter
    quarter = 12 * 2 * 1024 * grid**2 // 4
    peaks = [max(gradients, size) for size in (after + quarter, before + 4 * quarter)]
    assert image_bytes(half) - image_bytes(live) == peaks[0] - peaks[1]


def test_float32_takes_more_than_bf16_and_less_than_twice_as_much():
    cfg = compose_config(["experiment=dune_336"])
    assert 1.5 < image_bytes(cfg, low_precision=False) / image_bytes(cfg) < 2
    half = compose_config(["experiment=dune_336", "train.precision=bf16"])
    assert image_bytes(half, low_precision=False) == image_bytes(cfg)


@pytest.mark.parametrize(
    ("name", "gpus", "parts"),
    [
        ("dune_1gpu", 1, {16: 16, 24: 8, 40: 4, 80: 2}),
        ("dune_2gpu", 2, {24: 8, 80: 2}),
        ("dune_8gpu", 8, {16: 4, 40: 2, 80: 1}),
        ("in1k_1gpu", 1, {80: 2}),
    ],
)
def test_parts_by_memory(name, gpus, parts):
    cfg = compose_config([f"experiment={name}"])
    for gib, expected in parts.items():
        found = fit(cfg, gpus, gib * GIB)
        assert found.parts == expected and found.needed <= (1 - SPARE) * gib * GIB
    if expected > 1:  # the fewest
        assert not fit(cfg, gpus, gib * GIB, parts=expected // 2).fits


@pytest.mark.parametrize(("channels", "rows"), [(384, 9000), (64, 9000)])
def test_the_matrices_of_phi_s_are_counted(channels, rows):
    """Of a real update; the state is in the run's table."""
    statistics, x = RunningPhiS(channels), torch.randn(rows, channels)
    with Alive() as alive:
        statistics.update(x)
    assert alive.most == pytest.approx(statistics.update_bytes, rel=1e-3)


def test_statistics_that_are_large_have_a_line_of_their_own():
    cfg = compose_config(["experiment=radio_v25", "data=folder", "data.datasets.images.root=x"])
    widths = [t.num_features for t in cfg.teachers.values() if "patch" in t.token_types]
    sums = 16 * sum(width**2 for width in widths)  # scatter and rotation, in float64
    memory = memory_bytes(cfg, 1)
    assert memory["teachers' statistics"] == pytest.approx(sums, rel=0.01)
    assert "teachers' statistics" not in memory_bytes(compose_config(["experiment=dune_336"]), 1)
    whole = fit(cfg, 8, 2**40, parts=1).needed
    cfg.standardization.patch = "none"
    assert whole - fit(cfg, 8, 2**40, parts=1).needed > sums + 8 * max(widths) * 2 * 8192


def peak(cfg: RunConfig, images: int) -> int:
    """The most bytes alive in a step, of the student, the features and the loss; teachers run elsewhere."""
    objective = dataclasses.replace(cfg.objective, cls=TermWeights(), drop_probability=0.0)
    with torch.device("meta"):
        student = Student(cfg.student, cfg.projector, cfg.teacher_features)
        statistics = TeacherStatistics.of(cfg.teacher_features, cfg.standardization)
    student.compute_in(torch.bfloat16, cfg.train.student_stream)
    own = torch.ones(len(cfg.teachers), 1, dtype=torch.bool)
    mode, grid = FakeTensorMode(allow_non_fake_inputs=True), cfg.image_size // cfg.student.patch_size

    def teachers(*_: object) -> dict[str, dict[str, torch.Tensor]]:
        shapes = {n: {"cls": (images,), "patch": (images, given_patches(t, grid))} for n, t in cfg.teachers.items()}
        return {
            name: {token: torch.empty(*shapes[name][token], t.num_features, dtype=torch.bfloat16)
                   for token in t.token_types}
            for name, t in cfg.teachers.items()
        }  # fmt: skip

    step = DistillationStep(student, teachers, statistics, own, objective)
    with mode, traced():
        without_content(student, mode)
        without_content(statistics, mode)
        sides = {name: t.input_size or cfg.image_size for name, t in cfg.teachers.items() if cfg.data.teacher_views}
        views = {name: View(torch.empty(images, 3, 3), None, torch.empty(images, side, side, dtype=torch.bool))
                 for name, side in sides.items()}  # fmt: skip
        groups = torch.zeros(images, dtype=torch.int64)
        pictures = torch.empty(images, 3, cfg.image_size, cfg.image_size)
        with Alive() as alive:
            step(pictures, groups, groups, 0, 0.0, views=views).loss.backward()
    return alive.most


@pytest.mark.parametrize(
    ("recipe", "teachers", "more"),
    [
        ("theia", ["clip"], []),
        ("radio_v25", ["siglip"], ["objective.align=larger", "projector.patch_head.upsample=2"]),
        ("sak_b", [f"sam_{i}" for i in (2, 5, 8, 11)], ["projector.which_blocks=[0,1,2,3]", "student.depth=4"]),
        *(pytest.param(*recipe, marks=pytest.mark.slow) for recipe in (
            ("dune_336", ["mast3r_vitlarge_16"], []), ("radio_v25", ["clip"], []), ("eupe_student", ["proxy"], []),
            ("c_radio_v4", ["siglip2"], ["student.radio.num_global=1"]),
        )),
    ],
)  # fmt: skip
def test_the_model_finds_what_a_siblings_step_has_alive(recipe, teachers, more):
    """Maps that are enlarged or sampled, features that are rotated, adapters: of a few blocks of the full width, and of
    one trunk."""
    small = ["student.depth=2", "data=folder", "data.datasets.images.root=x"]
    cfg = compose_config([f"experiment={recipe}", *small, *more])
    cfg = at_size(cfg, cfg.image_size, teachers)
    counted = (peak(cfg, 96) - peak(cfg, 64)) / 32  # weights in bf16, and their gradients, are there once
    found = phases(cfg)
    assert counted < max(found["loss"], found["backward"]) < 1.2 * counted


def test_what_does_not_fit_at_all_says_so():
    found = fit(compose_config(["experiment=dune_1gpu"]), 1, 3 * GIB)
    assert not found.fits and found.parts == 256


def test_parts_divide_batches_that_are_no_power_of_two():
    cfg = compose_config(["experiment=dune_1gpu", "train.global_batch=270"])
    found = fit(cfg, 1, 24 * GIB)
    assert 270 % found.parts == 0 and found.parts == 6 and not fit(cfg, 1, 24 * GIB, parts=5).fits


def test_the_words_of_a_fit():
    whole = Fit(128, 1, 22 * GIB, 80 * GIB)
    assert str(whole) == "at once: estimated 22 of 80 GiB"
    parts = dataclasses.replace(whole, parts=2, unknown=("sam",))
    assert str(parts) == (
        "in 2 parts of 64: estimated 22 of 80 GiB (without the teachers: the size of sam is not known)"
    )


def test_memory_of_a_cpu_is_shared_by_the_ranks():
    one, four = (device_memory(torch.device("cpu"), ranks) for ranks in (1, 4))
    assert one > GIB / 4 and four == pytest.approx(one / 4, rel=0.2)


def test_a_counted_projector_agrees_with_the_formula():
    """Kinds without a formula are counted on tensors without data; those that have one show that the count is right."""
    cfg = compose_config(["experiment=dune_336"])
    patches = (cfg.image_size // cfg.student.patch_size) ** 2
    for kind in ("tp", "lp"):  # a simple one's LayerNorm is in float32 under a GPU's autocast alone
        own = dataclasses.replace(cfg, projector=dataclasses.replace(cfg.projector, kind=kind))
        name, features = next(iter(own.teacher_features.items()))
        counted = projector_cost(own.projector, own.student, features, 24, size=2).kept
        assert counted == pytest.approx(_projector(own, name, patches, patches, 2, 4), rel=0.1), kind


def test_a_network_that_runs_on_two_inputs_is_held_once(overrides):
    """Regression: its weights were counted for each of them."""
    vits = [f"+teachers@teachers.{name}=dinov2_vits14_reg" for name in ("small", "large")]
    weights = [f"teachers.{name}.weights=random:3" for name in ("small", "large")]
    counts = teacher_parameters(compose_config([*overrides, *vits, *weights, "teachers.large.input_size=112"]))
    assert counts["small"] > 2e7 and counts["large"] == 0
