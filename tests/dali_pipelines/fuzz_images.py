"""Damaged images by the thousand through the loader's decoding: does one of them end the process?

    python tests/dali_pipelines/fuzz_images.py --files 5000

Each file is one of the images below in one of the formats, with a few bytes changed, inserted, left out, repeated or
cut off, as a function of the seed and its number alone. Batches are decoded in a process of their own; where one ends
by a signal, its files are tried one by one and the culprits are named. Of JPEGs that DALI takes, the pixels are
compared with Pillow's.
"""

from __future__ import annotations

import argparse
import collections
import io
import json
import subprocess
import sys
import warnings

import numpy as np
import torch
from PIL import Image

from dune_fast.dali_pipelines.errors import BrokenImage
from dune_fast.dali_pipelines.images import for_dali
from dune_fast.dali_pipelines.pipeline import Decoder, whole_images

BATCH = 250  # files of a process
KINDS: list[tuple[str, str, str, dict]] = [
    # name, mode, format, options; a list of modes makes an animation
    *[(f"JPEG {s}", "RGB", "JPEG", {"subsampling": s}) for s in (0, 1, 2)],
    ("JPEG gray", "L", "JPEG", {}),
    ("JPEG progressive", "RGB", "JPEG", {"progressive": True}),
    ("JPEG restarts", "RGB", "JPEG", {"restart_marker_blocks": 3}),
    ("JPEG CMYK", "CMYK", "JPEG", {}),
    ("JPEG RGB", "RGB", "JPEG", {"keep_rgb": True}),
    *[(f"PNG {mode}", mode, "PNG", {}) for mode in ("RGB", "RGBA", "L", "LA", "P", "1", "I;16")],
    ("PNG animated", "L", "PNG", {"save_all": True, "frames": 3}),
    ("WebP", "RGB", "WEBP", {}),
    ("WebP lossless", "RGBA", "WEBP", {"lossless": True}),
    ("WebP animated", "RGB", "WEBP", {"save_all": True, "frames": 3}),
    *[(f"TIFF {c}", "RGB", "TIFF", {"compression": c}) for c in (None, "tiff_lzw", "jpeg", "tiff_deflate", "packbits")],
    ("TIFF group 4", "1", "TIFF", {"compression": "group4"}),
    ("JPEG 2000", "RGB", "JPEG2000", {}),
    ("AVIF", "RGB", "AVIF", {"speed": 10}),
    ("GIF", "P", "GIF", {"save_all": True, "frames": 3}),
    ("BMP", "RGB", "BMP", {}),
    ("PPM", "RGB", "PPM", {}),
    ("TGA", "RGB", "TGA", {"compression": "tga_rle"}),
    ("SGI", "RGB", "SGI", {}),
    ("PCX", "P", "PCX", {}),
    ("DDS", "RGBA", "DDS", {"pixel_format": "DXT5"}),
    ("ICO", "RGBA", "ICO", {}),
    ("ICNS", "RGBA", "ICNS", {}),
    ("QOI", "RGB", "QOI", {}),
    ("IM", "RGB", "IM", {}),
]


def picture(mode: str, seed: int) -> Image.Image:
    """Smooth colours and some noise, 56 x 40 pixels."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)).resize((56, 40))
    fine = Image.fromarray(rng.integers(0, 256, (40, 56, 3), dtype=np.uint8))
    image = Image.blend(coarse, fine, 0.2)
    if mode == "I;16":
        return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) << 8)
    return image.convert(mode)


def whole(kind: int, seed: int) -> bytes:
    """An undamaged file."""
    _, mode, fmt, options = KINDS[kind]
    options = dict(options)
    frames = [picture(mode, seed + i) for i in range(options.pop("frames", 1))]
    if len(frames) > 1:
        options["append_images"] = frames[1:]
    buffer = io.BytesIO()
    frames[0].save(buffer, fmt, **options)
    return buffer.getvalue()


def damaged(seed: int, number: int) -> tuple[str, bytes]:
    """The kind and the bytes of one file."""
    rng = np.random.default_rng([seed, number])
    kind = number % len(KINDS)
    data = bytearray(whole(kind, int(rng.integers(8))))
    for _ in range(int(rng.integers(1, 5))):
        # every second change is near the start, where the headers are
        at = int(rng.integers(min(len(data), 200) if rng.random() < 0.5 else len(data)))
        length = int(rng.integers(1, 9))
        how = rng.integers(6)
        if how == 0:
            data[at] ^= 1 << int(rng.integers(8))
        elif how == 1:
            data[at : at + length] = rng.integers(0, 256, length, dtype=np.uint8).tobytes()
        elif how == 2:
            data[at:at] = rng.integers(0, 256, length, dtype=np.uint8).tobytes()
        elif how == 3 and len(data) > 100:
            del data[at : at + length]
        elif how == 4:
            data[at : at + length] = bytes([int(rng.choice([0, 255, 127, 128]))]) * length
        elif how == 5 and rng.random() < 0.3:
            if rng.random() < 0.5 and len(data) > 100:
                del data[max(at, 50) :]
            else:
                data[at:at] = data[at : at + 8 * length]
    return KINDS[kind][0], bytes(data)


def decode_batch(seed: int, first: int, count: int) -> dict:
    """What became of some files; runs in a process of its own."""
    warnings.simplefilter("ignore")
    counts: collections.Counter[str] = collections.Counter()
    worst, refused = 0, []
    decoder = Decoder(8, 40, 1, torch.device("cpu"))
    taken = []
    for number in range(first, first + count):
        kind, data = damaged(seed, number)
        raw = np.frombuffer(data, np.uint8)
        counts["files"] += 1
        try:
            encoded, size = for_dali(raw)
        except BrokenImage:
            counts["broken"] += 1
            continue
        taken.append((number, kind, raw, encoded, size))
    for start in range(0, len(taken), 8):
        part = taken[start : start + 8]
        geometry = whole_images([size for *_, size in part], decoder.image_size)
        failed = decoder.refused([encoded for *_, encoded, _ in part], geometry)
        for i, (number, kind, raw, encoded, _size) in enumerate(part):
            by_dali = encoded is raw
            counts["by Pillow"] += not by_dali
            counts["by DALI"] += by_dali and i not in failed
            if not by_dali:
                assert i not in failed, (number, kind, failed[i])
                continue
            try:
                ppm, size = for_dali(raw, by_pillow=True)
            except BrokenImage as error:
                counts["refused by Pillow alone" if i not in failed else "JPEG refused by both"] += 1
                refused.append((number, kind, "Pillow" if i not in failed else "both", str(error)))
                continue
            if i in failed:
                counts["JPEG refused by DALI alone"] += 1
                refused.append((number, kind, "DALI", failed[i]))
                continue
            decoder.submit([encoded, ppm], whole_images([size] * 2, decoder.image_size))
            ours, theirs = decoder.receive()[0].int()
            difference = int((ours - theirs).abs().max())
            worst = max(worst, difference)
            counts["JPEGs that differ from Pillow by more than 2 levels"] += difference > 2
    return {"counts": counts, "worst": worst, "refused": refused}


def run_batch(seed: int, first: int, count: int) -> tuple[int, dict]:
    """(exit status, what `decode_batch` found) of a process of its own."""
    command = [sys.executable, __file__, "--seed", str(seed), "--child", str(first), str(count)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode > 0:
        raise RuntimeError(f"files {first} to {first + count - 1}: {done.stderr[-2000:]}")
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return done.returncode, json.loads(lines[-1]) if lines and not done.returncode else {}


def fuzz(seed: int, files: int, first: int = 0) -> tuple[collections.Counter, int, list, list[str]]:
    """Counts, the largest difference, what was refused, and the files that have ended a process."""
    total: collections.Counter[str] = collections.Counter()
    worst, refused, fatal = 0, [], []
    for start in range(first, first + files, BATCH):
        count = min(BATCH, first + files - start)
        status, found = run_batch(seed, start, count)
        if status < 0:
            culprits = [n for n in range(start, start + count) if run_batch(seed, n, 1)[0] < 0]
            fatal.append(f"signal {-status} in files {start} to {start + count - 1}; alone: {culprits or 'none'}")
            continue
        total.update(found["counts"])
        worst = max(worst, found["worst"])
        refused += found["refused"]
    return total, worst, refused, fatal


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=5000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--child", type=int, nargs=2, metavar=("FIRST", "COUNT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        sys.stdout.write("\n" + json.dumps(decode_batch(args.seed, *args.child)) + "\n")
        return 0
    total, worst, refused, fatal = fuzz(args.seed, args.files, args.first)
    for entry in refused:
        sys.stdout.write(f"refused: {entry}\n")
    for name, count in sorted(total.items()):
        sys.stdout.write(f"{count:7d} {name}\n")
    sys.stdout.write(f"largest difference to Pillow: {worst} levels\n")
    sys.stdout.write("".join(f"{line}\n" for line in fatal) or "no process has ended\n")
    return int(bool(fatal))


if __name__ == "__main__":
    raise SystemExit(main())
