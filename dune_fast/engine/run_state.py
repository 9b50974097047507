"""`state.json` in a run's folder: how the run stands, for scripts that start it again.

    {"state": "stopped", "step": 4000, "steps": 125000, "why": "SIGTERM", "time": "2026-01-01T00:00:00.000+00:00", ...}

Launchers take every exit status but 0 for a crash, report it at length and kill the other ranks. So a rank that has
saved and stopped ends with 0, as one that has finished does, and this file tells them apart.
"""

from __future__ import annotations

import json
import logging
import os
import socket
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dune_fast.dali_pipelines.storage import write_whole
from dune_fast.teachers.run_files import complete_steps

logger = logging.getLogger(__name__)

NAME = "state.json"
RUNNING, STOPPED, FINISHED, FAILED = "running", "stopped", "finished", "failed"
"""Running, or killed; stopped by a signal, and saved; at its end; ended by an error."""
STOPPED_STATUS = 85
"""Exit status of `dune-fast distill` and `dune-fast resume` for a run that was stopped by a signal, and saved."""


def read_state(run: Path) -> dict[str, Any]:
    """What `state.json` holds; empty if there is none."""
    try:
        content = json.loads((run / NAME).read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def write_state(run: Path, state: str, step: int, steps: int, why: str = "") -> None:
    """Says how the run stands; rank 0 calls it. A disk that refuses the file costs a warning.

    `step` is how many finished steps are saved, `steps` how many the run has, `why` a signal or a sentence.
    """
    content = {
        "state": state, "step": step, "steps": steps, "why": why,
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"), "process": os.getpid(),
        "host": socket.gethostname(),
    }  # fmt: skip
    try:
        write_whole(run / NAME, f"{json.dumps(content)}\n".encode())
    except OSError as error:
        logger.warning("%s cannot be written: %s", run / NAME, error)


def fail(run: Path, why: str) -> None:
    """Says that this process's run has failed, and why; nothing if the folder is another process's."""
    now = read_state(run)
    if (now.get("state"), now.get("process"), now.get("host")) == (RUNNING, os.getpid(), socket.gethostname()):
        write_state(run, FAILED, max(complete_steps(run), default=0), now["steps"], why)


def command_status(run: Path, launch: Callable[[], int]) -> int:
    """Launches a run's ranks; the exit status for a shell, which tells a run that was stopped from one at its end."""
    before = read_state(run)
    status, after = launch(), read_state(run)
    return STOPPED_STATUS if after != before and after.get("state") == STOPPED else status
