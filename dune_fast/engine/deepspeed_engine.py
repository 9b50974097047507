"""DeepSpeed behind a narrow interface; nothing else in the project imports it."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dune_fast.engine.optimizer import OptimizerConfig, build_optimizer, clip_per_parameter, clip_scale

logger = logging.getLogger(__name__)


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


def free_port() -> int:
    """A TCP port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def init_distributed() -> torch.device:
    """Joins the process group that a launcher describes, or makes one of this process alone.

    Returns:
        This rank's device.
    """
    deepspeed = _import_deepspeed()
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        if "RANK" not in os.environ:  # not launched: python dune_fast/train.py
            address = f"tcp://127.0.0.1:{free_port()}"
            dist.init_process_group(backend, init_method=address, rank=0, world_size=1)
            os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists on it
        deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False)
    return device


def sum_over_ranks(x: Tensor) -> None:
    """All-reduce: sums `x` over ranks, in place."""
    dist.all_reduce(x)


class Engine:
    """A module under DeepSpeed's data parallelism and ZeRO 0 to 2.

    Args:
        module: what is trained; parameters that no loss reaches must be frozen.
        optimizer: AdamW's settings and the clipping.
        micro_batch: images a step on this rank.
        zero_stage: 0, 1 or 2.
        options: further entries of DeepSpeed's configuration.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: OptimizerConfig,
        micro_batch: int,
        zero_stage: int = 1,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        deepspeed = _import_deepspeed()
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": micro_batch,
            "zero_optimization": {"stage": zero_stage},
            "zero_allow_untested_optimizer": True,
            "gradient_clipping": 0.0,  # the default is 1.0, over all parameters; ours is per parameter
            "steps_per_print": 2**31,
        }
        if zero_stage in (1, 2):
            config["zero_optimization"]["compute_grad_norm"] = False  # it would be read by the host at every step
        for key, value in (options or {}).items():
            merge = isinstance(value, Mapping) and isinstance(config.get(key), dict)
            config[key] = {**config[key], **value} if merge else value
        self.max_norm = optimizer.clip_per_parameter
        self.zero_stage = zero_stage
        self.world_size = dist.get_world_size()
        self.engine, *_ = deepspeed.initialize(
            model=module, optimizer=build_optimizer(module, optimizer), config=config, dist_init_required=False
        )
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self._pieces: Tensor | None = None

    def __call__(self, images: Tensor) -> Any:
        return self.engine(images)

    @property
    def module(self) -> nn.Module:
        """The module that was passed in."""
        return self.engine.module

    def backward(self, loss: Tensor) -> None:
        """Gradients, averaged over ranks."""
        self.engine.backward(loss)

    def step(self, learning_rate: float) -> Tensor:
        """Clips every parameter's gradient on its own, updates the weights, clears the gradients.

        Returns:
            Norms before clipping, float32 [number of trainable parameters] (order: DeepSpeed's).
        """
        norms = self._clip()
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate
        self.engine.step()
        return norms

    def _clip(self) -> Tensor:
        if self.zero_stage == 0:
            missing = [i for i, p in enumerate(self.parameters) if p.grad is None]
            assert not missing, f"trainable parameters {missing} got no gradient: freeze what no loss reaches"
            return clip_per_parameter([p.grad for p in self.parameters], self.max_norm)
        return self._clip_partitions()

    @torch.no_grad()
    def _clip_partitions(self) -> Tensor:
        """Stages 1 and 2: a rank holds pieces of some gradients; their square sums are added over ranks first."""
        gradients, owners = [], []
        for group, partition in self.engine.optimizer.averaged_gradients.items():
            owners += self.engine.optimizer.params_in_partition[group]
            gradients += partition[: len(self.engine.optimizer.params_in_partition[group])]  # what follows is padding
        if self._pieces is None:  # the partition is the same at every step: its indices go to the device once
            index = {id(p): i for i, p in enumerate(self.parameters)}
            self._pieces = torch.tensor(
                [index[id(p)] for p in owners], dtype=torch.long, device=self.parameters[0].device
            )
        squares = torch.zeros(len(self.parameters), device=self._pieces.device)
        if gradients:
            squares.index_add_(0, self._pieces, torch.stack(torch._foreach_norm(gradients, 2.0)).square())
        if self.world_size > 1:
            sum_over_ranks(squares)
        norms = squares.sqrt()
        if self.max_norm > 0 and gradients:
            torch._foreach_mul_(gradients, list(clip_scale(norms[self._pieces], self.max_norm).unbind()))
        return norms

    def save(self, folder: Path, tag: str, state: dict[str, Any]) -> None:
        """Writes weights, optimizer and `state` under folder/tag, then moves the `latest` mark; all ranks call it."""
        self.engine.save_checkpoint(str(folder), tag=tag, client_state=state)

    def load(self, folder: Path, tag: str) -> dict[str, Any]:
        """Loads what `save` wrote; returns `state`. All ranks call it.

        Raises:
            ValueError: the checkpoint is incomplete, or was written with another world size or ZeRO stage.
        """
        try:
            path, state = self.engine.load_checkpoint(str(folder), tag=tag)
        except Exception as error:  # DeepSpeed raises many kinds here, RuntimeError and AssertionError among them
            reason = next(iter(str(error).splitlines()), repr(error))
            raise ValueError(
                f"checkpoint {folder / tag} cannot be loaded ({reason}); "
                "it may be cut short, or written with another number of ranks or ZeRO stage: use those, remove it "
                "to fall back to the one before, or start anew with train.overwrite=true"
            ) from error
        if path is None:
            raise ValueError(f"checkpoint {folder / tag} does not exist")
        return state
