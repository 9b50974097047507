"""A student that starts from another's weights: same function, other resolution; and only at a run's fresh start."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from safetensors.torch import save_file

from dune_fast.engine.config import load_config
from dune_fast.engine.warm_start import WarmStartError, warm_start
from dune_fast.kernels.nn.vit import ViTConfig
from dune_fast.projectors.config import ProjectorConfig
from dune_fast.student import Student, build_student
from dune_fast.teachers.containers import TeacherWeightsError
from tests.engine.conftest import build

ENCODER = ViTConfig(image_size=56, embed_dim=48, depth=2, num_heads=3)
TEACHERS = {"a": (24, ("cls", "patch")), "b": (32, ("patch",))}


def student(seed: int, teachers=TEACHERS, **changes) -> Student:
    return build_student(dataclasses.replace(ENCODER, **changes), ProjectorConfig(), teachers, seed).eval()


def equal(ours: torch.nn.Module, theirs: torch.nn.Module) -> bool:
    ours, theirs = ours.state_dict(), theirs.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_another_resolution_starts_as_the_same_function(tmp_path):
    first, second = student(1), student(2, image_size=84)
    save_file(first.state_dict(), tmp_path / "student.safetensors")
    assert warm_start(second, str(tmp_path)).projectors == ["a", "b"]
    assert second.encoder.pos_embed.shape == (1, 37, 48)
    images = torch.randn(2, 3, 84, 84)
    with torch.no_grad():
        torch.testing.assert_close(second(images), first(images), rtol=0, atol=0)
    assert second.encoder.pos_embed.requires_grad and not second.encoder.norm.weight.requires_grad


def test_projectors_of_other_teachers_keep_their_initial_weights(tmp_path):
    first = student(1)
    others = {"a": (24, ("cls", "patch")), "b": (40, ("patch",)), "c": (8, ("patch",))}
    second, initial = student(2, others), student(2, others)
    save_file(first.state_dict(), tmp_path / "student.safetensors")
    assert warm_start(second, str(tmp_path / "student.safetensors")).projectors == ["a"]
    assert equal(second.encoder, first.encoder) and equal(second.projectors["a"], first.projectors["a"])
    assert all(equal(second.projectors[name], initial.projectors[name]) for name in "bc")


@pytest.mark.parametrize("kind", ["encoder.safetensors", "bare.pth", "published.pth"])
def test_every_container_of_an_encoder(kind, tmp_path):
    first, second = student(1), student(2)
    encoder = first.encoder.state_dict()
    if kind == "encoder.safetensors":
        save_file(encoder, tmp_path / kind)
    elif kind == "bare.pth":
        torch.save(encoder | {"mask_token": torch.zeros(1, 48)}, tmp_path / kind)
    else:  # as released: a chunk index before the block index, wrapped
        chunked = {key.replace("blocks.", "blocks.0.", 1): value for key, value in encoder.items()}
        torch.save({"model": {f"module.encoder.{k}": v for k, v in chunked.items()}, "iter": 3}, tmp_path / kind)
    assert warm_start(second, str(tmp_path / kind)).projectors == []
    assert equal(second.encoder, first.encoder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_registers": 2}, r"register_tokens has shape \[1, 2, 48\] instead of \[1, 4, 48\]"),
        ({"depth": 1}, "blocks.1.norm1.weight is missing"),
        ({"embed_dim": 24}, "has shape"),
        ({"patch_size": 28}, r"patch_embed.proj.weight has shape \[48, 3, 28, 28\] instead of \[48, 3, 14, 14\]"),
    ],
)
def test_another_architecture_is_named_and_nothing_changes(changes, words, tmp_path):
    save_file(student(1, **changes).encoder.state_dict(), tmp_path / "encoder.safetensors")
    second = student(2)
    with pytest.raises(WarmStartError, match=words):
        warm_start(second, str(tmp_path))
    assert equal(second, student(2))


@pytest.mark.parametrize("registers", [0, 4])
def test_timms_dinov2_is_a_start(registers, tmp_path, caplog):
    """Positions are resized, registers that it lacks keep their initial weights; both are said."""
    import timm

    name = f"vit_small_patch14_{'reg4_' if registers else ''}dinov2"
    model = timm.create_model(name, num_classes=0, depth=2, embed_dim=48, num_heads=3, img_size=84)
    state = {key: torch.randn_like(value) for key, value in model.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    ours, initial = student(2), student(2)
    with caplog.at_level("INFO"):
        warm_start(ours, str(tmp_path))  # the folder, as timm's hub has it
    encoder = ours.encoder
    assert "positions resized from 36 to 16 patches" in caplog.text
    assert ("4 registers drawn, the source has none" in caplog.text) == (registers == 0)
    expected = state["reg_token"] if registers else initial.encoder.register_tokens
    assert torch.equal(encoder.register_tokens, expected)
    assert torch.equal(encoder.blocks[1].attn.qkv.weight, state["blocks.1.attn.qkv.weight"])
    table = state["pos_embed"] if registers else state["pos_embed"][:, 1:]
    grid = table.unflatten(1, (6, 6)).permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(grid, scale_factor=4.1 / 6, mode="bicubic").flatten(2).transpose(1, 2)
    torch.testing.assert_close(encoder.pos_embed[:, 1:], resized)
    first = torch.zeros(1, 1, 48) if registers else state["pos_embed"][:, :1]
    assert torch.equal(encoder.pos_embed[:, :1], first)
    if registers:
        with pytest.raises(WarmStartError, match="register_tokens is not known"):
            warm_start(student(2, num_registers=0), str(tmp_path))


def test_a_run_that_has_not_ended_and_a_checkpoint_are_a_start(finished):
    """The newest checkpoint has the weights of the finished run; the one before has others."""
    cfg = load_config(finished / "config.yaml")
    drawn = [build_student(cfg.student, cfg.projector, cfg.teacher_features, 9) for _ in range(3)]
    end, newest, before = drawn
    assert warm_start(end, str(finished)).projectors == ["one", "two"]
    (finished / "student.safetensors").unlink()
    (finished / "encoder.safetensors").unlink()
    warm_start(newest, str(finished))
    warm_start(before, str(finished / "checkpoints" / "step_0000003"))
    assert equal(newest, end) and not equal(before.encoder, end.encoder)


def test_a_source_that_is_not_there_is_named(tmp_path):
    with pytest.raises(WarmStartError, match="that run has not ended"):
        warm_start(student(1), str(tmp_path))
    with pytest.raises(TeacherWeightsError, match="there is no checkpoint"):
        warm_start(student(1), str(tmp_path / "nothing.pth"))


def test_weights_that_are_not_finite_are_refused(tmp_path):
    first = student(1)
    first.encoder.cls_token.data[0, 0, 0] = torch.nan
    save_file(first.encoder.state_dict(), tmp_path / "encoder.safetensors")
    with pytest.raises(WarmStartError, match="cls_token has values that are not finite"):
        warm_start(student(2), str(tmp_path))


def test_a_run_starts_warm_and_goes_on_without_the_source(overrides, tmp_path):
    """A resumed run takes its own checkpoint, not the source again, which may be gone by then."""
    first = student(1, {"one": (24, ("cls", "patch")), "two": (32, ("patch",))})
    source = tmp_path / "first.safetensors"
    save_file(first.state_dict(), source)
    more = ["image_size=84", f"student_weights={source}", "train.seed=5", "train.log_every=2"]
    trainer = build(overrides, *more)
    ours, theirs = trainer.engine.module.state_dict(), first.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs if key != "encoder.pos_embed")
    batches = trainer.task.loader.batches(0)
    trainer.train_step(next(batches))
    trainer.train_step(next(batches))
    trainer._save()
    trainer.saver.finish(trainer.device)
    trainer.task.loader.close()
    source.unlink()
    again = build(overrides, *more)
    assert again.step == 2
    assert all(torch.equal(v, ours[k]) for k, v in again.engine.module.state_dict().items())
    again.task.loader.close()


def test_what_was_taken_and_what_not_is_said(tmp_path, caplog):
    first = student(1)
    others = {"a": (24, ("cls", "patch")), "b": (40, ("patch",)), "d": (8, ("patch",))}
    left = {"encoder.head.weight": torch.zeros(3, 48), "encoder.mask_token": torch.zeros(1, 48), "step": torch.ones(1)}
    save_file(first.state_dict() | left, tmp_path / "student.safetensors")
    with caplog.at_level("INFO"):
        found = warm_start(student(2, others), str(tmp_path))
    assert found.projectors == ["a"] and found.drawn == ["b", "d"]
    b = len(first.projectors["b"].state_dict())
    assert found.not_taken == {"encoder": 2, "projectors.b": b, "step": 1}
    assert found.tensors == len(first.encoder.state_dict())
    sentence = f"as drawn: projectors of b, d; not taken of the file: encoder (2), projectors.b ({b}), step (1)"
    assert sentence in caplog.text and sentence in str(found)


def test_timms_plain_vit_is_the_same_function(tmp_path, monkeypatch, caplog):
    """It has neither LayerScale nor registers; "timm:NAME" is the file of that name in the folder of weights."""
    from timm.models.vision_transformer import VisionTransformer

    name = "vit_nano_patch14_56"
    model = VisionTransformer(56, 14, num_classes=5, embed_dim=48, depth=2, num_heads=3).eval()
    save_file(model.state_dict(), tmp_path / f"{name}.safetensors")
    monkeypatch.setenv("DUNE_FAST_WEIGHTS", str(tmp_path))
    ours = student(2, num_registers=0)
    with caplog.at_level("INFO"):
        found = warm_start(ours, f"timm:{name}")
    assert "4 LayerScales set to 1, the source has none" in caplog.text and found.not_taken == {"head": 2}
    images = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        expected = model.forward_features(images)
        torch.testing.assert_close(ours.encoder(images)["x_norm_patchtokens"], expected[:, 1:], rtol=1e-4, atol=1e-5)


def test_half_of_the_layer_scales_is_a_fault(tmp_path):
    encoder = student(1).encoder.state_dict()
    encoder.pop("blocks.1.ls1.gamma")
    save_file(encoder, tmp_path / "encoder.safetensors")
    with pytest.raises(WarmStartError, match="blocks.1.ls1.gamma is missing"):
        warm_start(student(2), str(tmp_path))


def test_the_report_is_in_the_record_of_the_run(overrides, tmp_path):
    save_file(student(1).encoder.state_dict(), tmp_path / "first.safetensors")
    trainer = build(overrides, f"student_weights={tmp_path / 'first.safetensors'}", "train.steps=2")
    trainer.run()
    found = json.loads((trainer.run_dir / "run.json").read_text())["starts"][0]["warm_start"]
    assert found["source"].endswith("first.safetensors") and found["drawn"] == ["one", "two"]
    assert found == trainer.task.warm_start.as_dict()
