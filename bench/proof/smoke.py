"""Drawn cut-outs, photographs and a stereo pair for `--smoke` and for tests: nothing is fetched."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from bench.proof.scenes import Sources

CLASSES = ("disc", "square")


def drawn_sources(folder: Path, cutouts: int = 6, photographs: int = 4) -> Sources:
    """Discs and squares in random colours with alpha, and noise as photographs."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    found: dict[str, list[Path]] = {}
    for name in CLASSES:
        for i in range(cutouts):
            image = Image.new("RGBA", (40, 30 + i))
            colour = (*rng.integers(40, 256, 3).tolist(), 255)
            draw = ImageDraw.Draw(image)
            (draw.ellipse if name == "disc" else draw.rectangle)((4, 4, 34, 24), fill=colour)
            found.setdefault(name, []).append(_saved(image, folder / f"{name}{i}.png"))
    photos = {
        kind: [_saved(_noise(rng, 90, 70), folder / f"{kind}{i}.png") for i in range(photographs)]
        for kind in ("natural", "interior")
    }
    return Sources(found, photos["natural"], photos["interior"])


def drawn_stereo(folder: Path, disparity: int = 35) -> Path:
    """A pair of 320 x 500 pixels whose right image is the left one moved by `disparity`."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(1)
    wide = _noise(rng, 500 + disparity, 320)
    _saved(wide.crop((0, 0, 500, 320)), folder / "motorcycle_left.png")
    _saved(wide.crop((disparity, 0, 500 + disparity, 320)), folder / "motorcycle_right.png")
    np.savez(folder / "motorcycle_disp.npz", arr_0=np.full((320, 500), disparity, np.float32))
    return folder


def _noise(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    small = rng.integers(0, 256, (height // 5, width // 5, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def _saved(image: Image.Image, path: Path) -> Path:
    image.save(path)
    return path
