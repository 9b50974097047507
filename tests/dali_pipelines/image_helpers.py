"""What the tests of image files share."""

import io
import struct
import zlib

from PIL import Image


def encode(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_of(header: tuple[int, ...], *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of (width, height, bits, colour type) and any chunks between header and end."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    begin = chunk(b"IHDR", struct.pack(">IIBBBBB", *header, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + begin + b"".join(chunk(*each) for each in chunks) + chunk(b"IEND", b"")
