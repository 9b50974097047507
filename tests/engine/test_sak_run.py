"""SAK's first stage as a run: two teachers at two levels each, resumed, evaluated, and its parts refused by name."""

from __future__ import annotations

import shutil

import pytest
import torch

import dune_fast
from dune_fast.engine import checkpoints
from dune_fast.engine.config import ConfigError, compose_config
from dune_fast.engine.flops import projector_flops
from dune_fast.engine.memory import trained_parameters
from dune_fast.engine.metrics import read_metrics
from dune_fast.engine.warm_start import initial_student
from dune_fast.student import Student
from tests.engine.conftest import build, same_weights, small_run, train


@pytest.fixture
def sak(photos, tmp_path) -> list[str]:
    """Overrides of twenty steps: source `wide` has the student's channels and a grid of its own, `narrow` aligners."""
    base = [part for part in small_run(photos, tmp_path / "run") if "teachers" not in part]
    for source, channels in (("wide", 48), ("narrow", 24)):
        for level in (0, 1):
            name = f"teachers.{source}_{level}"
            base += [
                f"+teachers@{name}=conv_patchify", f"{name}.weights=random:{level}", f"{name}.num_features={channels}",
                f"{name}.source={source}", f"{name}.token_types=[patch]",
            ]  # fmt: skip
    base += [f"teachers.wide_{level}.{own}" for level in (0, 1) for own in ("input_size=84", "grid=own")]
    return [
        *base, "projector=sak", "projector.which_blocks=[0,1]", "objective.patch.cosine=0", "objective.align=larger",
        "objective.patch.smooth_l1=0.1", "objective.patch.map_cosine=0.9", "objective.drop_probability=0",
        "standardization.convention=none", "optimizer.lr=1e-3", "optimizer.schedule=cosine", "train.steps=20",
        "optimizer.decay_vectors=true", "train.checkpoint_every=10",
    ]  # fmt: skip


def test_a_resumed_run_learns_and_ends_bit_identical(sak, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(sak, f"output_dir={whole}")
    shutil.copytree(whole, parts)
    shutil.rmtree(parts / "checkpoints" / checkpoints.tag(20))
    again = build(sak, f"output_dir={parts}")
    assert again.step == 10
    again.run()
    assert same_weights(parts, whole)
    losses = [record["loss"] for record in read_metrics(whole / "metrics.jsonl")]
    assert len(losses) == 20 and losses[-1] < 0.9 * losses[0]

    model = dune_fast.load_model(whole)
    assert list(model.student.shared) == ["wide", "narrow"]
    projections = model.projections(torch.randn(1, 3, 56, 84))
    shapes = {name: tuple(of["patch"].shape) for name, of in projections.items()}
    wide, narrow = (1, 24, 48), (1, 24, 24)
    assert shapes == {"wide_0": wide, "wide_1": wide, "narrow_0": narrow, "narrow_1": narrow}

    cfg = compose_config([*sak, f"student_weights={whole}", "train.seed=1"])
    student, found = initial_student(cfg)  # whole: levels and the adapters that they were trained with
    assert found.shared == ["wide", "narrow"] and not found.drawn and "shared" not in found.not_taken
    state = model.student.state_dict()
    assert all(torch.equal(x, state[key]) for key, x in student.state_dict().items())
    other = initial_student(compose_config([*sak, f"student_weights={whole}", "projector.down_ratio=8"]))[1]
    assert not other.shared and len(other.drawn) == 4


def test_every_level_reads_the_adapters_of_its_source(sak):
    cfg = compose_config(sak)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        student = Student(cfg.student, cfg.projector, cfg.teacher_features)
        student.encoder.init_weights()
    images = torch.randn(2, 3, 56, 56)
    student(images)["narrow_0"]["patch"].square().sum().backward()
    touched = {".".join(name.split(".")[:3]) for name, p in student.shared.named_parameters() if p.grad is not None}
    assert touched == {"narrow.adapters.0", "narrow.adapters.1"}  # of its own source, up to its own block
    assert [hasattr(student.projectors[name], "aligner") for name in cfg.teachers] == [False, False, True, True]
    with torch.autocast("cpu", torch.bfloat16):
        assert all(x["patch"].isfinite().all() for x in student(images).values())
    features = cfg.teacher_features
    of_chain = 3 * 2 * 2 * 17 * 48 * 12  # three adapters of two products on 17 tokens
    counts = {name: projector_flops(cfg.projector, cfg.student, features[name], 4) for name in cfg.teachers}
    assert counts["narrow_0"] - counts["narrow_1"] == counts["wide_0"] - counts["wide_1"] == of_chain


def test_adapters_are_counted_with_the_projectors(sak):
    adapter = 2 * 48 * 12 + 48 + 12 + 1
    levels = 2 * (2 * 48) + 2 * (2 * 48 + 48 * 24 + 24)
    assert trained_parameters(compose_config(sak))[1] == 2 * 3 * adapter + levels


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("projector.which_blocks=[0,0]", r"which_blocks=\[0, 0\] ends at block 0, and the student's last one is 1"),
        ("projector.down_ratio=49", "down_ratio=49 leaves none of the student's 48 channels"),
        ("projector.which_blocks=[1]", "2 teachers have the source 'wide' .*names 1 levels"),
        ("projector.which_blocks=[0,2]", r"which_blocks \[0, 2\]: the student's blocks are 0 to 1"),
        ("projector.which_blocks=[]", "which_blocks is empty"),
        ("teachers.wide_0.token_types=[cls,patch]", r"wide_0.token_types is .*give \[patch\]"),
        ("teachers.wide_0.source=narrow", "1 teachers have the source 'wide'|3 teachers have the source 'narrow'"),
    ],
)
def test_levels_that_do_not_fit_are_refused(sak, more, message):
    with pytest.raises(ConfigError, match=message):
        compose_config([*sak, more])
