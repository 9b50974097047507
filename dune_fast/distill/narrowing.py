"""A narrower student's first weights out of a ViT teacher, in closed form.

Every token x of the teacher is to be P x in the student, P [D', D] the principal directions of the teacher's normalised
tokens over all blocks, laid so that every P x has mean 0: then the student's LayerNorm divides P x by its own deviation
and subtracts nothing. Block by block, with the student's own tokens as input, each linear layer is a ridge regression:

    qkv   -> q, k, v of the teacher's heads that explain most of its attention's output
    proj  -> P (teacher's tokens after attention) - student's tokens
    fc1   -> the teacher's hidden units that write most into P
    fc2   -> P (teacher's tokens after the MLP) - student's tokens

so that a layer also corrects what the ones before it lost. Blocks beyond `blocks` stay as drawn: with a small
LayerScale they pass tokens on.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dune_fast.kernels.nn.block import LAYER_NORM_EPS, Block
from dune_fast.kernels.nn.vit import VisionTransformer, ViTConfig, resize_positions


class NarrowingError(ValueError):
    """A student cannot be made from this teacher."""


def check_pair(student: ViTConfig, teacher: ViTConfig) -> None:
    """NarrowingError unless `narrow` can make the one from the other."""
    sides = {"student": student, "teacher": teacher}
    faults = [f"the {who} has no cls token" for who, cfg in sides.items() if not cfg.cls_token]
    faults += [f"the {who} has no position table" for who, cfg in sides.items() if cfg.pos_embed != "learned"]
    faults += [f"the {who}'s MLP is {cfg.mlp}, not gelu" for who, cfg in sides.items() if cfg.mlp != "gelu"]
    if student.patch_size != teacher.patch_size:
        faults.append(f"its patch size is {teacher.patch_size}, the student's {student.patch_size}")
    if student.embed_dim > teacher.embed_dim:
        faults.append(f"it has {teacher.embed_dim} channels, the student {student.embed_dim}, which is more")
    sizes = [cfg.embed_dim // cfg.num_heads for cfg in (student, teacher)]
    if sizes[0] != sizes[1]:
        faults.append(f"its attention heads have {sizes[1]} channels, the student's {sizes[0]}")
    if faults:
        raise NarrowingError("; ".join(faults))


def ridge(x: Tensor, y: Tensor, penalty: float = 1e-3) -> tuple[Tensor, Tensor]:
    """Weights [q, p] and bias [q] of y [m, q] from x [m, p]; the penalty is in units of the inputs' mean variance."""
    x_mean, y_mean = x.mean(0), y.mean(0)
    x, y = (x - x_mean).double(), (y - y_mean).double()
    weight = _solve(x.T @ x, x.T @ y, penalty).T.float()
    return weight, y_mean - weight @ x_mean


def _solve(gram: Tensor, cross: Tensor, penalty: float) -> Tensor:
    """(gram + penalty * its mean diagonal)^-1 cross; of inputs that are all 0, zeros."""
    scale = gram.diagonal().mean().clamp_min(torch.finfo(gram.dtype).tiny)
    return torch.linalg.solve(gram + penalty * scale * torch.eye(len(gram)).to(gram), cross)


def _norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=LAYER_NORM_EPS)


def _heads(qkv: Tensor, heads: int) -> Tensor:
    """[n, T, 3 H C] -> attention's output [n, T, H C]."""
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def _steps(block: Block, x: Tensor, heads: int) -> dict[str, Tensor]:
    """Everything within a block of the teacher that the regressions ask for; `out` is what the block gives."""
    qkv = block.attn.qkv(block.norm1(x))
    attended = _heads(qkv, heads)
    middle = x + _gamma(block.ls1) * block.attn.proj(attended)
    before = block.mlp.fc1(block.norm2(middle))
    out = middle + _gamma(block.ls2) * block.mlp.fc2(F.gelu(before))
    return {"qkv": qkv, "heads": attended, "middle": middle, "before": before, "out": out}


def _gamma(scale: nn.Module) -> Tensor | float:
    """LayerScale's gains, 1 where there is none."""
    return getattr(scale, "gamma", 1.0)


def projection(teacher: VisionTransformer, blocks: int, images: Tensor, channels: int) -> Tensor:
    """P of the top of this file, [channels, D], divided by the tokens' typical length after the last block."""
    x = teacher.embed(images)
    moment = torch.zeros(x.shape[-1], x.shape[-1], dtype=torch.float64, device=x.device)
    for block in teacher.blocks[:blocks]:
        x = _steps(block, x, teacher.cfg.num_heads)["out"]
        z = _norm(x).flatten(0, 1).double()
        moment += z.T @ z
    directions = torch.linalg.eigh(moment).eigenvectors[:, -(channels - 1) :].flip(1)  # [D, channels - 1]
    # an orthonormal basis of what is orthogonal to (1, ..., 1)
    eye = torch.eye(channels, dtype=torch.float64, device=x.device)
    basis = torch.linalg.qr(torch.cat([torch.ones_like(eye[:, :1]), eye[:, 1:]], 1)).Q[:, 1:]
    p = (basis @ directions.T).float()
    return p / (x @ p.T).std()


def best_heads(outputs: Tensor, target: Tensor, heads: int, count: int) -> list[int]:
    """The heads whose outputs [m, H C] together explain most of the target [m, q]."""
    x, y = (outputs - outputs.mean(0)).double(), (target - target.mean(0)).double()
    gram, cross, size = x.T @ x, x.T @ y, outputs.shape[1] // heads

    def explained(chosen: tuple[int, ...]) -> float:
        rows = torch.cat([torch.arange(h * size, (h + 1) * size) for h in chosen]).to(x.device)
        return (cross[rows] * _solve(gram[rows][:, rows], cross[rows], 1e-3)).sum().item()

    return list(max(itertools.combinations(range(heads), count), key=explained))


@torch.no_grad()
def narrow(student: VisionTransformer, teacher: VisionTransformer, images: Tensor, blocks: int) -> list[float]:
    """Fills the student's embedding and its first `blocks` blocks.

    Args:
        student: with its drawn weights, float32, of a pair that `check_pair` accepts.
        teacher: float32.
        images: ImageNet-normalised [n, 3, H, W] that the regressions are made on. A block of the teacher's tokens is
            held for all of them, 40 n T D bytes for T tokens of D channels.
        blocks: of the teacher, from its first; at most those of either.

    Returns:
        share of P x that is not explained after each block, over patches and cls.

    Raises:
        NarrowingError: see `check_pair`.
    """
    cfg, heads = student.cfg, teacher.cfg.num_heads
    check_pair(cfg, teacher.cfg)
    p = projection(teacher, blocks, images, cfg.embed_dim)
    embed = teacher.patch_embed.proj
    student.patch_embed.proj.weight.copy_(torch.einsum("ed,dcij->ecij", p, embed.weight))
    student.patch_embed.proj.bias.copy_(p @ embed.bias)
    student.cls_token.copy_(teacher.cls_token @ p.T)
    side = cfg.image_size // cfg.patch_size
    student.pos_embed.copy_(resize_positions(teacher.pos_embed, side, side, offset=0.0) @ p.T)
    x, tokens = teacher.embed(images).float(), student.embed(images).float()

    def rows(values: Tensor, of: VisionTransformer) -> Tensor:
        """[n, P + N, C] -> those of cls and patches, [m, C]."""
        return torch.cat([values[:, :1], values[:, of.num_prefix_tokens :]], 1).flatten(0, 1)

    def fit(layer: nn.Linear, inputs: Tensor, target: Tensor) -> Tensor:
        weight, bias = ridge(rows(inputs, student), target)
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
        return F.linear(inputs, layer.weight, layer.bias)

    lost = []
    for block, theirs in zip(student.blocks[:blocks], teacher.blocks[:blocks], strict=True):
        whole = _steps(theirs, x, heads)
        steps = {name: rows(value, teacher) for name, value in whole.items()}
        for scale in (block.ls1, block.ls2):
            if hasattr(scale, "gamma"):
                scale.gamma.fill_(1.0)
        chosen = best_heads(steps["heads"], (steps["middle"] - rows(x, teacher)) @ p.T, heads, cfg.num_heads)
        qkv = steps["qkv"].unflatten(-1, (3, heads, -1))[:, :, chosen].flatten(1)
        attended = _heads(fit(block.attn.qkv, _norm(tokens), qkv), cfg.num_heads)
        tokens = tokens + fit(block.attn.proj, attended, steps["middle"] @ p.T - rows(tokens, student))
        columns = torch.as_tensor(_gamma(theirs.ls2)).reshape(-1, 1).to(p) * theirs.mlp.fc2.weight
        written = F.gelu(steps["before"]).var(0) * (p @ columns).square().sum(0)
        units = written.topk(block.mlp.fc1.out_features).indices.sort().values
        before = fit(block.mlp.fc1, _norm(tokens), steps["before"][:, units])
        wanted = steps["out"] @ p.T
        tokens = tokens + fit(block.mlp.fc2, F.gelu(before), wanted - rows(tokens, student))
        x = whole["out"]
        missed = (wanted - rows(tokens, student)).square().sum()
        lost.append((missed / (wanted - wanted.mean(0)).square().sum()).item())
    return lost
