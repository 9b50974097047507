"""One encoder for several task heads against an encoder for each: `python -m bench.heads`.

Weights are drawn. Every round times, in turn: the encoder; each head on tokens that are there; all heads on one pass of
the encoder, which is `EncoderWithHeads`; each head with an encoder of its own, one after the other. Medians of rounds.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from dune_fast.engine.devices import device_name
from dune_fast.engine.provenance import versions
from dune_fast.heads.head import Head
from dune_fast.heads.linear.depth import DepthHead
from dune_fast.heads.linear.segmentation import SegmentationHead
from dune_fast.heads.many import EncoderWithHeads
from dune_fast.heads.mast3r.head import Mast3rHead
from dune_fast.heads.multihmr.camera import default_intrinsics
from dune_fast.heads.multihmr.detection import Cells
from dune_fast.heads.multihmr.head import MultiHmrHead
from dune_fast.kernels.nn.vit import VisionTransformer, ViTConfig

ENCODERS = {"vits14": (384, 6), "vitb14": (768, 12), "vitl14": (1024, 16)}
"""Name -> channels and attention heads; `vitl14` has 24 blocks, the others 12."""
PATCH = 14
SMALL = {"dec_dim": 48, "dec_depth": 4, "dec_heads": 3, "layer_dims": (8, 8, 8, 8), "feature_dim": 16, "last_dim": 8}
"""Of MASt3R's head with --small."""


def build(name: str, size: int, chosen: list[str], small: bool) -> tuple[VisionTransformer, dict[str, Head]]:
    """An encoder and heads of drawn weights, as published in size; `small` shrinks what is slow, for tests."""
    width, heads = (48, 3) if small else ENCODERS[name]
    depth = 2 if small else 24 if name == "vitl14" else 12
    encoder = VisionTransformer(ViTConfig(size, PATCH, width, depth, heads)).init_weights()
    makers: Mapping[str, Callable[[], Head]] = {
        "seg": lambda: SegmentationHead(width, 150),
        "depth": lambda: DepthHead(width),
        "mast3r": lambda: Mast3rHead(width, PATCH, **(SMALL if small else {})),
        "multihmr": lambda: MultiHmrHead(width, size, **({"dim": 64, "hidden": 64} if small else {})),
    }
    return encoder, {head: makers[head]() for head in chosen}


def measure(
    encoder: VisionTransformer, heads: Mapping[str, Head], size: int, batch: int, rounds: int, device: torch.device
) -> dict[str, float]:
    """Milliseconds, medians of rounds: "encoder", "head NAME", "together", "apart".

    Args:
        encoder, heads: on the device.
        size: side of the images, pixels.
        batch: images; even, since MASt3R's head takes pairs.
        rounds: how often everything is timed, after one round that is not.
    """
    model = EncoderWithHeads(encoder, heads).eval().requires_grad_(False)
    alone = {name: EncoderWithHeads(copy.deepcopy(encoder), {name: head}).eval() for name, head in heads.items()}
    images = torch.randn(batch, 3, size, size, device=device)
    given: dict[str, dict[str, Any]] = {}
    if "multihmr" in heads:  # the patches of two people an image, so that the work is the same in every round
        given["multihmr"] = {"intrinsics": default_intrinsics(size).to(device).expand(batch, 3, 3)}
        given["multihmr"]["cells"] = _cells(batch, size // PATCH, device)
    tokens = model.encode(images)
    work: dict[str, Callable[[], Any]] = {"encoder": lambda: model.encode(images)}
    for name in heads:
        work[f"head {name}"] = lambda name=name: model.decode(tokens, name, **given.get(name, {}))
    work["together"] = lambda: model(images, given=given)
    work["apart"] = lambda: [
        one(images, given={name: given[name]} if name in given else {}) for name, one in alone.items()
    ]
    times: dict[str, list[float]] = {name: [] for name in work}
    with torch.no_grad():
        for turn in range(rounds + 1):
            for name, run in work.items():
                seconds = _seconds(run, device)
                if turn:
                    times[name].append(seconds)
    return {name: 1000 * median(found) for name, found in times.items()}


def _seconds(run: Callable[[], Any], device: torch.device) -> float:
    """Of one call, until the device has done it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _cells(batch: int, grid: int, device: torch.device) -> Cells:
    """Two people in each image, at a third and at two thirds of its diagonal."""
    image = torch.arange(batch, device=device).repeat_interleave(2)
    place = torch.tensor([grid // 3, 2 * grid // 3], device=device).repeat(batch)
    return Cells(image, place, place, torch.arange(2, device=device).repeat(batch), 2)


def report(result: Mapping[str, Any]) -> Table:
    """The parts, and what one encoder saves."""
    times = result["milliseconds"]
    table = Table("part", "ms", title=f"{result['encoder']}, {result['batch']} images of {result['size']} px, "
                  f"{result['device']}", title_justify="left")  # fmt: skip
    table.columns[1].justify = "right"
    for name, value in times.items():
        table.add_row({"together": "one encoder, all heads", "apart": "an encoder for each head"}.get(name, name),
                      f"{value:.1f}")  # fmt: skip
    table.caption = f"one encoder takes {result['ratio']:.2f} of the time of separate ones"
    return table


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.heads", description=__doc__)
    parser.add_argument("--encoder", choices=ENCODERS, default="vitb14", help="(default: %(default)s)")
    parser.add_argument("--size", type=int, default=336, help="side of the images, pixels (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=2, help="images, an even number (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="timed (default: %(default)s)")
    names = ("seg", "depth", "mast3r", "multihmr")
    parser.add_argument("--heads", nargs="+", choices=names, default=list(names), help="(default: all)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--small", action="store_true", help="tiny networks, to see that it runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there")
    args = parser.parse_args(argv)
    if args.batch < 2 or args.batch % 2 or args.rounds < 1 or args.size < PATCH or args.size % PATCH:
        parser.error(f"give an even --batch, --rounds from 1, and a --size that is a multiple of {PATCH}")
    torch.manual_seed(0)
    device = torch.device(args.device)
    encoder, heads = build(args.encoder, args.size, args.heads, args.small)
    for module in (encoder, *heads.values()):
        module.eval().requires_grad_(False).to(device)
    times = measure(encoder, heads, args.size, args.batch, args.rounds, device)
    result = {
        "encoder": "small" if args.small else args.encoder, "size": args.size, "batch": args.batch,
        "rounds": args.rounds, "heads": args.heads, "device": device_name(device),
        "threads": torch.get_num_threads(), "milliseconds": times, "ratio": times["together"] / times["apart"],
        "versions": versions(),
    }  # fmt: skip
    Console(highlight=False).print(report(result))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
