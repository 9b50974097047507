"""An own network as a teacher, by import path: `model: package.module:factory`.

`factory(**model_args)` returns an `nn.Module` whose forward takes images [B, 3, H, W], normalised with the
configuration's mean and std, and gives one of

- {"patch": [B, N, C], "cls": [B, C]}, or one of the two; patches row-major,
- a tensor [B, N, C] of patch tokens,
- a tensor [B, C, h, w], a map of patch tokens.

Attributes `patch_size`, `num_features` and `grid_multiple` of the module, where it has them, are checked against the
configuration. `weights` is a file with the module's state dict, "own" where the factory loads them itself, or
"random:SEED" where it draws them.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping

from torch import Tensor, nn

from dune_fast.teachers.protocol import Teacher, Trunk, map_tokens
from dune_fast.teachers.weights import build_foreign, random_seed, weights_path

OWN = "own"
"""`weights` of a module that brings its own."""
_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


class ModuleTrunk(Trunk):
    """A module of the user's: images [B, 3, H, W] -> {"patch": [B, N, C], "cls": [B, C]} or one of them."""

    def __init__(self, module: nn.Module, patch_size: int, num_features: int) -> None:
        super().__init__()
        self.module = module
        self.patch_size = getattr(module, "patch_size", patch_size)
        self.num_features = getattr(module, "num_features", num_features)
        self.grid_multiple = getattr(module, "grid_multiple", 1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features = self.module(images)
        if isinstance(features, Mapping):
            return dict(features)
        if isinstance(features, Tensor) and features.ndim in (3, 4):
            return {"patch": features if features.ndim == 3 else map_tokens(features)}
        shape = list(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise ValueError(
            f"{type(self.module).__name__} gives {shape}; a teacher gives a dictionary of tokens, [B, N, C] or "
            "[B, C, h, w]"
        )


class ModuleTeacher(Teacher):
    """Reads what the module gives; see the top of the file."""

    def build_trunk(self) -> Trunk:
        cfg = self.config
        seed = random_seed(self.name, cfg.weights)
        path = None if seed is not None or cfg.weights == OWN else weights_path(cfg.weights)
        factory = import_factory(self.name, cfg.model)
        module = build_foreign(lambda: self._make(factory), seed, path, cfg.model)
        return ModuleTrunk(module, cfg.patch_size, cfg.num_features)

    def _make(self, factory: Callable[..., object]) -> nn.Module:
        cfg = self.config
        try:
            module = factory(**cfg.model_args)
        except TypeError as error:
            raise ValueError(f"teachers.{self.name}.model_args do not suit {cfg.model}: {error}") from error
        if not isinstance(module, nn.Module):
            raise ValueError(
                f"teachers.{self.name}.model: {cfg.model} gives a {type(module).__name__}, not a torch.nn.Module"
            )
        return module

    def tokens(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        if lacking := [kind for kind in self.config.token_types if kind not in features]:
            raise ValueError(
                f"teachers.{self.name}.token_types asks for {', '.join(lacking)}; {self.config.model} gives "
                f"{', '.join(features)}"
            )
        return features


def import_factory(name: str, model: str) -> Callable[..., object]:
    """The factory of an import path "package.module:factory"; ValueError if there is none."""
    if not _PATH.fullmatch(model):
        raise ValueError(f"teachers.{name}.model is {model!r}; write package.module:factory")
    module_name, _, attribute = model.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(
            f"teachers.{name}.model: {module_name} cannot be imported ({error}); is it installed, or in PYTHONPATH?"
        ) from error
    factory = getattr(module, attribute, None)
    if not callable(factory):
        raise ValueError(f"teachers.{name}.model: {module_name} has no function or class {attribute!r}")
    return factory
