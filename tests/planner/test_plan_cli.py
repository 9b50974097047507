"""`dune-fast plan` for a machine: text, JSON, calibration, mistakes."""

from __future__ import annotations

import json

import pytest

from dune_fast import cli
from dune_fast.engine.config import compose_config
from dune_fast.engine.flops import run_flops
from dune_fast.planner.budget import longest
from dune_fast.planner.calibrate import calibrate
from dune_fast.planner.numbers import Number

HOW = ("counted", "measured", "given", "estimated")


def told(capsys, *arguments: str) -> str:
    assert cli.main(["plan", *arguments]) == 0
    return capsys.readouterr().out


def numbers(values) -> list[dict]:
    """All numbers with a unit, anywhere."""
    if isinstance(values, dict):
        own = [values] if values.keys() == {"value", "unit", "how"} else []
        return own + [n for entry in values.values() for n in numbers(entry)]
    return [n for entry in values for n in numbers(entry)] if isinstance(values, list) else []


def test_what_two_4090_can_do(capsys):
    text = told(capsys, "dune_336", "--gpu", "rtx4090", "--gpus", "2", "--hours", "72", "--disk", "2TB")
    for part in (
        "2 x rtx4090, 24 GiB", "165.2 TFLOP/s in dense bf16", "Ada GPU Architecture", "at most 72 h (given)",
        "dune-fast distill -n 2 experiment=dune_336 train.images=", "MB/s (estimated)", "kWh at most", "FP8 teachers",
        "smaller student", "start:", "progressive:", "cached:", "not known",
    ):  # fmt: skip
        assert part in text, part


def test_json_says_how_every_number_is_known(capsys):
    (plan,) = json.loads(told(capsys, "demo", "--tflops", "50", "--gpu-memory", "24", "--hours", "2", "--json"))
    found = numbers(plan)
    assert len(found) > 20 and all(n["how"].startswith(HOW) for n in found)
    assert plan["plans"][0]["command"].startswith("dune-fast distill -n 1 experiment=demo")
    assert plan["plans"][0]["numbers"]["hours"]["how"] == "estimated from the given rate"


def test_overrides_go_into_the_command(capsys):
    text = told(capsys, "dune_336", "train.global_batch=256", "--gpu", "h100", "--hours", "1")
    assert "experiment=dune_336 train.global_batch=256 train.images=" in text


def test_many_machines(capsys):
    text = told(capsys, "dune_336", "--gpu", "h100", "--nodes", "1..32", "--storage", "3000", "--cores", "64")
    rows = [line.split() for line in text.splitlines() if line.split() and line.split()[0].isdigit()]
    table = [row for row in rows if "x" not in row[1]]
    assert [row[:2] for row in table] == [[str(n), str(8 * n)] for n in (1, 2, 4, 8, 16, 32)]
    assert "network 100 Gbit/s" in text and table[0][-1] == "compute" and table[-1][-1] == "gradients"
    rows = json.loads(told(capsys, "dune_336", "--gpu", "h100", "--nodes", "2", "--json"))[0]["nodes"]
    assert rows[0]["gpus"] == 16 and rows[0]["how"] == "estimated"


SMALL = [
    "+teachers@teachers.one=dinov2_vits14", "student=vit_tiny14", "student.depth=2", "image_size=56",
    "train.global_batch=4", "train.steps=100", "train.precision=fp32",
]  # fmt: skip


def test_a_calibration_takes_the_place_of_the_assumption():
    """On this machine's processor: the rate is measured, what follows from it says so. No weights file is needed."""
    cfg = compose_config(SMALL)
    found = calibrate(cfg, 2)
    assert found.micro_batch == 4 and found.steps == 2 and found.seconds > 0
    assert found.tflops == pytest.approx(run_flops(cfg).training * 4 / found.seconds / 1e12)
    machine = found.machine(2)
    assert machine.tflops.how == "measured" and machine.how == "estimated from the measured rate"
    assert machine.name == found.device and machine.gpus == 2
    plan = longest(cfg, "small", [], found.machine(1), 1e3)
    assert plan.numbers["speed"].value == pytest.approx(4 / found.seconds)
    own = calibrate(compose_config([*SMALL, "data.views=1", "cache.folder=x", "standardization.convention=fixed"]), 2)
    assert own.tflops * own.seconds == pytest.approx(found.tflops * found.seconds)  # of the step with its teacher


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gpu", "rtx9090"], "rtx4090"),
        (["--hours", "72"], "which GPU?"),
        (["--gpu", "h100", "--hours", "0"], "--hours is 0"),
        (["--gpu", "h100", "--disk", "much"], "e.g. 2TB"),
        (["--gpu", "h100", "--images", "0"], "--images is 0"),
        (["--gpu", "h100", "--nodes", "x"], "--nodes x"),
        (["--gpu", "h100", "--calibrate"], "leave --gpu"),
        (["--gpu", "h100", "--gpu-memory", "-1"], "--gpu-memory is -1"),
        (["--json"], "--gpu NAME"),
    ],
)
def test_mistakes_are_explained(arguments, words, capsys):
    assert cli.main(["plan", "dune_336", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_numbers_are_readable():
    assert str(Number(21147648, "images", "estimated")) == "21,147,648 images (estimated)"
    assert str(Number(0.01234, "h", "measured")) == "0.0123 h (measured)"
