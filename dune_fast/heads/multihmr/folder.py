"""Images with people, in a folder of one's own: the training data of the head.

    ROOT/train/ANY/NAME.jpg with ROOT/train/ANY/NAME.npz, see `people_files`; ROOT/val/ likewise

Of an image, the nearest people come first, and those closer than a centimetre or behind the camera are left out. The
flip is a pure function of (seed, position in the run).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dune_fast.dali_pipelines.errors import DataError
from dune_fast.dali_pipelines.images import SUFFIXES
from dune_fast.heads.multihmr.find import read_image
from dune_fast.heads.multihmr.people_files import read_people
from dune_fast.heads.multihmr.square import fit_square, flip_camera, flip_people, normalise
from dune_fast.heads.multihmr.targets import NEAREST, PARTS
from dune_fast.kernels import philox

ASK = (
    "BEDLAM, which published Multi-HMR is trained on, is on https://bedlam.is.tue.mpg.de after registration "
    "(non-commercial research), and `dune-fast heads bedlam` makes such files of it; any images of your own do, too: "
    "train/NAME.jpg and train/NAME.npz, see the top of dune_fast/heads/multihmr/people_files.py"
)
"""Where a user gets training data."""

NUM_BETAS = 11
"""Shape coefficients of a training example: more are cut off, missing ones are 0."""


class Example(NamedTuple):
    """An image and its n people."""

    image: Tensor
    """float32 [3, S, S], normalised."""
    intrinsics: Tensor
    """K [3, 3] in its pixels."""
    people: dict[str, Tensor]
    """Axis-angles [n, ., 3] by `targets.PARTS`, betas [n, 11], transl [n, 3]."""


class PeopleFolder:
    """The examples of one split.

    Args:
        root: folder of the data set.
        split: "train" or "val".
        side: S, of the images.
        mean, std: that the encoder normalises images with.

    Raises:
        DataError: no such folder, no image with a file of people in it, or two images with the same file.
    """

    def __init__(
        self, root: Path, split: str, side: int, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
    ) -> None:
        folder, self.side = Path(root) / split, side
        self._normal = {} if mean is None or std is None else {"mean": tuple(mean), "std": tuple(std)}
        if not folder.is_dir():
            raise DataError(f"there is no folder {folder} of images with people. {ASK}")
        images = [p for p in sorted(folder.rglob("*")) if p.suffix.lower() in SUFFIXES and not p.name.startswith(".")]
        self.files = [(image, image.with_suffix(".npz")) for image in images if image.with_suffix(".npz").is_file()]
        if not self.files:
            raise DataError(f"{folder} has {len(images)} images, none with a file of people beside it. {ASK}")
        by_file: dict[Path, Path] = {}
        for image, file in self.files:
            if (twin := by_file.setdefault(file, image)) != image:
                raise DataError(f"{twin} and {image} have one people file, {file.name}: rename or remove one of them")

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int, flip: bool = False) -> Example:
        """An example, mirrored or not; DataError for a file that cannot be read."""
        image, file = self.files[index]
        square, arrays = fit_square(read_image(image), self.side), read_people(file)
        intrinsics, pixels = square.intrinsics(arrays["K"].astype(np.float64)), square.pixels
        if flip:
            arrays, intrinsics = flip_people(arrays), flip_camera(intrinsics, self.side)
            pixels = pixels[:, ::-1]
        depth = arrays["transl"][:, 2]
        order = np.argsort(depth, kind="stable")
        order = order[depth[order] > NEAREST]
        betas = np.zeros((len(order), NUM_BETAS), np.float32)
        columns = min(NUM_BETAS, arrays["betas"].shape[1])
        betas[:, :columns] = arrays["betas"][order, :columns]
        people = {name: torch.from_numpy(arrays[name][order]) for name in (*PARTS, "transl")}
        people["betas"] = torch.from_numpy(betas)
        k = torch.from_numpy(intrinsics.astype(np.float32))
        return Example(normalise(pixels, **self._normal), k, people)


def is_flipped(seed: int, position: int) -> bool:
    """Whether the image at this position of the run is mirrored: every second one, by chance."""
    drawn = philox.uniform4(seed, philox.AUGMENT, torch.tensor([position]), 0)
    return bool(drawn[0, 0] < 0.5)


def collate(examples: Sequence[Example]) -> dict[str, Any]:
    """A batch: `image` [B, 3, S, S], `intrinsics` [B, 3, 3], and of its P people flat `people` (as in an example, [P,
    ...]), `index` [P] of their images, `slot` [P] among those of the image, `slots`, the most of an image."""
    counts = [len(example.people["transl"]) for example in examples]
    names = examples[0].people
    return {
        "image": torch.stack([example.image for example in examples]),
        "intrinsics": torch.stack([example.intrinsics for example in examples]),
        "people": {name: torch.cat([example.people[name] for example in examples]) for name in names},
        "index": torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)),
        "slot": torch.cat([torch.arange(count) for count in counts]),
        "slots": max(counts),
    }

