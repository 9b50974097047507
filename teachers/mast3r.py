"""MASt3R's encoder: RoPE2D instead of a position table, no cls token, images scaled to [-1, 1].

Leroy et al., "Grounding Image Matching in 3D with MASt3R", ECCV 2024. The decoder and the heads are ignored. The
container names the architecture in a string that its own code evaluates; here it is parsed.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from dune_fast.teachers.containers import TeacherWeightsError
from dune_fast.teachers.vit import ViTTeacher

_HALF = (0.5, 0.5, 0.5)
_NAMES = {"enc_blocks.": "blocks.", "enc_norm.": "norm.", "patch_embed.": "patch_embed."}
_ROPE = "RoPE100"


class MASt3RTeacher(ViTTeacher):
    """Patch tokens after the encoder's norm."""

    token_types = ("patch",)
    statistics = (_HALF, _HALF)
    pos_embed = "rope2d"

    @classmethod
    def recognizes(cls, keys: Collection[str]) -> bool:
        return any(key.startswith("enc_blocks.") for key in keys)

    @classmethod
    def convert(cls, state: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
        return {
            new + key.removeprefix(old): value
            for key, value in state.items()
            for old, new in _NAMES.items()
            if key.startswith(old)
        }

    @classmethod
    def heads(cls, content: Mapping[str, Any], path: Path) -> int | None:
        text = getattr(content.get("args"), "model", None)
        if text is None:
            return None
        options = parse_call(text, path)
        if (positions := options.get("pos_embed", _ROPE)) != _ROPE:
            raise TeacherWeightsError(f"{path} was trained with positions {positions!r}; {_ROPE} is supported")
        heads = options.get("enc_num_heads")
        if heads is not None and (type(heads) is not int or heads < 1):
            raise TeacherWeightsError(f"{path} says enc_num_heads={heads!r}, which is no number of attention heads")
        return heads


class _Infinity(ast.NodeTransformer):
    """Makes a number of the bare name `inf`."""

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.Constant(math.inf) if node.id == "inf" else node


def parse_call(text: Any, path: Path, argument: str = "model") -> dict[str, Any]:
    """The keyword arguments of a call written as a string, "Name(a=1, b=('x', -inf))"; nothing is evaluated.

    Arguments that are no literals are left out; the bare name `inf` is a number. `argument`: where the string stands,
    for the message.

    Raises:
        TeacherWeightsError: the string is something else.
    """
    wrong = f"{path}: its argument {argument!r} is not a plain call like Name(key=value)"
    if not isinstance(text, str) or len(text) > 10_000:
        raise TeacherWeightsError(wrong)
    try:
        call = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise TeacherWeightsError(wrong) from error
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
        raise TeacherWeightsError(wrong)
    options = {}
    for keyword in call.keywords:
        try:
            options[str(keyword.arg)] = ast.literal_eval(_Infinity().visit(keyword.value))
        except (ValueError, TypeError, RecursionError, MemoryError):
            continue
    return options
