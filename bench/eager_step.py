"""The baseline of `python -m bench.step`: one distillation step as plain PyTorch would write it, with the published
structure and none of what this project fuses, keeps or leaves out.

Float32 teachers under bf16 autocast, MASt3R's attention with its matrix in memory and scaled there, q, k and v by
index after a permutation, LayerNorm, LayerScale, GELU and RoPE as operations of their own (RoPE in the tokens' type),
features gathered from all ranks to be standardized, the loss in float32, a Python loop over images and teachers for
dropping, DistributedDataParallel that searches for unused parameters, a loop over parameters for clipping, fused AdamW,
cuDNN's benchmark, every metric read by the host at every step. It runs on the modules of this project, so that both
start from the same weights, and draws the same random numbers for dropping: its losses are the reference of the
curves.

In two places it is kinder than the published code: the angles of RoPE are float32 before they are cast, and no host
read per block looks for the largest position.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dune_fast.distill.normalizers import CONVENTIONS
from dune_fast.distill.standardization import TeacherStatistics
from dune_fast.engine.config import RunConfig
from dune_fast.engine.optimizer import parameter_groups
from dune_fast.kernels.imagenet import IMAGENET_MEAN, IMAGENET_STD
from dune_fast.kernels.nn.block import MLP, Block, SelfAttention
from dune_fast.kernels.nn.vit import VisionTransformer
from dune_fast.kernels.teacher_drop import drop_uniforms
from dune_fast.projectors.base import split_cls
from dune_fast.projectors.transformer import TransformerProjector
from dune_fast.student import Student
from dune_fast.teachers.registry import build_teacher
from dune_fast.teachers.vit import ViTTeacher


def normalize(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """LN(x); autocast makes it float32."""
    return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE2D of q or k [B, H, N, D] in their own type: each half times cosines, plus its turned halves times sines.

    Args:
        x: queries or keys.
        cos, sin: [N, 2, D / 4] in x's type, the rows' angles and the columns'.
    """
    halves = []
    for half, c, s in zip(x.chunk(2, -1), cos.unbind(1), sin.unbind(1), strict=True):
        u, v = half.chunk(2, -1)
        halves.append(half * torch.cat([c, c], -1) + torch.cat([-v, u], -1) * torch.cat([s, s], -1))
    return torch.cat(halves, -1)


def attend(attn: SelfAttention, x: Tensor, rope: tuple[Tensor, Tensor] | None, materialize: bool) -> Tensor:
    """[B, N, D] -> [B, N, D]; `materialize` keeps the N x N weights in memory."""
    qkv = attn.qkv(x).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)  # [3, B, H, N, D / H]
    q, k, v = qkv[0], qkv[1], qkv[2]
    if rope is not None:
        cos, sin = (table.to(q.dtype) for table in rope)
        q, k = turn(q, cos, sin), turn(k, cos, sin)
    if materialize:
        weights = (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5
        out = weights.softmax(-1).to(v.dtype) @ v
    else:
        out = F.scaled_dot_product_attention(q, k, v)
    return attn.proj(out.transpose(1, 2).flatten(2))


def run_block(block: Block, x: Tensor, rope: tuple[Tensor, Tensor] | None, materialize: bool) -> Tensor:
    """x + ls1 * Attention(LN(x)), then x + ls2 * MLP(LN(x)), an operation at a time."""
    mlp: MLP = block.mlp
    x = x + block.ls1(attend(block.attn, normalize(block.norm1, x), rope, materialize))
    return x + block.ls2(mlp.fc2(F.gelu(mlp.fc1(normalize(block.norm2, x)))))


def encode(vit: VisionTransformer, images: Tensor, materialize: bool = False) -> Tensor:
    """Un-normalised tokens after the last block, [B, P + N, D]."""
    x, rope = vit.embed(images), vit.rope(images)
    for block in vit.blocks:
        x = run_block(block, x, rope, materialize)
    return x


class EagerTeacher(nn.Module):
    """One frozen ViT teacher in float32. images [B, 3, H, W], the student's -> {"cls": [B, C], "patch": [B, N, C]}."""

    def __init__(self, teacher: ViTTeacher, student_patch_size: int) -> None:
        super().__init__()
        self.vit, self.cfg = teacher.trunk.vit, teacher.config
        self.student_patch_size = student_patch_size
        self.materialize = self.vit.cfg.pos_embed == "rope2d"
        for name, values in (("old_mean", IMAGENET_MEAN), ("old_std", IMAGENET_STD)):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1))
        self.register_buffer("new_mean", torch.tensor(self.cfg.mean).view(3, 1, 1))
        self.register_buffer("new_std", torch.tensor(self.cfg.std).view(3, 1, 1))
        self.requires_grad_(False)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        if self.cfg.patch_size != self.student_patch_size:
            size = [side // self.student_patch_size * self.cfg.patch_size for side in images.shape[-2:]]
            images = F.interpolate(images, size=size, mode="bicubic", align_corners=True)
        images = (images * self.old_std + self.old_mean - self.new_mean) / self.new_std
        cls, _, patches = self.vit.split(normalize(self.vit.norm, encode(self.vit, images, self.materialize)))
        tokens = {"cls": cls, "patch": patches}
        return {kind: tokens[kind] for kind in self.cfg.token_types}


class EagerStudent(nn.Module):
    """Encoder and transformer projectors, an operation at a time, on the weights of a `Student`."""

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.student = student

    def forward(self, images: Tensor) -> dict[str, dict[str, Tensor]]:
        encoder = self.student.encoder
        tokens = encode(encoder, images)
        tokens = torch.cat([tokens[:, :1], tokens[:, encoder.num_prefix_tokens :]], dim=1)
        projections = {}
        for name, projector in self.student.projectors.named_children():
            x = tokens
            for block in projector.blocks:
                x = run_block(block, x, None, materialize=False)
            projections[name] = split_cls(projector.linear(x))
        return projections


def check_plain(cfg: RunConfig, student: Student, teachers: dict[str, object]) -> None:
    """ValueError where the baseline does not know the published structure."""
    others = [
        name for name, teacher in teachers.items()
        if not isinstance(teacher, ViTTeacher) or teacher.network is not VisionTransformer
    ]  # fmt: skip
    if others:
        raise ValueError(f"the eager baseline has plain ViT teachers only; {', '.join(others)} is of another family")
    if not all(isinstance(p, TransformerProjector) for p in student.projectors.children()):
        raise ValueError(
            f"the eager baseline has transformer projectors only, projector.kind is {cfg.projector.kind!r}"
        )
    if cfg.objective.sharing != "full" or cfg.standardization.convention != "dune":
        raise ValueError("the eager baseline has objective.sharing=full and standardization.convention=dune only")
    if cfg.optimizer.name != "adamw":
        raise ValueError(f"the eager baseline has optimizer.name=adamw only, not {cfg.optimizer.name}")


@contextmanager
def cudnn_benchmark() -> Iterator[None]:
    """cuDNN measures its convolutions; other variants of the process keep what they had."""
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


class EagerStep:
    """A whole step: forward, loss, backward, clipping, update, metrics read by the host.

    Args:
        cfg: of the run; its teachers are built anew, in float32.
        student: trained in place.
        device: where everything goes.
        dtype: of autocast; None for float32.
    """

    def __init__(self, cfg: RunConfig, student: Student, device: torch.device, dtype: torch.dtype | None) -> None:
        teachers = {name: build_teacher(name, teacher) for name, teacher in cfg.teachers.items()}
        check_plain(cfg, student, teachers)
        self.cfg, self.device, self.dtype = cfg, device, dtype
        patch = cfg.student.patch_size
        self.teachers = {name: EagerTeacher(teacher, patch).to(device).eval() for name, teacher in teachers.items()}
        self.student = DistributedDataParallel(
            EagerStudent(student.to(device)), device_ids=[device] if device.type == "cuda" else None,
            find_unused_parameters=True,
        )  # fmt: skip
        optimizer = cfg.optimizer
        groups = parameter_groups(student, optimizer.weight_decay)
        self.optimizer = torch.optim.AdamW(
            groups, lr=0.0, betas=tuple(optimizer.betas), eps=optimizer.eps, fused=True
        )
        self.parameters = [p for p in student.parameters() if p.requires_grad]
        self.statistics = TeacherStatistics(cfg.teacher_features).to(device)

    @cudnn_benchmark()
    def __call__(self, images: Tensor, positions: Tensor, step: int, learning_rate: float, momentum: float) -> float:
        """One step; returns the loss, as the host has read it.

        Args:
            images: [B, 3, H, W], ImageNet-normalised.
            positions: int64 [B], global index of each image.
            step: of the run.
            learning_rate, momentum: of this step.
        """
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            projections = self.student(images)
            with torch.no_grad():
                features = {name: teacher(images) for name, teacher in self.teachers.items()}
        losses, parts = self._losses(projections, features, momentum)
        loss = self._drop(losses, positions, step)
        loss.backward()
        self._clip()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for value in parts:
            value.item()
        return loss.item()

    def _losses(self, projections: dict, features: dict, momentum: float) -> tuple[Tensor, list[Tensor]]:
        """L float32 [T, B], and the metrics."""
        losses, parts, eps = [], [], CONVENTIONS["dune"]
        for name, tokens in features.items():
            per_token = []
            for token, target in tokens.items():
                with torch.no_grad():
                    target = target.float()
                    rows = self._gather(target).flatten(0, -2)
                    std, mean = torch.std_mean(rows, 0)
                    running = getattr(self.statistics, name).normalizers[token]
                    running.mean.lerp_(mean, momentum)
                    running.std.lerp_(std, momentum)
                    target = (target - mean) / std.clamp_min(eps)
                found = projections[name][token].float()
                cosine = 1 - F.cosine_similarity(found, target, dim=-1)
                smooth = F.smooth_l1_loss(found, target, reduction="none").mean(-1)
                value = 0.5 * cosine + 0.5 * smooth
                per_token.append(value.mean(1) if value.ndim == 2 else value)
                parts += [cosine.mean(), smooth.mean(), per_token[-1].mean()]
            losses.append(torch.stack(per_token).mean(0))
        return torch.stack(losses), parts

    def _gather(self, features: Tensor) -> Tensor:
        """Whole features of all ranks [ranks * B, ..., C]."""
        gathered = [torch.ones_like(features) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, features.contiguous())
        return torch.cat(gathered)

    def _drop(self, losses: Tensor, positions: Tensor, step: int) -> Tensor:
        """The hardest teacher of each image and a random part of the others, by a loop over images and teachers."""
        probability = self.cfg.objective.drop_probability
        draws = drop_uniforms(self.cfg.train.seed, step, positions.cpu(), len(losses)).tolist()
        with torch.no_grad():
            weights = []
            for b in range(losses.shape[1]):
                kept, hardest = torch.ones_like(losses[:, b]), losses[:, b].argmax()
                for t in range(len(losses)):
                    if t != hardest and draws[t][b] < probability:  # the host reads each comparison
                        kept[t] = 0
                weights.append(kept)
            weights = torch.stack(weights).t()
            if not torch.all(weights.sum(0) >= 1):
                raise RuntimeError("an image has lost all its teachers")
            weights.div_(weights.sum())
        return (weights * losses).sum()

    def _clip(self) -> None:
        limit = self.cfg.optimizer.clip_per_parameter
        for parameter in self.parameters:
            scale = limit / (parameter.grad.norm() + 1e-6)
            if limit > 0 and scale < 1:  # the host reads a value for every parameter
                parameter.grad.mul_(scale)
