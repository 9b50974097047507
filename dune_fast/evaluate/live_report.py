"""The report of a run that goes on or has just ended: what it costs is bounded, and it cannot fail the run."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

_SHARE = 0.01
"""Of the time between two reports that writing them may take: a report of 1 s is written every 100 s at most."""
_RECORDS = 2000
"""Of the training that are read while it goes on: 31,000 took 4 s to read and draw on one core, 2,000 take 1 s."""


def _some_records(path: Path) -> list[dict[str, Any]]:
    """Those of evaluations, and about `_RECORDS` of the others, evenly spaced, with the last."""
    lines = path.read_text().splitlines()
    stride = -(-len(lines) // _RECORDS)
    records = []
    for i, line in enumerate(lines):
        if (len(lines) - 1 - i) % stride == 0 or '"evaluation_seconds"' in line:
            with contextlib.suppress(json.JSONDecodeError):  # cut short by a kill
                records.append(json.loads(line))
    return records


class LiveReport:
    """Writes `report.html` into a run's folder, on rank 0.

    Curves and what the folder says, no features: it takes about a second.

    Args:
        run: folder of the run.
    """

    def __init__(self, run: Path) -> None:
        self.run = run
        self._next = 0.0
        """Time from which on a report may be written."""

    def write(self, now: Mapping[str, Any] | None = None, finished: bool = False) -> None:
        """Writes it anew; what fails, an import included, costs a warning.

        Args:
            now: a record that is not in `metrics.jsonl` yet.
            finished: the run has ended: its `pca.png` is shown, and no report comes too soon.
        """
        began = time.monotonic()
        if began < self._next and not finished:
            return
        path = self.run / "report.html"
        try:
            # drawing is imported when there is something to draw
            from dune_fast.engine.metrics import read_metrics
            from dune_fast.evaluate.pictures import Picture, curves
            from dune_fast.evaluate.report import write_report

            metrics = self.run / "metrics.jsonl"
            records = read_metrics(metrics) if finished else _some_records(metrics)
            records += [now] if now else []
            pictures = list(curves(records))
            pca, student = self.run / "pca.png", self.run / "student.safetensors"
            if finished and pca.is_file() and pca.stat().st_mtime >= student.stat().st_mtime:  # of this one
                pictures.append(Picture("pca", pca.read_bytes(), ((), [])))
            write_report(self.run, path, records, pictures)
        except Exception as error:
            logger.warning("%s could not be written: %s", path, error)
            logger.debug("this is where it came from", exc_info=True)
        now_is = time.monotonic()
        self._next = now_is + (now_is - began) / _SHARE
