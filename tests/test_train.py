"""`dune_fast/train.py`: errors of the system that a user can mend are sentences, all others keep their traceback."""

import errno
import logging
import os
import shutil
from pathlib import Path

import pytest

from dune_fast import train
from dune_fast.engine import trainer

DEMO = ["experiment=demo", "evaluation.held_out=false"]


def raising(monkeypatch, error: Exception) -> None:
    def start(*_):
        raise error

    monkeypatch.setattr(trainer, "Trainer", start)


@pytest.fixture(autouse=True)
def messages(monkeypatch, caplog):
    """The records of the log, whose handlers stay pytest's."""
    monkeypatch.setattr(train, "setup_logging", lambda debug, rank: None)
    caplog.set_level(logging.INFO, "dune_fast")
    return caplog


@pytest.mark.parametrize(
    "number, cure",
    [
        (errno.ENOSPC, "make room"),
        (errno.EDQUOT, "make room"),
        (errno.EROFS, "this user can use it"),
        (errno.EACCES, "this user can use it"),
        (errno.EEXIST, "take away what is there"),
        (errno.ESTALE, "the storage answers"),
        (errno.EMFILE, "ulimit -n"),
    ],
)
def test_errors_of_the_system_say_what_where_and_what_to_do(monkeypatch, messages, number, cure):
    raising(monkeypatch, OSError(number, os.strerror(number), "/runs/demo/config.yaml"))
    assert train.main([*DEMO, "output_dir=/runs/demo"]) == 2
    (record,) = messages.records
    assert record.getMessage().startswith(f"{os.strerror(number)}: /runs/demo/config.yaml. Please ")
    assert cure in record.getMessage() and record.exc_info is None


def test_full_disk_that_names_no_file_names_the_places(monkeypatch, messages, tmp_path):
    monkeypatch.setenv("DUNE_FAST_CACHE", str(tmp_path / "cache"))
    raising(monkeypatch, OSError(errno.ENOSPC, "No space left on device"))
    assert train.main([*DEMO, "output_dir=/runs/demo"]) == 2
    words = messages.records[0].getMessage()
    assert "No space left on device: output_dir=/runs/demo, the cache folder" in words and str(tmp_path) in words


def test_traceback_is_there_for_those_who_ask(monkeypatch, messages):
    messages.set_level(logging.DEBUG, "dune_fast")
    raising(monkeypatch, OSError(errno.ENOSPC, "No space left on device"))
    assert train.main(DEMO) == 2
    assert [record.exc_info is not None for record in messages.records] == [False, True]


@pytest.mark.parametrize(
    "error", [FileNotFoundError(errno.ENOENT, "No such file", "x"), OSError("no number"), RuntimeError("bug")]
)
def test_errors_that_are_bugs_keep_their_traceback(monkeypatch, messages, error):
    """It goes where all messages go, so to the run's log too."""
    raising(monkeypatch, error)
    assert train.main(DEMO) == 1
    assert messages.records[-1].exc_info[1] is error


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc")
def test_a_folder_that_nobody_can_make_is_a_sentence(messages):
    assert train.main([*DEMO, "output_dir=/proc/nope"]) == 2
    assert "output_dir=/proc/nope cannot be made" in messages.records[-1].getMessage()
    assert not messages.records[-1].exc_info


def test_a_disk_without_room_for_a_checkpoint_is_said_before_the_start(monkeypatch, messages, tmp_path):
    monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(2**40, 2**40 - 2**20, 2**20))
    assert train.main([*DEMO, f"output_dir={tmp_path / 'run'}"]) == 2
    assert "a checkpoint of this run takes" in messages.records[-1].getMessage()
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_real_folder_that_cannot_be_made(messages, tmp_path):
    """Below a file; permissions would not bind root, as whom tests may run."""
    (tmp_path / "file").touch()
    assert train.main([*DEMO, f"output_dir={tmp_path / 'file' / 'run'}"]) == 2
    assert f"Not a directory: {tmp_path / 'file' / 'run'}. Please" in messages.records[-1].getMessage()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_real_full_disk(monkeypatch, messages, tmp_path):
    """The run's first file is on a device that takes nothing."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").symlink_to("/dev/full")
    assert train.main([*DEMO, f"output_dir={tmp_path / 'run'}"]) == 2
    assert "No space left on device: " in messages.records[-1].getMessage()
