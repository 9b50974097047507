"""ZeRO 0 to 3 on one, two and four ranks: the reference trajectory, exact resume, elastic resume, skipped steps.

Ranks are processes that import torch and DeepSpeed, so every number of ranks is launched once for all checks.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bench.case import Case, relative_error
from bench.train_case import comparable_weights, load_train_state, train_case_student
from dune_fast.engine.deepspeed_engine import init_distributed
from tests.engine.conftest import ROOT, run_ranks, same_weights, small_run, timeless
from tests.engine.zero_worker import PARTS, STAGES, WHOLE, lamb, trainer

CASE = "train/train_hardest.safetensors"


def launch(processes: int, folder: Path, reference: Path, overrides: list[str]) -> None:
    quiet = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    run_ranks(processes, "tests/engine/zero_worker.py", str(folder), str(reference), *overrides, **quiet)


def kept_run(photos: Path) -> list[str]:
    """The small run, every teacher kept: the loss of a rank's batch then does not depend on the ranks.

    With an average of the weights and smaller images up to the step at which the interrupted runs are resumed.
    """
    without = ("deepspeed=", "output_dir=", "train.checkpoint_every=")  # the worker sets the first two
    return [
        *(text for text in small_run(photos, Path()) if not text.startswith(without)), "objective.drop_probability=0",
        "train.checkpoint_every=100", "logging.conflicts=false", "train.ema=0.9",
        "progressive=[{until:0.5,image_size:28}]",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def reference(request) -> Path:
    default = ROOT.parent / "shared" / "reference"
    return Path(os.environ.get("DUNE_REFERENCE_DIR", default)) / CASE


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory, photos, reference) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    launch(2, folder, reference, kept_run(photos))
    return folder


@pytest.fixture(scope="module")
def four_ranks(two_ranks, photos, reference) -> Path:
    launch(4, two_ranks, reference, kept_run(photos))
    return two_ranks


def check_trajectories(folder: Path, reference: Path, processes: int) -> None:
    if not reference.exists():
        pytest.skip(f"no reference case at {reference}: set DUNE_REFERENCE_DIR")
    case = Case(reference)
    start, _ = train_case_student(case)
    end, statistics = train_case_student(case)
    load_train_state(case, "final", end, statistics)
    start, end = comparable_weights(start), comparable_weights(end)
    weights = {}
    for stage in STAGES:
        found = load_file(folder / f"trajectory_{processes}_{stage}.safetensors")
        torch.testing.assert_close(found.pop("loss"), case["loss"], rtol=1e-5, atol=0)
        torch.testing.assert_close(found.pop("grad_norm_max"), case["grad_norm_max"], rtol=1e-4, atol=0)
        student, _ = train_case_student(case)
        student.load_state_dict(found)
        weights[stage] = comparable_weights(student)
        assert relative_error(weights[stage] - start, end - start) < 1e-4
    for stage in STAGES:
        assert relative_error(weights[stage], weights[0]) < 1e-5, stage


def test_two_ranks_train_as_the_reference_under_every_stage(two_ranks, reference):
    check_trajectories(two_ranks, reference, 2)


@pytest.mark.slow
def test_four_ranks_train_as_the_reference_under_every_stage(four_ranks, reference):
    check_trajectories(four_ranks, reference, 4)


def check_lamb(folder: Path, processes: int) -> None:
    init_distributed()
    one = lamb(0)
    for stage in STAGES:
        found = load_file(folder / f"lamb_{processes}_{stage}.safetensors")
        for name, value in one.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=f"{name} under stage {stage}")


def test_lamb_of_two_ranks_is_that_of_one_under_every_stage(two_ranks):
    check_lamb(two_ranks, 2)


@pytest.mark.slow
def test_lamb_of_four_ranks_is_that_of_one_under_every_stage(four_ranks):
    check_lamb(four_ranks, 4)


@pytest.mark.parametrize("stage", STAGES)
def test_a_resumed_run_of_two_ranks_is_bit_identical(two_ranks, stage):
    whole, parts = (two_ranks / f"{name}_{stage}" for name in (WHOLE, PARTS))
    assert timeless(parts) == timeless(whole)[3:]
    assert same_weights(parts, whole) and same_weights(parts, whole, "student_raw.safetensors")


@pytest.mark.parametrize("stage", STAGES[1:])
def test_the_average_of_the_weights_is_the_same_under_every_stage(two_ranks, stage):
    first, ours = two_ranks / f"{WHOLE}_0", two_ranks / f"{WHOLE}_{stage}"
    same_to_rounding(ours, first, 0)
    assert not same_weights(ours, ours, "student_raw.safetensors", "student.safetensors")


def same_to_rounding(run: Path, whole: Path, after: int = 3) -> None:
    for ours, theirs in zip(timeless(run), timeless(whole)[after:], strict=True):
        for key in theirs:
            assert ours[key] == pytest.approx(theirs[key], rel=1e-5), (ours["step"], key)
    weights, expected = (load_file(folder / "student.safetensors") for folder in (run, whole))
    for key, value in expected.items():
        if not key.endswith("attn.qkv.bias"):  # a key's bias follows rounding, see bench.train_case
            assert relative_error(weights[key], value) < 1e-5, key


@pytest.mark.parametrize("stage", STAGES)
def test_one_rank_goes_on_from_two_under_another_stage(two_ranks, tmp_path, photos, stage):
    shutil.copytree(two_ranks / f"half_{stage}", tmp_path / "run")
    resumed = trainer(kept_run(photos), tmp_path / "run", (stage + 1) % 4)
    assert resumed.step == 3
    resumed.run()
    same_to_rounding(tmp_path / "run", two_ranks / f"{WHOLE}_{stage}")


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "then"), [(1, 3), (3, 2)])
def test_four_ranks_go_on_from_two_under_another_stage(four_ranks, stage, then):
    same_to_rounding(four_ranks / f"from_{stage}_to_{then}_4", four_ranks / f"{WHOLE}_{stage}")


def test_a_step_that_is_not_finite_on_one_rank_is_skipped_on_all(two_ranks):
    for rank in (0, 1):
        changed = json.loads((two_ranks / f"skipped_{rank}.json").read_text())
        assert changed == {str(stage): False for stage in STAGES}


def test_a_changed_configuration_is_refused_by_every_rank(two_ranks):
    for rank in (0, 1):
        assert "train.seed: 0 -> 3" in (two_ranks / f"refused_{rank}.txt").read_text()
