"""torchvision, built for CUDA, can be imported beside a CPU torch once `make` has put a hook into the environment."""

from __future__ import annotations

import subprocess
import sys

from dune_fast.teachers import torchvision_operators


def test_the_hook_declares_the_operators_at_the_first_import_and_imports_nothing_before(tmp_path):
    """A torchvision whose library does not load, as that for CUDA beside a CPU torch."""
    torchvision_operators.install(tmp_path)
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "_C.so").write_bytes(b"for another torch")
    (package / "__init__.py").write_text(
        "import torch\n"
        "torch.library.register_fake('torchvision::nms')(lambda *_: None)\n"
    )
    code = (
        f"import site, sys; site.addsitedir({str(tmp_path)!r}); sys.path.insert(0, {str(tmp_path)!r})\n"
        "assert 'torch' not in sys.modules\n"
        "import torchvision, torch; print(torch.ops.torchvision.nms, torchvision.__file__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "torchvision.nms" in done.stdout and str(tmp_path) in done.stdout
