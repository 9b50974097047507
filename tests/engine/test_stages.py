"""Progressive resolution: the size of every step, the same images in the same order, exact resume at a border."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from dune_fast.engine.config import ConfigError, compose_config
from dune_fast.engine.flops import mean_flops, run_flops, stage_flops
from dune_fast.engine.metrics import read_metrics
from dune_fast.engine.stages import Stage, at_size, stage_at, stages
from dune_fast.planner.describe import describe
from tests.engine.conftest import build, same_weights, small_run, timeless, train

PROGRESSIVE = "progressive=[{until:0.3,image_size:28},{until:0.7,image_size:42}]"
SIZES = [28, 28, 42, 42, 56, 56]


@pytest.fixture(scope="module")
def progressive(photos, tmp_path_factory) -> tuple[Path, list[tuple]]:
    """A run of six steps with all checkpoints; what its batches were."""
    folder, seen = tmp_path_factory.mktemp("progressive") / "run", []

    def look(trainer, batch):
        table = trainer.engine.module.encoder.pos_embed
        seen.append((batch.images.shape[-1], batch.paths, batch.positions.tolist(), tuple(table.shape)))

    train([*small_run(photos, folder), PROGRESSIVE, "train.keep_checkpoints=9", "train.checkpoint_every=1"],
          before_step=look)  # fmt: skip
    return folder, seen


def test_images_of_a_step_are_of_its_stage_and_otherwise_the_same(progressive, overrides):
    seen, plain = progressive[1], []
    trainer = build(overrides, before_step=lambda run, batch: plain.append((batch.paths, batch.positions.tolist())))
    trainer.run()
    assert [size for size, *_ in seen] == SIZES
    assert [(paths, positions) for _, paths, positions, _ in seen] == plain
    assert {table for *_, table in seen} == {(1, 17, 48)}, "the table keeps its size"
    rates = [[r["lr"] for r in read_metrics(run / "metrics.jsonl")] for run in (progressive[0], trainer.run_dir)]
    assert rates[0] == rates[1]


@pytest.mark.parametrize("step", [1, 2, 4])
def test_a_run_goes_on_within_a_stage_and_at_a_border(progressive, photos, tmp_path, step, caplog):
    run = shutil.copytree(progressive[0], tmp_path / "run")
    for later in range(step + 1, 7):
        shutil.rmtree(run / "checkpoints" / f"step_{later:07}")
    for file in ("student.safetensors", "encoder.safetensors"):
        (run / file).unlink()
    with caplog.at_level("INFO"):
        train([*small_run(photos, run), PROGRESSIVE, "train.keep_checkpoints=9", "train.checkpoint_every=1"])
    assert same_weights(run, progressive[0]) and timeless(run) == timeless(progressive[0])
    assert "progressive: steps 1 to 2 at 28 px" in caplog.text
    assert caplog.text.count("step 3 to 4 at 42 px") == int(step <= 2)
    assert caplog.text.count("step 5 to 6 at 56 px") == 1


def test_another_size_in_the_next_stage_does_not_build_another_decoder(overrides):
    """One DALI pipeline, with its threads, serves all sizes."""
    trainer, made = build(overrides, PROGRESSIVE, "data.prefetch=1"), []
    new_decoder = trainer.task.loader._new_decoder
    trainer.task.loader._new_decoder = lambda *a: made.append(new_decoder(*a)) or made[-1]
    batches = trainer.task.loader.batches(0)
    for size in SIZES:
        assert next(batches).images.shape[-2:] == (size, size)
    batches.close()
    trainer.task.loader.close()
    assert len(made) == 1


def test_stages_of_a_configuration(overrides):
    cfg = compose_config([*overrides, PROGRESSIVE])
    found = stages(cfg)
    assert found == [Stage(0, 2, 28), Stage(2, 4, 42), Stage(4, 6, 56)]
    assert [stage_at(found, step).image_size for step in range(8)] == [*SIZES, 56, 56]
    assert stages(compose_config(overrides)) == [Stage(0, 6, 56)]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("{until:0.5,image_size:30}", r"progressive\[0\].image_size=30 is not a multiple"),
        ("{until:0.5,image_size:56}", r"progressive\[0\].image_size=56; sizes rise"),
        ("{until:0.3,image_size:42},{until:0.6,image_size:28}", r"progressive\[1\].image_size=28; sizes rise"),
        ("{until:1,image_size:28}", r"progressive\[0\].until=1 ends its stage at step 6 of 6"),
        ("{until:0.01,image_size:28}", r"progressive\[0\].until=0.01 ends its stage at step 0"),
        ("{until:0.5,image_size:28},{until:0.5,image_size:42}", r"progressive\[1\].until=0.5 .*that ends at 3"),
        ("{image_size:28}", r"progressive\[0\].until=0 "),
    ],
)
def test_stages_that_make_no_sense_are_refused(overrides, value, words):
    with pytest.raises(ConfigError, match=words):
        compose_config([*overrides, f"progressive=[{value}]"])


def test_a_start_on_images_of_two_sizes_is_refused(overrides):
    more = ["start.fit_projectors=true", PROGRESSIVE]
    with pytest.raises(ConfigError, match="start.images=512, but progressive.0. ends after 16 images"):
        compose_config([*overrides, *more])
    compose_config([*overrides, *more, "start.images=16"])


def test_another_order_of_sizes_is_another_run(progressive, photos):
    with pytest.raises(ConfigError, match="progressive: .* -> "):
        build([*small_run(photos, progressive[0]), "progressive=[{until:0.3,image_size:28}]"])


def test_operations_and_hours_count_every_stage_by_its_size(progressive):
    cfg = compose_config(["experiment=demo", "train.steps=100", "progressive=[{until:0.4,image_size:56}]"])
    parts = stage_flops(cfg)
    by_size = [run_flops(at_size(cfg, size)).training for size in (56, cfg.image_size)]
    assert [flops.training for _, flops in parts] == by_size
    mean = mean_flops(parts)
    assert mean == run_flops(cfg) and mean.training == pytest.approx(0.4 * by_size[0] + 0.6 * by_size[1])
    text = "\n".join(describe(cfg, "demo", [1], 10.0))
    assert "steps 1 to 40 at 56 px" in text and f"steps 41 to 100 at {cfg.image_size} px" in text
    records = read_metrics(progressive[0] / "metrics.jsonl")
    operations = [r["teraflops_per_second"] / r["images_per_second"] for r in records]
    assert operations[0] == pytest.approx(operations[1]) and operations[2] == pytest.approx(operations[3])
    assert operations[1] < operations[2] < operations[4]


def test_the_position_table_of_a_small_stage_gets_gradients(overrides):
    trainer = build(overrides, PROGRESSIVE)
    trainer.train_step(next(trainer.task.loader.batches(0)))
    trainer.task.loader.close()
    state = trainer.engine.state
    (moment,) = (state.tensors(shard)["exp_avg"] for shard in state.shards if shard.parameter.endswith("pos_embed"))
    assert torch.count_nonzero(moment) > 0.9 * moment.numel()
