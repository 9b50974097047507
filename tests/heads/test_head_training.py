"""A head's training on the engine: learning, resuming, several ranks, what is refused and what is missing."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import dune_fast
from dune_fast import cli, plan_cli, train
from dune_fast.engine import checkpoints
from dune_fast.engine.config import ConfigError, compose_config
from dune_fast.engine.metrics import read_metrics
from dune_fast.engine.run_state import read_state
from dune_fast.engine.schedules import cycled_beta
from dune_fast.engine.trainer import Trainer
from dune_fast.evaluate.dense import DenseTask, run_dense
from dune_fast.evaluate.model import open_model
from dune_fast.evaluate.pairs import open_pairs
from dune_fast.evaluate.probe import RECIPES, recipe
from dune_fast.evaluate.ranks import Ranks
from dune_fast.tasks.linear import SharedBatchNorm
from dune_fast.tasks.run import HeadEvaluation
from dune_fast.tasks.training import HeadTraining
from tests.engine.conftest import ROOT, run_ranks, same_weights, timeless
from tests.evaluate.conftest import encoder_file, own_cache, squares, write_encoder

__all__ = ["encoder_file", "own_cache", "squares"]  # fixtures
HEAD = "head.safetensors"


CROPS = {"seg_ade20k": ("size=42", "stride=28"), "depth_nyud": ("height=42", "width=56")}


def small(encoder: Path, data: Path, run: Path, experiment: str = "seg_ade20k") -> list[str]:
    """Overrides of a training of ten steps."""
    return [
        f"experiment={experiment}", f"head.encoder={encoder}", f"head.data.root={data}", "head.data.layout=plain",
        *(f"head.data.{field}" for field in CROPS[experiment]), "train.steps=10", "train.global_batch=4",
        "train.log_every=1",
        "train.checkpoint_every=5", "train.precision=fp32", "evaluation.every=0", "logging.tensorboard=false",
        "deepspeed=zero0", "optimizer.lr=0.01", f"output_dir={run}",
    ]  # fmt: skip


def start(overrides: list[str], *more: str, before_step=None) -> Trainer:
    cfg = compose_config([*overrides, *more])
    trainer = Trainer(cfg, HeadEvaluation(), HeadTraining(cfg))
    if before_step is not None:
        plain = trainer.train_step
        trainer.train_step = lambda batch: (before_step(trainer), plain(batch))[1]
    return trainer


@pytest.fixture
def overrides(encoder_file, squares, tmp_path) -> list[str]:
    return small(encoder_file, squares, tmp_path / "run")


@pytest.fixture(scope="module")
def whole(encoder_file, squares, tmp_path_factory) -> Path:
    """The folder of a run of ten steps that nothing has interrupted; not to be changed."""
    run = tmp_path_factory.mktemp("whole") / "run"
    start(small(encoder_file, squares, run)).run()
    return run


def test_schedules_of_the_experiments_are_the_recipes():
    for name, task in (("seg_ade20k", "segmentation"), ("depth_nyud", "depth")):
        cfg, wanted = compose_config([f"experiment={name}"]), RECIPES[task]
        o, n = cfg.optimizer, cfg.steps
        assert n == wanted.iterations and cfg.train.global_batch == wanted.batch
        assert (o.weight_decay, o.clip_global, o.clip_per_parameter) == (wanted.weight_decay, wanted.clip, 0.0)
        np.testing.assert_allclose(o.rates(n, 16), [wanted.rate(i) for i in range(n)], rtol=1e-9, atol=1e-16)
        betas = cycled_beta(n, *o.cycle_beta) if o.cycle_beta else np.full(n, o.betas[0])
        np.testing.assert_allclose(betas, [wanted.momentum(i) for i in range(n)], rtol=1e-12)


def test_a_head_learns_and_is_written(overrides, whole, tmp_path):
    records = [r for r in read_metrics(whole / "metrics.jsonl") if "loss" in r]
    assert [r["step"] for r in records] == list(range(1, 11))
    assert np.mean([r["loss"] for r in records[-3:]]) < 0.8 * records[0]["loss"]
    head = dune_fast.load_head(whole)
    assert head.kind == "linear_seg" and head.width == 48 and head.classes == 2 and head.bn.num_batches_tracked == 10
    saved = load_file(whole / "checkpoints" / checkpoints.tag(10) / "rank_00000.safetensors")
    kinds = ("weight", "exp_avg", "exp_avg_sq")
    parameters = ("bn.weight", "bn.bias", "conv_seg.weight", "conv_seg.bias")
    assert set(saved) == {f"{kind}/{name}" for kind in kinds for name in parameters}, "the encoder is in no checkpoint"
    started = json.loads((whole / "run.json").read_text())["starts"][0]
    assert len(started["encoder"]["sha256"]) == 64


def test_the_head_is_that_of_the_evaluation(encoder_file, squares, whole, tmp_path):
    """`dune-fast evaluate --task segmentation` draws, orders, cuts, weighs and steps alike, by code of its own."""
    train_pairs, val_pairs = open_pairs(squares, "segmentation", "plain")
    how = recipe("segmentation", iterations=10, lr=0.01, batch=4, size=42, stride=28, seed=0)
    model = open_model(str(encoder_file), torch.device("cpu"), precision="fp32")
    _, head = run_dense(DenseTask("segmentation", train_pairs, val_pairs, how), model, tmp_path, Ranks())
    torch.testing.assert_close(dict(head.state_dict()), load_file(whole / HEAD), rtol=1e-4, atol=1e-6)


def test_evaluations_and_averages_in_the_run_change_nothing(overrides, whole, tmp_path):
    start(overrides, "evaluation.every=5", "train.ema=0.9").run()
    assert same_weights(tmp_path / "run", whole, "head_raw.safetensors", HEAD)
    assert not same_weights(tmp_path / "run", whole, HEAD)
    found = [r for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if "val/miou" in r]
    assert [r["step"] for r in found] == [5, 10] and all(0 <= r["val/miou"] <= 1 for r in found)


def test_a_signal_stops_and_the_command_goes_on_bit_by_bit(overrides, whole, tmp_path, monkeypatch, caplog):
    def interrupt(trainer):
        if trainer.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    trainer = start(overrides, before_step=interrupt)
    trainer.run()
    run = tmp_path / "run"
    assert trainer.stopped and read_state(run)["state"] == "stopped" and not (run / HEAD).exists()
    monkeypatch.setattr(train, "setup_logging", lambda debug, rank: None)
    caplog.set_level(logging.INFO, "dune_fast")
    assert train.main(["--run", str(run)]) == 0
    assert "going on from step 4 of 10" in caplog.text and read_state(run)["state"] == "finished"
    assert same_weights(run, whole, HEAD) and timeless(run) == timeless(whole)
    page = (run / "report.html").read_text()
    assert "Finished, step 10 of 10" in page and "linear_seg" in page and "drawn before" not in page


@pytest.mark.slow
def test_a_kill_in_the_middle_costs_nothing(overrides, whole, tmp_path):
    """A process of its own, of 5 s."""
    run = tmp_path / "run"
    command = [sys.executable, "dune_fast/train.py", *overrides]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not checkpoints.complete_steps(run):
        time.sleep(0.002)
    process.kill()
    said = process.communicate()[1]
    assert checkpoints.complete_steps(run), said
    shutil.rmtree(run / "checkpoints" / checkpoints.tag(10), ignore_errors=True)  # the run was quicker than the kill
    trainer = start(overrides)
    assert trainer.step == 5
    trainer.run()
    assert same_weights(run, whole, HEAD) and timeless(run) == timeless(whole)


def test_parts_of_a_batch_make_the_same_gradient(overrides, tmp_path):
    """Without BatchNorm's moments, which are a part's: they are fixed here."""
    grown = {}
    for parts in (1, 2):
        trainer = start(overrides, f"train.accumulation={parts}", f"output_dir={tmp_path / str(parts)}")
        trainer.task.module.eval()
        batches = trainer.task.batches(0, lambda seconds: True)
        metrics = trainer.train_step(next(batches))
        grown[parts] = metrics["loss"], trainer.task.module.conv_seg.bias.detach().clone()
        trainer.task.close()
    torch.testing.assert_close(grown[1], grown[2], rtol=1e-5, atol=1e-7)


def test_batch_norm_is_torchs(monkeypatch):
    ours, theirs = SharedBatchNorm(5), torch.nn.BatchNorm2d(5)
    for x in torch.randn(3, 4, 5, 6, 7).mul(3).add(10):
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-5, atol=1e-6)
    ours.eval(), theirs.eval()
    torch.testing.assert_close(ours(x), theirs(x))


def test_depth_learns_with_a_cycled_beta(encoder_file, squares, tmp_path):
    seen = []

    def look(trainer):
        seen.append(trainer.engine.state.adamw.param_groups[0]["betas"])

    trainer = start(small(encoder_file, squares, tmp_path / "run", "depth_nyud"), before_step=look)
    trainer.run()
    look(trainer)
    assert seen[1:] == [(beta, 0.999) for beta in cycled_beta(10, 0.95, 0.85).tolist()]
    records = [r["loss"] for r in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert records[-1] < records[0] and dune_fast.load_head(tmp_path / "run").max_depth == 10.0


@pytest.mark.slow
def test_two_ranks_train_as_one(overrides, whole, tmp_path):
    """Two processes of 5 s."""
    run_ranks(2, "dune_fast/train.py", *overrides, PYTHONPATH=str(ROOT))
    ours, one = load_file(tmp_path / "run" / HEAD), load_file(whole / HEAD)
    torch.testing.assert_close(ours, one, rtol=1e-4, atol=1e-5)


def test_a_broken_example_stops_the_run_after_saving(overrides, tmp_path, squares):
    data = shutil.copytree(squares, tmp_path / "data")
    trainer = start(overrides, f"head.data.root={data}")
    plain = trainer.task.task.example

    def example(step, slot):
        if step == 4:
            (data / "images" / "train" / "0.png").write_bytes(b"no image")
            trainer.task.task.job.train.read(0)
        return plain(step, slot)

    trainer.task.task.example = example
    with pytest.raises(ValueError, match=r"0\.png with .* cannot be read"):
        trainer.run()
    assert checkpoints.complete_steps(tmp_path / "run") == [4]


def test_another_encoder_is_refused_when_a_run_goes_on(overrides, whole, tmp_path):
    other = write_encoder(tmp_path / "other.safetensors", seed=1)
    run = shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(run / "checkpoints" / checkpoints.tag(10))
    with pytest.raises(ConfigError, match="head.encoder: "):
        start(overrides, f"head.encoder={other}")
    with pytest.raises(ConfigError, match=r"other weights \(SHA-256 [0-9a-f]{12}\) than the encoder that this head"):
        start(overrides, f"head.encoder={other}", "train.allow_config_change=true")


def test_a_head_starts_from_another_ones_weights(overrides, whole, tmp_path):
    trainer = start(overrides, f"head.weights={whole}")
    started = trainer.task.module.state_dict()
    saved = load_file(whole / HEAD)
    assert all(torch.equal(started[name], x) for name, x in saved.items())
    trainer.task.close()
    assert trainer.task.started_from == f"started from {whole}: 7 of 7 tensors"


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("head.kind=linear", "head.kind='linear'; choose one of linear_seg"),
        ("head.encoder=", "head.encoder is empty: give the frozen encoder"),
        ("train.compile=true", "head.kind=linear_seg trains a head: train.compile belongs to a distillation"),
        ("train.accumulation=0 +head.data.keep_tokens=true", "how many views are kept; give the number of parts"),
        ("optimizer.schedule=poly", "optimizer.schedule='poly'; choose one of dune, mast3r"),
        ("optimizer.cycle_beta=[0.9]", r"optimizer.cycle_beta=\[0.9\]; give two numbers"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_a_sentence(override, sentence):
    with pytest.raises(ConfigError, match=sentence):
        compose_config(["experiment=seg_ade20k", *override.split()])


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("+head.data.rooot=x", "head.data: .*rooot.* its fields are root, layout, size"),
        ("head.data.layout=coco", "head.data: layout='coco'; choose one of ade20k"),
        ("head.data.size=large", "head.data: Value 'large' .* could not be converted to Integer"),
        ("+head.loss.gradient=0.5", "the loss of linear_seg has no options"),
    ],
)  # fmt: skip
def test_options_of_a_task_are_checked(override, sentence):
    cfg = compose_config(["experiment=seg_ade20k", override])
    with pytest.raises(ConfigError, match=sentence):
        HeadTraining(cfg)


def test_check_says_what_is_missing_and_where_to_ask(encoder_file, squares, tmp_path, capsys):
    overrides = small(encoder_file, squares, tmp_path / "run")
    assert cli.main(["heads", "check", *overrides]) == 0
    assert "nothing is missing to train seg_ade20k" in capsys.readouterr().out
    assert cli.main(["heads", "check", "experiment=seg_ade20k", f"head.data.root={tmp_path}", "head.encoder=nope"]) == 1
    said = capsys.readouterr().out
    assert "fail  the encoder" in said and "head.encoder=nope" in said
    assert f"head.data.root={tmp_path}" in said and "sceneparsing.csail.mit.edu" in said
    data = shutil.copytree(squares, tmp_path / "data")
    (data / "labels" / "val" / "1.png").write_bytes(b"no image")
    assert cli.main(["heads", "check", *overrides, f"head.data.root={data}"]) == 1
    assert "warn" in (said := capsys.readouterr().out) and "1.png cannot be read" in said and "0.png" not in said
    with pytest.raises(ConfigError, match=r"data of head\.kind=linear_seg are incomplete: .*sceneparsing"):
        start([*overrides, "head.data.layout=ade20k"])
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_commands_tell_heads_from_students(encoder_file, squares, tmp_path, capsys):
    assert cli.main(["distill", *small(encoder_file, squares, tmp_path / "run")]) == 2
    assert "`dune-fast heads train` does that" in capsys.readouterr().err
    assert cli.main(["heads", "check", "experiment=tiny_cpu"]) == 2
    assert "so this is a distillation" in capsys.readouterr().err


def test_a_heads_run_is_no_encoder(whole):
    for load in (dune_fast.load_encoder, dune_fast.load_model):
        with pytest.raises(ConfigError, match="is the run of a linear_seg head, which dune_fast.load_head reads"):
            load(whole)
    with pytest.raises(ValueError, match="seg_ade20k trains a head"):
        plan_cli.plan(cli.build_parser().parse_args(["plan", "seg_ade20k"]))
