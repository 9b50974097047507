"""The wheel: what it holds, and a run from it outside the checkout, beside another distribution's `kernels`."""

from __future__ import annotations

import os
import shutil
import site
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from tests.engine.conftest import photos, small_run  # noqa: F401  a fixture

ROOT = Path(__file__).resolve().parents[1]


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """A command's output; fails with it."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET")}
    done = subprocess.run(
        [str(c) for c in command], cwd=cwd, env={**kept, **environment}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def distributions(tmp_path_factory) -> Path:
    """A folder with a wheel and an sdist of this checkout's files."""
    folder = tmp_path_factory.mktemp("distributions")
    source = folder / "source"
    source.mkdir()
    names = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if names.returncode:
        pytest.skip("not a git checkout")
    for name in names.stdout.splitlines():
        if (ROOT / name).exists():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            if (ROOT / name).is_symlink():
                (source / name).symlink_to(os.readlink(ROOT / name))
            else:
                (source / name).write_bytes((ROOT / name).read_bytes())
    make = "import setuptools.build_meta as b; b.build_wheel('..'); b.build_sdist('..')"
    run(sys.executable, "-c", make, cwd=source)
    return folder


def test_the_wheel_holds_the_package_once(distributions):
    (wheel,) = distributions.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"dune_fast"}
    packed = {name for name in names if name.endswith((".py", ".yaml"))}
    folders = ("kernels", "teachers", "dali_pipelines", "configs")
    expected = {str(p.relative_to(ROOT)) for p in (ROOT / "dune_fast").glob("*.py")}
    for room in ("dune_fast", *folders):
        for top, _, files in os.walk(ROOT / room):
            relative = Path(top).relative_to(ROOT)
            relative = relative if room == "dune_fast" else Path("dune_fast") / relative
            expected |= {str(relative / f) for f in files if f.endswith((".py", ".yaml"))}
    assert packed == expected


def test_the_sdist_builds_the_same_wheel(distributions, tmp_path):
    (sdist,), (wheel,) = distributions.glob("*.tar.gz"), distributions.glob("*.whl")
    with tarfile.open(sdist) as tar:
        names = tar.getnames()
        tar.extractall(tmp_path, filter="data")
    assert not any(part in name.split("/") for name in names for part in ("tests", "bench", ".git", "runs"))
    (source,) = tmp_path.iterdir()
    run(sys.executable, "-c", "import setuptools.build_meta as b; b.build_wheel('..')", cwd=source)
    (again,) = tmp_path.glob("*.whl")
    assert sorted(zipfile.ZipFile(again).namelist()) == sorted(zipfile.ZipFile(wheel).namelist())


@pytest.mark.slow
@pytest.mark.network
def test_a_run_from_the_wheel_beside_hugging_faces_kernels(distributions, photos, tmp_path):  # noqa: F811
    """A new environment that sees this one's packages, but not the checkout. Regression: `kernels`, `teachers` and
    `configs` were top-level packages, and Hugging Face's `kernels` took the place of ours."""
    environment = tmp_path / "venv"
    venv.create(environment, with_pip=True, symlinks=True)
    python = environment / "bin" / "python"
    packages = Path(run(python, "-c", "import site; print(site.getsitepackages()[0])", cwd=tmp_path).strip())
    (packages / "outer.pth").write_text("\n".join(site.getsitepackages()))  # its own .pth files are not read
    (wheel,) = distributions.glob("*.whl")
    run(python, "-m", "pip", "install", "--no-deps", "--no-index", "--force-reinstall", wheel, cwd=tmp_path)
    run(python, "-m", "pip", "install", "--no-deps", "--target", packages, "kernels==0.11.7", cwd=tmp_path)
    run(python, "-m", "dune_fast.teachers.torchvision_operators", cwd=tmp_path)
    where = "import dune_fast, kernels, timm, transformers; print(dune_fast.__file__, kernels.__file__)"
    assert run(python, "-c", where, cwd=tmp_path).count(str(packages)) == 2
    overrides = small_run(photos, tmp_path / "run")
    overrides = [o for o in overrides if not o.startswith("train.steps")] + ["train.steps=3"]
    shutil.copytree(ROOT / "bench" / "toy", tmp_path / "own" / "bench" / "toy")
    own = {"PYTHONPATH": str(tmp_path / "own"), "DUNE_FAST_CONFIGS": str(tmp_path / "own" / "bench" / "toy")}
    out = run(environment / "bin" / "dune-fast", "distill", *overrides, cwd=tmp_path, OMP_NUM_THREADS="1", **own)
    assert (tmp_path / "run" / "encoder.safetensors").is_file(), out
    load = "import dune_fast, torch; print(dune_fast.load_encoder('run')(torch.zeros(1, 3, 56, 56)).keys())"
    run(python, "-c", load, cwd=tmp_path)
