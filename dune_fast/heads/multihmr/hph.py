"""HPH, Multi-HMR's cross-attention head: one token a person, refined by the others of its image and by its patches.

    q += queries_x[row] + queries_y[column];  context[row, column] += values_x[row] + values_y[column] at people's cells
    token = W [q, initial pose, shape, camera] + position
    each layer: x = x + self-attention(norm(x));  x = x + cross-attention(norm(x), context);  x = x + MLP(norm(x))
    outputs = linear(token) + initial values

People come flat, [P, ...]. Attention runs on [B, slots, ...], where the free slots are masked: the number of people of
each image stays on the device, and nobody's result depends on other images. Module names are those of released files.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dune_fast.heads.multihmr.detection import Cells
from dune_fast.kernels.attention import cross_attention
from dune_fast.kernels.nn.block import LayerNorm

NUM_ROTATIONS = 53
"""Root, 21 body, 15 left hand, 15 right hand, jaw."""

NUM_EXPRESSION = 10
_EPS = 1e-5


class PreNorm(nn.Module):
    """norm(x) into a branch, whose result is added to x."""

    def __init__(self, dim: int, fn: nn.Module) -> None:
        super().__init__()
        self.norm = LayerNorm(dim, eps=_EPS)
        self.fn = fn

    def forward(self, x: Tensor, *args: Tensor) -> Tensor:
        return x + self.fn(self.norm(x), *args)


def _heads(x: Tensor, heads: int) -> Tensor:
    """[B, n, heads x d] -> [B, heads, n, d]"""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


class PeopleAttention(nn.Module):
    """Self-attention among the people of an image."""

    def __init__(self, dim: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_qkv = nn.Linear(dim, 3 * heads * head_dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(heads * head_dim, dim))

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        """x [B, slots, dim], seen [B, 1, slots, slots] bool: query sees key."""
        q, k, v = (_heads(part, self.heads) for part in self.to_qkv(x).chunk(3, -1))
        return self.to_out(F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2).flatten(2))


class PatchAttention(nn.Module):
    """Cross-attention of an image's people to its patches, which are not normalised."""

    def __init__(self, dim: int, context_dim: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_kv = nn.Linear(context_dim, 2 * heads * head_dim, bias=False)
        self.to_q = nn.Linear(dim, heads * head_dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(heads * head_dim, dim))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """x [B, slots, dim], context [B, N, context_dim]."""
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)) for part in (self.to_q(x), *self.to_kv(context).chunk(2, -1))
        )  # [B, n, heads, head_dim]
        return self.to_out(cross_attention(q, k, v).flatten(2))


class FeedForward(nn.Module):
    """Two layers with the exact GELU."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        # 2 and 4 are dropouts in the released files' numbering, which have no weights
        self.net = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Identity(), nn.Linear(hidden, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class PeopleTransformer(nn.Module):
    """Layers of the three branches."""

    def __init__(self, dim: int, context_dim: int, depth: int, heads: int, head_dim: int, hidden: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [
                    PreNorm(dim, PeopleAttention(dim, heads, head_dim)),
                    PreNorm(dim, PatchAttention(dim, context_dim, heads, head_dim)),
                    PreNorm(dim, FeedForward(dim, hidden)),
                ]
            )
            for _ in range(depth)
        )

    def forward(self, x: Tensor, context: Tensor, seen: Tensor) -> Tensor:
        for among, across, forward in self.layers:
            x = forward(across(among(x, seen), context))
        return x


class Decoder(nn.Module):
    """Tokens of people: [B, slots, in] -> [B, slots, dim]."""

    def __init__(self, in_dim: int, dim: int, context_dim: int, depth: int, heads: int, head_dim: int,
                 hidden: int) -> None:  # fmt: skip
        super().__init__()
        self.to_token_embedding = nn.Linear(in_dim, dim)
        self.pos_embedding = nn.Parameter(torch.randn(1, 1, dim))
        self.transformer = PeopleTransformer(dim, context_dim, depth, heads, head_dim, hidden)

    def forward(self, x: Tensor, context: Tensor, seen: Tensor) -> Tensor:
        return self.transformer(self.to_token_embedding(x) + self.pos_embedding, context, seen)


class HPH(nn.Module):
    """The head, see the top of this file.

    Args:
        grid: patches of a side of the image.
        context_dim: channels of a patch with its camera embedding.
        num_betas: shape coefficients.
        depth, heads, head_dim, dim, hidden: of the layers.
    """

    def __init__(self, grid: int, context_dim: int, num_betas: int, depth: int, heads: int, head_dim: int, dim: int,
                 hidden: int) -> None:  # fmt: skip
        super().__init__()
        self.grid = grid
        for name in ("cross_queries_x", "cross_queries_y", "cross_values_x", "cross_values_y"):
            self.register_parameter(name, nn.Parameter(torch.randn(grid, context_dim) * 0.02))
        initial = torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 0.0]).repeat(NUM_ROTATIONS)  # the identity, six numbers each
        self.register_buffer("init_body_pose", initial[None])
        self.register_buffer("init_betas", torch.zeros(1, num_betas))
        self.register_buffer("init_cam", torch.zeros(1, 3))
        self.register_buffer("init_expression", torch.zeros(1, NUM_EXPRESSION))
        in_dim = context_dim + initial.numel() + num_betas + 3
        self.transformer = Decoder(in_dim, dim, context_dim, depth, heads, head_dim, hidden)
        sizes = {"decpose": initial.numel(), "decshape": num_betas, "deccam": 3, "decexpression": NUM_EXPRESSION}
        for name, size in sizes.items():
            layer = nn.Linear(dim, size)
            nn.init.xavier_uniform_(layer.weight, gain=0.01)  # the first prediction is nearly the initial one
            nn.init.zeros_(layer.bias)
            self.add_module(name, layer)

    def forward(self, context: Tensor, cells: Cells) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Six numbers a rotation [P, 318], betas [P, nb], camera [P, 3], expression [P, 10].

        Args:
            context: [B, grid x grid, context_dim].
            cells: of the P people.
        """
        image, row, column, slot, slots, kept = cells
        cell = row * self.grid + column
        query = context[image, cell] + self.cross_queries_x[row] + self.cross_queries_y[column]  # [P, context_dim]
        added = self.cross_values_x[row] + self.cross_values_y[column]
        if kept is not None:
            added = added * kept[:, None]
        context = context.index_put((image, cell), added, accumulate=True)
        initial = torch.cat([self.init_body_pose, self.init_betas, self.init_cam], 1).expand(len(query), -1)
        tokens = torch.cat([query, initial], 1)
        present = torch.ones_like(image, dtype=torch.bool) if kept is None else kept
        shape = (len(context), slots)
        taken = torch.zeros(shape, dtype=torch.bool, device=context.device).index_put((image, slot), present)
        # a free slot sees itself alone: no row of the mask is empty, and no person sees it
        seen = taken[:, None, :] | torch.eye(slots, dtype=torch.bool, device=context.device)
        padded = tokens.new_zeros(*shape, tokens.shape[1]).index_put((image, slot), tokens)
        out = self.transformer(padded, context, seen[:, None])[image, slot]  # [P, dim]
        return (
            self.decpose(out) + self.init_body_pose,
            self.decshape(out) + self.init_betas,
            self.deccam(out) + self.init_cam,
            self.decexpression(out) + self.init_expression,
        )
