"""Means and deviations of teachers' features that were measured beforehand and lie in files; the convention "stored".

    y = (x - mean) / std,   per channel, over all images and patches of a data set, unbiased std

Ours is one safetensors file for all teachers, `<teacher>/<token type>/{mean,std}` [C]. Theia's publication has two
.npy files for each of its teachers, `imagenet_mean_*` and `imagenet_var_*`; the latter, too, holds deviations.

Theia computes y in bfloat16, features and statistics cast to it: then it is a division, not a product with 1 / std, to
have the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from dune_fast.kernels.moments import moments

ARITHMETICS = ("fp32", "bf16")

Statistics = dict[str, dict[str, tuple[Tensor, Tensor]]]
"""teacher -> token type -> mean and deviation [C]"""


class FeatureMoments:
    """Moments of features that come batch by batch, float64 [C]."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: Tensor | float = 0.0
        self.squares: Tensor | float = 0.0

    def add(self, x: Tensor) -> None:
        """Rows [..., C] of any float type; merged by the parallel formula of Chan, Golub and LeVeque (1979)."""
        rows = x.numel() // x.shape[-1]
        if not rows:
            return
        mean, squares = (moment.double() for moment in moments(x))
        delta, total = mean - self.mean, self.count + rows
        self.squares = self.squares + squares + delta.square() * (self.count * rows / total)
        self.mean = self.mean + delta * (rows / total)
        self.count = total

    def finish(self) -> tuple[Tensor, Tensor]:
        """Mean and unbiased deviation, float32 [C]; ValueError for fewer than two rows."""
        if self.count < 2:
            raise ValueError(f"deviations need two rows of features, there were {self.count}: give more images")
        return self.mean.float(), (self.squares / (self.count - 1)).sqrt().float()


def bf16_standardized(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(x - mean) / std, every operation in bfloat16, as float32. x: [..., C] of any float type."""
    low = torch.bfloat16
    return ((x.to(low) - mean.to(low)) / std.to(low)).float()


def write_statistics(path: Path, statistics: Mapping[str, Mapping[str, tuple[Tensor, Tensor]]]) -> None:
    """Writes our file, whole or not at all."""
    tensors = {
        f"{teacher}/{token}/{name}": x.detach().float().cpu().contiguous()
        for teacher, tokens in statistics.items()
        for token, pair in tokens.items()
        for name, x in zip(("mean", "std"), pair, strict=True)
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f"{path.name}.part")
    save_file(tensors, fresh, metadata={"format": "pt"})
    fresh.replace(path)


def read_statistics(
    file: str, files: Mapping[str, Sequence[str]], teachers: Mapping[str, tuple[int, Sequence[str]]]
) -> Statistics:
    """What is stored of the teachers of a run.

    Args:
        file: ours, of all teachers that `files` does not name; "" where it names all.
        files: teacher -> its two .npy files, mean and deviation, for every token type of its.
        teachers: name -> (channels, token types).

    Raises:
        ValueError: a file is missing or damaged, has not the teacher, other channels, or a deviation of 0.
    """
    ours = _tensors(Path(file).expanduser()) if file else {}
    found: Statistics = {}
    for name, (channels, tokens) in teachers.items():
        for token in tokens:
            if name in files:
                pair, source = [_vector(Path(path).expanduser()) for path in files[name]], " and ".join(files[name])
            else:
                keys = [f"{name}/{token}/{part}" for part in ("mean", "std")]
                if lacking := [key for key in keys if key not in ours]:
                    raise ValueError(
                        f"standardization.file={file!r} has no {lacking[0]}: measure it with `dune-fast cache "
                        f"statistics`, or name two files in standardization.files.{name}"
                    )
                pair, source = [ours[key] for key in keys], file
            if any(x.shape != (channels,) for x in pair) or not bool(torch.stack(pair).isfinite().all()):
                shapes = " and ".join(str(list(x.shape)) for x in pair)
                raise ValueError(f"{source}: {name} has {channels} channels, they are {shapes}, or not all finite")
            if not bool((pair[1] > 0).all()):
                raise ValueError(f"{source}: the deviation of a channel of {name}'s {token} tokens is 0 or negative")
            found.setdefault(name, {})[token] = (pair[0], pair[1])
    return found


def _tensors(path: Path) -> dict[str, Tensor]:
    """Of our file, float32."""
    try:
        return {key: value.float() for key, value in load(path.read_bytes()).items()}
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"standardization.file={path} cannot be read ({error}): measure it with `dune-fast cache statistics {path}`"
            " and the overrides of this run"
        ) from error


def _vector(path: Path) -> Tensor:
    """Of a .npy file, float32 [C]."""
    try:
        return torch.from_numpy(np.load(path, allow_pickle=False).astype(np.float32)).flatten()
    except (OSError, ValueError, TypeError, EOFError, AttributeError) as error:  # none: empty, an archive of arrays
        raise ValueError(f"standardization.files names {path}, which cannot be read as .npy: {error}") from error
