"""Bodies drawn over a photograph, by Pillow alone: shaded triangles, the farthest first; and bodies as OBJ files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from dune_fast.dali_pipelines.storage import write_whole
from dune_fast.infer.legends import font_for

COLOURS = ((230, 126, 83), (93, 156, 206), (140, 190, 110), (205, 130, 190), (222, 190, 92), (110, 195, 190))
"""RGB of people, in turns."""

_LIGHT = np.array([0.3, -0.6, -0.75]) / np.linalg.norm([0.3, -0.6, -0.75])  # towards the light, in the camera's frame
_NEAREST = 0.05  # metres; triangles closer than this are not drawn


def draw_bodies(
    image: np.ndarray, vertices: np.ndarray, faces: np.ndarray, intrinsics: np.ndarray,
    colours: Sequence | np.ndarray = COLOURS, opacity: float = 0.8,
) -> np.ndarray:  # fmt: skip
    """The image, uint8 [H, W, 3], with P bodies over it.

    Args:
        image: uint8 [H, W, 3]; it is not changed.
        vertices: [P, V, 3] in the camera's frame, metres.
        faces: [F, 3], counterclockwise as seen from outside.
        intrinsics: K [3, 3] in pixels of the image.
        colours: RGB of each person, in turns; or [F, 3], of each face, for all of them.
        opacity: 1 hides the image.
    """
    below = Image.fromarray(image)
    layer, mask = below.copy(), Image.new("L", below.size)
    paint, stencil = ImageDraw.Draw(layer), ImageDraw.Draw(mask)
    depths, corners, shades = [], [], []
    by_face = np.asarray(colours).shape == (len(faces), 3)
    for i, body in enumerate(vertices):
        triangles = body[faces]  # [F, 3, 3]
        normals = np.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0])
        normals /= np.linalg.norm(normals, axis=1, keepdims=True) + 1e-12
        middle = triangles.mean(1)
        seen = ((normals * middle).sum(1) < 0) & (triangles[..., 2].min(1) > _NEAREST)
        plane = triangles[seen] @ intrinsics.T
        base = np.asarray(colours)[seen] if by_face else np.asarray(colours[i % len(colours)])
        light = 0.45 + 0.55 * np.clip(normals[seen] @ _LIGHT, 0, 1)
        depths.append(middle[seen, 2])
        corners.append(plane[..., :2] / plane[..., 2:])
        shades.append((light[:, None] * base).astype(np.int64))
    if not depths:
        return np.asarray(below)
    depth, corner, shade = (np.concatenate(parts) for parts in (depths, corners, shades))
    for k in np.argsort(-depth):
        points = [tuple(p) for p in corner[k].tolist()]
        paint.polygon(points, fill=tuple(shade[k].tolist()))
        stencil.polygon(points, fill=round(255 * opacity))
    return np.asarray(Image.composite(layer, below, mask))


def draw_scores(image: np.ndarray, places: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """The image with each person's number and score at [P, 2] pixels (x, y), inside the image."""
    out = Image.fromarray(image)
    paint = ImageDraw.Draw(out)
    radius, (font, line) = max(2, min(out.size) // 150), font_for(min(out.size))
    for i, ((x, y), score) in enumerate(zip(places.tolist(), scores.tolist(), strict=True)):
        paint.ellipse((x - radius, y - radius, x + radius, y + radius), fill=(255, 255, 255), outline=(0, 0, 0))
        text, stroke = f"{i}: {score:.2f}", max(1, line // 16)
        x = min(x + 2 * radius, out.width - font.getlength(text) - 2 * stroke)
        y = min(max(y, line / 2), out.height - line / 2)
        paint.text((max(x, stroke), y), text, fill=(255, 255, 255), font=font, anchor="lm", stroke_width=stroke,
                   stroke_fill=(0, 0, 0))  # fmt: skip
    return np.asarray(out)


def write_obj(path: Path, vertices: np.ndarray, faces: np.ndarray) -> None:
    """A mesh [V, 3] in metres with faces [F, 3] as a Wavefront OBJ file."""
    lines = [f"v {x:.6g} {y:.6g} {z:.6g}" for x, y, z in vertices.tolist()]
    lines += [f"f {a + 1} {b + 1} {c + 1}" for a, b, c in faces.tolist()]
    write_whole(path, ("\n".join(lines) + "\n").encode())
