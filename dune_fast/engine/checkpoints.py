"""What a run keeps: resumable checkpoints while it trains, the student's weights when it has ended.

A step waits for a copy of the state to the host. Every rank's thread writes it, then a record, into `step_N.part/`;
that of rank 0 waits for all records and makes the folder a checkpoint. `teachers.run_files` reads the format.

More than 300 lines: writing, loading and deleting belong to one format.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn

from dune_fast.dali_pipelines.storage import sync_folder, write_whole
from dune_fast.distill.standardization import TeacherStatistics
from dune_fast.engine.config import RunConfig, config_of, dump_config, load_config
from dune_fast.engine.zero_state import HostCopies, ShardedState
from dune_fast.student import Student, build_student
from dune_fast.teachers.architecture import architecture_metadata
from dune_fast.teachers.run_files import (
    AVERAGE,
    MANIFEST,
    STATE_FILE,
    CheckpointError,
    FileInfo,
    Manifest,
    Piece,
    Reader,
    checkpoint_state,
    complete_steps,
    folder,
    tag,
    weights_in,
)  # fmt: skip
from dune_fast.teachers.weights import TeacherWeightsError

logger = logging.getLogger(__name__)

LATEST = "latest"
"""File beside the checkpoints that names the newest; for people and scripts, the run itself looks at the folders."""
STUDENT = "student.safetensors"
"""The weights of a finished run, projectors and statistics too; their average under `train.ema`."""
RAW = "student_raw.safetensors"
"""The weights themselves, where `STUDENT` has the average."""
PART = ".part"
"""Suffix of a checkpoint's folder until every rank has written its part; nobody reads one that a kill cuts short."""
_NO_CHECKPOINT = "there is no checkpoint yet"
_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16",
    torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> FileInfo:
    """Writes a safetensors file and makes it durable; returns its checksum.

    `tensors` are contiguous and on the CPU. Own code rather than the library's: that one copies every tensor and holds
    the interpreter's lock while it writes, which would stop the training thread, and its errors are not OSErrors.
    """
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    at = 0
    for name, tensor in tensors.items():
        assert tensor.is_contiguous() and tensor.device.type == "cpu", name
        end = at + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, end]}
        at = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    digest, size = hashlib.sha256(), 0
    with path.open("wb", buffering=0) as file:
        for data in (len(encoded).to_bytes(8, "little"), encoded, *map(_bytes, tensors.values())):
            view = memoryview(data)
            while view:  # a raw write may be a short one
                written = file.write(view)
                digest.update(view[:written])
                view, size = view[written:], size + written
        os.fsync(file.fileno())
    return FileInfo(digest.hexdigest(), size)


def _bytes(tensor: Tensor) -> memoryview | bytes:
    return memoryview(tensor.view(-1).view(torch.uint8).numpy()) if tensor.numel() else b""


class Saver:
    """One rank's part in saving a run's checkpoints.

    Args:
        run: folder of the run, shared by all ranks.
        keep: newest checkpoints that are kept.
        keep_every: those of every N-th step are kept for good; 0 for none.
        timeout: seconds that rank 0 waits for the other ranks' files.
        saved: called on rank 0, by a thread, with the seconds that a save has taken from its beginning.
    """

    def __init__(
        self, run: Path, rank: int, world_size: int, keep: int = 2, keep_every: int = 0, timeout: float = 1800,
        saved: Callable[[float], object] = lambda seconds: None,
    ) -> None:  # fmt: skip
        self.run, self.rank, self.world_size = run, rank, world_size
        self.keep, self.keep_every, self.timeout = keep, keep_every, timeout
        self.last_step = -1
        """Of the newest save that was begun."""
        self.fault = ""
        """Why the newest save failed; empty if it did not."""
        self._copies, self._thread, self._saved = HostCopies(), None, saved

    def save(self, manifest: Manifest, state: ShardedState, small: Mapping[str, Tensor]) -> None:
        """Begins a save, after the one before has ended. All ranks call it at the same step.

        A save that fails (a full disk, say) warns and leaves the checkpoints before it alone; the next one tries anew.

        Args:
            manifest: without `pieces` and `files`.
            state: this rank's shards.
            small: whole tensors; only rank 0's are written.
        """
        self.wait()
        self._began = time.monotonic()
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
        """Waits, for `timeout` seconds at most, until the save has ended; False if it failed."""
        if self._thread is not None:
            self._thread.join(timeout)
        return not self.fault

    def finish(self, device: torch.device) -> None:
        """Waits for the last save; CheckpointError on every rank if it failed on any. All ranks call it."""
        fault = torch.tensor(float(not self.wait()), device=device)
        dist.all_reduce(fault, op=dist.ReduceOp.MAX)
        if fault.item():
            raise CheckpointError(
                f"the last checkpoint, step {self.last_step}, could not be saved "
                f"({self.fault or 'see the other ranks'}); {self.newest()}"
            )

    def newest(self) -> str:
        """Which checkpoint there is to go on from, for messages."""
        self.wait(timeout=60.0)  # one may be on its way to the disk
        steps = complete_steps(self.run)
        return f"the last good checkpoint is {tag(steps[-1])} in {folder(self.run)}" if steps else _NO_CHECKPOINT

    def _write(
        self, manifest: Manifest, mine: dict[str, Tensor], whole: dict[str, Tensor], pieces: dict[str, tuple[int, int]]
    ) -> None:
        final = folder(self.run) / tag(manifest.step)
        part = final.with_name(final.name + PART)
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
        self._saved(time.monotonic() - self._began)
        write_whole(final.parent / LATEST, f"{final.name}\n".encode())
        prune(self.run, manifest.step, self.keep, self.keep_every)


def prune(run: Path, newest: int, keep: int, keep_every: int = 0) -> None:
    """Deletes all complete checkpoints but the last `keep` and those of every `keep_every`-th step (0: of none).

    Those after the `newest`, the one that was just written, go too: they are broken, or the run would have gone on from
    them. So does what a kill or a full disk cut short before the newest.
    """
    steps = complete_steps(run)
    good = [step for step in steps if step <= newest]
    kept = set(good[-keep:]) | {step for step in good if keep_every and step % keep_every == 0}
    for step in steps:
        if step not in kept:
            shutil.rmtree(folder(run) / tag(step), ignore_errors=True)
    clear_partial(run, before=newest)


def clear_partial(run: Path, before: int | None = None) -> None:
    """Deletes what was cut short, of steps below `before`; no other process may be writing there."""
    for path in folder(run).glob(f"step_*{PART}"):
        if before is None or path.name < tag(before):
            shutil.rmtree(path, ignore_errors=True)


def load(run: Path, step: int, state: ShardedState, shapes: dict[str, list[int]]) -> tuple[Manifest, dict[str, Tensor]]:
    """Loads this rank's shards from a checkpoint of any number of ranks and any ZeRO stage; all ranks call it.

    Returns:
        The manifest, and the small tensors beside the shards.

    Raises:
        CheckpointError: it is damaged, or of other parameters.
    """
    where = folder(run) / tag(step)
    manifest = Manifest.read(where)
    if others := sorted(n for n in shapes.keys() | manifest.shapes.keys() if shapes.get(n) != manifest.shapes.get(n)):
        shown = "; ".join(f"{n}: {manifest.shapes.get(n)} -> {shapes.get(n)}" for n in others[:4])
        raise CheckpointError(
            f"{where} is of another student: {len(others)} parameters have other shapes ({shown}); go on with that "
            "student, or start from its weights by student_weights=... in a new folder"
        )
    reader = Reader(where, manifest)
    for shard in state.shards:
        for kind, live in state.tensors(shard).items():
            found = "weight" if kind == AVERAGE and not manifest.averaged else kind  # an average begins there
            live.copy_(reader.read(found, shard.parameter, shard.start, shard.numel))
    state.set_updates(manifest.updates)
    state.publish()
    return manifest, reader.state()


def load_statistics(
    statistics: nn.Module, tensors: dict[str, Tensor], of: str = "standardization.convention"
) -> None:  # fmt: skip
    """Loads the teachers' statistics; CheckpointError if they are of another configuration, in the field `of`."""
    try:
        statistics.load_state_dict(tensors)
    except RuntimeError as error:
        raise CheckpointError(
            f"the checkpoint's statistics of the teachers are of another {of}: take that change back, or start a new "
            "run with another name=..."
        ) from error


def _cpu(module: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    return {prefix + key: value.detach().cpu().contiguous() for key, value in module.state_dict().items()}


def export(run: Path, cfg: RunConfig, student: Student, statistics: TeacherStatistics, raw: bool = False) -> None:
    """Writes `encoder.safetensors`, `student.safetensors` (with projectors and statistics) and `config.yaml`.

    Under `train.ema` the student is the average, and the files' metadata say so by `ema`, its decay; `raw` writes the
    weights themselves, to `student_raw.safetensors` alone.
    """
    dump_config(cfg, run / "config.yaml")
    about = architecture_metadata(student.encoder.cfg)
    about |= {AVERAGE: str(cfg.train.ema)} if cfg.train.ema and not raw else {}
    everything = _cpu(student) | _cpu(statistics, "teacher_norms.")
    files = {RAW: everything} if raw else {"encoder.safetensors": _cpu(student.encoder), STUDENT: everything}
    for name, tensors in files.items():
        partial = run / f".{name}.part"
        try:
            write_tensors(partial, tensors, about)
            partial.replace(run / name)
        finally:
            partial.unlink(missing_ok=True)


def load_run(run: Path, file: str = STUDENT) -> tuple[RunConfig, Student, TeacherStatistics]:
    """Configuration, student and teachers' statistics of a run, in evaluation mode.

    Args:
        run: the folder of a run, finished or not (its newest checkpoint then, which is said), or of a checkpoint.
        file: of a finished run, `STUDENT` or `RAW`.

    Raises:
        ConfigError: `run` is not a run's folder, or that of a head's run.
        CheckpointError: the checkpoint is damaged.
        TeacherWeightsError: the run has not saved anything yet, or its weights are damaged.
    """
    path = weights_in(run, file)
    if path is None:
        load_config(run / "config.yaml")  # says so where this is no run at all
        raise TeacherWeightsError(f"{run}: the run has not ended, and there is no checkpoint of it yet")
    if path.is_dir():
        manifest, state = checkpoint_state(path)
        cfg = config_of(manifest.config, path)
    else:
        cfg = load_config(path.parent / "config.yaml")
    cfg.head.refuse(run)
    student = build_student(cfg.student, cfg.projector, cfg.teacher_features, cfg.train.seed)
    statistics = TeacherStatistics.of(cfg.teacher_features, cfg.standardization)
    try:
        state = state if path.is_dir() else load_file(path)
        norms = {k.removeprefix("teacher_norms."): state.pop(k) for k in list(state) if k.startswith("teacher_norms.")}
        student.load_state_dict(state)
        statistics.load_state_dict(norms)
    except Exception as error:
        raise TeacherWeightsError(
            f"{path} is damaged or of another configuration: {str(error).splitlines()[0]}"
        ) from error
    return cfg, student.eval(), statistics
