"""Trained models by path and by name, from runs, files and published containers; the hub's entry points."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import dune_fast
from dune_fast.export.run import export
from dune_fast.load import PUBLISHED, ModelNotFoundError
from dune_fast.teachers.architecture import architecture_metadata
from dune_fast.teachers.containers import TeacherWeightsError, read_container
from tests.test_export import SMALL, TINY, one_thread, write_run  # noqa: F401

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("load") / "run", SMALL)


@pytest.fixture(scope="module")
def container(tmp_path_factory) -> Path:
    """A published checkpoint under a published name."""
    folder = tmp_path_factory.mktemp("weights")
    export(write_run(folder / "run", TINY), "dune", folder)
    return (folder / "dune.pth").rename(folder / "dune_vitsmall14_336.pth")


@pytest.fixture(scope="module")
def hub():
    spec = importlib.util.spec_from_file_location("hubconf", ROOT / "hubconf.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


IMAGES = torch.randn(2, 3, 56, 42, generator=torch.Generator().manual_seed(0))


def test_encoder_of_a_run_is_frozen_and_speaks_dinov2(run):
    encoder = dune_fast.load_encoder(str(run))
    features = encoder(IMAGES)
    assert not encoder.training and not any(p.requires_grad for p in encoder.parameters())
    assert {key: list(x.shape) for key, x in features.items()} == {
        "x_norm_clstoken": [2, 128],
        "x_norm_regtokens": [2, 4, 128],
        "x_norm_patchtokens": [2, 12, 128],
        "x_prenorm": [2, 17, 128],
    }
    ((patches, cls),) = encoder.get_intermediate_layers(IMAGES, 1, return_class_token=True)
    torch.testing.assert_close(patches, features["x_norm_patchtokens"])
    torch.testing.assert_close(cls, features["x_norm_clstoken"])


@pytest.mark.parametrize("name", ["encoder.safetensors", "student.safetensors"])
def test_encoder_of_either_file(run, name):
    wanted, found = dune_fast.load_encoder(run), dune_fast.load_encoder(run / name)
    assert all(torch.equal(value, found.state_dict()[key]) for key, value in wanted.state_dict().items())


def test_model_projects_in_either_scale(run):
    model = dune_fast.load_model(run)
    assert model.teachers == ["one", "two"] and torch.equal(
        model(IMAGES)["x_prenorm"], model.encoder(IMAGES)["x_prenorm"]
    )
    own, standardized = model.projections(IMAGES, standardized=False), model.projections(IMAGES)
    assert {n: sorted(t) for n, t in own.items()} == {"one": ["cls", "patch"], "two": ["patch"]}
    assert own["two"]["patch"].shape == (2, 12, 40)
    normalizer = dict((f"{n}.{t}", x) for n, t, x in model.statistics.items())["two.patch"]
    expected = standardized["two"]["patch"] * normalizer.std + normalizer.mean
    torch.testing.assert_close(own["two"]["patch"], expected)
    assert model.get_intermediate_layers(IMAGES, 2)[0].shape == (2, 12, 128)


def test_published_container_by_path_and_by_name(container, monkeypatch):
    monkeypatch.setenv("DUNE_FAST_WEIGHTS", str(container.parent))
    by_name, by_path = dune_fast.load_model("dune_vitsmall14_336"), dune_fast.load_encoder(container)
    torch.testing.assert_close(by_name(IMAGES)["x_prenorm"], by_path(IMAGES)["x_prenorm"])


def test_published_encoder_alone(container, tmp_path):
    state = {k: v for k, v in read_container(container)["model"].items() if k.startswith("encoder.")}
    torch.save({"model": state}, tmp_path / "encoder.pth")
    whole, alone = dune_fast.load_encoder(container), dune_fast.load_encoder(tmp_path / "encoder.pth")
    assert torch.equal(whole(IMAGES)["x_prenorm"], alone(IMAGES)["x_prenorm"])
    with pytest.raises(TeacherWeightsError, match="every teacher"):
        dune_fast.load_model(tmp_path / "encoder.pth")


def test_exported_safetensors_needs_no_configuration(run, tmp_path):
    export(run, "safetensors", tmp_path)
    path = tmp_path / "encoder.safetensors"
    ours = dune_fast.load_encoder(path)
    assert torch.equal(ours(IMAGES)["x_prenorm"], dune_fast.load_encoder(run)(IMAGES)["x_prenorm"])
    with pytest.raises(ModelNotFoundError, match="without projectors"):
        dune_fast.load_model(path)
    save_file(load_file(path), path)  # without metadata: heads of 64 channels, as these are
    assert torch.equal(dune_fast.load_encoder(path)(IMAGES)["x_prenorm"], ours(IMAGES)["x_prenorm"])


@pytest.mark.parametrize("text", ['{"depth": []}', '{"depth": 1e9}', '{"depth": 1000000}', "{", '{"size": 3}', "[]"])
def test_a_senseless_architecture_is_explained(run, text, tmp_path):
    path = tmp_path / "encoder.safetensors"
    save_file(load_file(run / "encoder.safetensors"), path, metadata={"vit_config": text})
    with pytest.raises(TeacherWeightsError, match="architecture is senseless"):
        dune_fast.load_encoder(path)


def test_another_architecture_is_explained(run, tmp_path):
    from dataclasses import replace

    path = tmp_path / "encoder.safetensors"
    metadata = architecture_metadata(replace(SMALL, depth=3))
    save_file(load_file(run / "encoder.safetensors"), path, metadata=metadata)
    with pytest.raises(TeacherWeightsError, match="blocks.2.norm1.weight is missing"):
        dune_fast.load_encoder(path)


def test_unknown_names_list_what_exists(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mine").symlink_to(run)
    with pytest.raises(ModelNotFoundError, match="runs/mine.*dune_vitbase14_448_paper"):
        dune_fast.load_encoder("dune_vitbase14_44")
    with pytest.raises(ModelNotFoundError, match="put it at weights/dune_vitbase14_448.pth"):
        dune_fast.load_model("dune_vitbase14_448")
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ModelNotFoundError, match="neither"):
        dune_fast.load_encoder(tmp_path / "notes.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelNotFoundError, match="empty is not the folder of a run"):
        dune_fast.load_encoder(tmp_path / "empty")
    (tmp_path / "empty" / "config.yaml").write_text("")
    with pytest.raises(ModelNotFoundError, match="has not ended"):
        dune_fast.load_encoder(tmp_path / "empty")
    with pytest.raises(ModelNotFoundError, match="`dune-fast teachers fetch unic_vitl14`"):
        dune_fast.load_encoder("unic_l")


def test_hub_has_every_published_model_twice(hub, container, monkeypatch, tmp_path):
    for name in PUBLISHED:
        spelled = name.replace("14_", "_14_")
        for entry in (name, spelled, f"{name}_encoder", f"{spelled}_encoder"):
            assert callable(getattr(hub, entry)), entry
    model = hub.dune_vitsmall14_336(weights=str(container))
    assert model.teachers == ["one", "two"]
    monkeypatch.setenv("DUNE_FAST_WEIGHTS", str(container.parent))
    assert torch.equal(hub.dune_vitsmall14_336_encoder()(IMAGES)["x_prenorm"], model(IMAGES)["x_prenorm"])
    monkeypatch.setenv("DUNE_FAST_WEIGHTS", str(tmp_path))
    with pytest.raises(ModelNotFoundError, match="put it at .*dune_vitbase14_336.pth"):
        hub.dune_vitbase14_336()


def test_the_package_stays_light():
    code = "import sys, dune_fast; assert not {'hydra', 'timm', 'transformers', 'deepspeed'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    assert {"load_encoder", "load_model", "__version__"} <= set(dir(dune_fast))
    with pytest.raises(AttributeError, match="load_nothing"):
        dune_fast.load_nothing  # noqa: B018
