"""Partitions of a step: sizes and teachers of their own, by ranks or one after the other, averaged by share."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dune_fast.engine.accumulation import micro_batch_size
from dune_fast.engine.config import ConfigError, compose_config
from dune_fast.engine.flops import run_flops, teacher_flops
from dune_fast.engine.memory import fit, image_bytes, memory_bytes
from dune_fast.engine.metrics import read_metrics
from dune_fast.engine.stages import at_size, loaded_teachers, partitions, settings, stages, turns
from dune_fast.planner.describe import describe
from dune_fast.teachers.ensemble import TeacherEnsemble
from tests.engine.conftest import build, run_ranks, same_weights, small_run, timeless, train

PARTITIONS = [
    "partitions=[{image_size:28,images:6,teachers:[one]},{image_size:56,images:2}]", "objective.drop_probability=0",
    "standardization.convention=none", "evaluation.held_out=false",
]  # fmt: skip


CROPS = [
    "+teachers@teachers.three=conv_patchify", "teachers.three.weights=random:3", "teachers.three.num_features=24",
    "teachers.one.input_size=84", "teachers.one.grid=own", "train.seed=1",
    "data.teacher_views=true", "data.teacher_zoom=[0.9,1.2]", "data.teacher_shift=0.6", "objective.align=smaller",
    "partitions=[{image_sizes:[28,42],weights:[1,1],images:6,teachers:[one,three]},"
    "{image_sizes:[56,42],weights:[1,1],images:2,teachers:[two,three],teacher_zoom:[1.5,1.6]}]",
]  # fmt: skip
"""Three teachers with crops of their own, one of them in both partitions, which draw their sizes."""


def test_two_ranks_with_a_partition_each_train_as_one_process_with_both(overrides, tmp_path):
    """Weights, losses and drift of every teacher; ZeRO 2, own crops and grids, teachers that one of the ranks has not
    loaded. Seconds: two processes have to start."""
    common = [*overrides, *PARTITIONS, *CROPS, "train.steps=3"]
    common += [f"teachers.{name}.precision=bf16" for name in ("one", "two", "three")]
    alone = train(common, "partition_by=steps", f"output_dir={tmp_path / 'alone'}").run_dir
    two = tmp_path / "two"
    run_ranks(2, "dune_fast/train.py", *common, "deepspeed=zero2", f"output_dir={two}")
    ours, theirs = load_file(two / "student.safetensors"), load_file(alone / "student.safetensors")
    for name, x in theirs.items():
        if name.endswith("qkv.bias"):  # that of keys changes nothing: its gradient is rounding, which AdamW enlarges
            ours[name], x = (y.unflatten(0, (3, -1))[[0, 2]] for y in (ours[name], x))
        torch.testing.assert_close(ours[name], x, rtol=2e-4, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")
    drifts = [json.loads((run / "drift.json").read_text()) for run in (alone, two)]
    of = [[(entry["teacher"], entry["token"]) for entry in drift] for drift in drifts]
    assert of[1][-1] == ("two", "patch") and sorted(of[0]) == sorted(of[1]) and len(of[1]) == 5
    drawn = [[part.size(step, 1) for part in partitions(compose_config(common))] for step in range(3)]
    assert len({sizes[0] for sizes in drawn}) == len({sizes[1] for sizes in drawn}) == 2, drawn
    for both, one in zip(*(read_metrics(run / "metrics.jsonl") for run in (two, alone)), strict=True):
        for key in ("loss", "loss/one", "loss/two", "loss/three/patch/total", "loss/three", "gradient_norm/max"):
            assert both[key] == pytest.approx(one[key], rel=1e-4) and both[key] > 0, key


def test_a_crop_that_nobody_looks_at_is_not_decoded(overrides):
    trainer = build([*overrides, *PARTITIONS, *CROPS, "partition_by=steps", "data.prefetch=1"])
    batch = next(trainer.task.batches(0, lambda _: True))
    assert [part.images.shape[-1] for part in batch.parts] == [p.size(0, 1) for p in partitions(trainer.cfg)]
    views = [{name: "images" in view for name, view in part.teacher_views.items()} for part in batch.parts]
    assert views == [{"one": True, "two": False, "three": True}, {"one": False, "two": True, "three": True}]
    zooms = [1 / part.teacher_views["three"]["transform"][:, 0, 0].abs() for part in batch.parts]
    assert zooms[0].max() < 1.35 and zooms[1].min() > 1.4, "each partition has its own zoom, about"
    assert torch.isfinite(trainer.train_step(batch)["loss"])
    trainer.task.loader.close()


def test_a_step_is_the_mean_of_its_partitions_by_share(overrides):
    """One process: the gradient is that of the shares' sum of losses, each on its own images alone."""
    shared = "partitions=[{image_size:28,images:6,teachers:[one],share:0.75},{image_size:56,images:2,share:0.25}]"
    trainer = build([*overrides, *PARTITIONS, shared, "partition_by=steps", "data.prefetch=1"])
    task, student = trainer.task, trainer.engine.module
    batch = next(task.batches(0, lambda _: True))
    parts = task.split(batch)
    assert [(tuple(part.images.shape), part.positions.tolist()) for part in parts] == [
        ((6, 3, 28, 28), [0, 1, 2, 3, 4, 5]), ((2, 3, 56, 56), [6, 7]),
    ]  # fmt: skip
    names, losses, engine = list(task.cfg.teachers), [], task.distill.student
    task.distill.student = student  # DeepSpeed allows no other backward pass than its own
    for part, active in zip(parts, (["one"], names), strict=True):
        plain = (part.images, part.group, part.positions, 0, 1.0, part.group_on_host)
        losses.append(task.distill(*plain, active=active).loss)
    expected = torch.autograd.grad(0.75 * losses[0] + 0.25 * losses[1], list(student.encoder.blocks.parameters()))
    task.distill.student, metrics = engine, {}
    plain_step = trainer.engine.step

    def step(*inputs, **named):
        metrics["grads"] = [p.grad.clone() for p in student.encoder.blocks.parameters()]
        return plain_step(*inputs, **named)

    trainer.engine.step = step
    found = trainer.train_step(batch)
    for ours, theirs in zip(metrics["grads"], expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(found["loss"], (0.75 * losses[0] + 0.25 * losses[1]).detach())
    task.loader.close()


def test_a_run_of_partitions_goes_on_where_it_stopped(photos, tmp_path):
    more = [*PARTITIONS, *CROPS, "partition_by=steps", "standardization.convention=phi_s_running"]
    more.append("standardization.phi_s_period=1")
    whole = train(small_run(photos, tmp_path / "whole"), *more).run_dir
    part = shutil.copytree(whole, tmp_path / "part")
    shutil.rmtree(part / "checkpoints" / "step_0000006")
    train(small_run(photos, part), *more)
    assert same_weights(whole, part) and timeless(whole) == timeless(part)


def test_slots_and_weights(overrides):
    cfg = compose_config([*overrides, *PARTITIONS])
    by_ranks = [turns(cfg, rank, 4) for rank in range(4)]
    assert [[turn.part.slots for turn in own] for own in by_ranks] == [
        [slice(0, 3)], [slice(3, 6)], [slice(6, 7)], [slice(7, 8)],
    ]  # fmt: skip
    assert by_ranks[0][0].average == {"one": 1.0} and by_ranks[3][0].average == {"one": 1.0, "two": 2.0}
    one_by_one = turns(compose_config([*overrides, *PARTITIONS, "partition_by=steps"]), 1, 2)
    assert [turn.part.slots for turn in one_by_one] == [slice(3, 6), slice(7, 8)]
    assert [turn.weight for turn in one_by_one] == [1.0, 1.0] and micro_batch_size(cfg, 2) == 2


def test_partitions_draw_their_sizes_each_on_its_own(overrides):
    cfg = compose_config([*overrides, *PARTITIONS, *CROPS])
    first, second = partitions(cfg)
    sizes = np.array([[part.size(step, 1) for part in (first, second)] for step in range(400)])
    small = sizes == [28, 56]
    assert abs(small.mean(0) - 0.5).max() < 0.08 and abs((small[:, 0] == small[:, 1]).mean() - 0.5) < 0.08
    assert [(s.image_size, s.images) for s in settings(cfg, stages(cfg)[0])] == [
        (28, 0.375), (42, 0.375), (56, 0.125), (42, 0.125),
    ]  # fmt: skip
    mean = [run_flops(at_size(cfg, s.image_size, s.teachers)).student * s.images for s in settings(cfg, stages(cfg)[0])]
    assert run_flops(cfg).student == pytest.approx(sum(mean), abs=2)
    assert "6 images at 28 / 42 px for one, three" in "\n".join(describe(cfg, "demo", [2], 10.0))
    in_turn = compose_config([*overrides, *PARTITIONS, "partitions=[{image_sizes:[28,56],images:8}]"])
    assert [partitions(in_turn)[0].size(step, 1) for step in range(3)] == [28, 56, 28]


def test_a_rank_loads_the_teachers_of_its_partition_alone(overrides):
    cfg = compose_config([*overrides, *PARTITIONS, *CROPS])
    loaded = [loaded_teachers(cfg, turns(cfg, rank, 2)) for rank in (0, 1)]
    assert loaded == [["one", "three"], ["two", "three"]]
    by_steps, evaluated = (compose_config([*overrides, *PARTITIONS, *CROPS, o]) for o in (
        "partition_by=steps", "evaluation.every=2"))  # fmt: skip
    assert all(loaded_teachers(c, turns(c, 0, 2)) == list(c.teachers) for c in (by_steps, evaluated))
    whole, first = TeacherEnsemble(cfg.teachers, 14), TeacherEnsemble(cfg.teachers, 14, loaded=loaded[0])
    assert list(first.teachers) == loaded[0] and len(first.trunks) == 2
    images = torch.randn(2, 3, 28, 28)
    theirs, ours = whole(images), first(images)
    assert list(ours) == list(theirs) and torch.equal(ours["one"]["patch"], theirs["one"]["patch"])
    assert ours["two"]["patch"].shape == (0, *theirs["two"]["patch"].shape[1:]) and "cls" not in ours["two"]


def test_memory_has_the_teachers_of_the_fullest_rank():
    one, *others = compose_config(["experiment=dune_336"]).teachers
    parts = f"{{image_size:336,images:64,teachers:[{one}]}},{{image_size:336,images:64,teachers:[{','.join(others)}]}}"
    more = [f"partitions=[{parts}]", "train.global_batch=128", "objective.drop_probability=0"]
    ranks, steps = (
        memory_bytes(compose_config(["experiment=dune_336", *more, f"partition_by={mode}"]), 2)["teachers"]
        for mode in ("ranks", "steps")
    )
    assert ranks == pytest.approx(2 * steps / 3, rel=1e-3) and steps > 1.8e9


@pytest.mark.parametrize("name", ["radio_v25_high", "c_radio_v4_high"])
@pytest.mark.parametrize("ranks", [2, 8, 64])
def test_the_ranks_of_a_recipe_share_its_partitions(name, ranks):
    """Regression: three quarters of the ranks could not share 1,024 images, whatever their number."""
    cfg = compose_config([f"experiment={name}", "data=folder", "data.datasets.images.root=x"])
    assert micro_batch_size(cfg, ranks) == 256 // ranks


def test_operations_and_memory_count_partitions(overrides):
    cfg = compose_config([*overrides, *PARTITIONS])
    small, large = at_size(cfg, 28, ["one"]), at_size(cfg, 56)
    mean = [run_flops(c) for c in (small, large)]
    found = run_flops(cfg)
    assert found.student == round(0.75 * mean[0].student + 0.25 * mean[1].student)
    assert found.teachers["two"] in (None, round(0.25 * (teacher_flops("two", cfg.teachers["two"], 4) or 0)))
    assert fit(cfg, 2, 2**40, parts=1).images == 6
    taken = fit(cfg, 2, 2**40, parts=1).needed - fit(cfg, 4, 2**40, parts=1).needed
    ahead = 12 * (cfg.data.prefetch + 3)
    per_rank = {ranks: max(6 * 2 // ranks * (ahead * 28**2 + image_bytes(small)),
                           2 * 2 // ranks * (ahead * 56**2 + image_bytes(large))) for ranks in (2, 4)}  # fmt: skip
    assert taken == pytest.approx(per_rank[2] - per_rank[4], rel=0.02, abs=4 * 2**20)


def test_a_plan_says_what_partitions_are_and_who_cannot_share_them(overrides):
    text = "\n".join(describe(compose_config([*overrides, *PARTITIONS]), "demo", [2, 3], 10.0))
    assert "partitions, by ranks: 6 images at 28 px for one, counting 0.5; 2 images at 56 px for one, two," in text
    assert "shares of 0.5, 0.5 of 3 ranks are no whole numbers" in text


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["train.global_batch=16"], "partitions have 8 images together, but train.global_batch=16"),
        (["partition_by=images"], "partition_by='images'; choose one of ranks, steps"),
        (["partitions=[{image_size:84,images:8}]"], r"partitions\[0\] has images of 84 px; give sizes up to"),
        (["partitions=[{image_sizes:[28,30],images:8}]"], r"partitions\[0\].image_sizes\[1\]=30 is not a multiple"),
        (["partitions=[{image_size:56,image_sizes:[28],images:8}]"], r"partitions\[0\] has image_size=56 and image_si"),
        (["partitions=[{image_sizes:[28],weights:[1,2],images:8}]"], r"partitions\[0\].weights=.1.0, 2.0.; give one"),
        (["partitions=[{image_size:56,images:8,teacher_zoom:[1,2]}]"], "with data.teacher_views=false: teachers see"),
        (["partitions=[{image_size:56,images:8,teacher_zoom:[2,1]}]"], r"teacher_zoom=\[2.0, 1.0\]; give .smallest,"),
        (["partitions=[{image_size:56,images:8,teacher_zoom:[1,2]}]", "data.teacher_views=true"],
         r"teacher_zoom=\[1.0, 2.0\] and teacher_shift=0: teachers see other parts"),
        (["partitions=[{image_size:56,images:8,teachers:[three]}]"], r"partitions\[0\].teachers has 'three'"),
        (["partitions=[{image_size:56,images:8,teachers:[one]}]"], "teacher 'two' is in no partition"),
        (["objective.drop_probability=0.5"], "leaves teachers out, and objective.drop_probability=0.5 drops some"),
        (["partitions=[{image_size:56,images:4,share:0.5},{image_size:28,images:4}]"], "have shares of .0.5, 0.0."),
        (["progressive=[{until:0.5,image_size:28}]"], "partitions do not go with progressive"),
    ],
)
def test_partitions_that_make_no_sense_are_refused(overrides, more, words):
    with pytest.raises(ConfigError, match=words):
        compose_config([*overrides, *PARTITIONS, *more])


@pytest.mark.parametrize(
    ("ranks", "words"), [(3, "shares of 0.5, 0.5 of 3 ranks"), (8, r"partitions\[0\].images=6 cannot be shared by 4")]
)
def test_ranks_that_cannot_share_partitions_are_refused(overrides, ranks, words):
    with pytest.raises(ConfigError, match=words):
        micro_batch_size(compose_config([*overrides, *PARTITIONS]), ranks)


def test_phi_s_is_estimated_from_all_partitions(overrides):
    """Every teacher on the images of its partitions, at their sizes; nothing is left unknown."""
    more = ["partition_by=steps", "standardization.convention=phi_s", "standardization.phi_s_batches=2"]
    trainer = build([*overrides, *PARTITIONS, *more, "data.prefetch=1"])
    assert all(buffer.isfinite().all() for buffer in trainer.task.statistics.buffers())
    trainer.task.loader.close()
