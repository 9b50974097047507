"""What a teacher is: a trunk that turns images into features, and a reading of these features as tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, MutableMapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from dune_fast.kernels.imagenet import IMAGENET_MEAN, IMAGENET_STD
from dune_fast.teachers.config import TeacherConfig, check_config, network_key


class Trunk(nn.Module):
    """A frozen network: images [B, 3, H, W], normalised as it wants them, at its own resolution -> features.

    What the features are is between the trunk and the teachers that read them.
    """

    patch_size: int
    """Pixels, in each direction, that one patch token stands for."""
    num_features: int
    """Channels of a token."""
    grid_multiple: int = 1
    """Rows and columns of the patch grid must be multiples of this."""


def map_tokens(features: Tensor, channels_last: bool = False) -> Tensor:
    """A map [B, C, H, W], or [B, H, W, C] with `channels_last`, as patch tokens [B, H * W, C], row-major."""
    return features.flatten(1, 2) if channels_last else features.flatten(2).transpose(1, 2)


class Teacher(ABC):
    """One teacher. Teachers with equal `network_key` share one trunk, which then runs once on an input they share.

    Args:
        name: what the run calls it.
        trunks: trunks built so far, by `network_key`; a new one is added.

    Raises:
        ValueError: the configuration contradicts itself or the weights.
        TeacherWeightsError: see `teachers.weights`.
    """

    token_types: ClassVar[Sequence[str]] = ("cls", "patch")
    """Token types that the family has."""
    statistics: ClassVar[tuple[tuple[float, ...], tuple[float, ...]]] = (IMAGENET_MEAN, IMAGENET_STD)
    """(mean, std) of the images that the family's published weights take. A run obeys the configuration's."""
    options: ClassVar[Collection[str]] = ()
    """Which of the fields "activation" and "projected" the family reads; the others refuse them."""

    def __init__(self, name: str, config: TeacherConfig, trunks: MutableMapping[str, Trunk] | None = None) -> None:
        check_config(name, config)
        if lacking := [t for t in config.token_types if t not in self.token_types]:
            raise ValueError(
                f"teachers.{name}.token_types asks for {', '.join(lacking)}; "
                f"the family {config.family!r} has {', '.join(self.token_types)} only"
            )
        for option in ("activation", "projected"):
            if getattr(config, option) and option not in self.options:
                raise ValueError(
                    f"teachers.{name}.{option} is {getattr(config, option)!r}, but the family {config.family!r} has no "
                    "such choice; leave it out"
                )
        self.name = name
        self.config = config
        trunks = {} if trunks is None else trunks
        key = network_key(config)
        if key not in trunks:
            trunks[key] = self.build_trunk()
        self.trunk = trunks[key]
        for key, found in (("patch_size", self.trunk.patch_size), ("num_features", self.channels())):
            given = getattr(config, key)
            if given != found:
                raise ValueError(f"teachers.{name}.{key} is {given}, but the weights {config.weights} have {found}")

    @abstractmethod
    def build_trunk(self) -> Trunk:
        """The trunk with its weights loaded."""

    def channels(self) -> int:
        """Channels of the tokens that the configuration asks for; ValueError if they differ between cls and patch."""
        return self.trunk.num_features

    @abstractmethod
    def tokens(self, features: Any) -> dict[str, Tensor]:
        """The trunk's features as {"cls": [B, C], "patch": [B, N, C]}, patches row-major, or one of them."""

    def read(self, features: Any) -> dict[str, Tensor]:
        """The tokens that the configuration asks for: {"cls": [B, C], "patch": [B, N, C]} or one of them."""
        tokens = self.tokens(features)
        return {kind: tokens[kind] for kind in self.config.token_types}
