"""The memory of a head's step as it is counted without content, against what the allocator sees; parts that follow."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from PIL import Image
from torch.profiler import ProfilerActivity, profile

from bench.heads_proof.bodies import write_body_model
from bench.heads_proof.people import draw_parameters
from dune_fast.engine import trainer
from dune_fast.engine.config import RunConfig, compose_config
from dune_fast.engine.memory import SPARE
from dune_fast.evaluate.ranks import Ranks
from dune_fast.heads.multihmr.people_files import write_people
from dune_fast.kernels.nn.vit import VisionTransformer, ViTConfig
from dune_fast.tasks import linear, memory
from dune_fast.tasks.head_task import FrozenEncoder, HeadTask, stack
from dune_fast.tasks.run import HeadEvaluation
from dune_fast.tasks.training import HeadTraining, head_task
from tests.evaluate.conftest import encoder_file, own_cache, squares

__all__ = ["encoder_file", "own_cache", "squares"]  # fixtures
MIB = 2**20


@pytest.fixture(scope="module")
def network() -> VisionTransformer:
    return VisionTransformer(ViTConfig(112, 14, 48, 2, 3)).init_weights().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    """Grey images with one and with five people, and the body model."""
    root, random = tmp_path_factory.mktemp("people"), np.random.default_rng(0)
    k = np.array([[112.0, 0, 56], [0, 112, 56], [0, 0, 1]])
    for split in ("train", "val"):
        (root / split).mkdir()
        for i, count in enumerate((1, 5)):
            Image.new("RGB", (112, 112), "grey").save(root / split / f"{i}.png")
            write_people(root / split / f"{i}.npz", draw_parameters(random, count) | {"K": k})
    write_body_model(root / "body.npz", 20)
    return root


@pytest.fixture
def configured(squares, rooms, people):
    """Kind of a head -> configuration of a small training."""
    own = {
        "linear_seg": ["experiment=seg_ade20k", f"head.data.root={squares}", "head.data.layout=plain",
                       "head.data.size=56", "head.data.stride=28"],
        "linear_depth": ["experiment=depth_nyud", f"head.data.root={squares}", "head.data.layout=plain",
                         "head.data.height=56", "head.data.width=70"],
        "mast3r": ["experiment=mast3r_dune", f"+head.data.datasets.rooms.root={rooms}", "head.data.sizes=[[56,42]]",
                   "head.options={dec_dim:48,dec_depth:4,dec_heads:3,layer_dims:[8,8,16,16],feature_dim:16,last_dim:16}",
                   "head.data.n_corres=128"],
        "multihmr": ["experiment=multihmr_dune", f"head.data.root={people}", f"head.data.body_model={people}/body.npz",
                     "head.options.image_size=112", "+head.options.dim=64", "+head.options.hidden=64"],
    }  # fmt: skip
    return lambda kind: compose_config([*own[kind], "head.encoder=x", "train.global_batch=4", "output_dir=none"])


def opened(cfg: RunConfig) -> HeadTask:
    task = head_task(cfg)
    task.open(Ranks())
    return task


def allocated(task: HeadTask, network: VisionTransformer, batch: dict, dtype: torch.dtype | None) -> int:
    """The most bytes that a pass has of the CPU's allocator at once, as the profiler sees them."""
    head, encoder = task.build_head(network).train(), FrozenEncoder(network, dtype)
    for p in head.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    task.loss(head, encoder, batch, 0).loss.backward()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as seen:
        task.loss(head, encoder, batch, 0).loss.backward()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    return int(np.cumsum([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]).max())


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("linear_seg", None), ("linear_depth", torch.bfloat16), ("mast3r", None), ("multihmr", torch.bfloat16)],
)
def test_the_count_is_what_the_allocator_sees(configured, network, kind, dtype):
    task = opened(configured(kind))
    examples = memory.largest_examples(task, 4)
    assert len(examples) == 2
    found = []
    for count in (2, 4) if "linear" in kind else (2,):
        batch = task.collate([examples[i % 2] for i in range(count)])
        found.append(memory.part_bytes(task, network, batch, dtype))
        assert found[-1] == pytest.approx(allocated(task, network, batch, dtype), rel=0.1)
    assert found[-1] == found[0] or 1.3 < found[1] / found[0] < 2.5
    if kind == "multihmr":  # the paths of a GPU are counted, too
        assert memory.part_bytes(task, network, batch, dtype, gpu=True) == pytest.approx(found[0], rel=0.5)


def test_the_largest_examples_of_several_steps_are_taken():
    class Growing:
        collate = staticmethod(stack)

        def example(self, step: int, slot: int) -> dict:
            return {"image": torch.zeros(step % 5 + 1, 3), "slot": slot}

    assert [example["image"].shape for example in memory.largest_examples(Growing(), 1)] == [(5, 3)]
    assert len(memory.largest_examples(Growing(), 8)) == 2


def test_fewer_bytes_make_more_parts(configured, network):
    cfg = configured("linear_depth")

    def parts(available: int, ranks: int = 1) -> tuple[int, bool]:
        found = memory.fit(cfg, head_task(cfg), network, ranks, available, False, False)
        assert found.fits == (found.needed <= (1 - SPARE) * available)
        return found.parts, found.fits

    whole, four = (memory.fit(cfg, head_task(cfg), network, 1, n, False, False).needed for n in (2**40, 0))
    assert parts(2**40) == (1, True) and parts(round(four / (1 - SPARE)) + MIB) == (4, True)
    assert parts(round(whole / (1 - SPARE)) - MIB)[0] == 2
    assert parts(0) == (4, False) and parts(0, ranks=2) == (2, False)


def test_an_estimate_of_one_rank_asks_no_other(configured, network, monkeypatch):
    """Moments of segmentation are sums over ranks, of which one alone makes the estimate."""
    task = opened(configured("linear_seg"))
    batch = task.collate(memory.largest_examples(task, 4))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(linear, "sum_over_ranks", lambda x: pytest.fail("another rank was asked"))
    assert memory.part_bytes(task, network, batch) > 0


def test_a_run_takes_the_parts_that_fit(configured, squares, encoder_file, tmp_path, monkeypatch, caplog):
    """And keeps them when it goes on with more memory."""
    overrides = [
        "experiment=depth_nyud", f"head.data.root={squares}", "head.data.layout=plain", "head.data.height=56",
        "head.data.width=70", f"head.encoder={encoder_file}", "train.global_batch=4", "train.accumulation=0",
        "train.steps=2", "train.checkpoint_every=1", "train.precision=fp32", "evaluation.every=0", "deepspeed=zero0",
        "logging.tensorboard=false", f"output_dir={tmp_path / 'run'}",
    ]  # fmt: skip
    for available, steps in ((1000, 1), (2**40, 2)):
        monkeypatch.setattr(trainer, "smallest_memory", lambda device, available=available: available)
        cfg = compose_config([*overrides])
        with caplog.at_level(logging.INFO):
            run = trainer.Trainer(cfg, HeadEvaluation(), HeadTraining(cfg))
        if steps == 1:
            plain = run.train_step
            run.train_step = lambda batch, run=run, plain=plain: (run.stop.ask("test"), plain(batch))[1]
        run.run()
        assert cfg.train.accumulation == 4 and run.step == steps
    assert "train.accumulation=0: 4 examples a step and device, in 4 parts of 1: estimated" in caplog.text
    assert "less than 15 % of the memory is left" in caplog.text
