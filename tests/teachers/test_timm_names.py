"""timm's models by name on the command line, and by their tensors in `teachers verify`."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from dune_fast.cli import main
from dune_fast.engine.config import ConfigError, compose_config
from dune_fast.teachers.ensemble import TeacherEnsemble
from dune_fast.teachers.timm_names import timm_config
from dune_fast.teachers.verify import fingerprint, inspect_file


@pytest.fixture
def saved(tmp_path):
    """`saved(name)` is the path of a file of timm's model with random weights, classifier and all."""
    import timm

    def make(name: str, **options):
        torch.manual_seed(0)
        model = timm.create_model(name, pretrained=False, num_classes=3, **options)
        save_file(model.state_dict(), tmp_path / f"{name}.safetensors")
        return tmp_path / f"{name}.safetensors", model.eval()

    return make


@pytest.mark.parametrize(
    ("name", "patch", "channels", "tokens"),
    [
        ("vit_base_patch16_siglip_224", 16, 768, ["patch"]),
        ("vit_base_patch16_clip_224", 16, 768, ["cls", "patch"]),
        ("samvit_base_patch16", 16, 256, ["patch"]),
        ("convnext_atto", 32, 320, ["patch"]),
    ],
)
@pytest.mark.slow
def test_verify_knows_files_of_timm(name, patch, channels, tokens, saved):
    """They were called "not usable" or of no known family."""
    path, _ = saved(name)
    report = inspect_file(path)
    assert report.family == "timm" and report.models[0] == name and report.sound, report
    cfg = report.config
    assert (cfg.patch_size, cfg.num_features, list(cfg.token_types)) == (patch, channels, tokens)
    assert set(report.fingerprint) == set(tokens)


def test_verify_prints_how_to_use_it(saved, capsys):
    path, model = saved("convnext_atto")
    assert main(["teachers", "verify", str(path)]) == 0
    out = capsys.readouterr().out
    assert "family: timm\nmodel: convnext_atto\n" in out and "fingerprint patch" in out
    (shorthand,) = [line.partition(": ")[2].strip("'") for line in out.splitlines() if line.startswith("as a teacher")]
    cfg = compose_config(["experiment=tiny_cpu", shorthand]).teachers["NAME"]
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        expected = model.forward_features(images).flatten(2).transpose(1, 2)
    found = TeacherEnsemble({"a": cfg}, 32)(images)["a"]["patch"]
    mean, std = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    assert list(cfg.mean) == mean and list(cfg.std) == std
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_model_is_named_where_its_tensors_do_not_show_it(saved, capsys):
    path, _ = saved("resnet10t")
    path = path.rename(path.with_name("weights.safetensors"))
    assert main(["teachers", "verify", str(path)]) == 1
    assert "name it: --model NAME" in capsys.readouterr().out
    assert main(["teachers", "verify", str(path), "--model", "resnet10t"]) == 0
    assert main(["teachers", "verify", str(path), "--model", "resnet14t"]) == 1
    assert "missing: " in capsys.readouterr().out


@pytest.mark.parametrize("prefix", ["", "timm_"])
def test_the_name_of_a_file_says_the_model_and_its_weights(prefix, saved):
    """A ResNet's tensors show no model, and no tensors show how their images were normalised."""
    path, _ = saved("resnet10t")
    assert inspect_file(path.rename(path.with_name(f"{prefix}resnet10t.c3_in1k.safetensors"))).sound
    path, _ = saved("convnext_nano")
    tagged = inspect_file(path.rename(path.with_name(f"{prefix}convnext_nano.d1h_in1k.safetensors")))
    assert tagged.sound and tagged.models[0] == "convnext_nano.d1h_in1k"


def test_a_file_that_is_not_one_of_our_vits_is_told_how_to_name_its_model(saved, capsys):
    """EVA-02's blocks look like DINO's, and "not usable" was all that was said."""
    path, _ = saved("eva02_tiny_patch14_224")
    path = path.rename(path.with_name("weights.safetensors"))
    assert main(["teachers", "verify", str(path)]) == 1
    assert "not usable" in (out := capsys.readouterr().out) and "name it: --model NAME" in out


@pytest.mark.parametrize(("name", "patch"), [("beit_base_patch16_224", 16), ("hiera_tiny_224", 32)])
def test_a_model_for_one_size_alone_says_so(name, patch):
    """It ended `verify` and the first step by a traceback out of timm."""
    cfg = timm_config(name, "random:1")
    assert set(fingerprint(cfg)) == set(cfg.token_types)
    ensemble = TeacherEnsemble({"a": cfg}, 14)
    side = 224 // patch
    with pytest.raises(ValueError, match=f"a: {name} takes images of 224 px alone.*image_size={side * 14}"):
        ensemble(torch.zeros(1, 3, 56, 56))
    assert ensemble(torch.zeros(1, 3, side * 14, side * 14))["a"]["patch"].shape[1] == side**2


def test_a_teacher_by_its_name_in_timm(tmp_path, monkeypatch):
    monkeypatch.setenv("DUNE_FAST_WEIGHTS", str(tmp_path))
    name = "vit_base_patch16_siglip_224"
    cfg = compose_config([
        "experiment=tiny_cpu", f"+teachers.siglip=timm:{name}", "teachers.siglip.precision=fp32",
        f"+teachers.other='timm:{name}@/my weights/a=b.safetensors'",
    ])  # fmt: skip
    siglip, other = cfg.teachers["siglip"], cfg.teachers["other"]
    assert (siglip.family, siglip.model, siglip.patch_size, siglip.num_features) == ("timm", name, 16, 768)
    assert list(siglip.token_types) == ["patch"] and list(siglip.mean) == [0.5] * 3 and siglip.precision == "fp32"
    assert siglip.weights == f"{tmp_path}/{name}.safetensors" and other.weights == "/my weights/a=b.safetensors"
    assert len(cfg.teachers) == 2 + len(compose_config(["experiment=tiny_cpu"]).teachers)


def test_a_name_that_timm_does_not_know():
    with pytest.raises(ConfigError, match="teachers.a.model is 'vit_base_patch16_siglip_225', which timm does not"):
        compose_config(["experiment=tiny_cpu", "+teachers.a=timm:vit_base_patch16_siglip_225"])
    with pytest.raises(ConfigError, match=r"\+teachers.NAME=timm:MODEL@FILE"):
        compose_config(["experiment=tiny_cpu", "+teachers.a={family: timm}"])


def test_a_tag_of_weights_says_their_normalisation():
    assert timm_config("vit_base_patch16_clip_224.openai").mean != timm_config("vit_base_patch16_siglip_224").mean
