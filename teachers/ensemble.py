"""All teachers of a run, frozen, on the student's images."""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dune_fast.kernels.imagenet import IMAGENET_MEAN, IMAGENET_STD
from dune_fast.kernels.nn.patches import SharedPatches
from dune_fast.kernels.nn.routing import Route, Routes, union, within
from dune_fast.kernels.nn.vit import nearest_multiples
from dune_fast.kernels.resize import resize_normalize
from dune_fast.teachers.config import TeacherConfig, given_patches, input_key, network_key, scaled_grid
from dune_fast.teachers.inputs import Layout, Mosaic, fit_longest, fitted
from dune_fast.teachers.precision import autocast, prepare, resolve_precision
from dune_fast.teachers.protocol import Teacher, Trunk
from dune_fast.teachers.registry import build_teacher
from dune_fast.teachers.vit import ViTTrunk


class TeacherEnsemble(nn.Module):
    """Runs every teacher on one batch and returns its tokens on the student's patch grid.

    An image goes to a teacher of patch size p resized by p / q (q: the student's patch size), so that all grids agree:
    bicubic, corners aligned, no antialias. Then it is normalised as the teacher wants it. Inputs and trunks that
    teachers have in common are computed once, in a teacher's own precision (`teachers.precision`) whatever autocast is
    around the call. Nothing here waits for the device.

    With `scale` below 1 a teacher's grid is coarser: its images are resized with antialias, its patch tokens
    bilinearly, cell by cell, to the student's grid. With `input_size` it runs on images of that size, with `mosaic`
    on several of them at once (`teachers.inputs`); `grid: own` leaves its tokens where they are.

    Args:
        student_patch_size: q, in pixels.
        autocast_dtype: what `precision: auto` means, torch.bfloat16, or None for float32.
        device: where the teachers run, the CPU by default.
        loaded: the teachers that are built, all by default. The others get no image here, and have no tokens.

    Raises:
        ValueError: no teacher, or a wrong configuration (see `build_teacher` and `resolve_precision`).
    """

    def __init__(
        self,
        configs: Mapping[str, TeacherConfig],
        student_patch_size: int,
        autocast_dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        loaded: Collection[str] | None = None,
    ) -> None:
        super().__init__()
        if not configs:
            raise ValueError("there is no teacher; name at least one under `teachers`")
        device = device or torch.device("cpu")
        self.student_patch_size = student_patch_size
        self.configs = {name: resolve_precision(name, cfg, autocast_dtype, device) for name, cfg in configs.items()}
        """Of all teachers, with their precision."""
        built = {name: cfg for name, cfg in self.configs.items() if loaded is None or name in loaded}
        self.teachers: dict[str, Teacher] = _build(built, device)
        self.trunks = nn.ModuleList(dict.fromkeys(teacher.trunk for teacher in self.teachers.values()))
        self._runs: dict[Hashable, list[Teacher]] = {}
        """(trunk, input) -> who reads what this trunk makes of this input."""
        for teacher in self.teachers.values():
            run = network_key(teacher.config), input_key(teacher.config)
            self._runs.setdefault(run, []).append(teacher)
        self._grid_multiples = {name: _grid_multiple(teacher) for name, teacher in self.teachers.items()}
        self._run_multiples = {
            teacher.name: math.lcm(*(self._grid_multiples[other.name] for other in readers))
            for readers in self._runs.values()
            for teacher in readers
        }
        self.size_multiple = student_patch_size * math.lcm(*self._grid_multiples.values())
        """Heights and widths of the student's images must be multiples of this, in pixels."""
        self._affine_names: dict[tuple, str] = {}
        for teacher in self.teachers.values():
            self._register_affine(teacher.config)
        self.requires_grad_(False)
        self.train(False)
        self.to(device)

    def train(self, mode: bool = True) -> TeacherEnsemble:
        """Stays in evaluation mode: the teachers are frozen."""
        return super().train(False)

    @torch.no_grad()
    def forward(
        self,
        images: Tensor,
        routes: Routes | None = None,
        patches: SharedPatches | None = None,
        views: Mapping[str, Tensor] | None = None,
        sizes: Mapping[str, int] | None = None,
    ) -> dict[str, dict[str, Tensor]]:
        """Tokens of every teacher.

        Args:
            images: [B, 3, H, W], ImageNet-normalised, at the student's resolution.
            routes: which n of these images each teacher gets; all of them by default. A trunk runs once, on the images
                that any of its teachers gets, and not at all if there are none.
            patches: of these images, shared with the student; by default the teachers share among themselves.
            views: teacher -> its own pictures of the B images, [B, 3, h, w], ImageNet-normalised, in place of `images`;
                those of teachers that share a trunk are the same.
            sizes: teacher -> side in pixels of its images in place of `input_size`; those of teachers that share a
                trunk are the same.

        Returns:
            teacher name -> {"cls": [n, C], "patch": [n, N, C]}, the token types that its configuration asks for, in
            float32 or bfloat16; N are the patches of the student's grid or, with `grid: own`, of the teacher's.

        Raises:
            ValueError: an image size that some teacher cannot take, or tokens that do not cover the student's grid.
        """
        grid = self.grid(images)
        patches = SharedPatches() if patches is None else patches
        inputs: dict[Hashable, Tensor] = {}
        outputs = {
            name: {} if name in self.teachers else _no_tokens(cfg, given_patches(cfg, grid[0]), images)
            for name, cfg in self.configs.items()
        }
        for readers in self._runs.values():
            first, cfg = readers[0], readers[0].config
            chosen = None if routes is None else union([routes[teacher.name] for teacher in readers])
            own = first.name if views is not None and first.name in views else None
            source = images if own is None else views[own]
            side = (sizes or {}).get(first.name, cfg.input_size)
            layout = self._layout(first, grid, (source.shape[-2], source.shape[-1]), side)
            if chosen is not None and not len(chosen):
                for teacher in readers:
                    left = layout.grid if teacher.config.grid == "own" else grid
                    outputs[teacher.name] = _no_tokens(teacher.config, math.prod(left), images)
                continue
            key = (input_key(cfg), layout, own, None if chosen is None else chosen.host.tobytes())
            if key not in inputs:
                inputs[key] = self._input(source if chosen is None else chosen.take(source), layout, cfg)
            with autocast(cfg.precision, images.device):
                try:
                    features = _features(first, inputs[key], patches if inputs[key] is images else None)
                except (AssertionError, RuntimeError) as error:
                    self._explain(first, inputs[key], error)
                    raise
                tokens = {teacher.name: teacher.read(features) for teacher in readers}
            count = len(images) if chosen is None else len(chosen)
            for name, read in tokens.items():
                self._check(name, read, *layout.network_grid)
                read = layout.of_images(read, count)
                share = read if chosen is None else _share(read, routes[name], chosen)
                outputs[name] = dict(share) if self.teachers[name].config.grid == "own" else layout.laid(share, grid)
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
                f"must be multiples of {step}; the nearest are {nearest_multiples(max(height, width), step)}"
            )
        return height // patch, width // patch

    def _explain(self, teacher: Teacher, images: Tensor, error: Exception) -> None:
        """ValueError if a network that is made for one size has failed at another."""
        own, patch, size = getattr(teacher.trunk, "own_size", None), teacher.config.patch_size, images.shape[-1]
        if own is None or size == own or isinstance(error, torch.OutOfMemoryError):
            return
        scaled = "" if teacher.config.scale == 1 else f"teachers.{teacher.name}.scale=1 and "
        raise ValueError(
            f"teachers.{teacher.name}: {teacher.config.model} takes images of {own} px alone, and this run gives it "
            f"{size} px: choose {scaled}image_size={own // patch * self.student_patch_size}, "
            f"teachers.{teacher.name}.input_size={own}, or a model that takes any size"
        ) from error

    def _layout(self, teacher: Teacher, grid: tuple[int, int], size: tuple[int, int], side: int | None) -> Layout:
        """How a teacher's images, of `side` pixels if that is given, are made of pictures of `size` (h, w) where the
        student has `grid` patches."""
        cfg, name = teacher.config, teacher.name
        if side is None:
            multiple = self._run_multiples[name]
            rows, columns = (scaled_grid(n, cfg.scale, multiple) for n in grid)
            shown: tuple[float, float] = (rows, columns)
        else:
            rows = columns = side // cfg.patch_size
            height, width = fitted(size, side)
            shown = (height / cfg.patch_size, width / cfg.patch_size)
            if shown != (rows, columns) and cfg.grid == "own":
                raise ValueError(
                    f"teachers.{name}: images of {size[0]}x{size[1]} pixels do not fill its own grid of "
                    f"{rows}x{columns} patches; give square images, or choose grid: student"
                )
        if not cfg.mosaic:
            return Layout((rows, columns), shown, None)
        mosaic = Mosaic(rows * cfg.patch_size, cfg.mosaic, cfg.patch_size)
        if rows != columns or not mosaic.per_side:
            raise ValueError(
                f"teachers.{name}: images of {rows * cfg.patch_size}x{columns * cfg.patch_size} pixels cannot be "
                f"packed on a canvas of {cfg.mosaic}; give square images that are not larger, or mosaic: 0"
            )
        return Layout((rows, columns), shown, mosaic)

    def _input(self, images: Tensor, layout: Layout, cfg: TeacherConfig) -> Tensor:
        """Pictures to a teacher's images: resized first, then re-normalised, then filled up or packed."""
        name = self._affine_names.get(input_key(cfg)[1:])
        scale, shift = (None, None) if name is None else getattr(self, name)
        size = (layout.grid[0] * cfg.patch_size, layout.grid[1] * cfg.patch_size)
        with torch.autocast(images.device.type, enabled=False):
            images = images.float()
            if cfg.scale < 1:
                images = F.interpolate(images, size=size, mode="bicubic", antialias=True)
            if cfg.input_size is not None:
                images = resize_normalize(images, (images.shape[-2], images.shape[-1]), scale, shift)
                images = fit_longest(images, size[0], antialias=size[0] < max(images.shape[-2:]))
            else:
                images = resize_normalize(images, size, scale, shift)
            return images if layout.mosaic is None else layout.mosaic.pack(images)

    def _register_affine(self, cfg: TeacherConfig) -> None:
        """A buffer [2, 3] that undoes ImageNet's normalisation and applies the teacher's; none if equal."""
        _, mean, std = input_key(cfg)
        if (mean, std) == (IMAGENET_MEAN, IMAGENET_STD) or (mean, std) in self._affine_names:
            return
        rows = torch.tensor([IMAGENET_MEAN, IMAGENET_STD, mean, std], dtype=torch.float64)
        old_mean, old_std, new_mean, new_std = rows
        affine = torch.stack([old_std / new_std, (old_mean - new_mean) / new_std]).float()
        self._affine_names[mean, std] = f"_affine_{len(self._affine_names)}"
        self.register_buffer(self._affine_names[mean, std], affine, persistent=False)

    def _check(self, name: str, tokens: Mapping[str, Tensor], rows: int, columns: int) -> None:
        """Shapes against the teacher's grid and the configuration; they are known without waiting for the device."""
        cfg = self.teachers[name].config
        if "patch" in tokens and tokens["patch"].shape[1] != rows * columns:
            raise ValueError(
                f"teacher {name} gives {tokens['patch'].shape[1]} patch tokens for a grid of {rows}x{columns} = "
                f"{rows * columns}; correct teachers.{name}.patch_size ({cfg.patch_size}) or the image size"
            )
        for kind, x in tokens.items():
            assert x.shape[-1] == cfg.num_features, (name, kind, x.shape)


def _grid_multiple(teacher: Teacher) -> int:
    """What rows and columns of the student's grid must be multiples of for this teacher's sake.

    ValueError if the teacher has an input of its own that does not suit its network.
    """
    cfg = teacher.config
    multiple = math.lcm(cfg.grid_multiple, teacher.trunk.grid_multiple)
    step = multiple * cfg.patch_size
    own = [] if cfg.mosaic else [("input_size", side) for side in (cfg.input_size or 0, *cfg.input_sizes)]
    for field, side in (("mosaic", cfg.mosaic), *own):
        if side % step:
            raise ValueError(
                f"teachers.{teacher.name}.{field} is {side}; its network takes multiples of {step} pixels, the nearest "
                f"are {nearest_multiples(side, step)}"
            )
    return 1 if cfg.mosaic or cfg.input_size is not None else multiple


def _build(configs: Mapping[str, TeacherConfig], device: torch.device) -> dict[str, Teacher]:
    """The teachers, in the order of `configs`; file by file, each made ready before the next is read."""
    sources: dict[tuple[str, str], dict[str, TeacherConfig]] = {}
    for name, cfg in configs.items():
        sources.setdefault((cfg.family, cfg.weights), {})[name] = cfg
    teachers: dict[str, Teacher] = {}
    for members in sources.values():
        trunks: dict[str, Trunk] = {}
        built = [build_teacher(name, cfg, trunks) for name, cfg in members.items()]
        for teacher in {t.trunk: t for t in built}.values():
            prepare(teacher.name, teacher.config, teacher.trunk, device)
            if teacher.config.compile:
                teacher.trunk.compile(dynamic=False)
        teachers |= {teacher.name: teacher for teacher in built}
    return {name: teachers[name] for name in configs}


def _features(teacher: Teacher, images: Tensor, patches: SharedPatches | None) -> Any:
    """What a teacher's trunk makes of its input; a compiled one takes nothing that it was not compiled with."""
    shares = patches is not None and isinstance(teacher.trunk, ViTTrunk) and not teacher.config.compile
    return teacher.trunk(images, patches) if shares else teacher.trunk(images)


def _share(tokens: Mapping[str, Tensor], route: Route, whole: Route) -> dict[str, Tensor]:
    """One teacher's rows of the tokens of all images that its trunk has seen."""
    if len(route) == len(whole):
        return dict(tokens)
    own = within(route, whole)
    return {kind: own.take(x) for kind, x in tokens.items()}


def _no_tokens(cfg: TeacherConfig, patches: int, images: Tensor) -> dict[str, Tensor]:
    shapes = {"cls": (0, cfg.num_features), "patch": (0, patches, cfg.num_features)}
    return {kind: images.new_empty(shapes[kind]) for kind in cfg.token_types}
