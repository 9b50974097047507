"""What the tests of image files share."""

import io
import struct
import zlib

import numpy as np
import torch
from PIL import Image

from dune_fast.dali_pipelines.pipeline import Decoder, whole_images


def encode(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def largest_squares(encoded: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """int [2, S, S, 3], by DALI without a change of size: the squares at the two ends of an image."""
    side, (width, height) = min(size), size
    decoder, geometry = Decoder(2, side, 1, torch.device("cpu")), whole_images([(side, side)] * 2, side)
    geometry.window[1, :2] = width - side, height - side
    decoder.submit([encoded] * 2, geometry)
    pixels = decoder.receive()[0].numpy().astype(int)
    decoder.close()
    return pixels


def png_of(header: tuple[int, ...], *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of (width, height, bits, colour type) and any chunks between header and end."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    begin = chunk(b"IHDR", struct.pack(">IIBBBBB", *header, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + begin + b"".join(chunk(*each) for each in chunks) + chunk(b"IEND", b"")
