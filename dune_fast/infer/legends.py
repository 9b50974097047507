"""Colours of classes and depths, and the strip that explains them."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_GOLDEN = 0.618033988749895  # turns of hue: neighbours differ most
_UNKNOWN_DEPTH = (0, 0, 0)


def class_colours(count: int) -> np.ndarray:
    """uint8 [count, 3]: always the same, neighbours far apart."""
    colours = [
        colorsys.hsv_to_rgb(i * _GOLDEN % 1, (0.85, 0.55, 0.7)[i % 3], (0.95, 0.8, 0.6)[i // 3 % 3])
        for i in range(count)
    ]
    return np.round(255 * np.array(colours).reshape(count, 3)).astype(np.uint8)


def depth_colours(depth: np.ndarray, low: float, high: float) -> np.ndarray:
    """uint8 [..., 3] of depths in metres, red near and blue far; black where there is none (0)."""
    from matplotlib import colormaps

    share = 1 - (depth - low) / max(high - low, 1e-6)
    colours = np.round(255 * colormaps["turbo"](share.clip(0, 1))[..., :3]).astype(np.uint8)
    colours[depth <= 0] = _UNKNOWN_DEPTH
    return colours


Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def font_for(height: int) -> tuple[Font, int]:
    """A font, and its lines' height, for an image of so many pixels."""
    size = int(np.clip(height / 28, 11, 40))
    return ImageFont.load_default(size), round(1.5 * size)


def _shortened(text: str, font: Font, width: float) -> str:
    """The text, its end cut off where it is wider than so many pixels."""
    if font.getlength(text) <= width:
        return text
    kept = next((n for n in range(len(text), 0, -1) if font.getlength(f"{text[:n]}...") <= width), 0)
    return f"{text[:kept].rstrip()}..."


def with_class_legend(image: np.ndarray, entries: Sequence[tuple[str, np.ndarray]]) -> Image.Image:
    """The image with a strip below it: a box of colour and a name each, as many a line as fit."""
    font, line = font_for(image.shape[0])
    width, places, x, y = max(image.shape[1], 120), [], 0, 0
    for name, colour in entries:
        name = _shortened(name, font, width - 2 * line)
        needed = round(font.getlength(name)) + 2 * line
        if x and x + needed > width:
            x, y = 0, y + line
        places.append((x, y, name, tuple(int(v) for v in colour)))
        x += needed
    canvas = Image.new("RGB", (width, image.shape[0] + y + line + line // 3), "white")
    canvas.paste(Image.fromarray(image), (0, 0))
    draw, box = ImageDraw.Draw(canvas), round(0.55 * line)
    for x, y, name, colour in places:
        left, top = x + line // 3, image.shape[0] + y + line // 3
        draw.rectangle((left, top, left + box, top + box), fill=colour, outline="black")
        draw.text((left + box + line // 4, top + box / 2), name, fill="black", font=font, anchor="lm")
    return canvas


def with_depth_legend(colours: np.ndarray, low: float, high: float) -> Image.Image:
    """The image with a bar of colours at its right and the metres that they stand for, near ones at the bottom."""
    height = colours.shape[0]
    font, line = font_for(height)
    bar, marks = max(10, line // 2), max(2, min(6, height // (2 * line)))
    canvas = Image.new("RGB", (colours.shape[1] + 2 * bar + round(font.getlength(" 88.888 m")), height), "white")
    canvas.paste(Image.fromarray(colours), (0, 0))
    left = colours.shape[1] + bar // 2
    scale = depth_colours(np.linspace(high, low, height)[:, None].repeat(bar, 1), low, high)
    canvas.paste(Image.fromarray(scale), (left, 0))
    draw = ImageDraw.Draw(canvas)
    digits = 1 if high - low > 0.1 * marks else 2 if high - low > 0.01 * marks else 3  # so that marks differ
    for share in np.linspace(0, 1, marks):
        y = np.clip((1 - share) * (height - 1), line / 2, height - 1 - line / 2)
        text = f"{low + share * (high - low):.{digits}f} m"
        draw.text((left + bar + bar // 2, y), text, fill="black", font=font, anchor="lm")
    return canvas
