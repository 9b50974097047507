"""Nothing that becomes of a process's output ends it: logging, progress bars, warnings, `print` of any library."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SPEAKS = """
import logging, os, sys, warnings
from rich.console import Console
from rich.progress import Progress
from dune_fast.engine.run_log import setup_logging

setup_logging(debug=False, rank=0)
sys.stdin.readline()  # until the reader has gone
logging.getLogger("dune_fast").error("x")
with Progress(console=Console(stderr=True, force_terminal=True)) as bar:
    bar.advance(bar.add_task("steps", total=2))
    print("y", flush=True)
print("y" * 10_000, flush=True)
if sys.stderr:
    sys.stderr.writelines(["z" * 10_000])
    sys.stderr.buffer.write(b"z" * 10_000)
warnings.warn("old")
print("last")
open(sys.argv[1], "w").close()
"""


@pytest.mark.parametrize("output", ["pipe", "full", "closed"])
def test_a_process_outlives_its_output(output, tmp_path):
    """Regression: rich ended the process by SystemExit when `| head` or a killed `| tee` had closed the pipe."""
    if output == "full" and not Path("/dev/full").exists():
        pytest.skip("no device that is always full")
    reader, writer = os.pipe()
    full = os.open("/dev/full" if output == "full" else os.devnull, os.O_WRONLY)
    streams = {"pipe": writer, "full": full, "closed": None}[output]
    closed = "import sys\nsys.stdout = sys.stderr = None\n" if output == "closed" else ""  # as `>&-` leaves them
    process = subprocess.Popen(
        [sys.executable, "-c", closed + SPEAKS, str(tmp_path / "alive")], stdin=subprocess.PIPE, stdout=streams,
        stderr=streams,
    )  # fmt: skip
    for descriptor in (reader, writer, full):
        os.close(descriptor)
    process.communicate(b"go on\n", timeout=60)
    assert process.returncode == 0 and (tmp_path / "alive").exists()


def test_characters_that_the_output_cannot_show_are_written_as_codes(tmp_path):
    code = "from dune_fast.engine.run_log import setup_logging; setup_logging(False, 0); print('caf\\u00e9 \\u2588')"
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout == "caf\\xe9 \\u2588\n"
