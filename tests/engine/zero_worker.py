"""One rank of tests/engine/test_zero.py: `python zero_worker.py FOLDER REFERENCE OVERRIDE...`, launched by it."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from bench.case import Case
from bench.train_case import Trajectory
from dune_fast.engine.config import ConfigError, compose_config
from dune_fast.engine.deepspeed_engine import Engine, init_distributed
from dune_fast.engine.optimizer import OptimizerConfig
from dune_fast.engine.trainer import Trainer

STAGES = (0, 1, 2, 3)
WHOLE, PARTS = "whole", "parts"  # names of the uninterrupted and of the interrupted runs' folders


def partitioned(stage: int) -> dict:
    """DeepSpeed's options under which stage 3 really cuts the small parameters of a test too."""
    return {"zero_optimization": {"stage3_param_persistence_threshold": 0}} if stage == 3 else {}


def trajectories(folder: Path, reference: Path) -> None:
    """The reference's training step under every stage: mean loss and final weights, for the test to compare."""
    rank, world = dist.get_rank(), dist.get_world_size()
    for stage in STAGES:
        trajectory = Trajectory(Case(reference), stage, rank, world, options=partitioned(stage))
        history = trajectory.run()
        loss = history["loss"] * trajectory.weight / world
        dist.all_reduce(loss)
        student = trajectory.student()
        if rank == 0:
            tensors = {**student.state_dict(), "loss": loss, "grad_norm_max": history["grad_norm_max"]}
            save_file(tensors, folder / f"trajectory_{world}_{stage}.safetensors")


def lamb(stage: int) -> dict[str, torch.Tensor]:
    """Weights after five steps by LAMB, whose norms are of whole layers; under all stages but 0, ranks cut them."""
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
    optimizer = OptimizerConfig("lamb", weight_decay=0.1, eps=1e-6, clip_per_parameter=0.0)
    sizes = {name: p.numel() for name, p in network.named_parameters()}
    run = Engine(network, optimizer, 8 // world, stage, partitioned(stage))
    cut = any(shard.numel < sizes[shard.parameter] for shard in run.state.shards)
    assert cut == (stage > 0 and world > 1), "this rank holds whole layers alone"
    for images in torch.randn(5, world, 8 // world, 6, generator=torch.Generator().manual_seed(1)):
        run.backward(run(images[rank]).square().mean())
        run.step(0.05)
    with run.whole_weights() as module:
        return {name: p.detach().clone() for name, p in module.named_parameters()}


def lamb_under_every_stage(folder: Path) -> None:
    for stage in STAGES:
        found = lamb(stage)
        if dist.get_rank() == 0:
            save_file(found, folder / f"lamb_{dist.get_world_size()}_{stage}.safetensors")


def trainer(overrides: list[str], folder: Path, stage: int) -> Trainer:
    cut = "+deepspeed.options.zero_optimization.stage3_param_persistence_threshold=0"
    more = [f"deepspeed=zero{stage}", f"output_dir={folder}", *([cut] if stage == 3 else [])]
    return Trainer(compose_config([*overrides, *more]))


def train_to(run: Trainer, step: int) -> None:
    """Trains up to a step and saves there, as a run that is then killed."""
    batches = run.task.loader.batches(run.step)
    while run.step < step:
        run.train_step(next(batches))
        with run.engine.evaluated_weights():  # the average and back, which the training does not notice
            pass
    run._save()
    assert run.saver.wait()
    batches.close()
    run.task.loader.close()
    dist.barrier()


def same_stage(folder: Path, overrides: list[str]) -> None:
    """Two ranks: an uninterrupted run and one that is resumed at its half, under every stage."""
    for stage in STAGES:
        whole, parts = (folder / f"{name}_{stage}" for name in (WHOLE, PARTS))
        trainer(overrides, whole, stage).run()
        train_to(trainer(overrides, parts, stage), 3)
        if dist.get_rank() == 0:
            shutil.copytree(parts, folder / f"half_{stage}")
        dist.barrier()
        trainer(overrides, parts, stage).run()


def refused(folder: Path, overrides: list[str]) -> None:
    """What rank 0 finds in the run's folder stops every rank with its sentence, not with a broken connection."""
    try:
        trainer([*overrides, "train.seed=3"], folder / f"{WHOLE}_0", 0)
    except ConfigError as error:
        (folder / f"refused_{dist.get_rank()}.txt").write_text(str(error))


def other_stage(folder: Path, overrides: list[str]) -> None:
    """Goes on from what two ranks have saved, with another number of ranks and under another stage."""
    for stage, then in ((1, 3), (3, 2)):
        run = folder / f"from_{stage}_to_{then}_{dist.get_world_size()}"
        if dist.get_rank() == 0:
            shutil.copytree(folder / f"half_{stage}", run)
        dist.barrier()
        resumed = trainer(overrides, run, then)
        assert resumed.step == 3
        resumed.run()


def skipped(folder: Path, overrides: list[str]) -> None:
    """A loss that is not finite on one rank: every rank skips the step, and nothing changes."""
    changed = {}
    for stage in STAGES:
        run = trainer(overrides, folder / f"skipped_{stage}", stage)
        batches = run.task.loader.batches(0)
        run.train_step(next(batches))

        def state(run: Trainer = run) -> list[torch.Tensor]:
            held = [x.clone() for shard in run.engine.state.shards for x in run.engine.state.tensors(shard).values()]
            with run.engine.whole_weights() as module:
                held += [x.clone() for x in module.state_dict().values()]
            return held + [x.clone() for x in run.task.statistics.buffers()] + [run.engine.state.updates().clone()]

        before = state()
        batch = next(batches)
        if dist.get_rank() == 1:
            batch.images[0] = float("nan")
        run.train_step(batch)
        changed[stage] = not all(torch.equal(a, b) for a, b in zip(before, state(), strict=True))
        run.train_step(next(batches))
        moved = not all(torch.equal(a, b) for a, b in zip(before, state(), strict=True))
        changed[stage] |= not moved
        batches.close()
        run.task.loader.close()
    (folder / f"skipped_{dist.get_rank()}.json").write_text(json.dumps(changed))


def main() -> None:
    """All checks of this number of ranks, in one process group."""
    folder, reference, overrides = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    torch.set_num_threads(1)
    init_distributed()
    if reference.exists():
        trajectories(folder, reference)
    lamb_under_every_stage(folder)
    if dist.get_world_size() == 2:
        same_stage(folder, overrides)
        skipped(folder, overrides)
        refused(folder, overrides)
    else:
        other_stage(folder, overrides)


if __name__ == "__main__":
    main()
