"""`dune-fast export RUN --to timm | hf | onnx | safetensors | dune`."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from dune_fast.export import TARGETS

logger = logging.getLogger(__name__)


def run_export(args: argparse.Namespace) -> int:
    """Writes a trained encoder in another library's format, reads it back with that library and compares."""
    from dune_fast.export.check import LIMIT
    from dune_fast.export.run import export

    exported = export(args.run, args.to, args.output)
    for path in exported.files:
        logger.info("%s", path)
    logger.info(
        "%s: read back, the largest difference is %.1e of the output's largest value (at most %.0e is allowed)",
        exported.target, exported.difference, LIMIT,
    )  # fmt: skip
    for note in exported.notes:
        logger.info("%s", note)
    return 0


def add_parser(commands: argparse._SubParsersAction) -> None:
    """The command `export`."""
    listed = "; ".join(f"{name}: {what}" for name, what in TARGETS.items())
    sub = commands.add_parser("export", help="a trained encoder for other libraries", description=run_export.__doc__)
    sub.add_argument("run", help="folder of a run or of a checkpoint, a weights file, or a published name")
    sub.add_argument("--to", required=True, metavar="TARGET", help=listed)
    sub.add_argument("--output", type=Path, help="folder for the files (default: RUN/export/TARGET)")
    sub.set_defaults(run_command=run_export)
