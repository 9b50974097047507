"""The record of broken images: in memory, in files beside the run, and when there are too many of them.

What takes the place of a broken image is a function of the order and of which files are broken, not of when they were
found or by which rank. So a run that goes on, on any number of ranks, sees what it would have seen without the
interruption; the record only spares it finding out again. Files that could not be read at all are the exception: all
ranks of this run that learn of them leave them out, the next run tries them again.
"""

from __future__ import annotations

import json
import logging
import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from dune_fast.dali_pipelines.datasets import DataConfig, Images
from dune_fast.dali_pipelines.errors import DataError

logger = logging.getLogger(__name__)


class Quarantine:
    """Which images are broken. Counts them per dataset and stops the run when they are too many; one per process.

    With the run's folder, every process appends to a file of its own there, `quarantine.rank{R}.jsonl`, and reads those
    of all, at the start and whenever it finds an image itself, so the limit is one for all ranks. Thread-safe.
    """

    def __init__(
        self, names: Sequence[str], images: Sequence[Images], config: DataConfig, folder: Path | None, rank: int
    ) -> None:
        self._names, self._images, self._config = names, images, config
        self._broken: set[tuple[int, int]] = set()
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
            path = self._images[dataset][index]
            self._broken.add((dataset, index))
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

    def _count(self) -> dict[str, int]:
        found = Counter(dataset for dataset, _ in self._broken)
        return {name: found[i] for i, name in enumerate(self._names)}

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
                    self._broken.add((dataset, index))
