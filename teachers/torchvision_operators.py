"""Lets torchvision be imported beside a CPU build of torch: `python -m teachers.torchvision_operators`.

torchvision from PyPI is built for CUDA: beside a torch without it, its import ends with "operator torchvision::nms does
not exist". Two declared operators are enough; `make` runs this file, which copies itself where torchvision fails.
"""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

COPY = "dune_fast_torchvision_operators"
"""Name of the copy in site-packages, and of the `.pth` file that runs `hook` at every start of Python."""


def declare() -> None:
    """Declares `torchvision::nms` and `qnms`, unless something has."""
    import torch

    for operator in ("nms", "qnms"):
        with contextlib.suppress(RuntimeError):  # declared before
            signature = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            torch.library.define(f"torchvision::{operator}", signature)


class _Finder:
    @classmethod
    def find_spec(cls, name: str, path: object = None, target: object = None) -> None:
        """Finds nothing, and declares the operators where torchvision's own do not load."""
        if name == "torchvision":
            sys.meta_path.remove(cls)
            spec = importlib.util.find_spec("torchvision")
            if spec is not None and not _own_load(Path(spec.submodule_search_locations[0])):
                declare()


def _own_load(package: Path) -> bool:
    """Whether this torch can load torchvision's compiled operators."""
    import torch

    try:
        for library in package.glob("_C*.so"):
            torch.ops.load_library(library)
    except OSError:
        return False
    return True


def hook() -> None:
    """Lets the first import of torchvision declare its operators; torch is not imported before."""
    sys.meta_path.insert(0, _Finder)


def is_broken() -> bool:
    """Whether torchvision is there and fails for want of its operators, in a process of its own."""
    done = subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True, text=True, check=False)
    return done.returncode != 0 and "torchvision::nms does not exist" in done.stderr


def install(site_packages: Path) -> None:
    """Copies this file there, with the line that runs `hook`."""
    shutil.copyfile(__file__, site_packages / f"{COPY}.py")
    (site_packages / f"{COPY}.pth").write_text(f"import {COPY}; {COPY}.hook()\n")


if __name__ == "__main__" and is_broken():
    install(Path(sysconfig.get_paths()["purelib"]))
