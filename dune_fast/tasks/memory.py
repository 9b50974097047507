"""What a step of a head's training takes of a device's memory, counted on tensors without content.

The task's own loss and its backward pass run on fake tensors in the place of weights, images and targets: every
operation says which shapes it gives, and nothing is computed. What is alive at once is added up. The examples are real
ones, the largest of the first steps.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_flatten, tree_map_only

from dune_fast.engine.config import RunConfig
from dune_fast.engine.fake_memory import Alive, without_content
from dune_fast.engine.memory import Fit, trained_bytes
from dune_fast.evaluate.ranks import Ranks
from dune_fast.kernels.library import traced
from dune_fast.kernels.nn.vit import VisionTransformer
from dune_fast.tasks.head_task import Batch, FrozenEncoder, HeadTask

_STEPS, _EXAMPLES = 8, 2
"""Steps, and slots of each, whose examples are looked at: a step's may be larger than another's."""


def largest_examples(task: HeadTask, slots: int) -> list[Any]:
    """Examples of that of the first steps whose tensors are the largest; the task's data are open."""
    few = min(slots, _EXAMPLES)
    found = [[task.example(step, slot) for slot in range(few)] for step in range(_STEPS)]
    return max(found, key=lambda examples: batch_bytes(task.collate(examples)))


def batch_bytes(batch: Batch) -> int:
    """Bytes of a batch's tensors."""
    return sum(x.numel() * x.element_size() for x in tree_flatten(batch)[0] if isinstance(x, Tensor))


def part_bytes(
    task: HeadTask, network: VisionTransformer, batch: Batch, dtype: torch.dtype | None = None, gpu: bool = False,
    mode: FakeTensorMode | None = None,
) -> int:  # fmt: skip
    """The most that one part's forward and backward pass have alive at once, beside weights, gradients and the batch.

    Args:
        task: its data are open.
        network: the encoder; its weights are not read.
        batch: of `task.collate`, on the host.
        dtype: of the encoder's products, None for float32.
        gpu: whether operations are those of a GPU.
        mode: the same for all calls of one task, which may keep tensors.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True) if mode is None else mode
    with torch.device("meta"):
        head = task.build_head(network).train()
    with mode, traced() if gpu else contextlib.nullcontext():
        without_content(head, mode)
        given = tree_map_only(Tensor, mode.from_tensor, batch)
        with Alive() as alive:
            task.loss(head, FrozenEncoder(network, dtype), given, 0).loss.backward()
        return alive.most


def fit(
    cfg: RunConfig, task: HeadTask, network: VisionTransformer, ranks: int, available: int, low_precision: bool,
    gpu: bool,
) -> Fit:  # fmt: skip
    """The fewest parts that leave the spare share of memory, see `engine.memory.fit`; opens the task's data.

    Args:
        cfg: the run's.
        task: of this estimate alone.
        network: the encoder.
        ranks: devices; they must share the batch evenly.
        available: bytes of each device.
        low_precision: whether the encoder's products are in bf16.
        gpu: whether the devices are GPUs.
    """
    task.open(Ranks())
    with torch.device("meta"):
        head = task.build_head(network)
    trained = sum(p.numel() for p in head.parameters() if p.requires_grad)
    frozen = sum(p.numel() for m in (head, network) for p in m.parameters() if not p.requires_grad)
    fixed = 4 * frozen + sum(trained_bytes(cfg, trained, ranks).values())
    images = cfg.train.global_batch // ranks
    dtype, examples = torch.bfloat16 if low_precision else None, largest_examples(task, cfg.train.global_batch)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    for count in (n for n in range(1, images + 1) if images % n == 0):
        batch = task.collate([examples[i % len(examples)] for i in range(images // count)])
        needed = fixed + count * batch_bytes(batch) + part_bytes(task, network, batch, dtype, gpu, mode)
        found = Fit(images, count, needed, available)
        if found.fits:
            break
    return found
