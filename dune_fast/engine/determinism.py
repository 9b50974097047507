"""What makes a run on a GPU give the same bits again: `train.deterministic`.

By default it gives the same numbers but for rounding. These operations of a step add in no fixed order:

    attention's backward      cuDNN and FlashAttention add the gradient of q as their blocks finish
    gradients over ranks      NCCL's sums in the switch (NVLS)
    convolutions' gradients   none is left in our networks: the patch embedding is a matrix product

The project's own kernels use no atomic additions. Under `train.deterministic` torch takes deterministic algorithms and
refuses operations that have none. It refuses with an error: under `warn_only` torch's attention keeps cuDNN, and the
backward passes of FlashAttention and of memory-efficient attention stay what they are (sdp_utils.cpp and
attention_backward.cu in torch's sources). The cost, not yet measured: attention, forward too, by FlashAttention-2
instead of cuDNN, and its backward in the slower deterministic form, which takes more memory.

`torch.backends.cudnn.benchmark` is left off in every run, as torch has it: it times all algorithms of a convolution at
every new shape, picks others from run to run, and our networks have no convolution that would gain.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_ENVIRONMENT = {
    # a workspace for each handle: cuBLAS may otherwise take another algorithm where streams compete for one
    "CUBLAS_WORKSPACE_CONFIG": (":4096:8", ":16:8"),
    # the order of the switch's additions is not fixed
    "NCCL_ALGO": ("^NVLS", "Ring", "Tree", "CollnetDirect", "CollnetChain"),
}
"""Variables that libraries read at their first use -> the values that fix their order of additions, ours first."""
_CURES = {
    "upsample_bicubic2d_backward": "the position table is resized in every step: set student.image_size to the image "
    "size, so that it is not",
}
"""Operation of torch -> what to change instead of giving up determinism."""


class NotDeterministicError(ValueError):
    """An operation of the run has no deterministic form; the message names it and says what to do."""


@contextmanager
def deterministic_algorithms() -> Iterator[None]:
    """Inside, torch's libraries take deterministic algorithms alone. Enter it before the first product on a GPU.

    Raises:
        ValueError: the environment asks for algorithms that are not deterministic.
    """
    cudnn, filling = torch.backends.cudnn, torch.utils.deterministic
    before = (
        torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled(),
        filling.fill_uninitialized_memory, cudnn.deterministic, cudnn.benchmark,
    )  # fmt: skip
    added = _complete_environment()
    torch.use_deterministic_algorithms(True)
    filling.fill_uninitialized_memory = False  # on, it fills every torch.empty with NaN, for debugging
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        enabled, warn_only, filling.fill_uninitialized_memory, cudnn.deterministic, cudnn.benchmark = before
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        for name in added:
            os.environ.pop(name, None)


def _complete_environment() -> list[str]:
    """Adds what is missing of `_ENVIRONMENT`; names of what it has added."""
    for name, allowed in _ENVIRONMENT.items():
        if (given := os.environ.get(name)) not in (None, *allowed):
            raise ValueError(
                f"train.deterministic=true, but the variable {name} is {given!r}; unset it, or choose "
                f"{' or '.join(allowed)}"
            )
    added = [name for name in _ENVIRONMENT if name not in os.environ]
    os.environ.update({name: _ENVIRONMENT[name][0] for name in added})
    return added


@contextmanager
def explained() -> Iterator[None]:
    """Inside, torch's error about an operation without a deterministic form becomes a `NotDeterministicError`."""
    try:
        yield
    except RuntimeError as error:
        match = re.search(r"(\S+) does not have a deterministic implementation", str(error))
        if match is None:
            raise
        cure = next((cure for name, cure in _CURES.items() if match[1].startswith(name)), "")
        raise NotDeterministicError(
            f"train.deterministic=true, but {match[1]} has no deterministic form on this device. "
            f"{cure[:1].upper()}{cure[1:]}{'; or s' if cure else 'S'}et train.deterministic=false, under which a run "
            "that goes on is equal within rounding"
        ) from error
