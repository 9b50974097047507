"""Parity with the reference cases: `python -m bench.parity DIR` prints a line a case and exits 1 if any fails.

A case of a kind that nothing here computes is "not built": it neither passes nor fails.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

from rich.console import Console

from bench.case import Case
from bench.cases import RUNNERS


def find_cases(folder: Path) -> list[Path]:
    """All case files below a folder; ValueError if there is none."""
    files = sorted(folder.rglob("*.safetensors"))
    if not files:
        raise ValueError(f"there is no reference case (*.safetensors) under {folder}")
    return files


def report(path: Path, folder: Path) -> tuple[str, str]:
    """(outcome, line) of one case; outcome is "pass", "fail" or "not built"."""
    name = str(path.relative_to(folder).with_suffix(""))
    try:
        case = Case(path)
        if case.kind not in RUNNERS:
            return "not built", f"{name:42} {case.kind:13} not built"
        checks = RUNNERS[case.kind](case)
    except Exception as error:  # a case that cannot be run is a failed one, the others still count
        return "fail", f"{name:42} FAIL  {type(error).__name__}: {error}"
    worst = max(checks, key=lambda check: check.excess)
    outcome = "pass" if checks and all(check.passed for check in checks) else "fail"
    return outcome, (
        f"{name:42} {case.kind:13} {outcome if outcome == 'pass' else 'FAIL'}  "
        f"{worst.error:8.1e} of {worst.tolerance:.0e}  ({len(checks)} values, worst {worst.name})"
    )


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.parity", description=__doc__)
    parser.add_argument("folder", type=Path, help="folder with reference cases, searched recursively")
    args = parser.parse_args(argv)
    console = Console(highlight=False, width=160)
    try:
        files = find_cases(args.folder)
    except ValueError as error:
        console.print(str(error))
        return 1
    outcomes: Counter[str] = Counter()
    for path in files:
        outcome, line = report(path, args.folder)
        outcomes[outcome] += 1
        console.print(line)
    console.print(", ".join(f"{outcomes[key]} {key}" for key in ("pass", "fail", "not built")))
    return 1 if outcomes["fail"] else 0


if __name__ == "__main__":
    sys.exit(main())
