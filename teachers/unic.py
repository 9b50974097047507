"""The four teachers of UNIC, ViT-B/16 trained on ImageNet-1K: DINO, iBOT, DeiT-III, dBOT-ft. UNIC itself: `dune.py`.

Sariyildiz et al., "UNIC: Universal Classification Models via Multi-teacher Distillation", ECCV 2024.

- DINO (Caron et al., ICCV 2021) and iBOT (Zhou et al., ICLR 2022): a plain ViT.
- DeiT-III (Touvron et al., ECCV 2022): LayerScale; its position table has no entry for cls.
- dBOT (Liu et al., ICLR 2024), fine-tuned on the labels: the classifier reads `fc_norm` of the patches' mean; so does
  the cls token here, and the patches are those before any norm.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from torch import Tensor

from dune_fast.teachers.vit import ViTTeacher


class DINOTeacher(ViTTeacher):
    """cls and patch tokens after the final norm."""

    @classmethod
    def recognizes(cls, keys: Collection[str]) -> bool:
        gains = ("blocks.0.ls1.gamma", "blocks.0.gamma_1")
        return "blocks.0.attn.qkv.weight" in keys and "norm.weight" in keys and not any(gain in keys for gain in gains)


class IBOTTeacher(DINOTeacher):
    """As DINO; the release's container has the entry `state_dict`."""


class DeiT3Teacher(ViTTeacher):
    """cls and patch tokens after the final norm; the classifier is ignored."""

    layer_scale = True

    @classmethod
    def recognizes(cls, keys: Collection[str]) -> bool:
        return "blocks.0.gamma_1" in keys

    @classmethod
    def published_interpolation(cls, registers: int) -> tuple[float, bool]:
        return 0.0, False

    @classmethod
    def convert(cls, state: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
        state = super().convert(state, path)  # cls is prepended after the positions are added: its position is zero
        return {key.replace(".gamma_1", ".ls1.gamma").replace(".gamma_2", ".ls2.gamma"): v for key, v in state.items()}


class DBOTFineTunedTeacher(ViTTeacher):
    """cls = fc_norm(mean of the patches); patches un-normalised."""

    @classmethod
    def recognizes(cls, keys: Collection[str]) -> bool:
        return "fc_norm.weight" in keys and "norm.weight" not in keys

    @classmethod
    def published_interpolation(cls, registers: int) -> tuple[float, bool]:
        return 0.0, False

    @classmethod
    def convert(cls, state: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
        return {key.replace("fc_norm.", "norm."): value for key, value in super().convert(state, path).items()}

    def tokens(self, features: dict[int, Tensor]) -> dict[str, Tensor]:
        _, _, patches = self.trunk.vit.split(features[self.block])
        if self.config.layer is not None:
            patches = self.normed(patches)
        return {"cls": self.normed(patches.mean(dim=1)), "patch": patches}
