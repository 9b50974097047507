"""What one rank holds of the trained parameters under each ZeRO stage: slices of weights, moments and gradients.

DeepSpeed's optimizers keep the float32 masters that AdamW (LAMB is one, too) steps in flat tensors of their own layout.
A `Shard` says which run of elements of which parameter lies where in them; checkpoints, clipping and LAMB's norms know
nothing else of the stages.

    stage 0     every rank holds every parameter; the ranks share out the saving by bytes
    stage 1, 2  one flat partition a parameter group and rank; a parameter may cross the border of two
    stage 3     every parameter is cut into as many runs as there are ranks, the last ones padded
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dune_fast.teachers.run_files import AVERAGE

KINDS = ("weight", "exp_avg", "exp_avg_sq")
"""What AdamW keeps of every element, all in float32."""


@dataclass(frozen=True)
class Shard:
    """A run of elements of one flattened parameter."""

    parameter: str
    """Name in the module."""
    index: int
    """Of the parameter among the trained ones."""
    start: int
    """Its first element in the flattened parameter."""
    numel: int
    master: Tensor
    """The tensor that AdamW steps, float32, of any shape."""
    offset: int
    """Where the run begins in the flattened master."""
    slot: tuple[int, int] = (0, 0)
    """(group, place in it) of its averaged gradient."""

    def of(self, whole: Tensor) -> Tensor:
        """The run within a tensor of the master's elements: a flat view [numel]."""
        return whole.view(-1).narrow(0, self.offset, self.numel)


def add_squares(squares: Tensor, pieces: list[Tensor], indices: Tensor) -> None:
    """Adds the square sum of `pieces[i]` to `squares[indices[i]]`, in place; no host read. Added up over ranks, they
    are those of whole parameters."""
    if pieces:
        squares.index_add_(0, indices, torch.stack(torch._foreach_norm(pieces, 2.0)).square())


class ShardedState(ABC):
    """This rank's part of the weights and of AdamW's state.

    Args:
        optimizer: torch's AdamW, or DeepSpeed's wrapper around it.
        names: id(parameter) -> name, the trained parameters in the module's order.
    """

    replicated = False
    """Whether every rank holds everything."""

    def __init__(self, optimizer: Any, names: Mapping[int, str], rank: int) -> None:
        self.wrapper, self.rank = optimizer, rank
        self.adamw: torch.optim.AdamW = getattr(optimizer, "optimizer", optimizer)
        self._names, self._indices = dict(names), {key: i for i, key in enumerate(names)}
        self.shards = [shard for shard in self._layout() if shard.numel > 0]
        """In the order of `gradients`."""
        self._averages: dict[int, Tensor] | None = None
        """id(master) -> average; empty where this rank holds nothing, None where no average is kept."""

    @abstractmethod
    def _layout(self) -> list[Shard]:
        """All runs that this rank holds."""

    @abstractmethod
    def gradients(self) -> list[Tensor]:
        """The averaged gradients of `shards`, after the backward pass and before the optimizer's step; live tensors."""

    @abstractmethod
    def publish(self) -> None:
        """Makes the module compute with the masters, after they have been written to. All ranks call it."""

    def _shard(self, parameter: nn.Parameter, *place: Any) -> Shard:
        return Shard(self._names[id(parameter)], self._indices[id(parameter)], *place)

    def to_save(self, world_size: int) -> list[Shard]:
        """The shards that this rank writes to a checkpoint; over all ranks every element is written once."""
        if not self.replicated:
            return self.shards
        load, mine = [0] * world_size, []
        for shard in sorted(self.shards, key=lambda shard: -shard.numel):
            owner = load.index(min(load))
            load[owner] += shard.numel
            if owner == self.rank:
                mine.append(shard)
        return sorted(mine, key=lambda shard: shard.index)

    def tensors(self, shard: Shard) -> dict[str, Tensor]:
        """kind -> live flat view [numel] of a shard; moments that AdamW has not made yet are made here, zero."""
        state = self.adamw.state[shard.master]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=shard.master.device)
            state["exp_avg"] = torch.zeros_like(shard.master, requires_grad=False)
            state["exp_avg_sq"] = torch.zeros_like(shard.master, requires_grad=False)
        whole = {"weight": shard.master.detach(), **{kind: state[kind] for kind in KINDS[1:]}}
        if self._averages is not None:
            whole[AVERAGE] = self._averages[id(shard.master)]
        return {kind: shard.of(x) for kind, x in whole.items()}

    @property
    def averages(self) -> bool:
        """Whether an average of the weights is kept; the same on all ranks."""
        return self._averages is not None

    def _masters(self) -> list[Tensor]:
        """Every master of this rank once, in the order of `_averages`."""
        return list({id(shard.master): shard.master.detach() for shard in self.shards}.values())

    def start_average(self) -> None:
        """Keeps an average of the weights from here on; it begins at the weights of now."""
        self._averages = {id(shard.master): shard.master.detach() for shard in self.shards}
        self._averages = {key: master.clone() for key, master in self._averages.items()}

    @torch.no_grad()
    def average(self, decay: float, skipped: Tensor) -> None:
        """average += (1 - decay) * (weights - average), unless the step was `skipped` (bool scalar on the device)."""
        if self._averages:
            averages = list(self._averages.values())
            change = torch._foreach_sub(self._masters(), averages)
            torch._foreach_mul_(change, (1.0 - decay) * (~skipped).float())
            torch._foreach_add_(averages, change)

    @torch.no_grad()
    def swap_average(self) -> None:
        """Exchanges weights and average, in place; a second call undoes it, to the bit. All ranks call it."""
        assert self._averages is not None
        for master, average in zip(self._masters(), self._averages.values(), strict=True):
            kept = master.clone()
            master.copy_(average)
            average.copy_(kept)
        self.publish()

    def updates(self) -> Tensor:
        """Updates that AdamW has made, float32 scalar on the device; the same for every parameter. Rank 0 knows it:
        others may hold nothing."""
        if not self.shards:
            return torch.zeros(())
        self.tensors(self.shards[0])
        return self.adamw.state[self.shards[0].master]["step"]

    @torch.no_grad()
    def set_updates(self, count: float) -> None:
        """Sets the number of updates that AdamW has made."""
        for shard in self.shards:
            self.tensors(shard)
            self.adamw.state[shard.master]["step"].fill_(count)


class Replicated(ShardedState):
    """Stage 0: torch's optimizer on the module's own parameters."""

    replicated = True

    def _layout(self) -> list[Shard]:
        parameters = [p for group in self.adamw.param_groups for p in group["params"]]
        self._parameters = sorted(parameters, key=lambda p: self._indices[id(p)])
        return [self._shard(p, 0, p.numel(), p, 0) for p in self._parameters]

    def gradients(self) -> list[Tensor]:
        missing = [self._names[id(p)] for p in self._parameters if p.grad is None]
        assert not missing, f"trainable parameters {missing} got no gradient: freeze what no loss reaches"
        return [p.grad for p in self._parameters]

    def publish(self) -> None:
        pass


class Partitioned(ShardedState):
    """Stages 1 and 2: a flat partition of every parameter group."""

    def _layout(self) -> list[Shard]:
        zero, shards = self.wrapper, []
        for group, parameters in enumerate(zero.params_in_partition):
            starts = zero.grad_start_offset[group][self.rank]
            offsets = zero.grad_partition_insertion_offset[group][self.rank]
            for place, parameter in enumerate(parameters):
                key = zero.get_param_id(parameter)
                count = min(parameter.numel() - starts[key], int(zero.partition_size[group]) - offsets[key])
                master = zero.single_partition_of_fp32_groups[group]
                shards.append(self._shard(parameter, starts[key], count, master, offsets[key], (group, place)))
        return shards

    def gradients(self) -> list[Tensor]:
        return [self.wrapper.averaged_gradients[group][place] for group, place in (s.slot for s in self.shards)]

    def publish(self) -> None:
        self.wrapper.update_lp_params()


class Cut(ShardedState):
    """Stage 3: a run of every parameter."""

    def _layout(self) -> list[Shard]:
        zero, shards = self.wrapper, []
        # Our own norms serve clipping and the check for finite values. DeepSpeed's would be read by the host at every
        # step, and would count what its padding happens to hold.
        zero._get_norm_groups = lambda: [0.0]
        for group, parameters in enumerate(zero.fp16_groups):
            offset = 0
            for place, parameter in enumerate(parameters):
                length = parameter.partition_numel()
                start = self.rank * length
                count = max(0, min(length, parameter.ds_numel - start))
                master = zero.fp32_partitioned_groups_flat[group]
                shards.append(self._shard(parameter, start, count, master, offset, (group, place)))
                offset += length
        return shards

    def gradients(self) -> list[Tensor]:
        averaged = self.wrapper.averaged_gradients
        return [averaged[s.slot[0]][s.slot[1]].view(-1).narrow(0, 0, s.numel) for s in self.shards]

    def publish(self) -> None:
        zero = self.wrapper
        zero._partition_all_parameters()
        for group in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(group)
        zero._post_step(set())  # gathers the small parameters that stay whole


def sharded_state(stage: int, optimizer: Any, names: Mapping[int, str], rank: int) -> ShardedState:
    """The state of a ZeRO stage; arguments as in `ShardedState`."""
    return {0: Replicated, 1: Partitioned, 2: Partitioned, 3: Cut}[stage](optimizer, names, rank)


class HostCopies:
    """Copies tensors to memory of the host that is kept from one save to the next, page-locked for a GPU's."""

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def __call__(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies, contiguous, of `tensors`; valid until the next call. The device is waited for once."""
        for name, tensor in tensors.items():
            kept = self._kept.get(name)
            if kept is None or kept.shape != tensor.shape or kept.dtype != tensor.dtype:
                kept = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
                self._kept[name] = kept
            kept.copy_(tensor, non_blocking=True)
        if any(tensor.is_cuda for tensor in tensors.values()):
            torch.cuda.current_stream().synchronize()
        return {name: self._kept[name] for name in tensors}
