"""A reference case: a safetensors file whose metadata entry `case` says what was computed.

Tolerances: relative Frobenius error 1e-5 forward, 1e-4 gradients, in float32 on a CPU.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from dune_fast.distill.objective import ObjectiveConfig, TermWeights, ownership

FORWARD, GRADIENT = 1e-5, 1e-4

GENERIC = {"in19k", "in1k", "gldv2", "mapillarystreet"}
HUMAN = {"bedlam", "agora", "cuffs", "ubody"}
OWN_GROUP = {"dino2reg": "generic", "mast3r": "3d", "multihmr": "human"}
"""Prefix of a teacher's name -> group of its own datasets."""
SHARING = {"none": "full", "lowest_loss": "full", "own_data": "none", "own+generic_data": "generic"}
"""Published name of the dropping method -> `objective.sharing`."""


@dataclass
class Check:
    """One recomputed quantity."""

    name: str
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance  # False for NaN

    @property
    def excess(self) -> float:
        """Error over tolerance, which may be 0; infinite for NaN."""
        if not self.tolerance:
            return 0.0 if self.error == 0 else math.inf
        return self.error / self.tolerance if self.error == self.error else math.inf


class Case:
    """A file of tensors, named by paths, and what was run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with safe_open(path, "pt") as handle:
            self.info: dict[str, Any] = json.loads(handle.metadata()["case"])
            self.tensors = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118

    @property
    def kind(self) -> str:
        return self.info["kind"]

    def __getitem__(self, key: str) -> Tensor:
        return self.tensors[key]

    def __contains__(self, key: str) -> bool:
        return key in self.tensors

    def under(self, prefix: str) -> dict[str, Tensor]:
        """Tensors below a path, without it."""
        return {k[len(prefix) + 1 :]: v for k, v in self.tensors.items() if k.startswith(prefix + "/")}


def relative_error(ours: Tensor, reference: Tensor) -> float:
    """Frobenius norm of the difference over that of the reference; the plain norm where the reference is zero."""
    if ours.shape != reference.shape:
        return float("inf")
    difference = torch.linalg.vector_norm(ours.double() - reference.double())
    scale = torch.linalg.vector_norm(reference.double())
    return float(difference / scale if scale > 0 else difference)


def compare(
    ours: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float = FORWARD, under: str = ""
) -> list[Check]:
    """A check of every expected tensor, called `under` + its name."""
    return [Check(under + name, relative_error(ours[name], value), tolerance) for name, value in expected.items()]


def objective_of(info: dict[str, Any]) -> ObjectiveConfig:
    """The objective that a loss or train case was run with."""
    weights = [TermWeights(info.get("lam_cos", 0.5), info.get("lam_sl1", 0.5)) for _ in range(2)]
    probability = info["p"] if info["method"] == "lowest_loss" else 0.0
    return ObjectiveConfig(
        *weights, beta=info.get("beta", 1.0), sharing=SHARING[info["method"]], drop_probability=probability
    )


def batch_groups(info: dict[str, Any], cfg: ObjectiveConfig) -> tuple[Tensor, Tensor]:
    """(ownership table [T, G], group of each image [B]) of a loss or train case."""
    known = ["3d", "generic", "human"]
    own = {name: [group for prefix, group in OWN_GROUP.items() if name.startswith(prefix)] for name in info["teachers"]}
    groups = ["generic" if name in GENERIC else "human" if name in HUMAN else "3d" for name in info["datasets"]]
    table = ownership(own, known, cfg)
    return table, torch.tensor([known.index(group) for group in groups])
