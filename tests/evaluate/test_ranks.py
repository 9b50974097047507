"""The processes of an evaluation meet as those of a run do."""

from __future__ import annotations

import torch

from dune_fast.evaluate import ranks


def test_processes_that_a_launcher_has_started_join(monkeypatch):
    """Regression: `torchrun -m dune_fast evaluate` ended at once, with an AttributeError."""
    launcher = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    joined = []
    monkeypatch.setattr(ranks, "join", lambda *args: joined.append(args))
    monkeypatch.setattr(ranks.dist, "destroy_process_group", lambda: joined.append("left"))
    with ranks.open_ranks("cpu") as here:
        assert (here.rank, here.size, here.device) == (1, 2, torch.device("cpu"))
    (place, device, minutes, patience), left = joined
    assert (place.rank, place.world_size, place.port, device) == (1, 2, 29500, torch.device("cpu")) and left == "left"
    assert minutes > 0 and patience.total_seconds() > 60 * minutes
