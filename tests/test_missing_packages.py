"""On a machine without some of our packages, the tests that need them are skipped and the others run."""

from __future__ import annotations

import sys

import missing_packages
import pytest


class Reports:
    """What a nested pytest reports: file or test -> outcome and reason."""

    def __init__(self) -> None:
        self.found: dict[str, tuple[str, str]] = {}

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if not report.passed:
            self._add(report)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:
            self._add(report)

    def _add(self, report: pytest.CollectReport | pytest.TestReport) -> None:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else ""
        self.found[report.nodeid] = report.outcome, reason


def nested(folder, files: dict[str, str], monkeypatch) -> dict[str, tuple[str, str]]:
    """Runs pytest on these files as on a machine without DeepSpeed and DALI."""
    for package in ("deepspeed", "nvidia.dali"):  # as if they were not installed
        for name in [name for name in sys.modules if name.startswith(f"{package}.")]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, package, None)
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    reports = Reports()
    options = [f"--rootdir={folder}", "-c", "/dev/null", "-q", "-p", "no:cacheprovider"]
    pytest.main([str(folder), *options, "--continue-on-collection-errors"], plugins=[missing_packages, reports])
    return reports.found


def test_what_needs_a_missing_package_is_skipped_with_its_name(tmp_path, monkeypatch):
    """Regression: one module that imported Hydra stopped every GPU test of a machine without it."""
    files = {
        "test_a_module.py": "import deepspeed.ops\ndef test(): ...",
        "test_b_call.py": "def test_lazy():\n    import nvidia.dali.fn\ndef test_plain(): ...",
        "test_c_wrapped.py": "def test():\n    try:\n        import deepspeed\n"
        "    except ImportError as error:\n        raise ValueError('no engine') from error",
        "below/conftest.py": "import deepspeed",
        "below/test_d.py": "def test(): ...",
    }
    assert nested(tmp_path, files, monkeypatch) == {
        "test_a_module.py": ("skipped", "Skipped: needs deepspeed"),
        "test_b_call.py::test_lazy": ("skipped", "Skipped: needs nvidia.dali"),
        "test_b_call.py::test_plain": ("passed", ""),
        "test_c_wrapped.py::test": ("skipped", "Skipped: needs deepspeed"),
        "below": ("skipped", "Skipped: needs deepspeed"),
    }


def test_other_errors_stay_errors(tmp_path, monkeypatch):
    files = {
        "test_a_typo.py": "import kernels.no_such_file",
        "test_b_name.py": "from rich import no_such_name",
        "test_c_submodule.py": "import rich.no_such_module\ndef test(): ...",  # rich is installed
        "test_d_failure.py": "def test():\n    assert False",
    }
    found = nested(tmp_path, files, monkeypatch)
    assert {name: outcome for name, (outcome, _) in found.items()} == {
        "test_a_typo.py": "failed", "test_b_name.py": "failed", "test_c_submodule.py": "failed",
        "test_d_failure.py::test": "failed",
    }  # fmt: skip
