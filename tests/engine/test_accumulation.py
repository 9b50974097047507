"""A rank's batch in parts: every image once, the same running statistics, metrics that are means."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dali_pipelines.loader import Batch
from dune_fast.engine.accumulation import part_momentum, split
from dune_fast.engine.config import compose_config
from dune_fast.engine.metrics import read_metrics
from dune_fast.engine.trainer import Trainer


def test_parts_are_the_batch_in_order():
    index = torch.arange(6)
    batch = Batch(torch.randn(6, 3, 2, 2), index, index + 10, index + 20, list("abcdef"), 4, np.arange(6))
    parts = split(batch, 3)
    assert [part.paths for part in parts] == [["a", "b"], ["c", "d"], ["e", "f"]]
    for name in ("images", "positions", "group", "dataset"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(batch, name))
    assert all(part.step == 4 and len(part) == 2 for part in parts)
    assert parts[2].group_on_host.tolist() == [4, 5]


@pytest.mark.parametrize("momentum", [1.0, 0.3, 0.001, 0.0])
def test_the_past_keeps_its_share_over_all_parts(momentum):
    assert part_momentum(momentum, 1) == momentum
    assert (1 - part_momentum(momentum, 4)) ** 4 == pytest.approx(1 - momentum)


def test_a_run_in_parts_follows_the_whole(overrides, tmp_path):
    """Beside the statistics of the parts everything is the same; with 4 images each they are close."""
    records = {}
    for accumulation in (1, 2):
        out = tmp_path / str(accumulation)
        more = [f"train.accumulation={accumulation}", f"output_dir={out}", "objective.drop_probability=0"]
        Trainer(compose_config([*overrides, *more, "logging.tensorboard=false"])).run()
        records[accumulation] = read_metrics(out / "metrics.jsonl")
    for whole, parts in zip(records[1], records[2], strict=True):
        assert parts["loss"] == pytest.approx(whole["loss"], rel=0.1)
        assert parts["lr"] == whole["lr"] and parts["images"] == whole["images"]


def test_a_batch_that_cannot_be_split_is_explained(overrides):
    with pytest.raises(ValueError, match=r"8 is not a multiple of the 1 processes x train.accumulation=3; .* 9"):
        Trainer(compose_config([*overrides, "train.accumulation=3"]))
