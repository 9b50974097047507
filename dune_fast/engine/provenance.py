"""`run.json` in a run's folder: for every start of the run, what ran it and where."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dune_fast.dali_pipelines.storage import write_whole
from dune_fast.engine.devices import device_name

logger = logging.getLogger(__name__)

_PACKAGES = (
    "dune-fast", "torch", "triton", "deepspeed", "nvidia-dali-cuda130", "nvidia-dali-cuda120", "flash-attn", "timm",
    "numpy",
)  # fmt: skip
_GIT_SECONDS = 10  # a repository on a slow network disk must not hold up a start


def packages() -> dict[str, str]:
    """Version by name: this project, Python, packages that are installed."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def versions() -> dict[str, str]:
    """`packages`, and what may differ between machines: CUDA, NVIDIA's driver."""
    found = packages()
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    if driver := driver_version():
        found["driver"] = driver
    return found


def driver_version() -> str | None:
    """Version of NVIDIA's kernel driver, None where there is none."""
    path = Path("/sys/module/nvidia/version")
    if path.is_file():
        return path.read_text().strip()
    if shutil.which("nvidia-smi"):
        lines = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        return lines.split()[0] if lines else None
    return None


def _output(*command: str) -> str | None:
    """A command's output, None if it fails or takes too long."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_GIT_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def files_hash(folders: Iterable[Path], suffixes: Sequence[str]) -> str:
    """A hash of the names and contents of the files with these suffixes below some folders, links followed."""
    digest = hashlib.blake2b(digest_size=8)
    for top in folders:
        for folder, below, files in os.walk(top, followlinks=True):
            below.sort()
            for path in (Path(folder, name) for name in sorted(files)):
                if path.suffix in suffixes:
                    digest.update(f"{path.relative_to(top)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit, branch and files that differ from it, of the checkout that `folder` is the top of; None if it is none."""
    if not (folder / ".git").exists() or not shutil.which("git"):
        return None
    # git refuses another user's checkout, whose settings could run programs; this one's code runs in any case
    git = ("git", "-c", f"safe.directory={folder}", "-c", "core.fsmonitor=false", "-C", str(folder))
    commit = _output(*git, "rev-parse", "HEAD")
    if commit is None:
        return None
    changed = _output(*git, "status", "--porcelain", "--untracked-files=no")
    return {
        "commit": commit,
        "branch": _output(*git, "rev-parse", "--abbrev-ref", "HEAD"),
        "changed": [line[2:].strip() for line in changed.splitlines()] if changed is not None else None,
    }


def gather(value: Any) -> list[Any]:
    """The values of all ranks, in their order. All ranks call it."""
    values = [value] * dist.get_world_size()
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def world(device: torch.device) -> dict[str, Any]:
    """Ranks, backend, and the devices of every host, in the order of ranks. All ranks call it."""
    hosts: dict[str, list[str]] = {}
    for host, name in gather((socket.gethostname(), device_name(device))):
        hosts.setdefault(host, []).append(name)
    return {"ranks": dist.get_world_size(), "backend": dist.get_backend(), "hosts": hosts}


class RunRecord:
    """`run.json`: {"starts": [...], "trackers": {...}}, written whole, so that a kill leaves the old or the new one.

    `keep` and `keep_tracker` are safe to call from several threads.
    """

    def __init__(self, folder: Path) -> None:
        self.path, self._lock = folder / "run.json", threading.Lock()
        self.content: dict[str, Any] = {"starts": [], "trackers": {}}
        if self.path.exists():
            try:
                self.content |= json.loads(self.path.read_text())
            except (json.JSONDecodeError, TypeError) as error:
                logger.warning("%s cannot be read and is written anew: %s", self.path, error)

    def start(self, step: int, total_steps: int, where: dict[str, Any]) -> dict[str, Any]:
        """Appends a start after `step` finished steps and logs it; `where` is of `world`. Returns what it appended."""
        entry = {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "step": step,
            "total_steps": total_steps,
            "arguments": sys.argv[1:],
            "host": socket.gethostname(),
            "process": os.getpid(),
            "platform": platform.platform(),
            "world": where,
            "versions": versions(),
            "git": git_state(Path(__file__).resolve().parents[2]),
        }
        if not step:
            self.content["trackers"] = {}  # a run that starts anew is another run
        self.content["starts"].append(entry)
        self.save()
        shown = ", ".join(f"{name} {version}" for name, version in entry["versions"].items())
        logger.info("versions: %s", shown)
        if git := entry["git"]:
            changed = f" with {len(git['changed'])} changed files" if git["changed"] else ""
            logger.info("source: commit %s (%s)%s", git["commit"][:12], git["branch"], changed)
        hosts = (f"{host}: {len(names)} x {names[0]}" for host, names in where["hosts"].items())
        logger.info("world: %d ranks (%s) on %s", where["ranks"], where["backend"], "; ".join(hosts))
        return entry

    def keep(self, entry: dict[str, Any], key: str, value: Any) -> None:
        """Adds a value to an entry of the record, and saves."""
        with self._lock:
            entry[key] = value
            self.save()

    def keep_tracker(self, service: str, run_id: str) -> None:
        """Adds a service's name for this run, and saves."""
        self.keep(self.content["trackers"], service, run_id)

    def save(self) -> None:
        """Writes the file; a disk that refuses it costs a warning, not the run."""
        try:
            write_whole(self.path, f"{json.dumps(self.content, indent=1)}\n".encode())
        except OSError as error:
            logger.warning("%s cannot be written: %s", self.path, error)
