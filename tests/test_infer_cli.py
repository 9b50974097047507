"""`dune-fast infer`: files and pictures of segmentation and depth, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

import dune_fast
from bench.heads_proof.bodies import write_body_model
from dune_fast import cli
from dune_fast.evaluate.dense import flip_averaged_depth, resized_argmax, window_logits
from dune_fast.evaluate.model import open_model
from dune_fast.heads.files import save_head
from dune_fast.heads.linear.depth import DepthHead
from dune_fast.heads.linear.segmentation import SegmentationHead
from dune_fast.heads.mast3r.head import Mast3rHead
from dune_fast.heads.multihmr.head import MultiHmrHead
from dune_fast.infer import dense
from dune_fast.infer.legends import class_colours, depth_colours, with_class_legend, with_depth_legend
from tests.evaluate.conftest import encoder_file, write_encoder

__all__ = ["encoder_file"]  # fixture
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Heads by kind, and three images of sizes that are no multiples of a patch."""
    root = tmp_path_factory.mktemp("infer")
    torch.manual_seed(0)
    seg = SegmentationHead(48, 3, names=("sky", "a tree", "water"), window=42, stride=28)
    torch.nn.init.normal_(seg.conv_seg.weight)  # so that all classes occur
    save_head(seg, root / "seg.safetensors")
    save_head(DepthHead(48, max_depth=80.0), root / "depth.safetensors")
    save_head(DepthHead(24), root / "narrow.safetensors")
    (root / "photos" / "more").mkdir(parents=True)
    random = np.random.default_rng(0)
    for name, size in (("a.png", (61, 97)), ("more/b.jpg", (120, 90)), ("tiny.png", (1, 3))):
        Image.fromarray(random.integers(0, 256, (*size, 3), dtype=np.uint8)).save(root / "photos" / name)
    return root


def command(files, kind, encoder, out, *more) -> list[str]:
    head = ["--head", str(files / f"{kind}.safetensors")]
    return ["infer", kind, "--images", str(files / "photos"), "--encoder", str(encoder), *head, "--out", str(out),
            "--precision", "fp32", *more]  # fmt: skip


def test_segmentation_is_the_evaluations(files, encoder_file, tmp_path, capsys):
    assert cli.main(command(files, "seg", encoder_file, tmp_path / "found", "--json", "--device", "cpu")) == 0
    results = json.loads(capsys.readouterr().out)
    assert [path.name for path in sorted((tmp_path / "found").iterdir())] == [
        "a.labels.png", "a.seg.png", "b.labels.png", "b.seg.png", "classes.json", "tiny.labels.png", "tiny.seg.png"
    ]  # fmt: skip
    labels = np.array(Image.open(tmp_path / "found" / "a.labels.png"))
    photo = np.array(Image.open(files / "photos" / "a.png"))
    assert labels.shape == photo.shape[:2] == (61, 97) and set(np.unique(labels)) <= {0, 1, 2}
    model = open_model(str(encoder_file), CPU, precision="fp32")
    head = dune_fast.load_head(files / "seg.safetensors")
    with torch.no_grad():
        logits = window_logits(torch.from_numpy(photo).permute(2, 0, 1), model, head, CPU)
    assert np.array_equal(labels, resized_argmax(logits, (61, 97)).numpy())
    (shares,) = (r["classes"] for r in results if r["image"].endswith("a.png"))
    assert sum(shares.values()) == pytest.approx(1, abs=1e-3) and set(shares) <= {"sky", "a tree", "water"}
    drawn = np.array(Image.open(tmp_path / "found" / "a.seg.png"))
    expected = 0.45 * photo + 0.55 * class_colours(3)[labels]
    assert np.abs(drawn[:61, :97] - expected).max() < 0.51 and drawn.shape[0] > 61  # a legend below
    legend = json.loads((tmp_path / "found" / "classes.json").read_text())
    assert legend["1"] == {"name": "a tree", "colour": class_colours(3)[1].tolist()}


def test_depth_is_the_evaluations(files, encoder_file, tmp_path):
    assert cli.main(command(files, "depth", encoder_file, tmp_path)) == 0
    photo = np.array(Image.open(files / "photos" / "a.png"))
    head = dune_fast.load_head(files / "depth.safetensors")
    model = open_model(str(encoder_file), CPU, norm=False, precision="fp32")
    with torch.no_grad():
        expected = flip_averaged_depth(torch.from_numpy(photo).permute(2, 0, 1), model, head, CPU).numpy()
    metres, millimetres = np.load(tmp_path / "a.depth.npy"), np.array(Image.open(tmp_path / "a.depth.png"))
    np.testing.assert_allclose(metres, expected, rtol=1e-5)
    assert metres.dtype == np.float32 and millimetres.dtype == np.uint16
    np.testing.assert_allclose(millimetres, 1000 * metres.clip(0, 65.535), atol=0.51)
    assert np.load(tmp_path / "tiny.depth.npy").shape == (1, 3)
    assert np.array(Image.open(tmp_path / "a.colours.png")).shape[1] > 97  # a scale at the right


def test_large_images_are_read_smaller(files, encoder_file, tmp_path):
    assert cli.main(command(files, "depth", encoder_file, tmp_path, "--size", "28")) == 0
    assert np.load(tmp_path / "b.depth.npy").shape == (120, 90)


def test_pictures_of_no_content():
    assert class_colours(0).shape == (0, 3) and len(np.unique(class_colours(30), axis=0)) == 30
    flat = depth_colours(np.full((20, 20), 2.0), 2.0, 2.0)
    assert with_depth_legend(flat, 2.0, 2.0).size[1] == 20
    assert depth_colours(np.array([0.0, 1.0]), 1.0, 2.0)[0].tolist() == [0, 0, 0]
    many = [(f"a class of number {i}", np.zeros(3)) for i in range(40)]
    assert with_class_legend(np.zeros((10, 10, 3), np.uint8), many).size[1] > 400


def test_a_legend_names_what_can_be_seen_and_cuts_no_letter(tmp_path, monkeypatch):
    entries = []
    drawn = Image.new("L", (1, 1))
    monkeypatch.setattr(dense, "with_class_legend", lambda image, found: entries.extend(found) or drawn)
    labels = np.zeros((100, 100), np.int64)
    labels[0, :30], labels[1, :60] = 1, 2
    image = np.zeros((100, 100, 3), np.uint8)
    for head in (SegmentationHead(8, 3, names=("sky", "a far bird", "tree")), SegmentationHead(8, 3)):
        found = dense._write_labels("x", image, labels, head, tmp_path)
    assert [text for text, _ in entries] == ["99 % sky", "1 % tree", "99 % class 0", "1 % class 2"]
    assert found["classes"]["1"] == 0.003
    long = with_class_legend(image, [("a name of a class that is wider than the image", np.zeros(3))])
    assert long.size[0] == 120 and (np.array(long)[100:, -3:] == 255).all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"--head": "depth.safetensors"}, "holds a linear_depth head, and a linear_seg head is needed: give "
                                          "another one, or use this one by `dune-fast infer depth`"),
        ({"--head": "photos/a.png"}, "photos/a.png cannot be read: truncated, damaged"),
        ({"--head": "ENCODER"}, "holds an encoder and no head: give it as the encoder"),
        ({"--encoder": "photos/a.png"}, "is neither a .safetensors nor a .pth file"),
        ({"--encoder": "HEAD"}, "seg.safetensors"),
        ({"--images": "photos/none.jpg"}, "there is no image"),
        ({"--images": "empty"}, "has no image: no file in it ends in"),
        ({"--images": "seg.safetensors"}, "seg.safetensors cannot be read: no known image format"),
        ({"--device": "cuda:99"}, "--device cuda:99: this machine has"),
        ({"--device": "gpu"}, "--device gpu: give cpu, cuda or cuda:1"),
        ({"--device": "meta"}, "--device meta: give cpu, cuda or cuda:1"),
        ({"--out": "seg.safetensors"}, "seg.safetensors cannot be a folder (File exists): give another place"),
        ({"--head": "s3://bucket/x"}, "argument --head: this is s3://bucket/x, an address"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_a_sentence(files, encoder_file, tmp_path, capsys, change, words):
    (files / "empty").mkdir(exist_ok=True)
    known = {"ENCODER": str(encoder_file), "HEAD": str(files / "seg.safetensors")}
    arguments = command(files, "seg", encoder_file, tmp_path)
    for option, value in change.items():
        value = known.get(value, value if option == "--device" or value.startswith("s3:") else str(files / value))
        if option in arguments:
            arguments[arguments.index(option) + 1] = value
        else:
            arguments += [option, value]
    try:
        assert cli.main(arguments) == 2
    except SystemExit as refused:
        assert refused.code == 2
    assert words in capsys.readouterr().err


def test_heads_of_another_encoder_are_refused(files, encoder_file, tmp_path, capsys):
    arguments = command(files, "depth", encoder_file, tmp_path)
    arguments[arguments.index("--head") + 1] = str(files / "narrow.safetensors")
    assert cli.main(arguments) == 2
    assert "reads 24 channels of 14 px patches and 24 of a class token" in capsys.readouterr().err
    four = tmp_path / "four.safetensors"
    save_head(SegmentationHead(48, 2, layers=4), four)
    arguments = command(files, "seg", encoder_file, tmp_path)
    arguments[arguments.index("--head") + 1] = str(four)
    assert cli.main(arguments) == 2
    assert "4 layers of an encoder that has 2 blocks alone" in capsys.readouterr().err
    deep = write_encoder(tmp_path / "deep.safetensors", depth=4)
    arguments[arguments.index("--encoder") + 1] = str(deep)
    assert cli.main(arguments) == 0


def test_two_images_of_one_name_are_refused(files, encoder_file, tmp_path, capsys):
    Image.new("RGB", (30, 30)).save(tmp_path / "a.jpg")
    arguments = command(files, "seg", encoder_file, tmp_path)
    arguments.insert(arguments.index("--images") + 1, str(tmp_path))
    assert cli.main(arguments) == 2
    assert "would write the same files" in capsys.readouterr().err


def test_a_pair_by_the_command(files, encoder_file, tmp_path, capsys):
    pytest.importorskip("cv2")
    sizes = {"dec_dim": 8, "dec_depth": 4, "dec_heads": 2, "layer_dims": [4] * 4, "feature_dim": 4, "last_dim": 4}
    save_head(Mast3rHead(48, 14, **sizes), tmp_path / "mast3r.safetensors")
    images = [str(files / "photos" / name) for name in ("a.png", "more/b.jpg")]
    arguments = ["infer", "mast3r", "--images", *images, "--encoder", str(encoder_file), "--json"]
    arguments += ["--head", str(tmp_path / "mast3r.safetensors"), "--out", str(tmp_path / "found"), "--long-side", "70"]
    cameras = ["--intrinsics", "80", "80", "48", "30", "90", "90", "60", "45"]
    assert cli.main([*arguments, *cameras]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["images"] == images and {p.name for p in (tmp_path / "found").iterdir()} >= {"pair.npz", "points.ply"}
    with np.load(tmp_path / "found" / "pair.npz") as pair:
        np.testing.assert_allclose(pair["intrinsics1"], [[80, 0, 48], [0, 80, 30], [0, 0, 1]])
        np.testing.assert_allclose(pair["intrinsics2"], [[90, 0, 60], [0, 90, 45], [0, 0, 1]])
    for more, words in (
        (["--intrinsics", "-80", "80", "48", "30"], "with positive focal lengths"),
        (cameras[:4], "--intrinsics has 3 numbers: give FX FY CX CY"),
        (cameras[:5], "and one camera is given for both"),
        (["--long-side", "75"], "a long side of 75 pixels is not a multiple"),
        (["--images", images[0]], "a pair is two images, got 1"),
        (["--head", str(files / "seg.safetensors")], "holds a linear_seg head, and a mast3r head is needed"),
    ):
        assert cli.main([*arguments, *more]) == 2
        assert words in capsys.readouterr().err


def test_people_by_the_command(files, encoder_file, tmp_path, capsys):
    head = MultiHmrHead(48, 56, depth=1, heads=2, head_dim=8, dim=16, hidden=16)
    torch.nn.init.constant_(head.mlp_classif[2].bias, 5.0)  # a person everywhere: suppression leaves some
    save_head(head, tmp_path / "hmr.safetensors")
    body = write_body_model(tmp_path / "SMPLX_NEUTRAL.npz", 20)
    image = str(files / "photos" / "a.png")
    arguments = ["infer", "multihmr", "--images", image, "--encoder", str(encoder_file), "--body-model", str(body)]
    arguments += ["--head", str(tmp_path / "hmr.safetensors"), "--out", str(tmp_path / "found"), "--json"]
    assert cli.main([*arguments, "--fov", "75", "--no-meshes"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["people"] > 0 and {p.name for p in (tmp_path / "found").iterdir()} == {"a.npz", "a_people.png"}
    for more, words in (
        (["--body-model", str(tmp_path / "none.npz")], "none.npz"),
        (["--threshold", "2"], "threshold 2: give a score above 0"),
        (["--fov", "200"], "field of view"),
    ):
        assert cli.main([*arguments, *more]) == 2
        assert words in capsys.readouterr().err
