"""`train.ema`: the average follows its formula, is evaluated and exported, and the training does not notice."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from dune_fast.engine.checkpoints import load_run
from dune_fast.engine.config import compose_config
from dune_fast.engine.memory import checkpoint_bytes, memory_bytes, trained_parameters
from dune_fast.engine.schedules import average_decay
from dune_fast.engine.trainer import Trainer
from dune_fast.evaluate.in_run import InRunEvaluation
from dune_fast.load import load_encoder, load_model
from tests.engine.conftest import build, same_weights, small_run, timeless, train

EMA = "train.ema=0.3"


@pytest.fixture(scope="module")
def averaged(photos, tmp_path_factory):
    """A run of six steps with an average, its checkpoints, and the average that its formula gives."""
    folder, weights, average = tmp_path_factory.mktemp("averaged") / "run", {}, {}

    def look(trainer, batch):
        follow({name: p.detach().clone() for name, p in trainer.engine.module.named_parameters() if p.requires_grad},
               trainer.step - 1)  # fmt: skip

    def follow(now, step):
        for name, value in now.items():
            d = 0.0 if step < 0 else average_decay(0.3, step)
            average[name] = value if step < 0 else d * average[name] + (1 - d) * value

    trainer = train([*small_run(photos, folder), EMA], before_step=look)
    weights |= {name: p.detach().clone() for name, p in trainer.engine.module.named_parameters() if p.requires_grad}
    follow(weights, 5)
    return folder, average


def test_the_training_is_the_same_and_the_average_is_exported(averaged, trained_run):
    run, average = averaged
    assert same_weights(run, trained_run, "student_raw.safetensors", "student.safetensors")
    assert timeless(run) == timeless(trained_run)
    student, encoder = load_file(run / "student.safetensors"), load_file(run / "encoder.safetensors")
    for name, expected in average.items():
        torch.testing.assert_close(student[name], expected, rtol=1e-5, atol=1e-7)
    assert all(torch.equal(value, student[f"encoder.{name}"]) for name, value in encoder.items())
    assert not same_weights(run, trained_run)
    for file in ("student.safetensors", "encoder.safetensors"):
        assert safe_open(run / file, "pt").metadata()["ema"] == "0.3"
    assert "ema" not in safe_open(run / "student_raw.safetensors", "pt").metadata()
    assert not (trained_run / "student_raw.safetensors").exists()
    assert "ema" not in safe_open(trained_run / "student.safetensors", "pt").metadata()
    raw, mean = load_encoder(run / "student_raw.safetensors"), load_encoder(run)
    assert torch.equal(mean.cls_token, student["encoder.cls_token"])
    assert not torch.equal(raw.cls_token, mean.cls_token)
    whole = load_model(run / "student_raw.safetensors")
    assert whole.teachers == ["one", "two"] and torch.equal(whole.encoder.cls_token, raw.cls_token)
    assert torch.equal(load_model(run / "student.safetensors").encoder.cls_token, mean.cls_token)


def test_a_resumed_run_and_a_checkpoint_have_the_average(averaged, photos, tmp_path):
    run = shutil.copytree(averaged[0], tmp_path / "run")
    unfinished = load_run(run / "checkpoints" / "step_0000006")[1].state_dict()
    student = load_file(run / "student.safetensors")
    assert all(torch.equal(value, student[name]) for name, value in unfinished.items())
    shutil.rmtree(run / "checkpoints" / "step_0000006")
    (run / "student.safetensors").unlink()
    train([*small_run(photos, run), EMA])
    assert same_weights(run, averaged[0]) and same_weights(run, averaged[0], "student_raw.safetensors")


def test_an_average_begins_where_an_old_checkpoint_ends(finished, photos, caplog):
    """Checkpoints from before there was an average have neither it nor a word of it."""
    path = finished / "checkpoints" / "step_0000003" / "manifest.json"
    shutil.rmtree(finished / "checkpoints" / "step_0000006")
    manifest = json.loads(path.read_text())
    manifest["run"].pop("averaged")
    manifest["config"]["train"].pop("ema")
    manifest.pop("sha256")
    path.write_text(json.dumps(manifest))
    with caplog.at_level("INFO"):
        trainer = build([*small_run(photos, finished), EMA])
    assert "the checkpoint has no average of the weights, it begins here" in caplog.text
    state = trainer.engine.state
    assert all(torch.equal(t["ema"], t["weight"]) for t in map(state.tensors, state.shards))
    trainer.run()
    assert (finished / "student_raw.safetensors").is_file()


def test_a_run_goes_on_without_its_average(averaged, trained_run, photos, tmp_path):
    run = shutil.copytree(averaged[0], tmp_path / "run")
    shutil.rmtree(run / "checkpoints" / "step_0000006")
    train(small_run(photos, run))
    assert same_weights(run, trained_run)


def test_the_average_is_what_is_evaluated(overrides):
    cfg = compose_config([*overrides, EMA, "evaluation.every=3", "evaluation.batch=4"])
    seen = []
    with InRunEvaluation(cfg) as evaluate:
        copy = evaluate._copy

        def look(trainer):
            student = copy(trainer)
            state = trainer.engine.state
            tensors = {shard.parameter: state.tensors(shard) for shard in state.shards}
            own = dict(student.named_parameters())
            seen.append(all(torch.equal(own[name].flatten(), t["ema"]) for name, t in tensors.items()))
            seen.append(any(not torch.equal(t["weight"], t["ema"]) for t in tensors.values()))
            return student

        evaluate._copy = look
        Trainer(cfg, evaluate).run()
    assert seen == [True] * 4


def test_a_skipped_step_leaves_the_average_alone(overrides):
    trainer = build(overrides, EMA)
    batches = trainer.task.loader.batches(0)
    trainer.train_step(next(batches))
    state = trainer.engine.state
    before = [state.tensors(shard)["ema"].clone() for shard in state.shards]
    batch = next(batches)
    batch.images[0] = float("nan")
    trainer.train_step(batch)
    after = [state.tensors(shard)["ema"].clone() for shard in state.shards]
    trainer.train_step(next(batches))
    trainer.task.loader.close()
    assert all(map(torch.equal, before, after))
    assert not all(torch.equal(x, state.tensors(s)["ema"]) for x, s in zip(after, state.shards, strict=True))


def test_decays_of_the_first_steps():
    assert [average_decay(0.999, step) for step in (0, 90, 10**6)] == [0.1, 0.91, 0.999]


def test_memory_and_disk_count_the_average(overrides):
    plain, cfg = compose_config(overrides), compose_config([*overrides, EMA])
    parameters = sum(trained_parameters(cfg))
    assert checkpoint_bytes(cfg) - checkpoint_bytes(plain) == 4 * parameters
    assert memory_bytes(cfg, 1)["average of the weights"] == 4 * parameters
    assert memory_bytes(cfg, 2)["average of the weights"] == 4 * parameters // (2 if cfg.deepspeed.zero_stage else 1)
    assert "average of the weights" not in memory_bytes(plain, 1)
