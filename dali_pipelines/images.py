"""Encoded images: which of them DALI gets as they are, all others through Pillow, and images made anew.

The content of a file decides. DALI decodes plain JPEGs: baseline or progressive, 8 bits, segment after segment. There
it is fast, and equal to Pillow. In other formats it has crashed the process (grey animated PNG, damaged JPEG 2000,
truncated TIFF), given wrong pixels (TIFF, BMP, animated PNG) or refused what is valid (WebP, BMP). So Pillow decodes
everything else, and every JPEG that DALI refuses, to 8-bit RGB, and DALI gets the pixels as a PPM.

Pillow decodes in the process of the run: none of its decoders has crashed under tests/dali_pipelines/fuzz_images.py,
and a process of its own would copy every image twice more.
"""

from __future__ import annotations

import functools
import io

import numpy as np
from PIL import Image, UnidentifiedImageError

from dune_fast.dali_pipelines.errors import BrokenImage

SUFFIXES = (
    ".jpg", ".jpeg", ".jfif", ".jpe", ".mpo", ".png", ".apng", ".webp", ".avif", ".avifs", ".gif", ".tif", ".tiff",
    ".bmp", ".dib", ".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx", ".ppm", ".pgm", ".pbm", ".pnm", ".pfm", ".tga",
    ".icb", ".vda", ".vst", ".sgi", ".rgb", ".rgba", ".bw", ".pcx", ".dcx", ".dds", ".psd", ".qoi", ".ico", ".cur",
    ".icns", ".xbm", ".xpm", ".im", ".msp", ".pcd", ".pxr", ".ras", ".fit", ".fits", ".fli", ".flc", ".ftc", ".ftu",
    ".blp", ".gbr", ".iim",
)  # fmt: skip
"""What counts as an image where no pattern is given, in either case: the suffixes of the images that Pillow opens."""
_NO_IMAGES = {"EPS", "PDF", "MPEG", "WMF", "BUFR", "GRIB", "HDF5"}
"""Formats of Pillow that need another program, or whose pixels it cannot decode."""
_PPM = b"P6"
_QUALITY = 95  # without chroma subsampling: 0.9 levels of mean error on the demo's photographs at 512 pixels
_LONGEST_SIDE = 65_500  # of a JPEG that libjpeg writes


def plain_jpeg(data: bytes) -> tuple[int, int] | None:
    """(width, height) of a JPEG that DALI decodes, as it is stored (no EXIF orientation); None for all other files.

    BrokenImage if it has no end: whether DALI decodes it then depends on the crop.
    """
    if not data.startswith(b"\xff\xd8"):
        return None
    at, frame, has_adobe = 2, b"", False
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker, end = data[at + 1], at + 2 + int.from_bytes(data[at + 2 : at + 4])
        if marker < 0xC0 or 0xD0 <= marker <= 0xD9 or marker == 0xFF or end < at + 4 or end > len(data):
            return None
        if marker == 0xDA:  # the pixels follow
            size = _plain_frame_size(frame, has_adobe)
            if size and data.rfind(b"\xff\xd9", at) < 0:  # a thumbnail before the pixels has an end of its own
                raise BrokenImage("the JPEG ends too early")
            return size
        if marker == 0xEE and data.startswith(b"Adobe", at + 4):
            has_adobe = True
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            if frame or marker not in (0xC0, 0xC2):
                return None
            frame = data[at + 4 : end]
        at = end
    return None


def _plain_frame_size(frame: bytes, has_adobe: bool) -> tuple[int, int] | None:
    """(width, height) from a JPEG's frame header, if it tells of 8 bits, gray, colours or Adobe's CMYK, and no bomb."""
    if len(frame) < 6 or len(frame) != 6 + 3 * frame[5] or frame[0] != 8:
        return None
    if frame[5] not in ((1, 3, 4) if has_adobe else (1, 3)):  # DALI takes other CMYK for Adobe's, which is inverted
        return None
    height, width = int.from_bytes(frame[1:3]), int.from_bytes(frame[3:5])
    limit = Image.MAX_IMAGE_PIXELS  # Pillow, which then gets it, refuses more than twice as many
    return (width, height) if width * height > 0 and (limit is None or width * height <= 2 * limit) else None


def for_dali(data: np.ndarray, by_pillow: bool = False) -> tuple[np.ndarray, tuple[int, int]]:
    """What DALI gets for an encoded image of any format, uint8 [length], and its (width, height).

    That is the same bytes if it is a plain JPEG, unless Pillow is to decode it, else a PPM, uint8 [length].

    Raises:
        BrokenImage: Pillow cannot decode it, or the JPEG has no end.
    """
    if (size := plain_jpeg(data.tobytes())) and not by_pillow:
        return data, size
    image = decode(data)
    header = np.frombuffer(_PPM + b" %d %d 255\n" % image.size, np.uint8)
    return np.concatenate([header, np.asarray(image).reshape(-1)]), image.size


def is_from_pillow(encoded: np.ndarray) -> bool:
    """Whether `for_dali` has decoded what it gave."""
    return encoded[: len(_PPM)].tobytes() == _PPM


def decode(data: np.ndarray) -> Image.Image:
    """An encoded image, uint8 [length], as 8-bit RGB, by Pillow. BrokenImage if Pillow cannot decode it."""
    try:
        with Image.open(io.BytesIO(data), formats=_formats()) as image:
            image.load()
            return to_rgb(image)
    except UnidentifiedImageError:
        raise BrokenImage("no known image format") from None
    except Exception as error:  # Pillow raises all kinds for broken files
        raise BrokenImage(str(error) or type(error).__name__, not isinstance(error, MemoryError)) from error


@functools.cache
def _formats() -> list[str]:
    """In Pillow's order: some formats have no magic bytes."""
    Image.init()
    return [name for name in Image.ID if name not in _NO_IMAGES]


def to_rgb(image: Image.Image) -> Image.Image:
    """Any image as 8-bit RGB, as Pillow's `convert("RGB")`: transparency is ignored. 16 bits lose the lower 8.

    ValueError for float or 32-bit pixels that are not in [0, 255], or all in [0, 1]: Pillow would clip them.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        low, high = image.getextrema()
        if not (low >= 0 and 1 < high <= 255):
            raise ValueError(f"pixels of mode {image.mode} from {low:g} to {high:g} have no known range")
    return image.convert("RGB")


def shrink(image: Image.Image, shorter_side: int) -> Image.Image:
    """With at most `shorter_side` pixels on the shorter side: bicubic, antialiased; others as they are."""
    if min(image.size) <= shorter_side:
        return image
    scale = shorter_side / min(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def encode(image: Image.Image) -> bytes:
    """As JPEG of quality 95, 4:4:4 (no chroma subsampling); as PNG if a side is too long for a JPEG."""
    buffer = io.BytesIO()
    if max(image.size) > _LONGEST_SIDE:
        image.save(buffer, "PNG")
    else:
        image.save(buffer, "JPEG", quality=_QUALITY, subsampling=0)
    return buffer.getvalue()
