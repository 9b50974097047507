"""One rank of test_plan_scale.py: counts the bytes of a step on the only network that this process sees."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from dune_fast.engine.deepspeed_engine import Engine, init_distributed
from dune_fast.engine.optimizer import OptimizerConfig

STEPS = 3
WIDTH, LAYERS, BATCH = 512, 8, 8


def sent() -> int:
    """Bytes that all processes of this network have sent through lo."""
    (line,) = [line for line in Path("/proc/self/net/dev").read_text().splitlines() if line.strip().startswith("lo:")]
    return int(line.split(":")[1].split()[8])


def measure(stage: int, parts: int, dtype: str) -> dict:
    """Bytes and seconds of a step, after one that opens connections."""
    torch.manual_seed(0)
    module = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))
    parameters = sum(p.numel() for p in module.parameters())
    options = {"zero_optimization": {"stage3_param_persistence_threshold": 0}} if stage == 3 else {}
    engine = Engine(module, OptimizerConfig(), BATCH, stage, options, parts, dtype)
    for i in range(STEPS + 1):
        if i == 1:
            dist.barrier()
            before, began = sent(), time.perf_counter()
        for _ in range(parts):
            engine.backward(engine(torch.randn(BATCH, WIDTH)).square().mean())
        engine.step(1e-3)
    dist.barrier()
    seconds = (time.perf_counter() - began) / STEPS
    used = (sent() - before) / STEPS
    return {
        "stage": stage, "parts": parts, "dtype": dtype, "parameters": parameters, "bytes": used, "seconds": seconds,
    }  # fmt: skip


if __name__ == "__main__":
    init_distributed()
    found = [measure(*case) for case in json.loads(sys.argv[2])]
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(found))
