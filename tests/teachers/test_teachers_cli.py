"""`dune-fast teachers`: what it lists and shows, fetching with resume, and what it says of files."""

from __future__ import annotations

import dataclasses
import hashlib
import io

import pytest
import torch
import yaml

from dune_fast import teachers_cli
from dune_fast.cli import main
from dune_fast.engine.overrides import config_names
from dune_fast.kernels.nn.vit import ViTConfig
from dune_fast.teachers.architecture import random_vit_state
from dune_fast.teachers.config import TeacherConfig
from dune_fast.teachers.registry import family_class
from dune_fast.teachers.verify import inspect_file

SMALL = ViTConfig(image_size=28, embed_dim=64, depth=2, num_heads=1, num_registers=2)


@pytest.fixture
def complaint(capsys):
    """`complaint()` is what the command said to stderr, without the line breaks of the terminal."""
    return lambda: " ".join(capsys.readouterr().err.split())


@pytest.fixture
def state():
    return random_vit_state(SMALL, 0)


@pytest.fixture
def weights_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("DUNE_FAST_WEIGHTS", str(tmp_path / "weights"))
    monkeypatch.setenv("DUNE_FAST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "weights"


def test_list_names_every_teacher(capsys, weights_dir):
    assert main(["teachers", "list"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert set(config_names("teachers")) == set(lines) - {"name"}
    assert "no, fetch" in lines["mast3r_vitl16"] and "drawn" in lines["conv_patchify"]
    weights_dir.mkdir()
    (weights_dir / "dinov2_vits14_pretrain.pth").touch()
    assert main(["teachers", "list"]) == 0
    assert " yes" in next(line for line in capsys.readouterr().out.splitlines() if line.startswith("dinov2_vits14 "))


@pytest.mark.parametrize("name", config_names("teachers"))
def test_show_is_yaml_with_the_architecture(name, capsys, weights_dir):
    assert main(["teachers", "show", name]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert set(TeacherConfig.__dataclass_fields__) <= set(shown)
    if shown["url"]:
        assert shown["weights"].startswith(str(weights_dir))
        if shown["projected"]:  # a reading with channels of its own: they do not say the network's size
            assert "architecture" not in shown
            return
        architecture = shown["architecture"]
        width = architecture["embed_dim"]
        assert architecture.get("features", width) == shown["num_features"]  # of Depth Anything's head
        assert family_class(shown["family"]).sizes[width][:2] == (architecture["depth"], architecture["num_heads"])


def test_show_of_a_name_that_does_not_exist(complaint):
    assert main(["teachers", "show", "dinov2_vitl14reg"]) == 2
    assert "did you mean dinov2_vitl14_reg" in complaint()


@pytest.fixture
def offered(server, state, weights_dir, monkeypatch):
    """A teacher whose file a server on the loopback has; fields may be replaced."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    server.body = buffer.getvalue()
    cfg = TeacherConfig(family="dinov2", weights=str(weights_dir / "w.pth"), num_features=64, url=server.url)

    def configure(**fields):
        monkeypatch.setattr(teachers_cli, "load_teacher_config", lambda name: dataclasses.replace(cfg, **fields))
        return weights_dir / "w.pth"

    return configure


def test_fetch_resumes_and_checks(offered, server, capsys):
    target = offered()
    server.cuts = [len(server.body), 30_000, 50_000]  # the first request asks for the size
    assert main(["teachers", "fetch", "small"]) == 0
    assert target.read_bytes() == server.body and sorted(target.parent.iterdir()) == [target]
    assert server.requests == ["", "", "bytes=30000-", "bytes=80000-"]
    assert hashlib.sha256(server.body).hexdigest() in capsys.readouterr().out
    assert main(["teachers", "fetch", "small"]) == 0
    assert "is there already" in capsys.readouterr().out
    assert main(["teachers", "verify", str(target)]) == 0


def test_fetch_with_a_hash(offered, server, complaint):
    sha256 = hashlib.sha256(server.body).hexdigest()
    target = offered(bytes=len(server.body), sha256=sha256)
    assert main(["teachers", "fetch", "small"]) == 0
    target.unlink()
    offered(bytes=len(server.body), sha256="0" * 64)
    assert main(["teachers", "fetch", "small"]) == 2
    assert "has SHA-256" in complaint() and not any(target.parent.iterdir())


def test_fetch_does_not_keep_what_is_no_weights_file(offered, server, complaint):
    target = offered()
    server.body = b"<html>please log in</html>" * 100
    assert main(["teachers", "fetch", "small"]) == 2
    assert "does not begin like an archive" in complaint() and not any(target.parent.iterdir())


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"url": "http://127.0.0.1:9/w.pth"}, "could not be fetched: no answer"),
        ({}, "the server answered 404"),
        ({"url": ""}, "has no address"),
        ({"url": "ftp://x/w.pth"}, "unknown scheme"),
        ({"weights": "random:1"}, "needs no file"),
    ],
)
def test_fetch_that_cannot_be_is_explained(offered, server, fields, words, complaint):
    offered(**fields)
    server.status = 404
    assert main(["teachers", "fetch", "small"]) == 2
    assert words in complaint()


def test_verify_names_faults(state, tmp_path, capsys):
    path = tmp_path / "w.pth"
    torch.save({"model": {**state, "mask_token": torch.zeros(1, 64), "head.bias": torch.zeros(3)}}, path)
    assert main(["teachers", "verify", str(path)]) == 0
    out = capsys.readouterr().out
    for words in ("under 'model'", "family: dinov2", "num_registers: 2", "missing: 0", "ignored: 2: mask_token,"):
        assert words in out
    assert "fingerprint cls" in out and "fingerprint patch" in out
    del state["blocks.1.mlp.fc2.bias"]
    state["blocks.1.attn.proj.bias"] = torch.zeros(3)
    state["blocks.0.attn.proj.bias"][1] = float("nan")
    torch.save(state, path)
    assert main(["teachers", "verify", str(path)]) == 1
    out = capsys.readouterr().out
    assert "missing: 1: blocks.1.mlp.fc2.bias" in out and "fingerprint" not in out
    assert "wrong shape: 1: blocks.1.attn.proj.bias has shape [3] instead of [64]" in out
    assert "unsound: 1: blocks.0.attn.proj.bias has values that are not finite" in out
    del state["pos_embed"]
    torch.save(state, path)
    assert main(["teachers", "verify", str(path)]) == 1


def test_verify_of_something_else(tmp_path, capsys, complaint):
    torch.save({"a": torch.zeros(2)}, tmp_path / "a.pth")
    assert main(["teachers", "verify", str(tmp_path / "a.pth")]) == 1
    assert "of no known family" in capsys.readouterr().out
    (tmp_path / "b.pth").write_bytes(b"junk")
    assert main(["teachers", "verify", str(tmp_path / "b.pth")]) == 2
    assert "cannot be read" in complaint()


@pytest.mark.parametrize(
    ("name", "family", "heads"),
    [
        ("dinov2_reg", "dinov2", 3), ("mast3r", "mast3r", None), ("multihmr", "multihmr", 3),
        ("unic_dbotft", "dbotft", 3), ("unic_deit3", "deit3", 3), ("unic_dino", "dino", 3), ("unic_ibot", "dino", 3),
    ],
)  # fmt: skip
def test_published_containers_are_recognised(name, family, heads, reference_dir):
    report = inspect_file(reference_dir / "checkpoint" / f"{name}_tiny.pth", heads)
    assert report.family == family and report.sound
    assert not any(key.startswith(("blocks", "enc_", "backbone.encoder.blocks")) for key in report.fit.surplus)
    assert (len(report.fit.surplus) > 100) == (family == "mast3r")  # the decoder


def test_verify_knows_a_release_of_dune(reference_dir, capsys):
    assert main(["teachers", "verify", str(reference_dir / "checkpoint" / "official_ddp.pth")]) == 0
    assert "distilled from dino2reg_vitlarge_14" in capsys.readouterr().out


def test_fingerprint_changes_with_the_weights(state, tmp_path):
    prints = []
    for change in (0.0, 0.0, 0.5):
        state["blocks.1.ls2.gamma"] += change
        torch.save(state, tmp_path / "w.pth")
        prints.append(inspect_file(tmp_path / "w.pth").fingerprint)
    assert prints[0] == prints[1] != prints[2]
