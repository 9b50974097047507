"""All teachers of a run, frozen, on the student's images."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping

import torch
from torch import Tensor, nn

from kernels.resize import resize_normalize
from teachers.config import IMAGENET_MEAN, IMAGENET_STD, TeacherConfig
from teachers.protocol import Teacher, Trunk
from teachers.registry import build_teacher


class TeacherEnsemble(nn.Module):
    """Runs every teacher on one batch and returns its tokens on the student's patch grid.

    An image goes to a teacher of patch size p resized by p / q (q: the student's patch size), so that all grids agree:
    bicubic, corners aligned, no antialias. Then it is normalised as the teacher wants it. Inputs and trunks that
    teachers have in common are computed once. Nothing here waits for the device.

    Args:
        configs: teacher name -> configuration.
        student_patch_size: q, in pixels.
        autocast_dtype: type of the teachers' matrix products and convolutions (torch.bfloat16); their weights are kept
            in it rather than cast at every step. None: float32. An autocast around the call has no influence.

    Raises:
        ValueError: no teacher, or a wrong configuration (see `build_teacher`).
    """

    def __init__(
        self,
        configs: Mapping[str, TeacherConfig],
        student_patch_size: int,
        autocast_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not configs:
            raise ValueError("there is no teacher; name at least one under `teachers`")
        self.student_patch_size = student_patch_size
        self.autocast_dtype = autocast_dtype
        trunks: dict[Hashable, Trunk] = {}
        self.teachers: dict[str, Teacher] = {name: build_teacher(name, cfg, trunks) for name, cfg in configs.items()}
        self.trunks = nn.ModuleList(trunks.values())
        readers = {key: [t for t in self.teachers.values() if t.trunk_key == key] for key in trunks}
        self._low_precision = {
            key: autocast_dtype is not None and all(t.config.autocast for t in teachers)
            for key, teachers in readers.items()
        }
        for key, trunk in trunks.items():
            if self._low_precision[key]:
                _cast_matrices(trunk, autocast_dtype)
        self._grid_multiples = {
            name: math.lcm(teacher.config.grid_multiple, teacher.trunk.grid_multiple)
            for name, teacher in self.teachers.items()
        }
        self.size_multiple = student_patch_size * math.lcm(*self._grid_multiples.values())
        """Heights and widths of the student's images must be multiples of this, in pixels."""
        self._affine_names: dict[tuple, str] = {}
        for teacher in self.teachers.values():
            self._register_affine(teacher.config)
        self.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> TeacherEnsemble:
        """Stays in evaluation mode: the teachers are frozen."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> dict[str, dict[str, Tensor]]:
        """Tokens of every teacher.

        Args:
            images: [B, 3, H, W], ImageNet-normalised, at the student's resolution.

        Returns:
            teacher name -> {"cls": [B, C], "patch": [B, N, C]}, the token types that its configuration asks for, in
            float32 or `autocast_dtype`.

        Raises:
            ValueError: an image size that some teacher cannot take, or tokens that do not cover the student's grid.
        """
        rows, columns = self.grid(images)
        inputs: dict[Hashable, Tensor] = {}
        features: dict[Hashable, object] = {}
        outputs: dict[str, dict[str, Tensor]] = {}
        for name, teacher in self.teachers.items():
            cfg, key = teacher.config, teacher.trunk_key
            wanted = (cfg.patch_size, *_statistics(cfg))
            with torch.autocast(images.device.type, enabled=False):
                if wanted not in inputs:
                    size = (rows * cfg.patch_size, columns * cfg.patch_size)
                    inputs[wanted] = self._input(images.float(), size, cfg)
            with torch.autocast(images.device.type, self.autocast_dtype, enabled=self._low_precision[key]):
                if (key, wanted) not in features:
                    features[key, wanted] = teacher.trunk(inputs[wanted])
                outputs[name] = teacher.read(features[key, wanted])
            self._check(name, outputs[name], rows, columns)
        return outputs

    def grid(self, images: Tensor) -> tuple[int, int]:
        """Rows and columns of the student's patches; ValueError if the image's size does not suit every teacher."""
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"teachers take images of shape [B, 3, H, W], got {list(images.shape)}")
        height, width = images.shape[-2:]
        step, patch = self.size_multiple, self.student_patch_size
        if height % step or width % step or not height or not width:
            strict = {name: m for name, m in self._grid_multiples.items() if m > 1}
            demands = "".join(f", and {name} needs a patch grid divisible by {m}" for name, m in strict.items())
            raise ValueError(
                f"images of {height}x{width} pixels do not fit: the student's patch size is {patch}{demands}, so sides "
                f"must be multiples of {step}; choose an image size of {_neighbours(max(height, width), step)}"
            )
        return height // patch, width // patch

    def _input(self, images: Tensor, size: tuple[int, int], cfg: TeacherConfig) -> Tensor:
        """Student's images to a teacher's: resized first, then re-normalised."""
        name = self._affine_names.get(_statistics(cfg))
        scale, shift = (None, None) if name is None else getattr(self, name)
        return resize_normalize(images, size, scale, shift)

    def _register_affine(self, cfg: TeacherConfig) -> None:
        """A buffer [2, 3] that undoes ImageNet's normalisation and applies the teacher's; none if equal."""
        mean, std = key = _statistics(cfg)
        if key == (IMAGENET_MEAN, IMAGENET_STD) or key in self._affine_names:
            return
        rows = torch.tensor([IMAGENET_MEAN, IMAGENET_STD, mean, std], dtype=torch.float64)
        old_mean, old_std, new_mean, new_std = rows
        affine = torch.stack([old_std / new_std, (old_mean - new_mean) / new_std]).float()
        self._affine_names[key] = f"_affine_{len(self._affine_names)}"
        self.register_buffer(self._affine_names[key], affine, persistent=False)

    def _check(self, name: str, tokens: Mapping[str, Tensor], rows: int, columns: int) -> None:
        """Shapes against the student's grid and the configuration; they are known without waiting for the device."""
        cfg = self.teachers[name].config
        if "patch" in tokens and tokens["patch"].shape[1] != rows * columns:
            raise ValueError(
                f"teacher {name} gives {tokens['patch'].shape[1]} patch tokens, the student {rows}x{columns} = "
                f"{rows * columns}; correct teachers.{name}.patch_size ({cfg.patch_size}) or the image size"
            )
        for kind, x in tokens.items():
            assert x.shape[-1] == cfg.num_features, (name, kind, x.shape)


def _statistics(cfg: TeacherConfig) -> tuple[tuple[float, ...], tuple[float, ...]]:
    return tuple(cfg.mean), tuple(cfg.std)


def _cast_matrices(trunk: Trunk, dtype: torch.dtype) -> None:
    """Cast what autocast would cast at every call; norms, positions and gains stay in float32."""
    for module in trunk.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.to(dtype)


def _neighbours(size: int, step: int) -> str:
    below = size // step * step
    return f"{below} or {below + step}" if below else str(step)
