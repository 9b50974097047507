"""LAMB on one rank under every ZeRO stage: timm's numbers, the paper's formula, and what every optimizer must keep to.

Several ranks: tests/engine/test_zero.py.
"""

from __future__ import annotations

import pytest
import timm.optim
import torch
from torch import Tensor, nn

from dune_fast.engine.deepspeed_engine import Engine, init_distributed
from dune_fast.engine.optimizer import OptimizerConfig
from dune_fast.engine.zero_state import KINDS
from tests.engine.zero_worker import STAGES, partitioned

LAMB = {"name": "lamb", "lr": 0.02, "betas": [0.9, 0.99], "eps": 1e-6, "weight_decay": 0.1, "clip_per_parameter": 0.0}


class Model(nn.Module):
    """An encoder and a projector, whose weight is 0 at first: its ratio is then 1."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.projector = nn.Linear(6, 5), nn.Linear(5, 3)
        nn.init.zeros_(self.projector.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.projector(torch.tanh(self.encoder(x))) - 1


@pytest.fixture(scope="module")
def data() -> Tensor:
    return torch.randn(10, 8, 6, generator=torch.Generator().manual_seed(1))


def engine(stage: int, accumulation: int = 1, **changed) -> Engine:
    init_distributed()
    return Engine(Model(), OptimizerConfig(**LAMB | changed), 8, stage, partitioned(stage), accumulation)


def train(run: Engine, data: Tensor, **step) -> dict[str, Tensor]:
    """Name -> weights after a step on each of `data`."""
    for x in data:
        for part in x.chunk(run.accumulation):
            run.backward(run(part).square().mean())
        run.step(LAMB["lr"], **step)
    with run.whole_weights() as module:
        return {name: p.detach().clone() for name, p in module.named_parameters()}


def state(run: Engine) -> dict[str, Tensor]:
    """Live weights and moments by name; on one rank each is whole."""
    return {f"{kind}/{s.parameter}": x for s in run.state.shards for kind, x in run.state.tensors(s).items()}


def by_timm(data: Tensor, everything: bool) -> dict[str, Tensor]:
    model, decay = Model(), LAMB["weight_decay"]
    groups = [{"params": [p for p in model.parameters() if (p.ndim > 1) == matrix],
               "weight_decay": decay if matrix or everything else 0.0} for matrix in (True, False)]  # fmt: skip
    optimizer = timm.optim.Lamb(groups, LAMB["lr"], betas=LAMB["betas"], eps=LAMB["eps"], max_grad_norm=None)
    for x in data:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return dict(model.named_parameters())


def by_formula(data: Tensor, everything: bool) -> dict[str, Tensor]:
    """Algorithm 2 of 1904.00962 in float64."""
    model, (b1, b2) = Model().double(), LAMB["betas"]
    moments = {name: (0.0, 0.0) for name, _ in model.named_parameters()}
    for t, x in enumerate(data.double(), start=1):
        model.zero_grad()
        model(x).square().mean().backward()
        for name, w in model.named_parameters():
            m, v = moments[name]
            m, v = moments[name] = b1 * m + (1 - b1) * w.grad, b2 * v + (1 - b2) * w.grad**2
            adapts = everything or w.ndim > 1
            r = m / (1 - b1**t) / ((v / (1 - b2**t)).sqrt() + LAMB["eps"]) + adapts * LAMB["weight_decay"] * w.detach()
            ratio = w.norm().item() / r.norm().item() if adapts and w.any() else 1.0
            w.data -= LAMB["lr"] * ratio * r
    return {name: w.detach().float() for name, w in model.named_parameters()}


@pytest.mark.parametrize(("stage", "everything"), [*((stage, False) for stage in STAGES), (1, True)])
def test_one_and_ten_steps_are_timms_and_the_papers_and_a_skipped_one_is_none(stage, everything, data):
    run, start = engine(stage, decay_vectors=everything), dict(Model().named_parameters())
    for steps in (data[:1], data):
        found = train(run, steps[-9:])
        timms, papers = by_timm(steps, everything), by_formula(steps, everything)
        for name, value in found.items():
            for theirs in (timms, papers):
                torch.testing.assert_close(value - start[name], theirs[name] - start[name], rtol=1e-4, atol=1e-6)
    assert all(held.keys() == {"step", *KINDS[1:]} for held in run.state.adamw.state.values()), "no more than AdamW"
    before = {name: x.clone() for name, x in state(run).items()}
    after = train(run, data[:1] * float("inf"))
    assert run.skipped and run.state.updates() == 10
    assert all(torch.equal(x, before[name]) for name, x in state(run).items())
    assert all(torch.equal(x, found[name]) for name, x in after.items())
    assert all(not torch.equal(x, found[name]) for name, x in train(run, data[:1]).items())


def test_parts_of_a_batch_give_the_step_of_the_whole(data):
    whole, parts = train(engine(1), data[:3]), train(engine(1, 4), data[:3])
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value)


@pytest.mark.parametrize("stage", STAGES)
def test_the_trunk_waits_while_its_moments_move_and_a_run_goes_on_from_its_state(stage, data):
    """To the bit under the same stage, within rounding under another."""
    run, start = engine(stage, frozen_trunk_steps=2), dict(Model().named_parameters())
    for name, value in train(run, data[:2], frozen_trunk=True).items():
        assert torch.equal(value, start[name]) == name.startswith("encoder."), name
    saved = {name: x.clone() for name, x in state(run).items()}
    assert all(x.any() for name, x in saved.items() if name.startswith("exp_avg"))
    expected = train(run, data[2:4])
    assert all(not torch.equal(x, start[name]) for name, x in expected.items())
    for then in (stage, (stage + 1) % 4):
        again = engine(then, frozen_trunk_steps=2)
        for name, x in state(again).items():
            x.copy_(saved[name])
        again.state.set_updates(2)
        again.state.publish()
        for name, value in train(again, data[2:4]).items():
            torch.testing.assert_close(value, expected[name], **({"rtol": 0, "atol": 0} if then == stage else {}))


def test_names_and_options_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="optimizer.name='sgd'; choose one of adamw, lamb"):
        OptimizerConfig(name="sgd")
    with pytest.raises(ValueError, match="weight_decay=0 leaves none: set it above 0, or optimizer.name=adamw"):
        OptimizerConfig(name="lamb", weight_decay=0.0)
