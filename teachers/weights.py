"""Teachers' weight files: found, compared with the module that wants them, loaded strictly."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from dune_fast.teachers.assets import asset_path
from dune_fast.teachers.config import RANDOM
from dune_fast.teachers.containers import CURE, TeacherWeightsError, container_state, read_container
from dune_fast.teachers.local_paths import local_path
from dune_fast.teachers.run_files import CheckpointError, weights_in

Unused = Sequence[str] | Callable[[str], bool]
"""Names of tensors that may have no place: their prefixes, or a function that says so."""


def weights_path(weights: str) -> Path:
    """The file that a teacher's `weights` names: "asset:NAME" (fetched if need be) or a path.

    The folder of a run stands for its encoder, of its newest checkpoint if it has not ended; one with a
    `model.safetensors`, as from timm's hub, for that file. A checkpoint's folder stays one.

    Raises:
        TeacherWeightsError: there is no such file.
        AddressError: an address of an object store.
        teachers.assets.AssetError: the asset cannot be had.
    """
    if weights.startswith("asset:"):
        return asset_path(weights)
    path = local_path(weights, "the weights file")
    if path.is_dir():
        return folder_weights(path, "encoder.safetensors", "model.safetensors")
    if not path.is_file():
        raise TeacherWeightsError(
            f"there is no weights file {path}; put it there (`dune-fast teachers list` says what can be fetched), or "
            "correct the teacher's `weights`"
        )
    return path


def folder_weights(path: Path, *names: str) -> Path:
    """As `run_files.weights_in`, with TeacherWeightsError if there are none, or broken checkpoints alone."""
    try:
        found = weights_in(path, *names)
    except CheckpointError as error:
        raise TeacherWeightsError(str(error)) from error
    if found is None:
        files = " nor ".join(names)
        if (path / "config.yaml").is_file():
            raise TeacherWeightsError(f"{path}: the run has not ended, and there is no checkpoint of it yet")
        raise TeacherWeightsError(f"{path} is not the folder of a run: it has neither {files} nor checkpoints")
    return found


def random_seed(name: str, weights: str) -> int | None:
    """The seed of weights called "random:SEED", None for others; ValueError if it is not a number."""
    if not weights.startswith(RANDOM):
        return None
    seed = weights.removeprefix(RANDOM)
    if not seed.isdecimal():
        raise TeacherWeightsError(f"teachers.{name}.weights is {weights!r}; write random:NUMBER")
    return int(seed)


@dataclass
class Fit:
    """How a state dict compares with the module that wants it."""

    missing: list[str] = field(default_factory=list)
    """Names that the module has and the state dict has not."""
    surplus: list[str] = field(default_factory=list)
    """Names that the module has no place for."""
    misshapen: list[str] = field(default_factory=list)
    """Sentences: "a.weight has shape [3, 5] instead of [3, 2]"."""
    unsound: list[str] = field(default_factory=list)
    """Sentences on values no module can use: NaN, infinities, another kind of number."""

    @property
    def faults(self) -> list[str]:
        """Sentences on everything that is wrong."""
        named = [f"{key} is missing" for key in self.missing] + [f"{key} is not known" for key in self.surplus]
        return named + self.misshapen + self.unsound


def compare(wanted: Mapping[str, Tensor], state: Mapping[str, Tensor], unused: Unused = ()) -> Fit:
    """Compares a state dict with a module's own, by names, shapes and types."""
    allowed = unused if callable(unused) else lambda name: name.startswith(tuple(unused))
    fit = Fit(
        missing=[key for key in wanted if key not in state],
        surplus=[key for key in state if key not in wanted and not allowed(key)],
    )
    for key, value in wanted.items():
        if key not in state:
            continue
        given = state[key]
        if given.shape != value.shape:
            fit.misshapen.append(f"{key} has shape {list(given.shape)} instead of {list(value.shape)}")
        elif given.layout != torch.strided or given.is_floating_point() != value.is_floating_point():
            fit.unsound.append(f"{key} has the type {given.dtype} ({given.layout}) instead of {value.dtype}")
        elif not bool(torch.isfinite(given.float() if given.element_size() == 1 else given).all()):
            fit.unsound.append(f"{key} has values that are not finite (NaN or infinite)")
    return fit


def check_fit(fit: Fit, module: str, path: Path | str) -> None:
    """TeacherWeightsError with the first faults, if there is one."""
    if not (faults := fit.faults):
        return
    shown = "; ".join(faults[:4]) + (f"; and {len(faults) - 4} more" if len(faults) > 4 else "")
    cure = f"To mend it, {CURE}"
    if len(fit.surplus) == len(faults):  # everything that the module wants is there, and something else
        cure = (
            "Without them its features would be others, so it is of another architecture: use the library that made it "
            "(teachers: the family timm or module), or merge what was added (LoRA) into the weights first"
        )
    raise TeacherWeightsError(f"{path} does not fit {module}: {shown}. {cure}")


def build_foreign(
    build: Callable[[], nn.Module], seed: int | None, path: Path | None, network: str, unused: Unused = ()
) -> nn.Module:
    """A network that its own code builds, in eval mode and frozen; torch's generator is as before.

    Its weights are those of the file at `path`, else drawn from `seed`, else whatever `build` gives. `network` is its
    name for messages. TeacherWeightsError if the file does not fit.
    """
    with torch.random.fork_rng(devices=[]):
        if seed is not None:
            torch.manual_seed(seed)
        module = build()
    if path is not None:
        # buffers that a file does not have are computed when the network is built: not on the meta device
        state, wanted = container_state(read_container(path), path), module.state_dict()
        check_fit(compare(wanted, state, unused), network, path)
        module.load_state_dict({key: state[key].to(value.dtype) for key, value in wanted.items()}, strict=True)
    return module.eval().requires_grad_(False)


def build_loaded(
    build: Callable[[], nn.Module], state: Mapping[str, Tensor], path: Path | str, unused: Unused = ()
) -> nn.Module:
    """A module with every parameter and buffer taken from `state` (floats become float32), in eval mode and frozen.

    It is built on the meta device and draws nothing: teachers have no influence on the student's initial weights.
    TeacherWeightsError for missing or surplus names, wrong shapes, values that are not finite.
    """
    with torch.device("meta"):
        module = build()
    wanted = module.state_dict()
    check_fit(compare(wanted, state, unused), module.__class__.__name__, path)
    loaded = {key: state[key].float() if value.is_floating_point() else state[key] for key, value in wanted.items()}
    module.load_state_dict(loaded, strict=True, assign=True)
    left = [key for key, value in (*module.named_parameters(), *module.named_buffers()) if value.is_meta]
    assert not left, f"never loaded: {left}"
    return module.eval().requires_grad_(False)
