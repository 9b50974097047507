"""Records, rates, the estimate, and where a run says it came from."""

from __future__ import annotations

import importlib.metadata
import io
import json
import logging
import subprocess
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from dune_fast.engine import metrics as metrics_module
from dune_fast.engine.deepspeed_engine import init_distributed
from dune_fast.engine.metrics import MetricsLog, Workload, read_metrics
from dune_fast.engine.provenance import RunRecord, git_state, versions, world
from tests.engine.conftest import full_disk, train

CPU = torch.device("cpu")
WORK = Workload(global_batch=64, world_size=4, device=CPU, flops=10**12, peak_tflops=20.0)


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    """Stands for the module `time` in dune_fast.engine.metrics."""
    fake = SimpleNamespace(now=100.0, perf_counter=lambda: fake.now)
    monkeypatch.setattr(metrics_module, "time", fake)
    return fake


def test_rates_of_a_record_and_its_line_without_a_terminal(tmp_path, clock, caplog):
    with caplog.at_level(logging.INFO):
        log = MetricsLog(tmp_path, 0, 100, WORK)
        clock.now += 20
        log.write(10, {"loss": 1.25}, wait_seconds=5.0)
        log.close()
    shown = ("step 10 of 100", "loss 1.2500", "32.0 images/s", "2000 ms", "wait 25 %", "MFU 40.0 %", "GiB", "3m 00s")
    assert all(part in caplog.text for part in shown)
    (record,) = read_metrics(tmp_path / "metrics.jsonl")
    assert record["images_per_second"] == pytest.approx(32)  # 640 images in 20 s
    assert record["step_seconds"] == pytest.approx(2)
    assert record["data_wait_share"] == pytest.approx(0.25)
    assert record["teraflops_per_second"] == pytest.approx(8)  # 32 TFLOP/s over four devices
    assert record["mfu"] == pytest.approx(0.4)
    assert record["hours_left"] == pytest.approx(90 * 2 / 3600)
    assert 0.05 < record["memory_gib"] < 24


def test_the_time_of_an_evaluation_is_not_the_steps(tmp_path, clock, caplog):
    found = []
    log = MetricsLog(tmp_path, 0, 10, WORK, on_estimate=found.append)
    for step in range(1, 11):
        clock.now += 2
        log.advance(step)
        if step in (3, 5):
            clock.now += 300
            with caplog.at_level(logging.INFO):
                log.write_evaluation(step, {"held_out/a": 0.5, "held_out/a/x": 0.5, "knn/y": 0.25}, 300.0)
    log.write(10, {"loss": 1.0}, 0.0)
    log.close()
    first, second, training = read_metrics(tmp_path / "metrics.jsonl")
    assert first["held_out/a/x"] == 0.5 and (first["step"], second["step"]) == (3, 5)
    assert training["images_per_second"] == pytest.approx(32) and found[0]["step_seconds"] == pytest.approx(2)
    assert "evaluation after step 3  held-out loss a 0.5000  k-NN y 25.0 %  (5m 00s)" in caplog.text


def test_the_time_that_is_left_counts_the_evaluations_to_come(tmp_path, clock):
    found = []
    log = MetricsLog(tmp_path, 0, 100, WORK, on_estimate=found.append, evaluation_every=30)
    for step in range(1, 31):
        clock.now += 2
        log.advance(step)
    clock.now += 300
    log.write_evaluation(30, {}, 300.0)  # of four: at 30, 60, 90 and 100
    clock.now += 2
    log.write(31, {"loss": 1.0}, 0.0)
    log.close()
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["hours_left"] == pytest.approx((69 * 62 / 31 + 3 * 300) / 3600)
    assert [estimate["hours"] for estimate in found] == pytest.approx([200 / 3600, (200 + 4 * 300) / 3600])


def test_an_unknown_device_has_no_mfu_and_an_unknown_teacher_no_flops():
    assert "mfu" not in Workload(64, 4, CPU, 10**12, None).rates(32.0)
    assert Workload(64, 4, CPU, None, 20.0).rates(32.0) == {}


@pytest.mark.parametrize(("total", "first", "after"), [(10_000, 0, 50), (200, 0, 10), (40, 0, 5), (10_000, 9_000, 50)])
def test_the_estimate_comes_once_and_leaves_the_first_step_out(tmp_path, clock, caplog, total, first, after):
    found = []
    log = MetricsLog(tmp_path, first, total, WORK, on_estimate=found.append)
    with caplog.at_level(logging.INFO):
        clock.now += 500  # the first step compiles
        log.advance(first + 1)
        for step in range(first + 2, min(first + 200, total) + 1):
            clock.now += 3
            log.advance(step)
            if step < first + 1 + after:
                assert not found
    log.close()
    (estimate,) = found
    assert estimate["after_steps"] == after
    assert estimate["images_per_second"] == pytest.approx(WORK.global_batch / 3)
    assert estimate["hours"] == pytest.approx(3 * total / 3600)
    assert estimate["device_hours"] == pytest.approx(4 * 3 * total / 3600)
    assert caplog.text.count("estimate after") == 1 and "process-hours" in caplog.text
    assert f"{WORK.global_batch / 3:.1f} images/s" in caplog.text and f"({3 * total / 3600:.3g} hours" in caplog.text


def test_a_terminal_gets_a_bar_and_a_line_of_numbers(tmp_path, clock, monkeypatch, caplog):
    """On 80 columns nothing of either is cut off."""
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=80, color_system=None)
    monkeypatch.setattr(metrics_module, "Console", lambda stderr: console)
    with caplog.at_level(logging.INFO):
        log = MetricsLog(tmp_path, 0, 125_000, WORK)
        clock.now += 20
        log.write(12_500, {"loss": 1.25}, 5.0)
        log.close()
    shown = " ".join(screen.getvalue().split())
    for part in ("step 12500/125000", "loss 1.2500", "MFU 50000.0 %", "left"):
        assert part in shown, shown
    assert "loss" not in caplog.text


def test_a_log_that_goes_on_drops_what_is_repeated(tmp_path):
    lines = [{"step": step, "loss": 1.0} for step in (1, 5, 10)]
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 12, "lo'
    (tmp_path / "metrics.jsonl").write_text(text)
    log = MetricsLog(tmp_path, 5, 20, WORK)
    log.write(10, {"loss": 2.0}, 0.0)
    log.close()
    assert [(r["step"], r["loss"]) for r in read_metrics(tmp_path / "metrics.jsonl")] == [(1, 1.0), (5, 1.0), (10, 2.0)]


def test_records_that_a_full_disk_refuses_are_written_when_it_has_room(tmp_path, caplog):
    log = MetricsLog(tmp_path, 0, 300, WORK)
    with caplog.at_level(logging.INFO):
        log.write(1, {"loss": 1.0}, 0.0)
        with full_disk((tmp_path / "metrics.jsonl").stat().st_size + 20):  # a part of a line still fits
            for step in range(2, 100):
                log.write(step, {"loss": 1 / step}, 0.0)
            assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [1]
        log.write(100, {"loss": 0.5}, 0.0)
        log.close()
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == list(range(1, 101))
    assert caplog.text.count("wait in memory") == 1 and "can be written again" in caplog.text


def test_every_start_of_a_run_is_on_record(overrides, tmp_path):
    for _ in range(2):
        train(overrides, "train.steps=8")
    starts = json.loads((tmp_path / "run" / "run.json").read_text())["starts"]
    assert [start["step"] for start in starts] == [0, 8]
    first = starts[0]
    assert first["versions"]["torch"] == importlib.metadata.version("torch")
    assert {"python", "deepspeed"} <= first["versions"].keys()
    assert first["world"]["ranks"] == 1 and list(first["world"]["hosts"].values()) == [["cpu"]]
    assert first["estimate"]["hours"] > 0 and "estimate" not in starts[1]
    for record in read_metrics(tmp_path / "run" / "metrics.jsonl"):
        kept = [record["kept/one"], record["kept/two"]]
        assert max(kept) <= 1 <= sum(kept)  # every image keeps its hardest teacher
        assert record["share/one"] == pytest.approx(kept[0] / sum(kept))
        assert 0 < record["gradient_norm/mean"] < record["gradient_norm/max"] <= record["gradient_norm/global"]


def test_a_damaged_record_of_starts_is_written_anew(tmp_path, caplog):
    (tmp_path / "run.json").write_text('{"starts": [')
    init_distributed()
    RunRecord(tmp_path).start(3, 10, world(CPU))
    assert "cannot be read" in caplog.text
    assert [start["step"] for start in json.loads((tmp_path / "run.json").read_text())["starts"]] == [3]


def test_git_state_names_commit_and_changed_files(tmp_path):
    assert git_state(tmp_path) is None

    def git(*arguments: str) -> str:
        identity = ("-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false")
        return subprocess.check_output(["git", *identity, *arguments], cwd=tmp_path, text=True).strip()

    git("init", "-q", "-b", "trunk")
    (tmp_path / "a.txt").write_text("one")
    git("add", "a.txt")
    git("commit", "-q", "-m", "first")
    assert git_state(tmp_path) == {"commit": git("rev-parse", "HEAD"), "branch": "trunk", "changed": []}
    (tmp_path / "a.txt").write_text("two")
    assert git_state(tmp_path)["changed"] == ["a.txt"]
    assert versions()["numpy"]
