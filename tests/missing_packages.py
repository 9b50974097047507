"""Tests on a machine that lacks some of our packages, such as a GPU machine with torch and little else: what needs one
that is absent is skipped, with its name as the reason."""

from __future__ import annotations

import importlib.util
from collections.abc import Generator

import pytest

MAY_BE_MISSING = (
    "PIL", "deepspeed", "fsspec", "hydra", "matplotlib", "nvidia.dali", "omegaconf", "onnx", "onnxruntime", "psutil",
    "rich", "safetensors", "scipy", "sklearn", "tensorboard", "timm", "torchvision", "transformers", "webdataset",
    "yaml",
)  # fmt: skip
"""Third-party packages by the names they are imported by: all but those that every test needs."""


def missing_package(error: BaseException | None) -> str | None:
    """The package in MAY_BE_MISSING whose absence led to this error; None for any other error."""
    while error is not None:
        if isinstance(error, ModuleNotFoundError):
            for package in MAY_BE_MISSING:
                if f"{error.name}.".startswith(f"{package}.") or f"{package}.".startswith(f"{error.name}."):
                    return None if _installed(package) else package
        error = error.__cause__ or error.__context__
    return None


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # "nvidia.dali" where there is no "nvidia"
        return False


def _skip(report: pytest.CollectReport | pytest.TestReport, call: pytest.CallInfo | None, where: str) -> None:
    package = missing_package(call.excinfo.value) if report.failed and call and call.excinfo else None
    if package is not None:
        report.outcome, report.longrepr = "skipped", (where, None, f"Skipped: needs {package}")


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Generator[None, pytest.CollectReport]:
    """A test module, or a folder's conftest.py, that cannot be imported."""
    report = yield
    _skip(report, getattr(report, "call", None), str(collector.path))
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Generator[None, pytest.TestReport]:
    """A test or fixture that imports the package itself, or calls what does."""
    report = yield
    _skip(report, call, str(item.path))
    return report
