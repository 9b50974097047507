"""What `dune-fast plan` says, and that its hours come from measurements or from the user alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dune_fast import cli
from dune_fast import plan as plan_module
from dune_fast.engine.config import compose_config
from dune_fast.engine.flops import run_flops
from dune_fast.engine.memory import memory_bytes, trained_parameters
from dune_fast.plan import describe, measured_rates


@pytest.fixture(scope="module")
def dune():
    return compose_config(["experiment=dune_336"])


def results(folder: Path, device: str, experiments: dict) -> Path:
    (folder / device).mkdir(parents=True)
    (folder / device / "step.json").write_text(json.dumps({"device": device, "experiments": experiments}))
    return folder


def line(images_per_second: float, tflops: float | None) -> dict:
    return {"images_per_second": images_per_second, "tflops": tflops, "batch": 128}


def test_length_arithmetic_and_memory_of_dune(dune, tmp_path):
    text = "\n".join(describe(dune, "dune_336", [1, 8], results=tmp_path))
    for part in ("125,114 steps", "1.574", "202 EFLOP", "86.0 M", "23.6 M", "no measured rate", "--tflops"):
        assert part in text
    assert "GPU-hours" not in text


@pytest.mark.parametrize(
    ("stage", "weights", "gradients", "moments"), [(0, 1, 1, 1), (1, 1, 1, 8), (2, 1, 8, 8), (3, 8, 8, 8)]
)
def test_memory_by_zero_stage(dune, stage, weights, gradients, moments):
    cfg = compose_config(["experiment=dune_336", f"deepspeed.zero_stage={stage}"])
    count = sum(trained_parameters(cfg))
    memory = memory_bytes(cfg, 8)
    assert memory["weights"] == 4 * count // weights
    assert memory["gradients"] == 4 * count // gradients
    assert memory["AdamW's moments"] == 8 * count // moments


def test_memory_of_teachers_by_precision(dune):
    three = 3 * 304e6  # ViT-L encoders
    assert memory_bytes(dune, 1)["teachers"] == pytest.approx(2 * three, rel=0.01)
    assert memory_bytes(dune, 1, low_precision=False)["teachers"] == pytest.approx(4 * three, rel=0.01)
    mixed = compose_config(["experiment=dune_336", "teachers.mast3r_vitlarge_16.precision=fp8"])
    assert memory_bytes(mixed, 1)["teachers"] == pytest.approx(5 / 3 * three, rel=0.01)


def test_a_measured_experiment_counts_as_it_is(dune, tmp_path):
    folder = results(tmp_path, "NVIDIA H100", {"dune_336": {"ours": line(250.0, 393.5), "eager": line(90.0, 141.0)}})
    (rate,) = measured_rates(dune, "dune_336", run_flops(dune), folder)
    assert (rate.device, rate.images_per_second) == ("NVIDIA H100", 250.0)
    text = "\n".join(describe(dune, "dune_336", [1, 8], results=folder))
    hours = 128_116_736 / 250 / 3600
    assert f"{hours:,.0f} GPU-hours" in text and "communication is not counted" in text


def test_another_experiment_is_taken_by_its_arithmetic(tmp_path):
    cfg = compose_config(["experiment=dune_448"])
    folder = results(
        tmp_path, "NVIDIA H100", {"dune_336": {"ours": line(250.0, 393.5)}, "unic": {"ours": line(900.0, 297.0)}}
    )
    (rate,) = measured_rates(cfg, "dune_448", run_flops(cfg), folder)
    assert rate.images_per_second == pytest.approx(393.5 / 2.992, rel=1e-3) and "dune_336" in rate.evidence


def test_only_what_runs_as_configured_counts(tmp_path):
    folder = results(
        tmp_path, "NVIDIA H100", {"dune_336": {"eager": line(90.0, 141.0), "ours+fp8": line(300.0, 470.0)}}
    )
    plain = compose_config(["experiment=dune_336"])
    assert measured_rates(plain, "dune_336", run_flops(plain), folder) == []
    low = compose_config(["experiment=dune_336", "teachers.mast3r_vitlarge_16.precision=fp8"])
    assert [r.images_per_second for r in measured_rates(low, "dune_336", run_flops(low), folder)] == [300.0]


def test_a_result_that_cannot_be_read_is_left_out(dune, tmp_path, caplog):
    results(tmp_path, "A", {"dune_336": {"ours": {"tflops": 1.0}}})
    (tmp_path / "B").mkdir()
    (tmp_path / "B" / "step.json").write_text("{")
    assert measured_rates(dune, "dune_336", run_flops(dune), tmp_path) == []
    assert caplog.text.count("left out") == 2


def test_the_command(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(plan_module, "default_results", lambda: tmp_path)
    assert cli.main(["plan", "dune_336", "dune_448", "train.global_batch=256", "--gpus", "2", "--tflops", "500"]) == 0
    out = capsys.readouterr().out
    assert "dune_448:" in out and "images at 448 px" in out and "steps of 256" in out
    hours = 1.574e12 * 128_116_700 / 500e12 / 3600
    assert f"{hours:,.0f} GPU-hours" in out and "at 500 TFLOP/s, as given" in out and "2 GPUs" in out


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


def test_parts_are_worked_out_for_gpus_of_several_sizes(tmp_path):
    one = compose_config(["experiment=dune_1gpu"])
    text = "\n".join(describe(one, "dune_1gpu", [1, 3], results=tmp_path))
    for part in (
        "50,046 steps of 256", "warm-up to 0.0003 over 10,009 steps, cosine to 1e-06", "worked out, 15% spare",
        "in 4 parts of 64", "of 40 GiB", "in 2 parts of 128", "of 80 GiB",
    ):  # fmt: skip
        assert part in text, part
    assert text.count("cannot be shared by 3 GPUs") == 1


def test_parts_that_are_given_are_looked_at(dune, tmp_path):
    lines = describe(dune, "dune_336", [1], results=tmp_path)
    (text,) = [line for line in lines if "does not fit" in line]
    assert "at once" in text
    (cure,) = [line for line in lines if "instead" in line]
    assert "in 8 parts" in cure or "in 16 parts" in cure
    assert "`dune-fast distill -n 1 experiment=dune_336 train.accumulation=0`" in cure
    half = compose_config(["experiment=dune_336", "train.accumulation=2"])
    text = "\n".join(describe(half, "dune_336", [8, 3], results=tmp_path))
    assert "in 2 parts of 64" in text and "cannot be shared by 3 GPUs x train.accumulation=2" in text
