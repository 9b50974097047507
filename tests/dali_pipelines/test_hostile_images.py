"""Files as they turn up in large collections, through the real loader: decoded as PIL does, or broken and replaced."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed (extra: dali)")
TF = pytest.importorskip("torchvision.transforms.v2.functional")

from image_helpers import encode, png_of  # noqa: E402
from loader_helpers import CPU, broken_paths  # noqa: E402

from dune_fast.dali_pipelines.datasets import DataConfig, DatasetConfig  # noqa: E402
from dune_fast.dali_pipelines.loader import TrainLoader, ValLoader  # noqa: E402
from dune_fast.kernels.augment import augment_colour  # noqa: E402

SIZE = 32
WIDTH, HEIGHT = 96, 64


def with_thumbnail(jpeg: bytes, thumbnail: bytes) -> bytes:
    """As cameras write it: in a segment before the pixels, and with markers of its own."""
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", 2 + len(thumbnail)) + thumbnail + jpeg[2:]


def png(header: tuple[int, ...], raw: bytes) -> bytes:
    """A PNG of any header, with any pixels behind it."""
    return png_of(header, (b"IDAT", zlib.compress(raw)))


def png16(values: np.ndarray, colour: int) -> bytes:
    """A PNG of 16 bits with the 8-bit values in the upper half and noise in the lower."""
    wide = (values.astype(np.uint16) << 8) | np.random.default_rng(0).integers(0, 256, values.shape, dtype=np.uint16)
    return png((WIDTH, HEIGHT, 16, colour), b"".join(b"\0" + row.astype(">u2").tobytes() for row in wide))


def usable(photo) -> dict[str, tuple[bytes, Image.Image]]:
    """name -> bytes and the RGB image that they should be."""
    rgb, alpha = photo(0, WIDTH, HEIGHT), photo(1, WIDTH, HEIGHT).convert("L")
    gray, jpeg = rgb.convert("L"), encode(rgb, "JPEG", quality=90)
    thumbnailed = with_thumbnail(jpeg, encode(rgb.resize((24, 16)), "JPEG"))
    frames = [photo(i, WIDTH, HEIGHT) for i in range(3)]
    rgba = Image.merge("RGBA", (*rgb.split(), alpha))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned; stored pixels are what counts
    kinds = {
        "plain.jpg": jpeg,
        "with a thumbnail.jpg": thumbnailed,
        "two pictures.jpg": encode(frames[0], "MPO", save_all=True, append_images=frames[1:2]),
        "progressive.jpg": encode(rgb, "JPEG", progressive=True),
        "full chroma.jpg": encode(rgb, "JPEG", subsampling=0),
        "half chroma.jpg": encode(rgb, "JPEG", subsampling=1),
        "restart markers.jpg": encode(rgb, "JPEG", restart_marker_blocks=4),
        "gray.jpg": encode(gray, "JPEG"),
        "cmyk.jpg": encode(rgb.convert("CMYK"), "JPEG"),
        "turned.jpg": encode(rgb, "JPEG", exif=exif.tobytes()),
        "garbage behind.jpg": jpeg + b"garbage" * 100,
        "one pixel.jpg": encode(rgb.resize((1, 1)), "JPEG"),
        "very wide.jpg": encode(photo(3, 6550, 10).resize((65500, 10)), "JPEG"),
        "20,000 x 20.jpg": encode(photo(4, 2000, 20).resize((20000, 20)), "JPEG"),
        "20,000 x 20.png": encode(photo(4, 2000, 20).resize((20000, 20)), "PNG"),
        "20 x 20,000.jpg": encode(photo(5, 20, 2000).resize((20, 20000)), "JPEG"),
        "palette.png": encode(rgb.convert("P", palette=Image.Palette.ADAPTIVE), "PNG"),
        "alpha.png": encode(rgba, "PNG"),
        "gray and alpha.png": encode(Image.merge("LA", (gray, alpha)), "PNG"),
        "one bit.png": encode(rgb.convert("1"), "PNG"),
        "colour of 16 bits.png": png16(np.asarray(rgb).reshape(HEIGHT, -1), 2),
        "one pixel.png": encode(rgb.resize((1, 1)), "PNG"),
        "very tall.png": encode(rgb.resize((1, 5000)), "PNG"),
        "PNG called.jpg": encode(rgb, "PNG"),
        "JPEG called.png": jpeg,
        "WebP called.jpg": encode(rgb, "WEBP", lossless=True),
        "animated WebP called.jpg": encode(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True),
        "animated.png": encode(frames[0], "PNG", save_all=True, append_images=frames[1:]),
        "alpha.webp": encode(rgba, "WEBP", lossless=True),
        "JPEG 2000 called.jpg": encode(rgb, "JPEG2000"),
        "PPM called.jpg": encode(rgb, "PPM"),
        "plain.bmp": encode(rgb, "BMP"),
        "plain.tiff": encode(rgb, "TIFF"),
        "lzw.tif": encode(rgb, "TIFF", compression="tiff_lzw"),
        "jpeg inside.tif": encode(rgb, "TIFF", compression="jpeg"),
        "cmyk.tiff": encode(rgb.convert("CMYK"), "TIFF"),
        "GIF called.jpg": encode(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "TGA called.jpg": encode(rgb, "TGA"),
    }
    expected = {name: (data, Image.open(io.BytesIO(data)).convert("RGB")) for name, data in kinds.items()}
    # PIL's convert("RGB") clips gray of 16 bits to white; the upper 8 bits are the image
    expected["gray of 16 bits.png"] = (png16(np.asarray(gray), 0), gray.convert("RGB"))
    return expected


def broken(photo) -> dict[str, tuple[bytes, str]]:
    """name -> bytes and words of the reason in the log."""
    rgb = photo(0, WIDTH, HEIGHT)
    jpeg, whole = encode(rgb, "JPEG", quality=90), encode(rgb, "PNG")
    thumbnailed = with_thumbnail(jpeg, encode(rgb.resize((24, 16)), "JPEG"))
    size = jpeg.index(b"\xff\xc0") + 5
    return {
        "empty.jpg": (b"", "empty"),
        "zeros.jpg": (bytes(5000), "no known image format"),
        "page.jpg": (b"<!DOCTYPE html><html><body>404 Not Found</body></html>", "no known image format"),
        "drawing.jpg": (b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', "no known image format"),
        "header alone.jpg": (jpeg[:400], "Truncated"),
        "truncated.jpg": (jpeg[: len(jpeg) // 2], "ends too early"),
        "without end marker.jpg": (jpeg[:-2], "ends too early"),
        "truncated behind a thumbnail.jpg": (thumbnailed[: len(thumbnailed) // 2], "ends too early"),
        "truncated.png": (whole[: len(whole) // 2], "truncated"),
        "overwritten.png": (whole[: len(whole) // 2] + b"\x12" * 30 + whole[len(whole) // 2 + 30 :], "image file"),
        "wrong checksum.png": (whole[:29] + bytes(4) + whole[33:], "no known image format"),
        "bomb.png": (png((60000, 60000, 8, 2), bytes(1000)), "exceeds limit"),
        "bomb.jpg": (jpeg[:size] + struct.pack(">HH", 60000, 60000) + jpeg[size + 4 :], "exceeds limit"),
        "small bomb.png": (png((9000, 9000, 8, 2), bytes(1000)), "truncated"),
    }


@pytest.fixture(scope="module")
def collection(tmp_path_factory, photo):
    """(folder, the usable ones, the broken ones)."""
    folder = tmp_path_factory.mktemp("hostile")
    good, bad = usable(photo), broken(photo)
    for name, (data, _) in (good | bad).items():
        (folder / name).write_bytes(data)
    return folder, {name: image for name, (_, image) in good.items()}, {name: words for name, (_, words) in bad.items()}


def config(folder: Path) -> DataConfig:
    own = DatasetConfig(root=str(folder), val_root=str(folder))
    return DataConfig(datasets={"d": own}, num_threads=2, max_broken_share=1.0)


def by_pil(image: Image.Image) -> torch.Tensor:
    bicubic = TF.InterpolationMode.BICUBIC
    image = TF.center_crop(TF.resize(image, [SIZE], interpolation=bicubic), [SIZE, SIZE])
    return torch.from_numpy(np.array(image))


def test_every_file_is_decoded_as_pil_does_or_named_as_broken(collection, caplog):
    folder, good, bad = collection
    with ValLoader(config(folder), SIZE, 16, 0, 1, CPU) as loader:
        found = {Path(p).name: image for batch in loader for p, image in zip(batch.paths, batch.images, strict=True)}
    assert set(found) == set(good) and loader.broken == {"d": len(bad)}
    for name, image in good.items():
        ours = (found[name] * torch.tensor([0.229, 0.224, 0.225])[:, None, None]) * 255
        theirs = augment_colour(by_pil(image)[None], None)[0] * torch.tensor([0.229, 0.224, 0.225])[:, None, None] * 255
        difference = (ours - theirs).abs()
        # measured: mean 0.15 to 0.18, at most 2; one-bit dither has only edges: 0.8 and 10
        assert difference.mean() < 1 and (difference <= 12).all(), name
    lines = [record.getMessage() for record in caplog.records]
    for name, words in bad.items():
        (line,) = [line for line in lines if f"/{name} " in line]
        assert words in line, line


def test_broken_files_are_replaced_and_batches_stay_full(collection):
    folder, good, bad = collection
    size = -(-len(good | bad) // 3)
    with TrainLoader(config(folder), SIZE, size, 0, 1, 0, CPU) as loader:
        batches = loader.batches()
        taken = [next(batches) for _ in range(3)]  # the whole collection
    seen = {Path(path).name for batch in taken for path in batch.paths}
    assert all(len(batch) == size and torch.isfinite(batch.images).all() for batch in taken)
    assert not seen & set(bad) and seen >= set(good)
    assert {Path(path).name for path in broken_paths(loader)} == set(bad)
