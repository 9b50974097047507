"""Arrows point down only: cli -> engine, evaluate -> distill, dali_pipelines -> teachers -> nn -> kernels."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OWN = {"dune_fast", "kernels", "teachers", "dali_pipelines", "bench", "tests", "configs"}
# folder -> what of the project it may import, besides itself
ALLOWED = {
    "kernels": set(),
    "dune_fast/nn": {"kernels"},
    "teachers": {"kernels", "dune_fast.nn"},
    "dali_pipelines": {"kernels", "teachers"},
    "dune_fast/distill": {"kernels", "dune_fast.nn"},
    "dune_fast/engine": {
        "kernels", "teachers", "dali_pipelines", "dune_fast.nn", "dune_fast.distill", "dune_fast.released",
    },
    "dune_fast/evaluate": {
        "kernels", "teachers", "dali_pipelines", "dune_fast.nn", "dune_fast.distill", "dune_fast.engine",
    },
}  # fmt: skip


def imports(path: Path) -> set[str]:
    """Absolute names of all modules that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def below(name: str, packages: set[str]) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


@pytest.mark.parametrize("folder", ALLOWED)
def test_imports_point_down(folder):
    allowed = ALLOWED[folder] | {folder.replace("/", ".")}
    files = sorted((ROOT / folder).glob("*.py"))
    assert files
    for path in files:
        own = {name for name in imports(path) if below(name, OWN)}
        # "from kernels import x" gives "kernels" too; the package itself is light and always allowed
        wrong = {name for name in own if not below(name, allowed) and name != "dune_fast"}
        assert not wrong, f"{path.relative_to(ROOT)} imports {sorted(wrong)}"


def test_kernels_import_torch_and_triton_alone():
    import sys

    for path in (ROOT / "kernels").glob("*.py"):
        roots = {name.partition(".")[0] for name in imports(path)}
        foreign = roots - set(sys.stdlib_module_names) - {"torch", "triton", "flash_attn", "kernels"}
        assert not foreign, f"{path.name} imports {sorted(foreign)}"


def test_deepspeed_is_imported_in_one_file():
    users = [
        str(path.relative_to(ROOT))
        for folder in OWN - {"tests", "configs"}
        for path in (ROOT / folder).rglob("*.py")
        if below("deepspeed", {name.partition(".")[0] for name in imports(path)})
    ]
    assert users == ["dune_fast/engine/deepspeed_engine.py"]


def test_no_print_and_no_eval():
    for folder in OWN - {"tests", "configs"}:
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                called = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""
                assert called not in ("print", "eval", "exec"), f"{path}:{node.lineno} calls {called}"
