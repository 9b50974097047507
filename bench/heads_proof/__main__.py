"""`python -m bench.heads_proof NAME [options]`: trains a head on drawn data and writes what it has learned."""

from __future__ import annotations

import importlib
import sys

PROOFS = {"multihmr": "bench.heads_proof.multihmr", "mast3r": "bench.heads_proof.mast3r"}
"""Name of a head -> module whose `main(argv)` proves it."""


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] not in PROOFS:
        raise SystemExit(f"usage: python -m bench.heads_proof {{{','.join(PROOFS)}}} [options]")
    return importlib.import_module(PROOFS[argv[0]]).main(argv[1:])


if __name__ == "__main__":
    sys.exit(main())
