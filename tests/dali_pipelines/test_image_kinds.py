"""Kinds of image files that were decoded wrongly, refused, left out, or ended the process: now each is Pillow's image.

Files that once crashed DALI are decoded in a process of their own.
"""

import io
import json
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed (extra: dali)")

from image_helpers import encode, largest_squares, png_of  # noqa: E402

from dune_fast.dali_pipelines.check import check_dataset  # noqa: E402
from dune_fast.dali_pipelines.datasets import DataConfig, DatasetConfig, index_dataset  # noqa: E402
from dune_fast.dali_pipelines.errors import BrokenImage  # noqa: E402
from dune_fast.dali_pipelines.images import SUFFIXES, decode, for_dali, plain_jpeg  # noqa: E402
from dune_fast.dali_pipelines.loader import TrainLoader  # noqa: E402
from dune_fast.dali_pipelines.shard_writer import ShardSettings, prepare  # noqa: E402

WIDTH, HEIGHT = 64, 48


def png(mode: str, frames: list[Image.Image], dispose: int = 0, hidden: bool = False) -> bytes:
    """An animated PNG; the default image is its first frame, or hidden from the animation."""

    def pixels(image: Image.Image) -> bytes:
        rows = np.asarray(image.convert(mode)).reshape(HEIGHT, -1)
        return zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))

    colour = {"L": 0, "RGB": 2, "LA": 4, "RGBA": 6}[mode]
    chunks, number = [(b"acTL", struct.pack(">II", len(frames) - hidden, 0))], 0
    for i, frame in enumerate(frames):
        if not (hidden and i == 0):
            chunks.append((b"fcTL", struct.pack(">IIIIIHHBB", number, WIDTH, HEIGHT, 0, 0, 1, 10, dispose, 0)))
            number += 1
        if i == 0:
            chunks.append((b"IDAT", pixels(frame)))
        else:
            chunks.append((b"fdAT", struct.pack(">I", number) + pixels(frame)))
            number += 1
    return png_of((WIDTH, HEIGHT, 8, colour), *chunks)


def webp_with_exif(image: Image.Image, padding: int, **options) -> bytes:
    """A WebP whose pixels' chunk has an odd length; a byte of padding is between it and the EXIF chunk."""
    data = encode(image, "WEBP", exif=Image.Exif().tobytes() or b"Exif\0\0", **options)
    parts, at = [], 12
    while at < len(data):
        kind, length = data[at : at + 4], int.from_bytes(data[at + 4 : at + 8], "little")
        body = data[at + 8 : at + 8 + length]
        if kind in (b"VP8L", b"VP8 ", b"ALPH") and length % 2 != padding:
            body += b"\0"  # decoders do not read to its end
        parts.append(kind + struct.pack("<I", len(body)) + body + bytes(len(body) % 2))
        at += 8 + length + length % 2
    body = b"WEBP" + b"".join(parts)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def bmp(bits: int, compression: int, masks: tuple[int, ...], pixels: bytes, palette: bytes = b"") -> bytes:
    """A BMP of any header."""
    tables = b"".join(struct.pack("<I", mask) for mask in masks) + palette
    offset = 54 + len(tables)
    header = b"BM" + struct.pack("<IHHI", offset + len(pixels), 0, 0, offset)
    sizes = struct.pack("<IiiHHIIii", 40, WIDTH, HEIGHT, 1, bits, compression, len(pixels), 0, 0)
    return header + sizes + struct.pack("<II", len(palette) // 4, 0) + tables + pixels


def tiff(samples: np.ndarray, tags: dict[int, int | tuple[int, ...]], planar: bool = False) -> bytes:
    """An uncompressed TIFF, [height, width, samples] of 8 or 16 bits, with any further tags."""
    height, width, count = samples.shape
    bits = 8 * samples.itemsize
    planes = [samples[..., i] for i in range(count)] if planar else [samples]
    strips = [plane.astype(f"<u{samples.itemsize}").tobytes() for plane in planes]
    entries: dict[int, tuple[str, tuple[int, ...]]] = {
        256: ("I", (width,)), 257: ("I", (height,)), 258: ("H", (bits,) * count), 259: ("H", (1,)),
        262: ("H", (2 if count >= 3 else 1,)), 277: ("H", (count,)), 278: ("I", (height,)),
        279: ("I", tuple(map(len, strips))), 284: ("H", (2 if planar else 1,)), 273: ("I", (0,) * len(strips)),
    }  # fmt: skip
    for tag, value in tags.items():
        entries[tag] = "H", value if isinstance(value, tuple) else (value,)
    base = 8 + 2 + 12 * len(entries) + 4
    lengths = [struct.calcsize(f"<{len(values)}{kind}") for kind, values in entries.values()]
    extra = sum(length for length in lengths if length > 4)
    starts = tuple(base + extra + sum(map(len, strips[:i])) for i in range(len(strips)))
    entries[273] = "I", starts
    directory, behind = struct.pack("<H", len(entries)), b""
    for tag in sorted(entries):
        kind, values = entries[tag]
        packed = struct.pack(f"<{len(values)}{kind}", *values)
        if len(packed) > 4:
            place = struct.pack("<I", base + len(behind))
            behind += packed
        else:
            place = packed.ljust(4, b"\0")
        directory += struct.pack("<HHI", tag, 4 if kind == "I" else 3, len(values)) + place
    return b"II*\0" + struct.pack("<I", 8) + directory + bytes(4) + behind + b"".join(strips)


def with_bytes_between_segments(jpeg: bytes, junk: bytes, after: int = 1) -> bytes:
    """Behind so many segments."""
    at = 2
    for _ in range(after):
        at += 2 + int.from_bytes(jpeg[at + 2 : at + 4])
    return jpeg[:at] + junk + jpeg[at:]


def odd_files(photo) -> dict[str, bytes]:
    """Valid files of kinds that DALI does not decode as Pillow does."""
    rgb, alpha = photo(0, WIDTH, HEIGHT), photo(1, WIDTH, HEIGHT).convert("L")
    gray, frames = rgb.convert("L"), [photo(i, WIDTH, HEIGHT) for i in range(3)]
    rgba = np.dstack([np.asarray(rgb), np.asarray(alpha)])
    values = np.asarray(rgb).astype(np.uint16)
    packed = ((values[..., 0] >> 3) << 10 | (values[..., 1] >> 3) << 5 | values[..., 2] >> 3).astype("<u2")
    wide = np.dstack([np.zeros((HEIGHT, WIDTH), np.uint8), np.asarray(rgb)[..., ::-1]])  # x, blue, green, red
    jpeg = encode(rgb, "JPEG", quality=90)
    palette = rgb.convert("P", palette=Image.Palette.ADAPTIVE)
    colours = np.pad(np.array(palette.getpalette(), np.uint8).reshape(-1, 3)[:, ::-1], ((0, 0), (0, 1)))
    rows = (b"".join(bytes([1, x]) for x in row) for row in np.asarray(palette)[::-1])
    runs = b"\0\0".join(rows) + b"\0\1"
    return {
        "gray, background disposed.png": png("L", frames, dispose=1),
        "gray and alpha, previous disposed.png": png("LA", frames, dispose=2),
        "hidden default image.png": png("RGB", frames, hidden=True),
        "odd lossless.webp": webp_with_exif(rgb, 1, lossless=True),
        "odd lossy.webp": webp_with_exif(rgb, 1),
        "even.webp": webp_with_exif(rgb, 0, lossless=True),
        "odd, alpha.webp": webp_with_exif(Image.fromarray(rgba), 1),
        "gray and alpha.tif": tiff(np.dstack([np.asarray(gray), np.asarray(alpha)]), {338: 2}),
        "associated alpha.tif": tiff(rgba, {338: 1}),
        "planar.tif": tiff(np.asarray(rgb), {}, planar=True),
        "planar of 16 bits.tif": tiff((values << 8) + 77, {}, planar=True),
        "white is zero.tif": tiff(np.asarray(gray)[..., None], {262: 0}),
        "five bits a colour.bmp": bmp(16, 0, (), packed[::-1].tobytes()),
        "masks in another order.bmp": bmp(32, 3, (255 << 24, 255 << 16, 255 << 8), wide[::-1].tobytes()),
        "run lengths.bmp": bmp(8, 1, (), runs, colours.tobytes()),
        "three bytes between segments.jpg": with_bytes_between_segments(jpeg, b"abc"),
        "zeros between segments.jpg": with_bytes_between_segments(jpeg, bytes(9), after=2),
        "0xff00 between segments.jpg": with_bytes_between_segments(jpeg, b"\xff\x00"),
        "CMYK without Adobe's marker.jpg": without_segment(encode(rgb.convert("CMYK"), "JPEG"), 0xEE),
        "GIF called.jpg": encode(palette, "GIF"),
        "AVIF called.jpg": encode(rgb, "AVIF"),
        "PNG called.webp": encode(rgb, "PNG"),
        "gray of 16 bits.pgm": b"P5 %d %d 65535\n" % gray.size + (np.asarray(gray).astype(">u2") << 8).tobytes(),
        **{f"orientation {i}.tif": tiff(np.asarray(rgb), {274: i}) for i in range(2, 9)},
    }


def without_segment(jpeg: bytes, marker: int) -> bytes:
    at = jpeg.index(bytes([0xFF, marker]))
    return jpeg[:at] + jpeg[at + 2 + int.from_bytes(jpeg[at + 2 : at + 4]) :]


def expected(data: bytes) -> np.ndarray:
    """Pillow's RGB; of 16 bits the upper 8."""
    image = Image.open(io.BytesIO(data))
    image.load()
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return np.asarray(image.convert("RGB")).astype(int)


def difference(encoded: np.ndarray, theirs: np.ndarray) -> int:
    """The largest one of all pixels, by DALI, to an image, int [H, W, 3], of which two squares show everything."""
    side, size = min(theirs.shape[:2]), theirs.shape[1::-1]
    assert max(size) <= 2 * side
    return np.abs(largest_squares(encoded, size) - [theirs[:side, :side], theirs[-side:, -side:]]).max()


@pytest.fixture(scope="module")
def odd(photo) -> dict[str, bytes]:
    return odd_files(photo)


def test_odd_valid_files_are_decoded_as_pillow_does(odd):
    for name, data in odd.items():
        encoded, size = for_dali(np.frombuffer(data, np.uint8))
        theirs = expected(data)
        assert size == theirs.shape[1::-1], name
        assert difference(encoded, theirs) <= 1, name


def test_odd_valid_files_go_into_shards_as_jpegs_that_dali_decodes(odd):
    for name, data in odd.items():
        jpeg, size = prepare(np.frombuffer(data, np.uint8), ShardSettings(), False)
        assert plain_jpeg(jpeg) == size, name
        assert np.abs(expected(jpeg) - expected(data)).mean() < 5, name  # palettes and noise are hard on JPEG


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_plain_jpegs_go_to_dali_byte_for_byte_and_are_pillows_pixels(photo, mode, progressive):
    for subsampling in (0, 1, 2):
        image = photo(3, WIDTH, HEIGHT).convert(mode)
        data = np.frombuffer(encode(image, "JPEG", subsampling=subsampling, progressive=progressive), np.uint8)
        encoded, size = for_dali(data)
        assert encoded is data and size == (WIDTH, HEIGHT)
        assert difference(encoded, expected(data.tobytes())) <= 1


def test_images_too_large_for_a_jpeg_become_png(photo):
    data = encode(photo(0, 6600, 10).resize((66_000, 10)), "PNG")
    made, size = prepare(np.frombuffer(data, np.uint8), ShardSettings(), False)
    assert size == (66_000, 10) and Image.open(io.BytesIO(made)).format == "PNG"


@pytest.mark.parametrize("low, high", [(0, 1), (-3, 200), (0, 4000)])
def test_floats_without_a_known_range_are_named(low, high):
    values = np.linspace(low, high, 100, dtype=np.float32).reshape(10, 10)
    with pytest.raises(BrokenImage, match="no known range"):
        decode(np.frombuffer(encode(Image.fromarray(values), "TIFF"), np.uint8))


CHECK = """
import json, sys
from dune_fast.dali_pipelines.check import check_dataset
from dune_fast.dali_pipelines.datasets import DataConfig, DatasetConfig
report = check_dataset("d", DataConfig(datasets={"d": DatasetConfig(root=sys.argv[1])}, num_threads=2), None)
print(json.dumps([report.train, [name.rpartition("/")[2] for name, _ in report.broken]]))
"""


def is_broken(data: bytes) -> bool:
    try:
        decode(np.frombuffer(data, np.uint8))
    except BrokenImage:
        return True
    return False


def test_files_that_corrupted_dalis_memory_end_no_process(photo, write_folder, tmp_path):
    """Grey animated PNGs with a disposal, damaged JPEG 2000 beside 4:4:4 JPEGs, LZW TIFFs that are cut off."""
    folder = write_folder(tmp_path / "images", 8)
    for i in range(8):
        photo(i, 160, 120).save(folder / f"full{i}.jpg", subsampling=0)
    frames = [photo(i, WIDTH, HEIGHT) for i in range(3)]
    good = {"a.png": png("L", frames, dispose=1), "b.png": png("LA", frames, dispose=2)}
    damaged, cut = {}, {}
    whole = encode(photo(0, 160, 120), "JPEG2000")
    for at in (30, 60, 90, 110):
        damaged[f"inserted{at}.jpg"] = whole[:at] + b"\x12\x34\x56" + whole[at:]
        damaged[f"deleted{at}.jp2"] = whole[:at] + whole[at + 5 :]
    whole = encode(photo(0, 160, 120), "TIFF", compression="tiff_lzw")
    directory = struct.unpack("<I", whole[4:8])[0]  # behind the pixels
    for share in (0.3, 0.6, 0.9):
        cut[f"cut{share}.tif"] = whole[: int(share * directory)].ljust(directory, b"\0") + whole[directory:]
    for name, data in (good | damaged | cut).items():
        (folder / name).write_bytes(data)
    command = [sys.executable, "-c", CHECK, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    assert done.returncode == 0, f"exit status {done.returncode}: {done.stderr[-500:]}"
    found, broken = json.loads(done.stdout.splitlines()[-1])
    assert found == 16 + len(good | damaged | cut) and not set(good) & set(broken)
    assert {name for name, data in damaged.items() if is_broken(data)} <= set(broken)


@pytest.mark.slow
def test_damaged_files_end_no_process():
    """`fuzz_images.py` has more of them."""
    import fuzz_images

    counts, worst, refused, fatal = fuzz_images.fuzz(seed=1, files=1000)
    assert not fatal and counts["files"] == 1000 and counts["by DALI"] > 20 and counts["by Pillow"] > 100
    assert worst <= 2 and not counts["JPEG refused by DALI alone"], refused


def test_all_suffixes_of_images_are_taken_and_others_counted_and_said(photo, tmp_path, caplog):
    (tmp_path / "sub").mkdir()
    for name in ("a.jpg", "b.jfif", "c.JPE", "d.avif", "e.ppm", "sub/f.jp2", "sub/g.gif", "h.tga"):
        photo(0, 40, 40).save(tmp_path / name)
    for name in ("notes.txt", "more.txt", "film.mp4", "README", "drawing.eps", ".hidden.txt"):
        (tmp_path / name).write_text("no image")
    data = DataConfig(datasets={"d": DatasetConfig(root=str(tmp_path), holdout=2)})
    said = "8 images; 5 other files left out: .txt 2, without a suffix 1, .eps 1, .mp4 1"
    assert index_dataset("d", data.datasets["d"]).contents() == said
    report = check_dataset("d", data)
    assert report.status == "ok" and report.notes == [said] and report.sampled == 8 and not report.broken
    with caplog.at_level("INFO"), TrainLoader(data, 32, 2, 0, 1, 0, torch.device("cpu")):
        assert f"dataset d: {said}" in caplog.text


def test_suffixes_are_those_of_pillows_images():
    """What is missing here is counted as no image by mistake; formats that Pillow cannot decode alone are no images."""
    Image.init()
    theirs = {suffix for suffix, name in Image.registered_extensions().items() if name in Image.OPEN}
    needs_more = {"EPS", "PDF", "MPEG", "WMF", "BUFR", "GRIB", "HDF5"}
    left_out = {suffix for suffix, name in Image.registered_extensions().items() if name in needs_more}
    assert theirs - left_out <= set(SUFFIXES) and not left_out & set(SUFFIXES)
