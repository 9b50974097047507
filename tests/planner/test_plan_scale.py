"""Bytes of a step: the formulas against what two processes send over a limited link, and what becomes the limit."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dune_fast.engine.config import compose_config
from dune_fast.engine.gradient_average import FEWEST, LARGEST
from dune_fast.engine.memory import trained_parameters
from dune_fast.planner.budget import image_flops
from dune_fast.planner.scale import (
    Cluster,
    bytes_of_stage,
    exposed_seconds,
    node_counts,
    overlapped,
    scaled,
    sent_bytes,
    statistics_bytes,
)

ROOT = Path(__file__).resolve().parents[2]
LINK = "1gbit"
CASES = [
    (0, 1, "fp32"), (0, 2, "fp32"), (0, 1, "bf16"), (1, 1, "fp32"), (1, 2, "fp32"), (1, 1, "bf16"), (2, 1, "fp32"),
    (2, 2, "fp32"), (3, 1, "fp32"), (3, 2, "fp32"),
]  # fmt: skip
SCRIPT = f"""
PATH=$PATH:/usr/sbin:/sbin
ip link set lo up && tc qdisc replace dev lo root tbf rate {LINK} burst 256kb latency 50ms || exit 77
RANK=1 LOCAL_RANK=1 "$@" & other=$!
RANK=0 LOCAL_RANK=0 "$@" && wait $other
"""


def dune(*overrides: str):
    return compose_config(["experiment=dune_336", *overrides])


def cluster(**changes) -> Cluster:
    """Eight GPUs of 386 TFLOP/s a node."""
    values = {
        "gpus": 8, "tflops": 386.0, "inside": 225e9, "between": 12.5e9, "storage": None, "cores": None,
        "image_bytes": 110e3, "decode_seconds": 0.0139,
    }  # fmt: skip
    return Cluster(**values | changes)


def rows(cfg, counts=(1, 2, 4, 8, 16, 32), **changes):
    return [scaled(cfg, cluster(**changes), image_flops(cfg), count) for count in counts]


@pytest.mark.slow  # two processes with DeepSpeed, ten engines, half a minute
def test_two_processes_send_what_the_formulas_say(tmp_path):
    """In a network of their own, in which nothing else sends; the link is slow enough to be what a step waits for."""
    if sys.platform != "linux" or os.geteuid() != 0 or not shutil.which("unshare"):
        pytest.skip("a network of its own needs Linux, root and unshare")
    kept = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    kept |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29555", "PYTHONPATH": str(ROOT)}
    kept |= {"OMP_NUM_THREADS": "1"}
    worker = [sys.executable, str(ROOT / "tests/planner/link_worker.py"), str(tmp_path / "found"), json.dumps(CASES)]
    command = ["unshare", "--net", "--pid", "--fork", "--kill-child", "bash", "-c", SCRIPT, "bash", *worker]
    done = subprocess.run(command, env=kept, capture_output=True, text=True, timeout=300)
    if done.returncode in (1, 77) and ("not permitted" in done.stderr or done.returncode == 77):
        pytest.skip(f"no network of its own here: {done.stderr.strip()[-200:]}")
    assert done.returncode == 0, done.stderr[-3000:]
    for case in json.loads((tmp_path / "found").read_text()):
        size = 2 if case["dtype"] == "bf16" else 4
        told = bytes_of_stage(case["stage"], 2, case["parameters"], size, case["parts"])
        assert case["bytes"] == pytest.approx(2 * told, rel=0.01), case  # lo carries what both ranks send
        if case["stage"]:
            assert case["seconds"] > 0.9 * case["bytes"] / (1e9 / 8), case  # nothing hides


@pytest.mark.parametrize(("stage", "dtype", "parts"), [(0, "fp32", 1), (1, "bf16", 4), (2, "fp32", 4), (3, "fp32", 4)])
def test_a_run_sends_its_stages_bytes(stage, dtype, parts):
    cfg = dune(
        f"deepspeed=zero{stage}", f"deepspeed.gradient_dtype={dtype}", f"train.accumulation={parts}"
    )
    count = sum(trained_parameters(cfg))
    gradients, weights = count * (2 if dtype == "bf16" else 4), count * 4
    half = {0: 2 * gradients, 1: 2 * gradients + weights, 2: 2 * gradients * parts + weights}
    half[3] = (2 * weights + gradients) * parts
    assert sent_bytes(cfg, 2) == half[stage] / 2 and sent_bytes(cfg, 8) == half[stage] * 7 / 8
    assert sent_bytes(cfg, 1) == 0


def test_the_measured_link_of_two_hosts():
    """13.6 MB of gradients at 1 Gbit: 0.106 s were measured after the backward pass, 0.165 to 0.186 s under ZeRO 1.
    Steps of 0.202 s without any transfer took 0.242 s at 1 Gbit and 0.381 s at 500 Mbit when the transfer began within
    the backward pass of 0.13 s (bench/NOTES.md; two runs with a free link differ by 0.024 s)."""
    link, count = 1e9 / 8, 13_600_000 // 4
    free = bytes_of_stage(0, 2, count, 4, 1) / link
    assert free == pytest.approx(0.106, rel=0.05)
    assert 0.95 < bytes_of_stage(1, 2, count, 4, 1) / link / 0.165 < 1.05
    assert overlapped(free, 0.13, FEWEST) == pytest.approx(0.242 - 0.202, abs=0.02)
    assert overlapped(2 * free, 0.13, FEWEST) == pytest.approx(0.381 - 0.202, abs=0.02)
    assert overlapped(0.01, 1.0, FEWEST) == 0.01 / FEWEST  # the last bucket
    cfg = dune("deepspeed=zero0")
    buckets = 4 * sum(trained_parameters(cfg)) / LARGEST
    assert exposed_seconds(cfg, free * link, link, 0.13) == overlapped(free, 0.13, buckets)
    assert exposed_seconds(dune("deepspeed=zero1"), free * link, link, 0.13) == free


def test_statistics_are_small():
    assert statistics_bytes(dune()) == 4 * (2 * 1024 + 1) * 8  # as tests/engine/test_experiments.py counts


def test_the_bottleneck_has_a_name():
    free = rows(dune("deepspeed=zero0"))
    assert [row.gpus for row in free] == [8, 16, 32, 64, 128, 256]
    assert all(row.step == pytest.approx(sum(row.seconds.values())) for row in free)
    efficiencies = [row.efficiency for row in free]
    assert efficiencies == sorted(efficiencies, reverse=True) and efficiencies[0] > 0.95
    assert free[0].bottleneck == "compute"
    assert rows(dune(), [32])[0].bottleneck == "gradients"
    assert rows(dune(), [8], storage=100e6)[0].bottleneck == "storage"
    assert rows(dune(), [1], cores=4)[0].bottleneck == "decoding"
    slow = rows(dune(), [8], storage=100e6)[0]
    assert slow.step == pytest.approx(1024 * 110e3 / 100e6) and slow.efficiency < free[3].efficiency


def test_gpus_that_cannot_share_a_batch_are_left_out():
    assert scaled(dune(), cluster(gpus=3), image_flops(dune()), 1) is None


def test_numbers_of_machines():
    assert node_counts("1..32") == [1, 2, 4, 8, 16, 32] and node_counts("3") == [3] and node_counts("2..5") == [2, 4]
    for text in ("0", "4..2", "x", "1..", "..3", "-1"):
        with pytest.raises(ValueError, match="--nodes"):
            node_counts(text)
