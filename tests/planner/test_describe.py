"""What `dune-fast plan` says of a run, and that its hours come from the rate that the user gives."""

from __future__ import annotations

import pytest

from dune_fast import cli
from dune_fast.engine.config import compose_config
from dune_fast.planner.describe import describe


def test_length_arithmetic_and_memory_of_dune():
    text = "\n".join(describe(compose_config(["experiment=dune_336"]), "dune_336", [1, 8]))
    for part in ("125,114 steps", "1.574", "202 EFLOP", "86.0 M", "23.6 M", "hours: give --tflops X"):
        assert part in text
    assert "GPU-hours" not in text


def test_the_command(capsys):
    assert cli.main(["plan", "dune_336", "dune_448", "train.global_batch=256", "--gpus", "2", "--tflops", "500"]) == 0
    out = capsys.readouterr().out
    assert "dune_448:" in out and "images at 448 px" in out and "steps of 256" in out
    hours = 1.574e12 * 128_116_700 / 500e12 / 3600
    assert f"{hours:,.0f} GPU-hours" in out and "at 500 TFLOP/s, as given" in out and "2 GPUs" in out
    assert "communication is not counted" in out


def test_an_experiment_may_be_named_as_in_other_commands(capsys):
    assert cli.main(["plan", "demo", "experiment=tiny_cpu"]) == 0
    out = capsys.readouterr().out
    assert "demo: 160 steps of 16 images at 112 px" in out and "tiny_cpu: 40 steps of 16 images at 56 px" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train.steps=3"], "name an experiment"),
        (["dune_336", "--tflops", "-1"], "--tflops is -1"),
        (["dune_336", "--gpus", "0"], "--gpus is 0"),
        (["dune_363"], "dune_336"),
    ],
)
def test_mistakes_are_explained(arguments, words, capsys):
    assert cli.main(["plan", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_parts_are_worked_out_for_gpus_of_several_sizes():
    text = "\n".join(describe(compose_config(["experiment=dune_1gpu"]), "dune_1gpu", [1, 3]))
    for part in (
        "50,046 steps of 256", "warm-up to 0.0003 over 10,009 steps, cosine to 1e-06", "worked out, 15% spare",
        "in 4 parts of 64", "of 40 GiB", "in 2 parts of 128", "of 80 GiB",
    ):  # fmt: skip
        assert part in text, part
    assert text.count("cannot be shared by 3 GPUs") == 1


def test_a_schedule_that_stays_at_its_peak():
    cfg = compose_config(["experiment=demo", "optimizer.schedule=constant"])
    assert any(line.endswith("over 32 steps, then constant") for line in describe(cfg, "demo", [1]))


def test_parts_that_are_given_are_looked_at():
    lines = describe(compose_config(["experiment=dune_336"]), "dune_336", [1])
    (text,) = [line for line in lines if "does not fit" in line]
    assert "at once" in text
    (cure,) = [line for line in lines if "instead" in line]
    assert "in 8 parts" in cure or "in 16 parts" in cure
    assert "`dune-fast distill -n 1 experiment=dune_336 train.accumulation=0`" in cure
    half = compose_config(["experiment=dune_336", "train.accumulation=2"])
    text = "\n".join(describe(half, "dune_336", [8, 3]))
    assert "in 2 parts of 64" in text and "cannot be shared by 3 GPUs x train.accumulation=2" in text
