"""Every image of Pillow's source distribution, through the loader, against Pillow."""

import io
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import PIL
import pytest
import torch
from PIL import Image

pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed (extra: dali)")

from image_helpers import largest_squares  # noqa: E402

from dune_fast.dali_pipelines.datasets import DataConfig, DatasetConfig, index_dataset  # noqa: E402
from dune_fast.dali_pipelines.images import SUFFIXES, to_rgb  # noqa: E402
from dune_fast.dali_pipelines.loader import ValLoader  # noqa: E402
from dune_fast.dali_pipelines.source import ImageSource  # noqa: E402


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """The files with suffixes of images below Tests/images, from the package index that pip is set to."""
    folder = tmp_path_factory.mktemp("pillow")
    command = ["download", "--no-binary", "pillow", "--no-deps", "-q", "-d", str(folder), f"pillow=={PIL.__version__}"]
    done = subprocess.run([sys.executable, "-m", "pip", *command], capture_output=True, text=True)
    archives = list(folder.glob("*.tar.gz"))
    if done.returncode or not archives:
        pytest.skip(f"Pillow's sources cannot be fetched: {done.stderr.strip().splitlines()[-1:]}")
    images = folder / "images"
    images.mkdir()
    with tarfile.open(archives[0]) as archive:
        for member in archive:
            inside = member.name.partition("/Tests/images/")[2]
            if member.isreg() and inside.lower().endswith(SUFFIXES):
                (images / inside.replace("/", "_")).write_bytes(archive.extractfile(member).read())
    return images


def by_pillow(data: bytes) -> np.ndarray | str:
    """int [H, W, 3], or why Pillow refuses the file."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            rgb = to_rgb(image) if image.mode[0] in "IF" else image.convert("RGB")
    except Exception as error:
        return str(error)
    return np.asarray(rgb).astype(int)


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.filterwarnings("ignore")
def test_all_that_pillow_opens_is_pillows_image_and_nothing_ends_the_process(corpus, capsys):
    """Set aside is what Pillow refuses, and floats and 32-bit integers whose range is not known."""
    own = DatasetConfig(root=str(corpus), val_root=str(corpus))
    config = DataConfig(datasets={"d": own}, num_threads=2, max_broken_share=1.0)
    dataset = index_dataset("d", own)
    with ValLoader(config, 64, 16, 0, 1, torch.device("cpu"), [dataset]) as loader:
        decoded = {path for batch in loader for path in batch.paths}
    source = ImageSource([dataset], "val", config)
    opened, wrong = set(), {}
    for index, path in enumerate(dataset.val):
        theirs = by_pillow(Path(path).read_bytes())
        if isinstance(theirs, str):
            continue
        opened.add(path)
        if path in decoded:
            ((encoded, size, _),) = source.read_all([(0, index)])
            assert size == theirs.shape[1::-1], path
            ours, side = largest_squares(encoded, size), min(size)
            if (difference := np.abs(ours - [theirs[:side, :side], theirs[-side:, -side:]]).max()) > 2:
                wrong[path] = difference
    with capsys.disabled():
        sys.stdout.write(f"\n{len(dataset.val)} files, Pillow opens {len(opened)}, decoded {len(decoded)}\n")
    assert len(opened) > 500 and opened == decoded and not wrong
