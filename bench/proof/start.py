"""A narrower student's first weights out of a ViT teacher, in closed form.

Every token x of the teacher is to be P x in the student, P [D', D] the principal directions of the teacher's normalised
tokens over all blocks, laid so that every P x has mean 0: then the student's LayerNorm divides P x by its own deviation
and subtracts nothing. Block by block, with the student's own tokens as input, each linear layer is a ridge regression:

    qkv   -> q, k, v of the teacher's heads that explain most of its attention's output
    proj  -> P (teacher's tokens after attention) - student's tokens
    fc1   -> the teacher's hidden units that write most into P
    fc2   -> P (teacher's tokens after the MLP) - student's tokens

so that a layer also corrects what the ones before it lost. Blocks beyond `blocks` stay as drawn.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from dune_fast.kernels.nn.block import LAYER_NORM_EPS
from dune_fast.kernels.nn.vit import VisionTransformer, resize_positions

State = Mapping[str, Tensor]


def ridge(x: Tensor, y: Tensor, penalty: float = 1e-3) -> tuple[Tensor, Tensor]:
    """Weights [q, p] and bias [q] of y [m, q] from x [m, p]; the penalty is in units of the inputs' mean variance."""
    x_mean, y_mean = x.mean(0), y.mean(0)
    x, y = (x - x_mean).double(), (y - y_mean).double()
    gram = x.T @ x
    gram.diagonal().add_(penalty * gram.diagonal().mean())
    weight = torch.linalg.solve(gram, x.T @ y).T.float()
    return weight, y_mean - weight @ x_mean


def _norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=LAYER_NORM_EPS)


def _heads(qkv: Tensor, heads: int) -> Tensor:
    """[n, T, 3 H C] -> attention's output [n, T, H C]."""
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class _TeacherBlock:
    """The steps of a block of the teacher, on its own tokens."""

    def __init__(self, state: State, index: int, heads: int) -> None:
        self.part = {key.removeprefix(f"blocks.{index}."): value for key, value in state.items()}
        self.heads = heads

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.part[f"{name}.weight"], self.part[f"{name}.bias"])

    def norm(self, name: str, x: Tensor) -> Tensor:
        return _norm(x) * self.part[f"{name}.weight"] + self.part[f"{name}.bias"]

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Everything that the regressions ask for; `out` is what the block gives."""
        qkv = self.linear("attn.qkv", self.norm("norm1", x))
        heads = _heads(qkv, self.heads)
        middle = x + self.part["ls1.gamma"] * self.linear("attn.proj", heads)
        before = self.linear("mlp.fc1", self.norm("norm2", middle))
        out = middle + self.part["ls2.gamma"] * self.linear("mlp.fc2", F.gelu(before))
        return {"qkv": qkv, "heads": heads, "middle": middle, "before": before, "out": out}


def _embed(state: State, images: Tensor) -> Tensor:
    """Images [n, 3, S, S] to the teacher's tokens before the first block, without registers."""
    weight = state["patch_embed.proj.weight"]
    patches = F.conv2d(images, weight, state["patch_embed.proj.bias"], stride=weight.shape[-1])
    tokens = patches.flatten(2).transpose(1, 2)
    cls = state["cls_token"].expand(len(images), -1, -1)
    return torch.cat([cls, tokens], 1) + resize_positions(state["pos_embed"], *patches.shape[-2:], offset=0.0)


def projection(state: State, heads: int, blocks: int, images: Tensor, channels: int) -> Tensor:
    """P of the top of this file, [channels, D], divided by the tokens' typical length after the last block."""
    x = _embed(state, images)
    moment = torch.zeros(x.shape[-1], x.shape[-1], dtype=torch.float64)
    for i in range(blocks):
        x = _TeacherBlock(state, i, heads).forward(x)["out"]
        z = _norm(x).flatten(0, 1).double()
        moment += z.T @ z
    directions = torch.linalg.eigh(moment).eigenvectors[:, -(channels - 1) :].flip(1)  # [D, channels - 1]
    # an orthonormal basis of what is orthogonal to (1, ..., 1)
    basis = torch.linalg.qr(torch.cat([torch.ones(channels, 1), torch.eye(channels)[:, 1:]], 1).double()).Q[:, 1:]
    p = (basis @ directions.T).float()
    return p / (x @ p.T).std()


def best_heads(outputs: Tensor, target: Tensor, heads: int, count: int) -> list[int]:
    """The heads whose outputs [m, H C] together explain most of the target [m, q]."""
    x, y = (outputs - outputs.mean(0)).double(), (target - target.mean(0)).double()
    gram, cross, size = x.T @ x, x.T @ y, outputs.shape[1] // heads

    def explained(chosen: tuple[int, ...]) -> float:
        rows = torch.cat([torch.arange(h * size, (h + 1) * size) for h in chosen])
        part = gram[rows][:, rows]
        part.diagonal().add_(1e-3 * part.diagonal().mean())
        return (cross[rows] * torch.linalg.solve(part, cross[rows])).sum().item()

    return list(max(itertools.combinations(range(heads), count), key=explained))


@torch.no_grad()
def start_from_teacher(
    student: VisionTransformer, state: State, heads: int, images: Tensor, blocks: int
) -> dict[str, float]:
    """Fills the student's embedding and its first `blocks` blocks.

    Args:
        student: with weights as drawn, a cls token, and a LayerNorm at its end.
        state: of a ViT with cls token, LayerScale and no registers.
        heads: of the teacher.
        images: ImageNet-normalised [n, 3, S, S] that the regressions are made on.
        blocks: of the teacher, from the first.

    Returns:
        share of P x that is not explained after each block, over patches and cls.
    """
    cfg = student.cfg
    p = projection(state, heads, blocks, images, cfg.embed_dim)
    weight, bias = state["patch_embed.proj.weight"], state["patch_embed.proj.bias"]
    student.patch_embed.proj.weight.copy_(torch.einsum("ed,dcij->ecij", p, weight))
    student.patch_embed.proj.bias.copy_(p @ bias)
    student.cls_token.copy_(state["cls_token"] @ p.T)
    side = cfg.image_size // cfg.patch_size
    student.pos_embed.copy_(resize_positions(state["pos_embed"], side, side, offset=0.0) @ p.T)
    prefix = 1 + cfg.num_registers
    x, tokens = _embed(state, images), student.embed(images).float()

    def taught(values: Tensor) -> Tensor:
        """[n, P + N, C] -> rows of cls and patches, [m, C]."""
        return torch.cat([values[:, :1], values[:, prefix:]], 1).flatten(0, 1)

    def fit(layer: torch.nn.Linear, inputs: Tensor, target: Tensor) -> Tensor:
        weight, bias = ridge(taught(inputs), target)
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
        return layer(inputs)

    errors = {}
    for i in range(blocks):
        block, teacher = student.blocks[i], _TeacherBlock(state, i, heads).forward(x)
        for scale in (block.ls1, block.ls2):
            if hasattr(scale, "gamma"):
                scale.gamma.fill_(1.0)
        written = ((teacher["middle"] - x) @ p.T).flatten(0, 1)
        chosen = best_heads(teacher["heads"].flatten(0, 1), written, heads, cfg.num_heads)
        qkv = teacher["qkv"].unflatten(-1, (3, heads, -1))[:, :, :, chosen].flatten(2).flatten(0, 1)
        attended = _heads(fit(block.attn.qkv, _norm(tokens), qkv), cfg.num_heads)
        tokens = tokens + fit(block.attn.proj, attended, (teacher["middle"] @ p.T).flatten(0, 1) - taught(tokens))
        hidden = F.gelu(teacher["before"]).flatten(0, 1)
        columns = state[f"blocks.{i}.ls2.gamma"][:, None] * state[f"blocks.{i}.mlp.fc2.weight"]
        weight = hidden.var(0) * (p @ columns).square().sum(0)
        units = weight.topk(block.mlp.fc1.out_features).indices.sort().values
        before = fit(block.mlp.fc1, _norm(tokens), teacher["before"].flatten(0, 1)[:, units])
        wanted = (teacher["out"] @ p.T).flatten(0, 1)
        tokens = tokens + fit(block.mlp.fc2, F.gelu(before), wanted - taught(tokens))
        x = teacher["out"]
        lost = (wanted - taught(tokens)).square().sum() / (wanted - wanted.mean(0)).square().sum()
        errors[f"block {i}"] = lost.item()
    return errors
