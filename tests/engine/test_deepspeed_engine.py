"""The engine on one rank: accumulation, types of averaged gradients, clipping, skipped steps, under every stage."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn

from dune_fast.engine import deepspeed_engine as module
from dune_fast.engine.deepspeed_engine import Engine, init_distributed
from dune_fast.engine.optimizer import OptimizerConfig

STAGES = [0, 1, 2, 3]


class Model(nn.Module):
    """Two layers, one parameter of which is frozen, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 3)
        self.frozen = nn.Parameter(torch.randn(3), requires_grad=False)
        self.register_buffer("offset", torch.randn(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x))) * self.frozen + self.offset


@pytest.fixture(scope="module")
def data() -> torch.Tensor:
    return torch.randn(4, 8, 6, generator=torch.Generator().manual_seed(1))


def engine(stage: int, **options) -> Engine:
    init_distributed()
    cfg = options.pop("optimizer", OptimizerConfig(clip_per_parameter=0.01))
    return Engine(Model(), cfg, 8, stage, **options)


def weights(run: Engine) -> torch.Tensor:
    with run.whole_weights() as module:
        return torch.cat([p.detach().flatten() for p in module.parameters()])


def train(run: Engine, data: torch.Tensor) -> torch.Tensor:
    for x in data:
        for part in x.chunk(run.accumulation):
            run.backward(run(part).square().mean())
        run.step(0.01)
    return weights(run)


def by_torch(data: torch.Tensor, clip_global: float = 0.0) -> torch.Tensor:
    """The same training by torch alone."""
    model = Model()
    decayed = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    plain = [p for p in model.parameters() if p.requires_grad and p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": 0.03}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.99), eps=1e-15)
    for x in data:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        if clip_global:
            nn.utils.clip_grad_norm_(decayed + plain, clip_global)
        else:
            for p in decayed + plain:
                nn.utils.clip_grad_norm_([p], 0.01)
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("stage", STAGES)
def test_parts_of_a_batch_give_the_step_of_the_whole(stage, data):
    expected = by_torch(data)
    for accumulation in (1, 2, 4):
        torch.testing.assert_close(train(engine(stage, accumulation=accumulation), data), expected)


@pytest.mark.parametrize("stage", STAGES)
def test_global_clipping_is_torchs(stage, data):
    cfg = OptimizerConfig(clip_per_parameter=0.0, clip_global=0.02)
    torch.testing.assert_close(train(engine(stage, optimizer=cfg), data), by_torch(data, clip_global=0.02))


@pytest.mark.parametrize("stage", STAGES)
def test_gradients_may_be_averaged_in_bf16_while_masters_stay_float32(stage, data):
    run = engine(stage, gradient_dtype="bf16")
    assert run.engine.communication_data_type == torch.bfloat16
    found = train(run, data)
    assert found.dtype == torch.float32
    assert all(x.dtype == torch.float32 for shard in run.state.shards for x in run.state.tensors(shard).values())
    torch.testing.assert_close(found, by_torch(data), rtol=0.02, atol=0.02)  # four steps of Adam at 0.01


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("what", ["loss", "gradient", "asked"])
def test_a_step_that_must_not_count_changes_nothing(stage, what, data):
    run = engine(stage)
    train(run, data[:2])
    before = [x.clone() for s in run.state.shards for x in run.state.tensors(s).values()] + [weights(run)]
    loss = run(data[2]).square().mean()
    run.backward(loss * float("inf") if what == "gradient" else loss)
    seen = loss * float("nan") if what == "loss" else loss
    run.step(0.01, seen, torch.tensor(what == "asked"))
    assert run.skipped
    after = [x for s in run.state.shards for x in run.state.tensors(s).values()] + [weights(run)]
    assert all(map(torch.equal, before, after)) and run.state.updates() == 2
    run.backward(run(data[3]).square().mean())
    run.step(0.01, torch.tensor(1.0), torch.tensor(False))
    assert not run.skipped and not torch.equal(before[-1], weights(run)) and run.state.updates() == 3
    assert torch.isfinite(weights(run)).all()


def test_options_that_the_engine_cannot_honour_are_refused():
    with pytest.raises(ValueError, match="bf16, zero_optimization.offload_optimizer: .* take them out"):
        engine(1, options={"bf16": {"enabled": True}, "zero_optimization": {"offload_optimizer": {"device": "cpu"}}})


@pytest.mark.parametrize("stage", STAGES)
def test_overlapping_that_makes_the_host_wait_is_refused(stage):
    options = {"zero_optimization": {"overlap_comm": True}}
    if stage in (1, 2):
        with pytest.raises(ValueError, match=f"overlap_comm: under stage {stage} .* wait .*_stage=0, which overlaps"):
            engine(stage, options=options)
    else:
        engine(stage, options=options)


@pytest.mark.parametrize("stage", STAGES)
def test_frozen_parameters_and_buffers_are_copied_and_loaded(stage):
    run = engine(stage)
    kept = run.untrained()
    assert kept.keys() == {"frozen", "offset"}
    run.load_untrained({name: x + 1 for name, x in kept.items()})
    found = run.untrained()
    assert all(torch.equal(found[name], kept[name] + 1) for name in kept)
    with pytest.raises(ValueError, match="other frozen parameters or buffers"):
        run.load_untrained({"frozen": kept["frozen"]})


def test_stage_3_leaves_everybody_elses_linear_layers_alone(data):
    """Regression: DeepSpeed put its own function in the place of torch's, and teachers ran through it."""
    before = nn.functional.linear
    run = engine(3)
    run(data[0])
    assert nn.functional.linear is before


@pytest.mark.parametrize(("devices", "index"), [(1, 0), (4, 3)])
def test_a_process_may_see_its_own_device_alone(devices, index, monkeypatch):
    """Regression: DeepSpeed took the local rank, 3, for the number of the one device that srun shows the process."""
    launched = {"RANK": "7", "WORLD_SIZE": "8", "LOCAL_RANK": "3", "MASTER_ADDR": "node7", "MASTER_PORT": "29500"}
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    for name, value in (("is_available", True), ("device_count", devices), ("set_device", None)):
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    monkeypatch.setattr(module, "join", lambda *_: None)
    deepspeed = SimpleNamespace(init_distributed=lambda *_, **__: None)
    monkeypatch.setattr(module, "_import_deepspeed", lambda: deepspeed)
    assert init_distributed() == torch.device("cuda", index) and os.environ["LOCAL_RANK"] == str(index)
