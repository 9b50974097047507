"""README.md and docs/: every command runs or parses, every path, link and field exists."""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.util
import re
import shlex
import shutil
import tomllib
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

import dune_fast
from dune_fast import cli, launcher, train
from dune_fast.cluster.ranks import TRAIN_SCRIPT
from dune_fast.engine.config import RunConfig, compose_config
from dune_fast.heads.files import save_head
from dune_fast.heads.linear.depth import DepthHead
from dune_fast.heads.linear.segmentation import SegmentationHead
from tests.engine.conftest import photos, trained_run

__all__ = ["photos", "trained_run"]  # fixtures

ROOT = Path(__file__).resolve().parents[1]
PAGES = {str(path.relative_to(ROOT)): path.read_text() for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))}
FOLDERS = ("bench", "configs", "dali_pipelines", "docs", "dune_fast", "kernels", "teachers", "tests")
"""What begins a path of this repository in backticks."""
NEEDS = re.compile(r"#.*\bneeds (a GPU|data|the network|minutes|SLURM|hosts)\b")
"""In the line of a command that is parsed and not run."""
RUN = {
    "cache", "config", "data", "evaluate", "export", "features", "figures", "heads", "infer", "launch", "plan",
    "teachers",
}  # fmt: skip
"""Commands of dune-fast that are run; `distill`, `resume` and `doctor` are run with their last step replaced."""


def blocks(page: str) -> list[tuple[str, str]]:
    """(language, text) of the code blocks of a page."""
    return re.findall(r"^```(\w*)\n(.*?)^```", page, re.DOTALL | re.MULTILINE)


def shell_lines() -> list[tuple[str, str]]:
    """(page, command with its comment) of every command, its continuation lines joined."""
    return [
        (name, line.strip())
        for name, page in PAGES.items()
        for language, text in blocks(page)
        if language == "sh"
        for line in text.replace("\\\n", " ").splitlines()
        if line.strip() and not line.startswith("#")
    ]


COMMANDS = list(dict.fromkeys(line for _, line in shell_lines()))


class Parsed(Exception):  # noqa: N818  no error
    """Raised in place of what a program does once its arguments are parsed."""


def parse_alone(main, argv: list[str], patch: pytest.MonkeyPatch) -> argparse.Namespace:
    """What the parser inside `main` makes of `argv`; nothing of `main` runs after it."""
    original, found = argparse.ArgumentParser.parse_args, []

    def parse(self, args=None, namespace=None):
        found.append(original(self, args, namespace))
        raise Parsed

    with patch.context() as inner, pytest.raises(Parsed):
        inner.setattr(argparse.ArgumentParser, "parse_args", parse)
        main(argv)
    return found[0]


def check_training(arguments: list[str]) -> None:
    """Composes what `train.py` is given."""
    parsed = train.parse(arguments)
    compose_config(parsed.overrides)


def check_dune_fast(arguments: list[str], run: bool, small: dict[str, str], patch: pytest.MonkeyPatch) -> None:
    """Parses and composes; with `run`, runs on the small run and its photographs."""
    parsed = train.parse_mixed(cli.build_parser(), arguments)
    if parsed.command in ("distill", "launch") or getattr(parsed, "heads_command", "") in ("train", "check"):
        compose_config(parsed.overrides)
    elif parsed.command in ("config", "doctor") or getattr(parsed, "data_command", "") in ("shard", "check"):
        compose_config(parsed.overrides, complete=False)
    if parsed.command == "plan":
        overrides = [text for text in parsed.overrides if "=" in text]
        for name in (text for text in parsed.overrides if "=" not in text):
            compose_config([f"experiment={name}", *overrides])
    if parsed.command == "export":
        assert parsed.to in dune_fast.export.TARGETS
    if not run or getattr(parsed, "to", "") == "dune":  # which the small run is too narrow for: tests/test_export.py
        return
    if parsed.command == "doctor":
        patch.setattr("dune_fast.doctor.examine", lambda checks: iter(()))
    launched = []
    patch.setattr(launcher, "run_launcher", lambda command, _: launched.append(command) or 0)
    for old, new in small.items():
        arguments = [word.replace(old, new) for word in arguments]
    assert cli.main(arguments) == 0
    if parsed.command in ("distill", "resume"):
        (command,) = launched
        train.parse(command[command.index(str(TRAIN_SCRIPT)) + 1 :])
    else:
        assert parsed.command in RUN | {"doctor"}


def check_python(arguments: list[str], run: bool, patch: pytest.MonkeyPatch) -> None:
    """`python -m bench.NAME`, `python -m pytest`, `python dune_fast/train.py`."""
    if arguments[0] == "dune_fast/train.py":
        return check_training(arguments[1:])
    assert arguments[0] == "-m"
    module, *rest = arguments[1:]
    if module == "pytest":
        assert {word for word in rest if word.startswith("-")} <= {"-q", "--slow"}
        assert all((ROOT / word).exists() for word in rest if not word.startswith("-"))
        return None
    assert module.startswith("bench."), module
    package = importlib.util.find_spec(module).submodule_search_locations is not None
    main = importlib.import_module(f"{module}.__main__" if package else module).main
    parsed = parse_alone(main, rest, patch)
    if module == "bench.step":
        compose_config([f"experiment={parsed.experiment}", *parsed.overrides])
    if run and getattr(parsed, "list", False):
        assert main(rest) == 0
    return None


def check_launcher(program: str, arguments: list[str]) -> None:
    """Options by the launcher's own parser, then ours by `train.py`'s."""
    at = arguments.index("dune_fast/train.py")
    options = arguments[:at]
    if program == "deepspeed":
        runner = importlib.import_module("deepspeed.launcher.runner")
        assert runner.parse_args([*options, "train.py"]).user_script == "train.py"
    elif program == "torchrun":
        from torch.distributed.run import get_args_parser

        assert get_args_parser().parse_args([*options, "train.py"]).training_script == "train.py"
    check_training(arguments[at + 1 :])


@pytest.fixture(scope="module")
def small(photos, trained_run, tmp_path_factory) -> dict[str, str]:
    """Words of the pages -> what stands for them here."""
    runs = tmp_path_factory.mktemp("runs")
    for name in ("demo", "mine", "dune_336"):
        shutil.copytree(trained_run, runs / name)
    width = dune_fast.load_encoder(trained_run).cfg.embed_dim
    for name, head in (("seg", SegmentationHead(width, 3, window=56, stride=42)), ("depth", DepthHead(width))):
        save_head(head, runs / f"{name}.head.safetensors")
    return {
        "seg.head.safetensors": str(runs / "seg.head.safetensors"),
        "depth.head.safetensors": str(runs / "depth.head.safetensors"),
        "runs/": f"{runs}/",
        "/path/to/images": str(photos),
        "holdout=100": "holdout=4",
        "checkpoint.pth": str(trained_run / "encoder.safetensors"),
        "/path/model.safetensors": str(trained_run / "encoder.safetensors"),
    }


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_of_the_pages(line, small, tmp_path, monkeypatch):
    monkeypatch.setenv("DUNE_FAST_CONFIGS", str(own_files(tmp_path)))
    run = NEEDS.search(line) is None
    program, *arguments = shlex.split(line, comments=True)
    if ">" in arguments:  # into a file
        arguments = arguments[: arguments.index(">")]
    if program == "eval" or program == "export":
        assert arguments == ["$(register-python-argcomplete dune-fast)"] or all("=" in word for word in arguments)
    elif program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert len(arguments) == 1 and arguments[0] in targets
    elif program == "pip":
        extra = re.fullmatch(r"\.\[(.+)\]", arguments[-1])[1]
        assert extra in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert "-c" in arguments and (ROOT / arguments[arguments.index("-c") + 1]).is_file()
    elif program == "dune-fast":
        if "--out" in arguments:
            at = arguments.index("--out") + 1
            arguments[at] = str(tmp_path / arguments[at])
        check_dune_fast(arguments, run, small, monkeypatch)
    elif program in ("python", ".venv/bin/python"):
        check_python(arguments, run, monkeypatch)
    elif program == "sbatch":
        assert arguments[-1] == "job.sh" and all(option.startswith("--nodes=") for option in arguments[:-1])
    elif program == "srun":
        check_python(arguments[arguments.index("python") + 1 :], run, monkeypatch)
    elif program in ("deepspeed", "torchrun"):
        check_launcher(program, arguments)
    else:
        pytest.fail(f"{program!r} is a program that this test does not know")


def own_files(folder: Path) -> Path:
    """The teacher's file of docs/own_teacher.md as a user would have written it."""
    (yaml,) = (text for language, text in blocks(PAGES["docs/own_teacher.md"]) if language == "yaml")
    path = folder / "own" / "teachers" / "mine.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(yaml)
    return folder / "own"


def test_blocks_say_their_language():
    assert {language for page in PAGES.values() for language, _ in blocks(page)} <= {"sh", "python", "yaml"}


@pytest.mark.parametrize("page", [name for name, text in PAGES.items() if "```python" in text])
def test_python_of_a_page(page, small):
    for language, text in blocks(PAGES[page]):
        if language != "python":
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "dune_fast":
                assert node.attr in dir(dune_fast)
        if ".pth" not in text:  # a published file
            given = {"images": torch.zeros(2, 3, 56, 56), "pil_image": Image.new("RGB", (80, 60))}
            for word in ("runs/", "seg.head.safetensors", "depth.head.safetensors"):
                text = text.replace(f'"{word}', f'"{small[word]}')
            exec(text, given)
            assert "features" not in text or given["features"]["x_norm_patchtokens"].ndim == 3
            assert "metres" not in text or given["metres"].shape == given["found"]["metres"].shape == (2, 1, 16, 16)


def test_the_readme_is_short():
    assert len(PAGES["README.md"].splitlines()) <= 130


@pytest.mark.parametrize("page", PAGES)
def test_links_and_paths_exist(page):
    prose = re.sub(r"^```.*?^```", "", PAGES[page], flags=re.DOTALL | re.MULTILINE)
    for link in re.findall(r"\]\(([^)#]+)", prose):
        assert "://" in link or ((ROOT / page).parent / link).exists(), link
    for word in re.findall(r"`([^`\s]+)`", prose):
        path, _, function = word.partition(":")
        if path.partition("/")[0] not in FOLDERS or "/" not in path or "<" in path:
            continue
        assert list(ROOT.glob(path.rstrip("/"))), word
        if function:
            assert function in names_of(ROOT / path), word


def names_of(path: Path) -> set[str]:
    """Functions and classes of a file, and "Class.method"."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
    return found


@pytest.mark.parametrize("page", PAGES)
def test_fields_and_choices_exist(page):
    """`train.steps=10` names a field, `deepspeed=zero2` a file of configs/."""
    schema = OmegaConf.structured(RunConfig)
    for word in re.findall(r"`([a-z_]+(?:\.[a-z_]+)*=[^`\s]+)`", PAGES[page]):
        key, _, value = word.partition("=")
        group = ROOT / "configs" / key
        if group.is_dir():
            assert value in ("mine", "NAME") or (group / f"{value}.yaml").is_file(), word
        elif key.startswith(("head.data.", "head.options.", "head.loss.")):  # a kind's own
            files = map(OmegaConf.load, (ROOT / "configs" / "experiment").glob("*.yaml"))
            assert any(OmegaConf.select(content, key) is not None for content in files), word
        elif "." in key and not key.startswith(("teachers.", "data.datasets.")):
            parent, _, leaf = key.rpartition(".")
            assert leaf in OmegaConf.select(schema, parent), word


def test_a_command_that_nobody_knows_fails(small, tmp_path, monkeypatch):
    for line in ("frobnicate --all", "dune-fast distill experiment=nowhere", "python -m bench.step --no-such-option"):
        with pytest.raises((pytest.fail.Exception, SystemExit, ValueError)):
            test_a_command_of_the_pages(line, small, tmp_path / line[:4] / str(len(line)), monkeypatch)
