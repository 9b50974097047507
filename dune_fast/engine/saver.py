"""Saves checkpoints beside the training: the step waits for a copy to the host, the disk is a thread's matter.

Every rank's thread writes its file and then a record of it into `step_N.part/`. The thread of rank 0 waits for all
records, writes the manifest, renames the folder, moves the `latest` mark and removes old checkpoints. Whatever a kill
cuts short is a `.part` folder, which nobody reads.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from dune_fast.dali_pipelines.storage import sync_folder, write_whole
from dune_fast.engine import checkpoints
from dune_fast.engine.container import (
    MANIFEST,
    STATE_FILE,
    FileInfo,
    Manifest,
    Piece,
    write_tensors,
)
from dune_fast.engine.zero_state import ShardedState

logger = logging.getLogger(__name__)


class HostCopies:
    """Copies tensors to memory of the host that is kept from one save to the next, page-locked for a GPU's."""

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def __call__(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies, contiguous, of `tensors`; valid until the next call. The device is waited for once."""
        for name, tensor in tensors.items():
            kept = self._kept.get(name)
            if kept is None or kept.shape != tensor.shape or kept.dtype != tensor.dtype:
                kept = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
                self._kept[name] = kept
            kept.copy_(tensor, non_blocking=True)
        if any(tensor.is_cuda for tensor in tensors.values()):
            torch.cuda.current_stream().synchronize()
        return {name: self._kept[name] for name in tensors}


class Saver:
    """One rank's part in saving a run's checkpoints.

    Args:
        run: folder of the run, shared by all ranks.
        rank, world_size: of this process.
        keep: newest checkpoints that are kept.
        keep_every: those of every N-th step are kept for good; 0 for none.
        timeout: seconds that rank 0 waits for the other ranks' files.
    """

    def __init__(
        self, run: Path, rank: int, world_size: int, keep: int = 2, keep_every: int = 0, timeout: float = 1800
    ) -> None:
        self.run, self.rank, self.world_size = run, rank, world_size
        self.keep, self.keep_every, self.timeout = keep, keep_every, timeout
        self.last_step = -1
        """Of the newest save that was begun."""
        self.fault = ""
        """Why the newest save failed; empty if it did not."""
        self._copies, self._thread = HostCopies(), None

    def save(self, manifest: Manifest, state: ShardedState, small: Mapping[str, Tensor]) -> None:
        """Begins a save; the one before has ended when it returns. All ranks call it at the same step.

        A save that fails (a full disk, say) warns and leaves the checkpoints before it alone; the next one tries anew.

        Args:
            manifest: without `pieces` and `files`.
            state: this rank's shards.
            small: whole tensors; only rank 0's are written.
        """
        self.wait()
        self.last_step, self.fault = manifest.step, ""
        small = small if self.rank == 0 else {}
        shards = state.to_save(self.world_size)
        tensors = {f"{kind}/{s.parameter}": x for s in shards for kind, x in state.tensors(s).items()}
        copies = self._copies({**tensors, **{f"small/{name}": x for name, x in small.items()}})
        mine = {name: copies[name] for name in tensors}
        whole = {name: copies[f"small/{name}"] for name in small}
        pieces = {s.parameter: (s.start, s.numel) for s in shards}
        self._thread = threading.Thread(
            target=self._write, args=(manifest, mine, whole, pieces), name="save", daemon=True
        )
        self._thread.start()

    def wait(self, timeout: float | None = None) -> bool:
        """Waits until the save that was begun has ended; whether it succeeded (also if there was none).

        Args:
            timeout: seconds to wait at most.
        """
        if self._thread is not None:
            self._thread.join(timeout)
        return not self.fault

    def _write(
        self, manifest: Manifest, mine: dict[str, Tensor], whole: dict[str, Tensor], pieces: dict[str, tuple[int, int]]
    ) -> None:
        final = checkpoints.folder(self.run) / checkpoints.tag(manifest.step)
        part = final.with_name(final.name + checkpoints.PART)
        try:
            part.mkdir(parents=True, exist_ok=True)
            name = f"rank_{self.rank:05}.safetensors"
            record = {"info": dataclasses.asdict(write_tensors(part / name, mine)), "pieces": pieces}
            write_whole(self._record(part, self.rank), json.dumps(record).encode())
            if self.rank == 0:
                manifest.files[STATE_FILE] = write_tensors(part / STATE_FILE, whole)
                self._commit(manifest, part, final)
        except Exception as error:  # any failure of the disk; the training goes on
            self.fault = f"{type(error).__name__}: {error}"
            if self.rank == 0:
                shutil.rmtree(part, ignore_errors=True)
            else:
                self._report(part)
            logger.warning(
                "the checkpoint of step %d could not be saved (%s); the run goes on, the next save tries again",
                manifest.step, self.fault,
            )  # fmt: skip

    @staticmethod
    def _record(part: Path, rank: int) -> Path:
        return part / f"rank_{rank:05}.json"

    def _report(self, part: Path) -> None:
        """Tells rank 0, if the disk lets us, that this rank's file will not come."""
        try:
            write_whole(self._record(part, self.rank), json.dumps({"fault": self.fault}).encode())
        except OSError:
            logger.debug("no record of the failed save could be written", exc_info=True)

    def _commit(self, manifest: Manifest, part: Path, final: Path) -> None:
        """Rank 0: makes a checkpoint of what all ranks have written."""
        deadline = time.monotonic() + self.timeout
        for rank in range(self.world_size):
            path = self._record(part, rank)
            while not path.exists():
                if time.monotonic() > deadline:
                    raise TimeoutError(f"rank {rank} has not written its file within {self.timeout:.0f} s")
                time.sleep(0.02)
            record = json.loads(path.read_text())
            if "fault" in record:
                raise OSError(f"rank {rank}: {record['fault']}")
            name = f"rank_{rank:05}.safetensors"
            manifest.files[name] = FileInfo(**record["info"])
            for parameter, (start, numel) in record["pieces"].items():
                manifest.pieces.setdefault(parameter, []).append(Piece(name, start, numel))
            path.unlink()
        write_whole(part / MANIFEST, manifest.to_json().encode())
        if final.exists():  # one that was found broken, at the step that has now been reached again
            shutil.rmtree(final)
        part.rename(final)
        sync_folder(final.parent)
        write_whole(final.parent / checkpoints.LATEST, f"{final.name}\n".encode())
        checkpoints.prune(self.run, manifest.step, self.keep, self.keep_every)
