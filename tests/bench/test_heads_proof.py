"""The proof of the task heads, at a size of seconds: what it draws, and that it runs from end to end."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bench.heads_proof import __main__, multihmr
from bench.heads_proof.bodies import body_arrays
from bench.heads_proof.people import Painter, PeopleConfig
from dune_fast.heads.files import load_head
from dune_fast.heads.multihmr.camera import default_intrinsics, project
from dune_fast.heads.multihmr.smplx import BodyModel
from dune_fast.heads.multihmr.targets import PARTS
from dune_fast.kernels.nn.vit import VisionTransformer, ViTConfig

CFG = PeopleConfig(side=56, most=2)


@pytest.fixture
def backgrounds(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{i}.jpg" for i in range(5)]
    for i, path in enumerate(paths):
        Image.new("RGB", (150, 130), (40 * i, 90, 90)).save(path)
    return paths


def test_drawn_people_are_where_their_parameters_say(backgrounds):
    """The image differs from its background around every joint of the trunk, and splits share nothing."""
    model = BodyModel(body_arrays(20))
    train, test = (Painter(model, CFG, backgrounds, split) for split in ("train", "test"))
    assert len(train.photographs) == 3 and len(test.photographs) == 2
    pixels, people = train(3)
    again, _ = Painter(model, CFG, backgrounds, "train")(3)
    assert np.array_equal(pixels, again) and not np.array_equal(pixels, test(3)[0])
    given = {name: torch.from_numpy(x) for name, x in people.items()}
    body = model(given["betas"], model.matrices(*(given[name] for name in PARTS)))
    k = torch.from_numpy(train.intrinsics).expand(len(body.joints), 3, 3)
    places = project(body.joints + given["transl"][:, None], k)
    background = pixels[0, 0].astype(int)
    for x, y in places[:, [0, 3, 6, 9]].flatten(0, 1).tolist():
        assert np.abs(pixels[int(y), int(x)].astype(int) - background).max() > 8
    assert (people["transl"][1:, 2] >= people["transl"][:-1, 2]).all()


def test_the_proof_runs_and_says_whether_it_holds(backgrounds, tmp_path, monkeypatch):
    encoder = VisionTransformer(ViTConfig(image_size=56, embed_dim=24, depth=1, num_heads=2)).init_weights().eval()
    monkeypatch.setattr(multihmr, "encoder_of_the_demo", lambda: encoder.requires_grad_(False))
    monkeypatch.setattr(multihmr, "photographs", lambda: backgrounds)
    cfg = multihmr.Settings(images=CFG, train=5, test=6, steps=3, batch=2, dim=16)
    result = multihmr.prove(cfg, tmp_path / "work", tmp_path / "results")
    assert not result["passed"]  # of a drawn encoder, after three steps
    rows = result["in_true_cells_mm"]
    assert set(rows) == {"untrained", "mean pose", "trained"} and rows["trained"] != rows["untrained"]
    saved = json.loads((tmp_path / "results" / "multihmr.json").read_text())
    assert saved["in_true_cells_mm"] == rows and len(list((tmp_path / "work").glob("t*.safetensors"))) == 2
    assert "| mean pose |" in (tmp_path / "results" / "multihmr.md").read_text()
    with Image.open(tmp_path / "results" / "multihmr.png") as page:
        assert page.size == (6 * 56, 3 * 56)
    kept = multihmr.prepared(cfg, BodyModel(body_arrays(400)), tmp_path / "work")  # read, not encoded again
    assert kept["test"][0].shape == (6, 16, 24) and len(kept["test"][1]) == 6
    # the test images are not those that settings and limits were chosen on
    fresh, tuned_on = (
        Painter(BodyModel(body_arrays(400)), dataclasses.replace(CFG, seed=seed), backgrounds, "test")(0)[0]
        for seed in (cfg.test_seed, CFG.seed)
    )
    assert np.array_equal(kept["test"][2][0], fresh) and not np.array_equal(kept["test"][2][0], tuned_on)
    assert load_head(tmp_path / "work" / "head.safetensors").kind == "multihmr"


def test_the_mean_of_people_is_a_person():
    """Means of rotations are rotations again, and the mean of one person is that person."""
    model, head = BodyModel(body_arrays(20)), multihmr.MultiHmrHead(24, 56, heads=2, head_dim=8, dim=16, hidden=16)
    example = multihmr.Example(
        torch.zeros(0), default_intrinsics(56),
        {name: 0.1 * torch.randn(1, n, 3) for name, n in PARTS.items()}
        | {"betas": torch.randn(1, 11), "transl": torch.tensor([[0.0, 0.0, 3.0]])},
    )  # fmt: skip
    rotations, betas = multihmr.mean_people([example], model, head)
    truth, _ = multihmr.targets_of([example], model, head)
    torch.testing.assert_close(rotations, truth.rotations[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(betas, truth.betas[0, :10])


def test_an_unknown_proof_is_a_sentence():
    with pytest.raises(SystemExit, match="usage: python -m bench.heads_proof {multihmr,mast3r}"):
        __main__.main(["nothing"])
