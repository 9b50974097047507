"""Any frozen network that can be evaluated, behind one interface: tokens of ImageNet-normalised images.

A run, a checkpoint, an export, a weights file, a published name, the name of a teacher; a teacher's projector of a run.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dune_fast.engine.devices import autocast_dtype
from dune_fast.evaluate.exported import load_exported
from dune_fast.heads.head import HeadError
from dune_fast.heads.linear.layers import Layer, blocks_read
from dune_fast.kernels.nn.vit import VisionTransformer
from dune_fast.load import PUBLISHED, PUBLISHED_ENCODERS, ModelNotFoundError, load_encoder, load_model
from dune_fast.teachers.config import IMAGENET_MEAN, IMAGENET_STD, TeacherConfig
from dune_fast.teachers.ensemble import TeacherEnsemble
from dune_fast.teachers.vit import ViTTeacher


@dataclass(frozen=True)
class FrozenModel:
    """A network in evaluation mode."""

    name: str
    """As the user has named it."""
    module: nn.Module
    """What holds the weights."""
    encode: Callable[[Tensor], list[Layer]]
    """ImageNet-normalised images [B, 3, H, W], sides multiples of `multiple` -> tokens of each block that is read."""
    patch_size: int
    """Pixels of a patch."""
    multiple: int
    """Sides of images must be multiples of this."""
    channels: int
    """Of a patch token."""
    cls_channels: int
    """Of the cls token, of RADIO's summaries together; 0 where there is none."""
    image_size: int
    """Side of the images that it was made for."""
    reading: dict[str, Any]
    """Everything beside weights and images that features depend on."""

    @property
    def has_cls(self) -> bool:
        """Whether there is a cls token."""
        return self.cls_channels > 0

    def padded(self, images: Tensor) -> list[Layer]:
        """As `encode`, of images of any size: zeros around them, the smaller half left and above.

        Returns:
            Tokens of the padded image: patches [B, C, ceil(H / multiple) * multiple / patch, ...].
        """
        pads = []
        for size in (images.shape[-1], images.shape[-2]):
            missing = -size % self.multiple
            pads += [missing // 2, missing - missing // 2]
        return self.encode(F.pad(images, pads))

    @functools.cached_property
    def weights_sha256(self) -> str:
        """Of its tensors, so a file and its copy by another name are the same."""
        return tensors_sha256(self.module)


def tensors_sha256(module: nn.Module) -> str:
    """SHA-256 over names, types, shapes and values of a module's tensors."""
    digest = hashlib.sha256()
    for name, x in sorted(module.state_dict().items()):
        digest.update(f"{name} {x.dtype} {list(x.shape)}\n".encode())
        values = x.detach().cpu().contiguous()
        digest.update(values.reshape(-1).view(torch.uint8).numpy() if values.numel() else np.empty(0, np.uint8))
    return digest.hexdigest()


def open_model(
    name: str,
    device: torch.device,
    *,
    teacher: Callable[[str], TeacherConfig] | None = None,
    projector: str = "",
    norm: bool = True,
    layers: int = 1,
    last_blocks: bool = False,
    precision: str = "auto",
) -> FrozenModel:
    """Loads a network.

    Args:
        name: a path or a published name as `dune_fast.load_encoder` takes it, the folder of an export to timm or
            transformers, or a teacher's name.
        device: where it goes.
        teacher: configuration of a teacher by its name; ValueError if there is none.
        projector: of a student, the teacher whose projector's output is read, by its name or an unambiguous part of it.
        norm: whether the final norm is applied.
        layers: how many blocks are read, 1 (the last) or 4.
        last_blocks: whether four are the last ones, instead of evenly spread ones.
        precision: of the products, see `TrainConfig.precision`.

    Raises:
        ModelNotFoundError: no such file, run or name.
        TeacherWeightsError: the file is damaged or another model's.
        ValueError: layers or a projector that the network has not.
    """
    if layers not in (1, 4):
        raise ValueError(f"{layers} layers: the heads read 1 block (the last) or 4")
    dtype = autocast_dtype(precision, device)
    how: dict[str, Any] = {"norm": norm, "layers": layers, "precision": str(dtype or torch.float32)}
    how |= {"projector": projector} | ({"last_blocks": True} if last_blocks else {})
    if projector:
        if layers > 1:
            raise ValueError("--layers 4 reads blocks of an encoder; a projector's output is one layer: leave one out")
        return _projector(name, projector, device, dtype, how)
    found = _teacher_config(name, teacher)
    if found is not None:
        if layers > 1:
            raise ValueError(f"--layers 4 is for encoders; {name} is read as a teacher: leave it out, or name a file")
        return _teacher(name, found, device, dtype, how)
    try:
        encoder = load_exported(Path(name).expanduser()) or load_encoder(name)
    except ModelNotFoundError as error:
        raise ModelNotFoundError(f"{error}; or a teacher's name (`dune-fast teachers list`)") from error
    return frozen_encoder(name, encoder.to(device), dtype, how)


def frozen_encoder(
    name: str, encoder: VisionTransformer, dtype: torch.dtype | None = None, how: dict[str, Any] | None = None
) -> FrozenModel:
    """An encoder that is loaded already; see `open_model` for `how`."""
    how = {"norm": True, "layers": 1, "precision": str(dtype or torch.float32), "projector": ""} if how is None else how
    try:
        blocks = blocks_read(len(encoder.blocks), how["layers"], how.get("last_blocks", False))
    except HeadError as error:
        raise HeadError(f"{name}: {error}") from error
    device = next(encoder.parameters()).device
    own, imagenet = (torch.tensor(x, device=device).view(2, 3, 1, 1) for x in (
        [encoder.mean, encoder.std], [IMAGENET_MEAN, IMAGENET_STD],
    ))  # fmt: skip
    same = torch.equal(own, imagenet)

    @torch.no_grad()
    def encode(images: Tensor) -> list[Layer]:
        if not same:
            images = (images * imagenet[1] + imagenet[0] - own[0]) / own[1]
        rows, columns = encoder.grid(images)
        with torch.autocast(images.device.type, dtype, enabled=dtype is not None):
            outputs = encoder.block_outputs(images, blocks)
            read = [encoder.normed_parts(outputs[i], i) if how["norm"] else encoder.split(outputs[i]) for i in blocks]
        return [_layer(patch, cls, rows, columns) for cls, _, patch in read]

    patch, reading = encoder.cfg.patch_size, how | {"blocks": list(blocks), "architecture": asdict(encoder.cfg)}
    reading |= {"mean": list(encoder.mean), "std": list(encoder.std)}
    size = encoder.transform.image_size
    return FrozenModel(
        name, encoder, encode, patch, patch, encoder.cfg.embed_dim, encoder.cls_channels, size, reading
    )


def _layer(patch: Tensor, cls: Tensor | None, rows: int, columns: int) -> Layer:
    """float32 [B, C, h, w] and [B, C] of tokens [B, N, C] and [B, C]."""
    maps = patch.float().transpose(1, 2).unflatten(2, (rows, columns))
    return maps, None if cls is None else cls.float()


def _teacher_config(name: str, teacher: Callable[[str], TeacherConfig] | None) -> TeacherConfig | None:
    """None for what is no teacher: paths come first, then DUNE's and UNIC's published names."""
    if teacher is None or Path(name).expanduser().exists() or name in (*PUBLISHED, *PUBLISHED_ENCODERS):
        return None
    try:
        return teacher(name)
    except ValueError:
        if "/" in name or "." in name:
            return None
        raise


def _teacher(
    name: str, cfg: TeacherConfig, device: torch.device, dtype: torch.dtype | None, how: dict[str, Any]
) -> FrozenModel:
    whole = replace(cfg, norm=cfg.norm and how["norm"], scale=1.0)
    ensemble = TeacherEnsemble({name: whole}, cfg.patch_size, dtype, device)
    (teacher,) = ensemble.teachers.values()
    if not how["norm"] and not isinstance(teacher, ViTTeacher):
        how = how | {"norm": True}  # nothing but a ViT has a norm to leave out

    def encode(images: Tensor) -> list[Layer]:
        tokens = ensemble(images)[name]
        if "patch" not in tokens:
            raise ValueError(f"the teacher {name} is configured to give no patch tokens: token_types={cfg.token_types}")
        return [_layer(tokens["patch"], tokens.get("cls"), *ensemble.grid(images))]

    size = cfg.image_size or 512 // ensemble.size_multiple * ensemble.size_multiple
    reading = how | {"teacher": asdict(teacher.config)}
    return FrozenModel(
        name, ensemble, encode, cfg.patch_size, ensemble.size_multiple, cfg.num_features,
        cfg.num_features * ("cls" in cfg.token_types), size, reading,
    )  # fmt: skip


def _projector(
    name: str, wanted: str, device: torch.device, dtype: torch.dtype | None, how: dict[str, Any]
) -> FrozenModel:
    model = load_model(name, device)
    matching = [t for t in model.teachers if t == wanted] or [t for t in model.teachers if wanted in t]
    if len(matching) != 1:
        raise ValueError(
            f"--projector {wanted}: {'several' if matching else 'none'} of the teachers of {name} match; it has the "
            f"projectors of {', '.join(model.teachers)}"
        )
    (chosen,) = matching
    model.student.compute_in(dtype)
    encoder = model.encoder

    @torch.no_grad()
    def encode(images: Tensor) -> list[Layer]:
        tokens = model.projections(images)[chosen]
        if "patch" not in tokens:
            raise ValueError(f"the projector of {chosen} gives no patch tokens; choose another one")
        return [_layer(tokens["patch"], tokens.get("cls"), *encoder.grid(images))]

    probe = torch.zeros(1, 3, 2 * encoder.patch_size, 2 * encoder.patch_size, device=device)
    ((patch, cls),) = encode(probe)
    return FrozenModel(
        f"{name}, projector of {chosen}", model, encode, encoder.patch_size, encoder.patch_size, patch.shape[1],
        0 if cls is None else cls.shape[1], encoder.transform.image_size, how | {"projector": chosen},
    )  # fmt: skip


def fingerprint(values: dict[str, Any]) -> str:
    """SHA-256 of a dictionary, in hexadecimal."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


def check_size(model: FrozenModel, size: int | None) -> int:
    """The side of square images; the model's own if none is asked for. ValueError if it is no multiple of the patch."""
    size = model.image_size if size is None else size
    if size < 1 or size % model.multiple:
        below = size // model.multiple * model.multiple
        near: Sequence[int] = [n for n in (below, below + model.multiple) if n > 0]
        raise ValueError(
            f"--size {size}: sides of images for {model.name} are multiples of {model.multiple}; the nearest are "
            f"{' and '.join(map(str, near))}"
        )
    return size
