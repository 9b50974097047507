"""What a user types, in processes of their own: launcher, several ranks, error messages, exit codes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dune_fast.engine.config import compose_config
from dune_fast.engine.metrics import read_metrics
from dune_fast.engine.trainer import Trainer
from dune_fast.evaluate.in_run import InRunEvaluation
from tests.engine.conftest import ROOT


def run(*command: str) -> subprocess.CompletedProcess:
    """Runs a command as from a fresh shell, with both output streams in `stdout`."""
    ours = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "TRITON_INTERPRET")
    environment = {key: value for key, value in os.environ.items() if key not in ours}
    return subprocess.run(
        command, cwd=ROOT, env=environment, text=True, timeout=300, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def cli(*arguments: str) -> subprocess.CompletedProcess:
    return run(sys.executable, "-m", "dune_fast.cli", *arguments)


def test_two_processes_give_the_losses_of_one(overrides, tmp_path):
    """With every teacher on every image, the mean of two ranks' losses is that of the whole batch."""
    common = [*overrides, "objective.drop_probability=0", "evaluation.held_out=false"]
    common += ["evaluation.every=4", "evaluation.batch=1", "data.datasets.images.holdout=3"]  # ranks get 2 and 1
    cfg = compose_config([*common, f"output_dir={tmp_path / 'one'}"])
    with InRunEvaluation(cfg) as evaluate:
        Trainer(cfg, evaluate).run()
    result = cli("distill", "-n", "2", *common, "deepspeed=zero1", f"output_dir={tmp_path / 'two'}")
    assert result.returncode == 0, result.stdout
    alone, two = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    assert len(alone) == len(two) == 6 + 2
    for one, both in zip(alone, two, strict=True):
        for key in one:
            if key.startswith(("loss", "share", "gradient_norm", "held_out")) or key in ("lr", "ema_momentum"):
                assert both[key] == pytest.approx(one[key], rel=1e-5), (one["step"], key)
    assert [record["step"] for record in two if record.get("held_out_images") == 3] == [4, 6]


def test_the_deepspeed_launcher_starts_the_script(overrides, tmp_path):
    launcher = Path(sys.executable).with_name("deepspeed")
    result = run(str(launcher), "--num_accelerators", "1", "dune_fast/train.py", *overrides)
    assert result.returncode == 0, result.stdout
    assert (tmp_path / "run" / "encoder.safetensors").exists() and "before" in result.stdout


def test_a_mistake_that_shows_late_gives_a_sentence_and_no_traceback_of_ours(overrides, tmp_path):
    result = cli("distill", "-n", "1", *overrides, "teachers.one.weights=/nowhere/w.safetensors")
    assert result.returncode != 0
    assert "there is no weights file /nowhere/w.safetensors" in result.stdout
    assert "Traceback" not in result.stdout and "launch.py" not in result.stdout  # Regression: the launcher's own line


def test_a_process_that_a_signal_ended_is_said(overrides, monkeypatch, tmp_path):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal\nif os.environ.get('LOCAL_RANK') == '0': os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    result = cli("distill", "-n", "1", *overrides)
    assert result.returncode != 0 and "a process of the run was ended by SIGKILL: often" in result.stdout
    assert "launch.py" not in result.stdout
