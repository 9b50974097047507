"""Users without a home folder, and what another user owns."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from dune_fast.dali_pipelines.source import shrunk_bytes
from dune_fast.dali_pipelines.storage import Reader
from dune_fast.engine.provenance import git_state
from dune_fast.teachers.files import cache_dir

root = pytest.mark.skipif(os.getuid() != 0, reason="only root can give files to another user")


def test_a_user_without_a_home_folder_is_told_what_to_set(monkeypatch):
    for name in ("HOME", "XDG_CACHE_HOME", "DUNE_FAST_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as for a uid that /etc/passwd does not have
    with pytest.raises(ValueError, match="has no home folder for the cache: set DUNE_FAST_CACHE"):
        cache_dir()
    monkeypatch.setenv("DUNE_FAST_CACHE", "/somewhere")
    assert cache_dir() == Path("/somewhere")


@root
@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_another_users_checkout_has_its_commit_recorded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))  # no settings of ours allow it
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "one"], check=True)
    for path in (tmp_path, *tmp_path.rglob("*")):
        os.chown(path, 54321, 54321)
    assert subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, check=False).returncode, "git refuses it"
    assert len(git_state(tmp_path)["commit"]) == 40


def test_another_users_shrunk_copy_that_is_closed_to_this_one_is_made_again(tmp_path, monkeypatch):
    photograph = tmp_path / "a.jpg"
    Image.effect_noise((400, 300), 50).convert("RGB").save(photograph)
    first, _ = shrunk_bytes(str(photograph), 100, tmp_path / "cache", Reader(0))
    (copy,) = (tmp_path / "cache").iterdir()
    copy.write_bytes(b"another user's")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may read everything
    assert shrunk_bytes(str(photograph), 100, tmp_path / "cache", Reader(0))[0].tobytes() == first.tobytes()
