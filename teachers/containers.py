"""Checkpoint containers of the published releases, read without running anything in them.

`torch.load(weights_only=True)` with an allow-list of harmless types; a file that needs another is refused by name.
"""

from __future__ import annotations

import argparse
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from teachers.weights import TeacherWeightsError, damaged

_NUMPY_DTYPES = [type(np.dtype(name)) for name in ("float64", "float32", "int64", "int32", "bool")]
ALLOWED = [argparse.Namespace, np.ndarray, np.dtype, *_NUMPY_DTYPES]
"""Types besides torch's own: the published `args` hold a Namespace with numpy arrays (the schedules)."""


def read_container(path: Path) -> dict[str, Any]:
    """A published checkpoint: `{'model': state dict, 'args': Namespace, ...}` or a bare state dict.

    Raises:
        TeacherWeightsError: missing, damaged, or in need of a type that is not allowed (named in the message).
    """
    if not Path(path).is_file():
        raise TeacherWeightsError(f"there is no checkpoint {path}; correct the path, or put the file there")
    reconstruct = np.empty(0).__reduce__()[0]  # lives in another module in numpy 1
    allowed = [
        *ALLOWED,
        (reconstruct, "numpy._core.multiarray._reconstruct"),
        (reconstruct, "numpy.core.multiarray._reconstruct"),
    ]
    try:
        with torch.serialization.safe_globals(allowed):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if wanted := re.search(r"GLOBAL (\S+)", str(error)):
            raise TeacherWeightsError(
                f"{path} asks for the type {wanted[1]} and is not loaded, since that could run code; save it without"
            ) from error
        raise damaged(path, error) from error
    except (OSError, EOFError, RuntimeError, ValueError, zipfile.BadZipFile) as error:
        raise damaged(path, error) from error
    if not isinstance(content, dict):
        raise TeacherWeightsError(f"{path} holds a {type(content).__name__}, not a checkpoint's dictionary")
    return content


def strip_wrappers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Removes `module.` (DistributedDataParallel) and `_orig_mod.` (torch.compile) from names."""
    return {key.replace("_orig_mod.", "").removeprefix("module."): value for key, value in state.items()}
