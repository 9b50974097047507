"""The fault bench: it tells survived from lost, its faults are real, and one small round of it."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bench import faults
from bench.fault_runs import STEPS, Bench, Lost, Started, last_step, newest
from dune_fast.engine import checkpoints


@pytest.fixture
def bench(tmp_path) -> Bench:
    return Bench(tmp_path / "faults", random.Random(0))


def finished_run(folder: Path) -> Path:
    folder.mkdir(parents=True)
    save_file({"a": torch.arange(6.0), "b": torch.ones(2, 3)}, folder / "student.safetensors")
    records = [{"step": step, "loss": 1 / step} for step in range(1, 6)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def sleeper(folder: Path, *command: str) -> Started:
    log = folder / "log"
    command = command or ("sleep", "60")
    with log.open("w") as file:
        return Started([subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)], [log])


def test_equal_runs_have_survived_and_one_other_bit_of_the_weights_is_lost(bench, tmp_path):
    bench.whole["shards", 1] = finished_run(tmp_path / "whole")
    run = finished_run(tmp_path / "run")
    bench.compare(run, 1)
    tensors = load_file(run / "student.safetensors")
    tensors["a"][3] = torch.nextafter(tensors["a"][3], torch.tensor(9.0))
    save_file(tensors, run / "student.safetensors")
    with pytest.raises(Lost, match="1 of 2 tensors differ"):
        bench.compare(run, 1)


@pytest.mark.parametrize("kept", ["0134", "012234", "01233"], ids=["missing", "doubled", "other"])
def test_records_that_are_missing_doubled_or_other_are_lost(bench, tmp_path, kept):
    bench.whole["shards", 1] = finished_run(tmp_path / "whole")
    run = finished_run(tmp_path / "run")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join(lines[int(number)] for number in kept))
    with pytest.raises(Lost, match="records differ"):
        bench.compare(run, 1)


def test_a_run_that_does_not_end_or_ends_too_early_is_lost(tmp_path):
    started = sleeper(tmp_path)
    with pytest.raises(Lost, match="did not end"):
        started.wait(0.2)
    assert not started.alive()
    with pytest.raises(Lost, match="did not reach step 3"):
        Bench.wait_until(sleeper(tmp_path, "true"), lambda: False, "step 3")


def test_a_full_disk_refuses_large_files_and_is_freed(tmp_path):
    """The child writes a file of a megabyte again and again, and says how it went."""
    script = tmp_path / "writes.py"
    script.write_text(
        "import sys, time\n"
        "while True:\n"
        "    try:\n"
        "        open(sys.argv[1], 'wb').write(b'x' * 2**20)\n"
        "        print('written', flush=True)\n"
        "    except OSError as error:\n"
        "        print('refused', error.errno, flush=True)\n"
        "    time.sleep(0.02)\n"
    )
    started = sleeper(tmp_path, sys.executable, str(script), str(tmp_path / "big"))

    def soon(word: str) -> None:
        end = time.monotonic() + 20
        before = len(started.text())
        while word not in started.text()[before:]:
            assert time.monotonic() < end, started.text()
            time.sleep(0.02)

    soon("written")
    with faults.full_disk(started):
        soon("refused")
    soon("written")
    started.kill()


@pytest.mark.parametrize("spoil", [faults.flip_bit, faults.cut_short, faults.lose_manifest])
def test_damage_is_damage(tmp_path, spoil):
    (tmp_path / "rank_00000.safetensors").write_bytes(bytes(range(100)))
    (tmp_path / "manifest.json").write_text("{}")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    spoil(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} != before


def test_a_fault_that_is_not_survived_gives_exit_status_1(monkeypatch, capsys, tmp_path):
    def lose(bench, run):
        raise Lost("everything gone")

    monkeypatch.setattr(faults, "faults", lambda kills: [faults.Fault("storm", lose)])
    assert faults.main(["--keep", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "LOST" in out and "everything gone" in out and "0 of 1 survived" in out


def test_an_unknown_fault_is_explained(capsys):
    with pytest.raises(SystemExit):
        faults.main(["--only", "meteor"])
    assert "SIGTERM" in capsys.readouterr().err


@pytest.mark.slow
def test_a_killed_run_whose_newest_checkpoint_is_damaged_ends_as_if_nothing_had_happened(bench):
    run = bench.work / "run"
    started = bench.start(run, 1)
    bench.wait_until(started, lambda: len(checkpoints.complete_steps(run)) > 1, "two checkpoints")
    started.kill()
    reached = last_step(run)
    assert reached < STEPS
    damaged = newest(run)
    faults.flip_bit(checkpoints.folder(run) / checkpoints.tag(damaged))
    again = bench.finish(run, 1)
    assert "is broken" in again.text() and f"going on from step {damaged - 5} " in again.text()
    bench.compare(run, 1)
    shutil.rmtree(bench.work)
