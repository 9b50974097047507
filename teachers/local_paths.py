"""Paths that have to be local: of models, of runs and of what commands write. Images alone are read from addresses."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # Path makes one slash of two
_COPY = {
    "s3": "`aws s3 cp --recursive`", "gs": "`gcloud storage cp -r`", "gcs": "`gcloud storage cp -r`",
    "az": "`azcopy copy --recursive`", "hf": "`hf download`", "http": "`curl -O`", "https": "`curl -O`",
}  # fmt: skip


class AddressError(ValueError):
    """An address of an object store, where a local path is wanted."""


def address_fault(text: str, what: str) -> str:
    """What to do where an address was given for `what`, such as "output_dir", as a sentence; "" for a local path."""
    if not (found := _ADDRESS.match(text)):
        return ""
    copy = _COPY.get(found[0].partition(":")[0].lower(), "the storage's own tool")
    return (
        f"{what} is {text}, an address: images and shards are read from addresses, but models, runs and results lie "
        f"in local or mounted folders. Give such a folder, and copy it from or to the storage with {copy}"
    )


def local_path(path: str | os.PathLike, what: str) -> Path:
    """The path, without "~"; AddressError for an address, such as "s3://bucket/folder". `what`: see `address_fault`."""
    if fault := address_fault(os.fspath(path), what):
        raise AddressError(fault)
    return Path(path).expanduser()


def local(text: str) -> Path:
    """A local path, as a type of argparse, which names the argument itself."""
    if fault := address_fault(text, "this"):
        raise argparse.ArgumentTypeError(fault)
    return Path(text)


class ResultPathError(ValueError):
    """A place of results (`--out`) that cannot be written."""


def result_folder(path: Path) -> Path:
    """The path, made a folder; ResultPathError where it cannot be one. Called before the work."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResultPathError(f"--out: {path} cannot be a folder ({error.strerror}): give another place") from error
    if not os.access(path, os.W_OK):
        raise ResultPathError(f"--out: this user cannot write to the folder {path}: give another place")
    return path


def result_file(path: Path) -> Path:
    """The path, its folder made; ResultPathError where no file can be written there. Called before the work."""
    result_folder(path.parent)
    if path.is_dir():
        raise ResultPathError(f"--out: {path} is a folder, and the result is a file: give a name in it")
    return path
