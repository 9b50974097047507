"""DeepSpeed behind a narrow interface; nothing else in the project imports it."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dune_fast.engine.gradient_average import GradientAverage
from dune_fast.engine.interruption import PATIENCE
from dune_fast.engine.lamb import Lamb
from dune_fast.engine.launch import place
from dune_fast.engine.optimizer import OptimizerConfig, build_optimizer, scale_gradients
from dune_fast.engine.rendezvous import join
from dune_fast.engine.zero_state import add_squares, sharded_state

_REFUSED = {
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping",
    "communication_data_type", "optimizer", "scheduler", "fp16", "bf16", "amp", "torch_autocast",
    *(f"zero_optimization.{name}" for name in (
        "stage", "offload_optimizer", "offload_param", "cpu_offload", "zenflow", "zero_hpz_partition_size",
        "zero_quantized_weights", "zero_quantized_gradients", "mics_shard_size", "parameter_alignment",
    )),
}  # fmt: skip


def _import_deepspeed() -> Any:
    """Imports DeepSpeed, quiet and without its CPU extensions."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # it would warn that it found no other
    import deepspeed
    import deepspeed.ops
    from deepspeed.utils import logger as deepspeed_logger

    deepspeed_logger.setLevel(logging.ERROR)
    if not torch.cuda.is_available():
        # its shared-memory collectives would be compiled for two minutes at the first use; gloo serves
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def init_distributed(timeout_minutes: float = 30.0, rendezvous_minutes: float = 10.0) -> torch.device:
    """Joins the process group that a launcher describes (see `engine.launch`), or makes one of this process alone.

    Args:
        timeout_minutes: after which a rank is missed: by the watchdog, which can name it, and a little later by the
            collectives.
        rendezvous_minutes: how long the ranks wait for each other here.

    Returns:
        This rank's device.

    Raises:
        LaunchError: the launcher's environment is incomplete, or not all ranks came.
    """
    deepspeed = _import_deepspeed()
    here = place(os.environ)
    if torch.cuda.is_available():
        # a launcher may show every process its own device alone
        device = torch.device("cuda", here.local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    if not dist.is_initialized():
        join(here, device, rendezvous_minutes, timedelta(minutes=PATIENCE * timeout_minutes))
        # DeepSpeed insists on it, and takes it for the device's number
        os.environ["LOCAL_RANK"] = str(here.local_rank if device.index is None else device.index)
        deepspeed.init_distributed("nccl" if device.type == "cuda" else "gloo", auto_mpi_discovery=False, verbose=False)
    return device


def sum_over_ranks(x: Tensor) -> None:
    """All-reduce: sums `x` over ranks, in place."""
    dist.all_reduce(x)


def _check_options(options: Mapping[str, Any], zero_stage: int) -> None:
    """Refuses entries that the engine sets itself, or under which DeepSpeed keeps its state where we do not look."""
    given = {*options, *(f"zero_optimization.{name}" for name in options.get("zero_optimization") or {})}
    if refused := sorted(given & _REFUSED):
        raise ValueError(
            f"deepspeed.options has {', '.join(refused)}: batch, precision, optimizer, clipping and stage are set by "
            "train.*, optimizer.* and deepspeed.*, and offloading is not supported; take them out"
        )
    # Under stages 1 and 2 DeepSpeed (0.19.8) then makes the host wait for the whole device, at the end of the backward
    # pass (`independent_gradient_partition_epilogue`) and in some paths at every bucket (`allreduce_and_copy`): the
    # launches of the update and of the next step come late, which costs more than the transfer that it hides, for one
    # bucket holds all gradients. Stage 0 overlaps without it (`GradientAverage`); stage 3, where it is the default,
    # waits once either way.
    if zero_stage in (1, 2) and (options.get("zero_optimization") or {}).get("overlap_comm"):
        raise ValueError(
            f"deepspeed.options has zero_optimization.overlap_comm: under stage {zero_stage} DeepSpeed then makes the "
            "host wait for the device in every step; take it out, or choose deepspeed.zero_stage=0, which overlaps "
            "without it, or 3"
        )


def useful_zero_stage(stage: int, world_size: int) -> int:
    """The ZeRO stage that a run uses: one rank has nobody to share with, and stages 1 to 3 would cost it copies of all
    gradients and weights at every step. Losses and checkpoints are the same under every stage."""
    return stage if world_size > 1 else 0


class Engine:
    """A module under DeepSpeed's data parallelism and ZeRO 0 to 3.

    Args:
        module: what is trained; parameters that no loss reaches must be frozen.
        optimizer: the optimizer's settings and the clipping.
        micro_batch: images of one backward pass on this rank.
        zero_stage: 0, 1, 2 or 3.
        options: further entries of DeepSpeed's configuration.
        accumulation: backward passes whose gradients are averaged for one step.
        gradient_dtype: in which gradients are averaged over ranks, "fp32" or "bf16".
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: OptimizerConfig,
        micro_batch: int,
        zero_stage: int = 1,
        options: Mapping[str, Any] | None = None,
        accumulation: int = 1,
        gradient_dtype: str = "fp32",
    ) -> None:
        deepspeed = _import_deepspeed()
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        elements = sum(p.numel() for p in trained.values())
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": micro_batch,
            "gradient_accumulation_steps": accumulation,
            "communication_data_type": gradient_dtype,
            # its buffers are as large as the bucket, half a billion elements by default
            "zero_optimization": {"stage": zero_stage, "reduce_bucket_size": min(elements, 500_000_000)},
            "zero_allow_untested_optimizer": True,
            "gradient_clipping": 0.0,  # the default is 1.0, over all parameters; ours is per parameter
            "steps_per_print": 2**31,
            "timers": {"throughput": {"enabled": False}},  # it waits for the device twice a step
        }
        if zero_stage in (1, 2):
            config["zero_optimization"]["compute_grad_norm"] = False  # it would be read by the host at every step
        if zero_stage == 3:  # it would replace torch.nn.functional.linear for everybody, the teachers included
            config["zero_optimization"]["memory_efficient_linear"] = False
        _check_options(options or {}, zero_stage)
        for key, value in (options or {}).items():
            merge = isinstance(value, Mapping) and isinstance(config.get(key), dict)
            config[key] = {**config[key], **value} if merge else value
        self.clipping, self.zero_stage, self.accumulation = optimizer, zero_stage, accumulation
        self.world_size = dist.get_world_size()
        self.shapes = {name: list(p.shape) for name, p in trained.items()}
        """Of the trained parameters, by name."""
        self.engine, *_ = deepspeed.initialize(
            model=module, optimizer=build_optimizer(module, optimizer), config=config, dist_init_required=False
        )
        self._average: GradientAverage | None = None
        if zero_stage == 0:
            self.engine.enable_backward_allreduce = False  # it would begin after the backward pass, for one rank too
            if self.world_size > 1:
                self._average = GradientAverage(list(trained.values()), self.engine.communication_data_type)
        self.device = self.engine.device
        self.state = sharded_state(
            zero_stage, self.engine.optimizer, {id(p): name for name, p in trained.items()}, dist.get_rank()
        )
        if isinstance(self.state.adamw, Lamb):
            alone = self.state.replicated or self.world_size == 1
            self.state.adamw.follow(self.state.shards, len(self.shapes), None if alone else sum_over_ranks)
        self.skipped = torch.zeros((), dtype=torch.bool, device=self.device)
        """Whether the last step was skipped because a loss or a gradient was not finite; the same on every rank."""
        self._indices = torch.tensor([s.index for s in self.state.shards], dtype=torch.long, device=self.device)
        self._backwards = 0

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        return self.engine(*inputs, **named)

    @property
    def module(self) -> nn.Module:
        """The module that was passed in; under stage 3 its weights are whole only within `whole_weights`."""
        return self.engine.module

    def backward(self, loss: Tensor) -> None:
        """Adds to the gradients, `accumulation` times a step; after the last time they are averaged over ranks."""
        last = (self._backwards + 1) % self.accumulation == 0
        if last and self._average:
            self._average.begin()
        self.engine.backward(loss)
        self._backwards += 1
        if not last:
            self.engine.step()  # updates nothing yet, but counts
        elif self._average:
            self.state.gradients()  # names those that are missing
            self._average.finish()

    def step(
        self, learning_rate: float, loss: Tensor | None = None, skip: Tensor | None = None, beta: float | None = None,
        frozen_trunk: bool = False,
    ) -> Tensor:  # fmt: skip
        """Clips the gradients, updates the weights, clears the gradients.

        Where a gradient or `loss` is not finite on any rank, weights and moments stay what they are on all of them,
        and `skipped` says so; the host reads nothing for it.

        Args:
            loss: this rank's, a scalar on the device; None to look at the gradients alone.
            skip: bool scalar on the device, the same on all ranks; true skips the step whatever it brings.
            beta: the optimizer's first one in this step; None for the configuration's.
            frozen_trunk: whether the encoder's weights stay, see `OptimizerConfig.frozen_trunk_steps`.

        Returns:
            Norms before clipping, float32 [number of trained parameters], in the module's order.
        """
        assert self._backwards % self.accumulation == 0, "a step comes after `accumulation` backward passes"
        norms = self._clip(loss)
        if skip is not None:
            self.skipped = self.skipped | skip
        self.state.adamw.found_inf = self.skipped.float()  # read by torch's fused kernel on the device
        for group in self.engine.optimizer.param_groups:
            group["lr"] = 0.0 if frozen_trunk and group.get("trunk") else learning_rate
            if beta is not None:
                group["betas"] = (beta, group["betas"][1])
        self.engine.step()
        return norms

    @torch.no_grad()
    def _clip(self, loss: Tensor | None) -> Tensor:
        """Ranks hold pieces of gradients: their square sums are added over ranks, in one all-reduce with the loss."""
        gradients = self.state.gradients()
        squares = torch.zeros(len(self.shapes) + 1, device=self.device)
        add_squares(squares, gradients, self._indices)
        if loss is not None:
            squares[-1] = 0.0 * loss.detach()  # NaN unless the loss is finite
        if self.world_size > 1:
            sum_over_ranks(squares[-1:] if self.state.replicated else squares)
        self.skipped = ~squares.sum().isfinite()
        norms = squares[:-1].sqrt()
        if gradients:
            scale_gradients(gradients, norms, self._indices, self.clipping)
        return norms

    @contextlib.contextmanager
    def whole_weights(self, write: bool = False) -> Iterator[nn.Module]:
        """The module with all of its weights in place, which under stage 3 they are not otherwise. All ranks enter.

        Args:
            write: keep what rank 0 changes, for all ranks.
        """
        if self.zero_stage < 3:
            yield self.module
            return
        gathered = _import_deepspeed().zero.GatheredParameters
        with gathered(list(self.module.parameters()), modifier_rank=0 if write else None):
            yield self.module

    @contextlib.contextmanager
    def evaluated_weights(self) -> Iterator[nn.Module]:
        """As `whole_weights`, with the average in place of the weights where one is kept. All ranks enter."""
        if self.state.averages:
            self.state.swap_average()
        try:
            with self.whole_weights() as module:
                yield module
        finally:
            if self.state.averages:
                self.state.swap_average()

    def untrained(self) -> dict[str, Tensor]:
        """Copies of the frozen parameters and the buffers, by name. All ranks call it."""
        with self.whole_weights() as module:
            state = module.state_dict()
            return {name: x.detach().clone() for name, x in state.items() if name not in self.shapes}

    def load_untrained(self, tensors: Mapping[str, Tensor]) -> None:
        """Loads what `untrained` returned; ValueError if names or shapes are others. All ranks call it."""
        with self.whole_weights(write=True) as module, torch.no_grad():
            state = {name: x for name, x in module.state_dict().items() if name not in self.shapes}
            if {n: x.shape for n, x in state.items()} != {n: x.shape for n, x in tensors.items()}:
                raise ValueError(
                    f"the checkpoint has other frozen parameters or buffers ({sorted(tensors)}) than the student "
                    f"({sorted(state)})"
                )
            for name, x in state.items():
                x.copy_(tensors[name])
