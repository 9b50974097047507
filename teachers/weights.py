"""Teachers' weight files: found, read without running anything in them, loaded strictly.

Every way in which a file can be wrong ends in a `TeacherWeightsError` that names the file and the cure.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from teachers.assets import asset_path

_CURE = "get the file again, or correct the teacher's `weights` and `family`"


class TeacherWeightsError(ValueError):
    """A teacher's weights are missing, damaged, or those of another model."""


def weights_path(weights: str) -> Path:
    """The file that a teacher's `weights` names: "asset:NAME" (fetched if need be) or a path.

    Raises:
        TeacherWeightsError: there is no such file.
        teachers.assets.AssetError: the asset cannot be had.
    """
    if weights.startswith("asset:"):
        return asset_path(weights)
    path = Path(weights).expanduser()
    if not path.is_file():
        raise TeacherWeightsError(f"there is no weights file {path}; correct the teacher's `weights`, or put it there")
    return path


def read_pickle(path: Path) -> dict[str, Tensor]:
    """A bare state dict saved by `torch.save`; a file that needs code to load is refused."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if wanted := re.search(r"GLOBAL (\S+)", str(error)):
            raise TeacherWeightsError(
                f"{path} asks for the type {wanted[1]} and is not loaded, since that could run code; "
                "save its tensors alone"
            ) from error
        raise damaged(path, error) from error
    except (OSError, EOFError, RuntimeError, ValueError, zipfile.BadZipFile) as error:
        raise damaged(path, error) from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise TeacherWeightsError(f"{path} is not a bare state dict (names to tensors); {_CURE}")
    return dict(state)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise damaged(path, error) from error


def damaged(path: Path, error: Exception) -> TeacherWeightsError:
    """The error for a file that its format's reader rejects."""
    reason = next(iter(str(error).splitlines()), "") or error.__class__.__name__
    return TeacherWeightsError(f"{path} cannot be read: truncated, damaged or of another format ({reason}); {_CURE}")


def build_loaded(
    build: Callable[[], nn.Module], state: Mapping[str, Tensor], path: Path | str, unused: Sequence[str] = ()
) -> nn.Module:
    """A module with every parameter and buffer taken from `state`, in eval mode and frozen.

    It is built without memory and without drawing random numbers, so that the teachers of a run have no influence on
    the student's initial weights.

    Args:
        build: makes the module.
        state: name -> tensor; floating-point tensors become float32.
        path: the source, for error messages.
        unused: prefixes of names in `state` that the module has no place for; any other surplus name is an error.

    Raises:
        TeacherWeightsError: missing or surplus names, or wrong shapes.
    """
    with torch.device("meta"):
        module = build()
    wanted = module.state_dict()
    state = {key: value for key, value in state.items() if key in wanted or not key.startswith(tuple(unused))}
    faults = [f"{key} is missing" for key in wanted if key not in state]
    faults += [f"{key} is not known" for key in state if key not in wanted]
    faults += [
        f"{key} has shape {list(state[key].shape)} instead of {list(value.shape)}"
        for key, value in wanted.items()
        if key in state and state[key].shape != value.shape
    ]
    if faults:
        shown = "; ".join(faults[:4]) + (f"; and {len(faults) - 4} more" if len(faults) > 4 else "")
        raise TeacherWeightsError(f"{path} does not fit {module.__class__.__name__}: {shown}. To mend it, {_CURE}")
    state = {key: value.float() if value.is_floating_point() else value for key, value in state.items()}
    module.load_state_dict(state, strict=True, assign=True)
    left = [key for key, value in (*module.named_parameters(), *module.named_buffers()) if value.is_meta]
    assert not left, f"never loaded: {left}"
    return module.eval().requires_grad_(False)
