"""The record of broken images: in memory, in a file beside the run, and when there are too many of them.

Which image takes the place of a broken one is a function of the order alone (`order.SampleOrder.image` with a `skip`)
and of which files are broken, not of when they were found or by which rank. So a run that goes on, on any number of
ranks, sees what it would have seen without the interruption, and reading the record back only spares it finding out
again. The exception are files that could not be read at all: they are on record, and all ranks of the run that learn of
them leave them out, but the next one tries them again.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Sequence
from pathlib import Path

from dune_fast.dali_pipelines.datasets import DataConfig, Images
from dune_fast.dali_pipelines.errors import DataError

logger = logging.getLogger(__name__)


class Quarantine:
    """Which images are broken. Counts them per dataset and stops the run when they are too many; one per process.

    With a folder, every process appends to a file of its own there, `quarantine.rank{R}.jsonl`, and knows what all of
    them have written: at the start, and again whenever it finds an image itself, so the limit is one for all ranks.
    Safe to use from several threads.

    Args:
        names, images: of each dataset.
        config: the limits.
        folder: of the run; None keeps the record in memory.
        rank: of this process.
    """

    def __init__(
        self, names: Sequence[str], images: Sequence[Images], config: DataConfig, folder: Path | None, rank: int
    ) -> None:
        self._names, self._images, self._config = names, images, config
        self._broken: dict[tuple[int, int], str] = {}
        self._lock = threading.Lock()
        self._folder = folder
        self._file = None if folder is None else folder / f"quarantine.rank{rank}.jsonl"
        self._read_until: dict[Path, int] = {}  # bytes
        self._read_back(at_start=True)
        if self._file in self._read_until and self._file.stat().st_size > self._read_until[self._file]:
            with open(self._file, "a") as file:
                file.write("\n")  # ends a line that a kill has cut short: the next entry needs one of its own

    def __contains__(self, image: tuple[int, int]) -> bool:
        return image in self._broken

    def add(self, dataset: int, index: int, reason: str, lasting: bool = True) -> None:
        """Records an image and names it in the log, once; see `BrokenImage` for `lasting`.

        Raises:
            DataError: the dataset has more broken images than the configuration allows.
        """
        with self._lock:
            if (dataset, index) in self._broken:
                return
            path = self._broken[dataset, index] = self._images[dataset][index]
            name, size = self._names[dataset], len(self._images[dataset])
            if self._file is not None:
                entry = {"dataset": name, "index": index, "path": path, "reason": reason, "lasting": lasting}
                self._file.parent.mkdir(parents=True, exist_ok=True)
                with open(self._file, "a") as file:
                    file.write(json.dumps(entry) + "\n")
            self._read_back()
            count = self._count()[name]
        logger.warning("dataset %s: broken image %s skipped (%s); %d of %d so far", name, path, reason, count, size)
        allowed = max(int(self._config.max_broken_share * size), min(self._config.max_broken_spared, size // 2))
        if count > allowed:
            raise DataError(
                f"dataset {name!r}: {count} of {size} images are broken, {allowed} are tolerated; "
                f"the last one is {path} ({reason}). "
                "Repair or remove them (the log names each), or raise data.max_broken_share"
            )

    def counts(self) -> dict[str, int]:
        """Broken images so far, by dataset; with a folder, those that any rank has found."""
        with self._lock:
            self._read_back()
            return self._count()

    def paths(self) -> list[str]:
        """Their files, in the order in which this process has learnt of them."""
        with self._lock:
            self._read_back()
            return list(self._broken.values())

    def _count(self) -> dict[str, int]:
        totals = dict.fromkeys(self._names, 0)
        for dataset, _ in self._broken:
            totals[self._names[dataset]] += 1
        return totals

    def _read_back(self, at_start: bool = False) -> None:
        """Takes over what is new in the files of all ranks; entries of other data, and torn lines, are left out.

        At the start, so are files that could not be read: this process tries them again.
        """
        for file in sorted(self._folder.glob("quarantine.rank*.jsonl")) if self._folder is not None else []:
            with open(file, "rb") as stream:
                stream.seek(self._read_until.get(file, 0))
                lines = stream.read()
            lines = lines[: lines.rfind(b"\n") + 1]  # another rank may be writing
            self._read_until[file] = self._read_until.get(file, 0) + len(lines)
            for line in lines.splitlines():
                try:
                    entry = json.loads(line)
                    dataset, index = self._names.index(entry["dataset"]), int(entry["index"])
                    same = (entry["lasting"] or not at_start) and self._images[dataset][index] == entry["path"]
                except (ValueError, KeyError, TypeError, IndexError):
                    continue  # a line cut short by a kill, a dataset or an image that is no longer there
                if same:
                    self._broken.setdefault((dataset, index), entry["path"])
