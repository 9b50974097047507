"""What every test needs before anything is imported."""

from __future__ import annotations

import logging
import os
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported: kernels then run on the CPU
ROOT = Path(__file__).resolve().parents[1]
os.environ["DUNE_FAST_CONFIGS"] = str(ROOT / "bench" / "toy")  # `+teachers@teachers.NAME=conv_patchify`
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))  # of processes

# a shell starts `pytest &` with Ctrl-C ignored, nohup ignores SIGHUP; runs keep to that, and their tests send both
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

try:  # torchvision is built for CUDA: beside a CPU torch, its import looks for two operators that are not there
    import torchvision  # noqa: F401
except ModuleNotFoundError:
    pass  # tests that need it are skipped
except RuntimeError:
    from dune_fast.teachers.torchvision_operators import declare

    declare()
    import torchvision  # noqa: F401

import pytest  # noqa: E402

pytest_plugins = ["missing_packages"]  # not imported here: hooks of a conftest.py miss the folders below it


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow, too")
    parser.addoption("--clusters", action="store_true", help="run the tests marked clusters: root, Linux, minutes")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """GPU tests skip where there is no GPU, slow ones unless they are asked for; the reason is said."""
    reasons = {
        "gpu": "" if torch.cuda.is_available() else "no CUDA device",
        "slow": "" if config.getoption("--slow") else "slow; run with --slow",
        "clusters": "" if config.getoption("--clusters") else "two hosts of namespaces; `make test-clusters` runs it",
    }
    for item in items:
        for mark, reason in reasons.items():
            # not `mark in item.keywords`: these hold the names of all folders above, too
            if reason and item.get_closest_marker(mark):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session", autouse=True)
def interpreter_and_numpy() -> Iterator[None]:
    """The interpreter of triton 3.6 makes integers of arrays of one element, which numpy 2.4 refuses: take them out."""
    try:
        from triton.runtime import interpreter
    except ImportError:
        yield
        return
    patch_tensor = interpreter._patch_lang_tensor

    def patch_tensor_and_index(tensor: type, scope: object) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang_tensor", patch_tensor_and_index)
        yield


@pytest.fixture(autouse=True)
def own_loggers_speak() -> None:
    """Commands run within a test, and libraries, set loggers for the rest of the process: caplog would miss ours."""
    logging.disable(logging.NOTSET)
    for name in list(logging.root.manager.loggerDict):
        if name.partition(".")[0] in ("dune_fast", "teachers", "dali_pipelines", "bench", "kernels"):
            logger = logging.getLogger(name)
            logger.disabled, logger.propagate = False, True
            logger.setLevel(logging.NOTSET)


@pytest.fixture(autouse=True)
def same_draws() -> None:
    """A test sees the same random numbers whatever has run before it."""
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], object]:
    """Makes a shell script that is found before all other programs of its name."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")

    def make(name: str, text: str) -> None:
        path = tmp_path / "bin" / name
        path.write_text(f"#!/bin/sh\n{text}")
        path.chmod(0o755)

    return make


@pytest.fixture(scope="session")
def reference_dir() -> Path:
    """The folder of reference cases; tests that need it skip where it is absent."""
    default = Path(__file__).resolve().parents[2] / "shared" / "reference"
    folder = Path(os.environ.get("DUNE_REFERENCE_DIR", default))
    if not folder.is_dir():
        pytest.skip(f"no reference cases at {folder}: set DUNE_REFERENCE_DIR")
    return folder
