"""What makes a run on a GPU give the same bits again: `train.deterministic`.

By default it gives the same numbers but for rounding. These operations of a step add in no fixed order:

    attention's backward      cuDNN and FlashAttention add the gradient of q as their blocks finish
    gradients over ranks      NCCL's sums in the switch (NVLS)

Our kernels use no atomic additions, what is trained no convolutions. Torch refuses operations without a deterministic
form by an error; under `warn_only` attention would keep cuDNN and its backward passes (torch's sdp_utils.cpp). The
cost, not yet measured: FlashAttention-2 instead of cuDNN, with the slower deterministic backward, and more memory.
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
    cudnn.deterministic, cudnn.benchmark = True, False  # a benchmark picks other algorithms from run to run
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
