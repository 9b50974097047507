"""Hostile and damaged files: each is refused with one sentence, and nothing in it runs or is unpacked."""

from __future__ import annotations

import argparse
import builtins
import json
import os
import stat
import struct
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dune_fast.kernels.nn.vit import ViTConfig
from dune_fast.teachers.architecture import random_vit_state
from dune_fast.teachers.config import TeacherConfig
from dune_fast.teachers.containers import TeacherWeightsError, read_container
from dune_fast.teachers.registry import build_teacher, family_class

SMALL = ViTConfig(image_size=28, embed_dim=64, depth=1, num_heads=1, num_registers=0)


@pytest.fixture
def state():
    return random_vit_state(SMALL, 0)


def build(path, family="dinov2"):
    return build_teacher("a", TeacherConfig(family=family, weights=str(path), num_features=64))


def refused(path, words, load=read_container):
    """The file is refused in one sentence that names it."""
    before = sorted(os.listdir(path.parent))
    with pytest.raises(TeacherWeightsError, match=words) as caught:
        load(path)
    assert path.name in str(caught.value) and "\n" not in str(caught.value)
    assert sorted(os.listdir(path.parent)) == before


class Calls:
    """Pickles into a call."""

    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("call", "name"),
    [
        ((os.system, "touch executed"), "system"),
        ((builtins.eval, "open('executed', 'w')"), "eval"),
        ((builtins.exec, "open('executed', 'w')"), "exec"),
        ((open, "executed", "w"), "open"),
        ((getattr, "x", "upper"), "getattr"),
        ((np.load, "executed"), "load"),
    ],
)
@pytest.mark.parametrize("place", ["model", "args"])
def test_pickle_that_runs_a_command(call, name, place, state, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = {"model": state, "args": argparse.Namespace(lr=1)}
    content[place] = argparse.Namespace(x=Calls(*call)) if place == "args" else {**state, "x": Calls(*call)}
    path = tmp_path / "w.pth"
    torch.save(content, path)
    refused(path, rf"asks for the type \S*{name}\b.* could run code")
    assert not (tmp_path / "executed").exists()


def test_pickle_from_before_the_archives(state, tmp_path):
    path = tmp_path / "w.pth"
    torch.save(state, path, _use_new_zipfile_serialization=False)
    refused(path, "bare pickle.* save it again")


def rewrite(source, target, change=None, compression=zipfile.ZIP_STORED, extra=()):
    """Copies an archive member by member; `extra` are (name or ZipInfo, content) that come on top."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for member in old.infolist():
            data = old.read(member)
            new.writestr(member.filename, change(member.filename, data) if change else data)
        for name, data in extra:
            new.writestr(name, data)


@pytest.fixture
def archive(state, tmp_path):
    path = tmp_path / "source.pth"
    torch.save({"model": state}, path)
    return path


def test_zip_bomb_is_refused_before_it_is_unpacked(archive, tmp_path, monkeypatch):
    path = tmp_path / "bomb.pth"
    rewrite(archive, path, compression=zipfile.ZIP_DEFLATED, extra=[("source/data/999", bytes(64 << 20))])
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("opened"))
    monkeypatch.setattr(zipfile.ZipFile, "open", lambda *a, **k: pytest.fail("unpacked"))
    refused(path, "unpack to .* which no saved weights do")


LINK = zipfile.ZipInfo("source/link")
LINK.external_attr = (stat.S_IFLNK | 0o777) << 16
OUTSIDE = ("../outside", "/outside", "source/../../outside", "..\\outside", "C:\\outside")


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    ("member", "words"),
    [*((name, "a member outside its own folder") for name in OUTSIDE), (LINK, "a link as a member"),
     ("source/data.pkl", "doubled member")],
)  # fmt: skip
def test_members_that_no_archive_of_weights_has(member, words, archive, tmp_path):
    path = tmp_path / "w.pth"
    rewrite(archive, path, extra=[(member, b"/etc")])
    refused(path, words)
    assert not (tmp_path.parent / "outside").exists()


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_truncated(share, suffix, state, tmp_path):
    path = tmp_path / f"w.{suffix}"
    save_file(state, path) if suffix == "safetensors" else torch.save({"model": state}, path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    refused(path, "cannot be read: truncated")


@pytest.mark.parametrize("magic", [b"", b"MZ", b"<html>", b"\x89PNG", b"PK\x05\x06", b"\x7fELF", b"\x1f\x8b"])
@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_wrong_magic(magic, name, tmp_path):
    path = tmp_path / name
    path.write_bytes(magic + b"not weights at all" * 20 if magic else b"")
    refused(path, "cannot be read")


def test_garbage_in_a_sound_archive(archive, tmp_path):
    generator = np.random.default_rng(0)
    for i in range(20):
        path = tmp_path / f"w{i}.pth"
        noise = generator.bytes(200)

        def spoil(name, data, noise=noise, i=i):
            return data[: 5 * i] + noise + data[5 * i + 200 :] if name.endswith("data.pkl") else data

        rewrite(archive, path, spoil)
        with pytest.raises(TeacherWeightsError, match=path.name):
            family_class("dinov2").read_file(path, TeacherConfig())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_weights_that_are_not_finite_are_named(value, suffix, state, tmp_path):
    state["blocks.0.attn.proj.weight"][3, 5] = value
    path = tmp_path / f"w.{suffix}"
    save_file(state, path) if suffix == "safetensors" else torch.save(state, path)
    refused(path, "blocks.0.attn.proj.weight has values that are not finite", build)


def test_a_few_bytes_that_claim_to_be_a_large_tensor(state, tmp_path):
    state["pos_embed"] = torch.zeros(1).expand(1, 10_000_001, 64)
    path = tmp_path / "w.pth"
    torch.save(state, path)
    refused(path, "pos_embed claims more values than the file holds", build)


def header(entries, length=None):
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text


@pytest.mark.parametrize(
    "content",
    [
        header({}, 10 << 30),
        header({"a": {"dtype": "F32", "shape": [1 << 62, 1 << 62], "data_offsets": [0, 4]}}) + bytes(4),
        header({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 4]}}) + bytes(4),
        header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}) + bytes(4),
        header({"a": {"dtype": "PYOBJECT", "shape": [1], "data_offsets": [0, 4]}}) + bytes(4),
        b"\x00" * 7,
    ],
)
def test_header_of_a_safetensors_file_that_claims_the_impossible(content, tmp_path):
    path = tmp_path / "w.safetensors"
    path.write_bytes(content)
    refused(path, "cannot be read")


def test_a_block_index_beyond_reason(state, tmp_path):
    state["blocks.999999999.norm1.weight"] = torch.zeros(64)
    path = tmp_path / "w.pth"
    torch.save(state, path)
    refused(path, "block 999999999", build)


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('touch executed')",
        "AsymmetricMASt3R(enc_num_heads=__import__('os').system('touch executed'))",
        "AsymmetricMASt3R(enc_num_heads=3) or open('executed', 'w')",
        "(" * 5000,
        "AsymmetricMASt3R(enc_num_heads='two')",
        "AsymmetricMASt3R(pos_embed='RoPE500')",
        "AsymmetricMASt3R(" + "a=1," * 5000 + ")",
        17,
    ],
)
def test_string_of_a_container_is_parsed_and_never_evaluated(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mast3r = family_class("mast3r")
    vit = random_vit_state(ViTConfig(patch_size=16, image_size=16, embed_dim=64, depth=1, num_heads=1, num_registers=0,
                                     cls_token=False, pos_embed="rope2d", layer_scale=None), 0)  # fmt: skip
    names = {"blocks.": "enc_blocks.", "norm.": "enc_norm.", "patch_embed.": "patch_embed."}
    model = {n + k.removeprefix(o): v for k, v in vit.items() for o, n in names.items() if k.startswith(o)}
    torch.save({"args": argparse.Namespace(model=text), "model": model}, tmp_path / "w.pth")
    try:
        architecture, _ = mast3r.read_file(tmp_path / "w.pth", TeacherConfig(family="mast3r"))
        assert architecture.num_heads == 1  # what cannot be parsed is left out
    except TeacherWeightsError as error:
        assert "w.pth" in str(error) and len(str(error)) < 500
    assert not (tmp_path / "executed").exists()
