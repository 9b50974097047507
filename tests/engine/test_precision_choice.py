"""What train.precision=auto means: on a CPU, for several ranks, and where a run goes on."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from dune_fast.engine import devices
from dune_fast.engine.config import ConfigError, load_config
from dune_fast.engine.devices import agreed_precision, autocast_dtype
from tests.engine.conftest import build

CPU = torch.device("cpu")


@pytest.mark.parametrize(("native", "dtype"), [(True, torch.bfloat16), (False, None)])
def test_auto_is_bf16_where_the_cpu_multiplies_it(monkeypatch, native, dtype):
    monkeypatch.setattr(devices, "MULTIPLIES_BF16", native)
    assert autocast_dtype("auto", CPU) is dtype
    assert autocast_dtype("bf16", CPU) is torch.bfloat16 and autocast_dtype("fp32", CPU) is None


@pytest.mark.parametrize(("others", "agreed"), [(1.0, "bf16"), (0.0, "fp32")])
def test_a_rank_without_bf16_gives_all_ranks_float32(monkeypatch, others, agreed):
    """Regression: each rank decided for itself, so that unlike machines averaged gradients of unlike precision."""

    def least(x: torch.Tensor, op: dist.ReduceOp) -> None:
        assert op == dist.ReduceOp.MIN
        x.clamp_(max=others)

    monkeypatch.setattr(devices, "MULTIPLIES_BF16", True)
    monkeypatch.setattr(dist, "all_reduce", least)
    assert agreed_precision("auto", CPU) == agreed


def test_a_run_goes_on_in_the_precision_that_it_began_with(finished, overrides, monkeypatch):
    """Regression: auto was decided anew at every start, so that a run changed its precision with its machine."""
    monkeypatch.setattr(devices, "MULTIPLIES_BF16", True)  # another machine than the one that it began on, in fp32
    trainer = build(overrides, "train.precision=auto")
    assert trainer.step == 6 and trainer.cfg.train.precision == "fp32"
    assert trainer.engine.module.autocast_dtype is None
    assert load_config(finished / "config.yaml").train.precision == "fp32"


def test_auto_is_settled_at_the_start(overrides, tmp_path, monkeypatch):
    monkeypatch.setattr(devices, "MULTIPLIES_BF16", True)
    trainer = build(overrides, "train.precision=auto")
    assert trainer.cfg.train.precision == "bf16" and trainer.engine.module.autocast_dtype is torch.bfloat16
    assert load_config(tmp_path / "run" / "config.yaml").train.precision == "bf16"


def test_another_precision_than_the_checkpoints_is_refused(finished, overrides):
    with pytest.raises(ConfigError, match='train.precision: "fp32" -> "bf16"'):
        build(overrides, "train.precision=bf16")
