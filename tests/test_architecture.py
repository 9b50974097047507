"""Floors: bench -> dune_fast -> dali_pipelines -> teachers -> kernels. Imports point down only, and no files import
each other, directly or through others."""

from __future__ import annotations

import ast
import os
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = ("kernels", "teachers", "dali_pipelines", "dune_fast", "bench")
"""From the lowest up. The first three are imported as dune_fast.NAME, through links."""
ROOMS = {
    "projectors": set(),
    "distill": {"projectors", "student"},
    "engine": {"cache", "distill", "heads", "projectors", "student", "released"},
    "evaluate": {"distill", "engine", "heads", "load", "student"},
    "tasks": {"distill", "engine", "evaluate", "heads", "load", "student"},
    "cache": set(),
    "heads": set(),
    "infer": {"engine", "evaluate", "heads", "load"},
}
"""What of dune_fast itself, beside their own files, its rooms may import."""


def python_files(*folders: str) -> list[Path]:
    """Every file once: links are not followed."""
    found = [Path(top, name) for f in folders for top, _, names in os.walk(ROOT / f) for name in names]
    return sorted(path for path in found if path.suffix == ".py")


def floor(name: str) -> str | None:
    """The top folder of an import name, None if it is none of ours."""
    first, second, *_ = [*name.split("."), "", ""]
    lower = first == "dune_fast" and second in FLOORS[:3]
    return second if lower else first if first in FLOORS[3:] else None


def module_name(path: Path) -> str:
    """The name by which a file is imported."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    return name if parts[0] in FLOORS[3:] else f"dune_fast.{name}"


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


def graph() -> dict[str, set[str]]:
    """Import name -> own modules that it imports."""
    found = {module_name(path): imports(path) for path in python_files(*FLOORS)}
    return {name: {other for other in others if other in found and other != name} for name, others in found.items()}


def test_imports_point_down():
    wrong = {
        f"{name} -> {other}"
        for name, others in graph().items()
        for other in others
        # the package itself is light: every floor below is inside it
        if other != "dune_fast" and FLOORS.index(floor(other)) > FLOORS.index(floor(name))
    }
    assert not wrong


def test_no_circles():
    edges = {name: others - {"dune_fast"} for name, others in graph().items()}
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_of_the_engine_point_down(room):
    allowed = {room, *ROOMS[room], *FLOORS[:3]}
    for path in python_files(f"dune_fast/{room}"):
        used = {n.split(".")[1] for n in imports(path) if n.startswith("dune_fast.")}
        assert used <= allowed, f"{path.relative_to(ROOT)} imports {sorted(used - allowed)}"


def test_own_folders_are_imported_below_dune_fast():
    """Regression: another distribution, Hugging Face's `kernels`, has a top-level package of the same name."""
    for path in python_files(*FLOORS, "tests"):
        assert not {n.partition(".")[0] for n in imports(path)} & {*FLOORS[:3], "configs"}, path.relative_to(ROOT)


def test_kernels_import_torch_and_triton_alone():
    allowed = {*sys.stdlib_module_names, "torch", "triton", "flash_attn", "dune_fast"}
    images = {"numpy", "PIL"}  # in nn: which `encoder.transform` takes, and tables that the host makes
    for path in python_files("kernels"):
        foreign = {name.partition(".")[0] for name in imports(path)} - allowed
        assert foreign <= (images if path.parent.name == "nn" else set()), f"{path.name}: {sorted(foreign)}"


def test_deepspeed_is_imported_in_one_file():
    users = [path for path in python_files(*FLOORS) if "deepspeed" in {n.partition(".")[0] for n in imports(path)}]
    assert users == [ROOT / "dune_fast/engine/deepspeed_engine.py"]


def test_no_command_of_teachers_and_data_needs_deepspeed():
    """`dune-fast teachers drift` imported it through the trainer."""
    edges, seen = graph(), set()
    waiting = {"dune_fast.teachers_cli", "dune_fast.data_cli", "dune_fast.doctor.machine"}
    while waiting:
        seen.add(name := waiting.pop())
        waiting |= edges[name] - seen
    assert len(seen) > 20 and "dune_fast.engine.deepspeed_engine" not in seen


def test_no_print_and_no_eval():
    for path in python_files(*FLOORS):
        for node in ast.walk(ast.parse(path.read_text())):
            called = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""
            assert called not in ("print", "eval", "exec"), f"{path}:{node.lineno} calls {called}"
