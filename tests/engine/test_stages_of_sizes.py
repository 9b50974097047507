"""Stages whose steps take several sizes, in which some teachers take part, and what begins anew with a stage."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch

from dune_fast.engine.config import ConfigError, compose_config
from dune_fast.engine.flops import run_flops
from dune_fast.engine.metrics import read_metrics
from dune_fast.engine.stages import Stage, at_size, stages
from tests.engine.conftest import build, same_weights, small_run, timeless, train

STAGES = [
    "progressive=[{until:0.5,image_sizes:[28,42],teachers:[two]},{until:1,image_sizes:[42,56,28],weights:[2,1,1]}]",
    "objective.drop_probability=0", "stage_restarts=[learning_rate,statistics]", "optimizer.frozen_trunk_steps=2",
    "train.keep_checkpoints=9", "train.checkpoint_every=1", "evaluation.held_out=false",
]  # fmt: skip


@pytest.fixture(scope="module")
def staged(photos, tmp_path_factory):
    """A run of six steps; its sizes, and before each step the encoder's weights and a teacher's statistics."""
    folder, seen = tmp_path_factory.mktemp("staged") / "run", []

    def look(trainer, batch):
        encoder = torch.cat([p.detach().flatten() for p in trainer.engine.module.encoder.parameters()])
        projector = trainer.engine.module.projectors["one"].linear.weight.detach().clone()
        mean = dict(trainer.task.statistics.named_buffers())["one.normalizers.cls.mean"].clone()
        seen.append((batch.images.shape[-1], encoder, projector, mean))

    train([*small_run(photos, folder), *STAGES], before_step=look)
    return folder, seen


def test_sizes_teachers_schedules_and_the_trunk_go_by_stage(staged, overrides):
    folder, seen = staged
    sizes = [size for size, *_ in seen]
    assert sizes[:3] == [28, 42, 28] and set(sizes[3:]) <= {28, 42, 56}
    records = read_metrics(folder / "metrics.jsonl")
    assert [r["loss/one"] for r in records[:3]] == [0, 0, 0] and all(r["loss/one"] > 0 for r in records[3:])
    assert all(r["loss/two"] > 0 and r["kept/two"] == 1 for r in records)
    rates = [r["lr"] for r in records]
    assert rates[:3] == rates[3:] and rates[0] > rates[2], "the schedule begins anew"
    encoders = [encoder for _, encoder, *_ in seen]
    assert torch.equal(encoders[0], encoders[2]) and not torch.equal(encoders[2], encoders[3])
    means = [mean for *_, mean in seen]
    assert not means[3].any() and means[4].any()
    assert not any(mean.any() for mean in means[:4]), "a teacher that sees nothing has no statistics"
    projectors = [projector for _, _, projector, _ in seen]
    shrunk = torch.nn.functional.cosine_similarity(projectors[0].flatten(), projectors[3].flatten(), dim=0)
    assert shrunk > 1 - 1e-6 and not torch.equal(projectors[3], projectors[4])


@pytest.mark.parametrize("step", [1, 3, 4])
def test_a_staged_run_goes_on_where_it_stopped(staged, photos, tmp_path, step, caplog):
    run = shutil.copytree(staged[0], tmp_path / "run")
    for later in range(step + 1, 7):
        shutil.rmtree(run / "checkpoints" / f"step_{later:07}")
    (run / "student.safetensors").unlink()
    with caplog.at_level("INFO"):
        train([*small_run(photos, run), *STAGES])
    assert "steps 1 to 3 at 28 / 42 px, teachers two" in caplog.text and "4 to 6 at 42 / 56 / 28 px" in caplog.text
    assert same_weights(run, staged[0]) and timeless(run) == timeless(staged[0])


def test_sizes_are_drawn_by_their_weights_and_the_step(overrides):
    stage = Stage(10, 1510, 56, (28, 42, 56), (0.5, 0.0, 1.5))
    sizes = np.array([stage.size(step, 7) for step in range(10, 1510)])
    assert abs((sizes == 28).mean() - 0.25) < 0.04 and not (sizes == 42).any()
    assert [stage.size(step, 7) for step in (10, 500)] == [sizes[0], sizes[490]]
    assert (sizes != np.array([stage.size(step, 8) for step in range(10, 1510)])).any()
    found = stages(compose_config([*overrides, *STAGES]))
    assert found == [Stage(0, 3, 42, (28, 42), (), ("two",)), Stage(3, 6, 56, (42, 56, 28), (2.0, 1.0, 1.0))]
    assert str(found[0]) == "28 / 42 px, teachers two"


def test_operations_are_the_mean_over_sizes(overrides):
    cfg = compose_config([*overrides, *STAGES])
    of = {size: run_flops(at_size(cfg, size)).student for size in (28, 42, 56)}
    first, second = (of[28] + of[42]) / 2, (2 * of[42] + of[56] + of[28]) / 4
    assert run_flops(cfg).student == pytest.approx((first + second) / 2, abs=2)


def test_parameter_groups_of_the_trunk_change_no_number(overrides, tmp_path):
    """With no frozen step left, weights are those of a run without the option."""
    plain = train(overrides, "train.steps=2", f"output_dir={tmp_path / 'plain'}").run_dir
    trainer = build(overrides, "train.steps=2", "optimizer.frozen_trunk_steps=1", f"output_dir={tmp_path / 'other'}")
    object.__setattr__(trainer.cfg.optimizer, "frozen_trunk_steps", 0)
    trainer.run()
    assert same_weights(plain, trainer.run_dir)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["progressive=[{until:0.5,image_sizes:[28,42],image_size:28}]"], "give one of them"),
        (["progressive=[{until:0.5,image_sizes:[28,42],weights:[1]}]"], r"weights=\[1.0\]; give one for each"),
        (["progressive=[{until:0.5,image_sizes:[28,84]}]"], "has images of 84 px; give sizes up to image_size=56"),
        (["progressive=[{until:0.5,image_sizes:[28,30]}]"], r"progressive\[0\].image_sizes\[1\]=30 is not a multiple"),
        (["stage_restarts=[weights]"], "stage_restarts has 'weights'; choose from learning_rate, statistics"),
        (["standardization.convention=phi_s"], "those of standardization.convention=phi_s are known before"),
        (["objective.drop_probability=0.3"], r"progressive\[0\].teachers leaves teachers out, and"),
        (["optimizer.frozen_trunk_steps=-1"], "optimizer.frozen_trunk_steps=-1; it must be at least 0"),
    ],
)
def test_stages_that_cannot_be_are_refused(overrides, more, words):
    with pytest.raises(ConfigError, match=words):
        compose_config([*overrides, *STAGES, *more])
