"""The student of one run as a teacher of the next: two tiny teachers, a proxy of them, a student of the proxy."""

from __future__ import annotations

import pytest
import torch

from dune_fast.load import load_encoder
from tests.engine.conftest import small_run, train


def student_of(proxy: str, photos, folder) -> list[str]:
    """Overrides of a run whose one teacher is the student of another."""
    own = [part for part in small_run(photos, folder) if "teachers" not in part]
    return [
        "+teachers@teachers.proxy=run", f"teachers.proxy.weights={proxy}", "teachers.proxy.num_features=48", *own,
        "student.embed_dim=24",
    ]  # fmt: skip


@pytest.mark.parametrize("file", ["", "/encoder.safetensors"])
def test_the_student_of_a_run_teaches_the_next(file, trained_run, photos, tmp_path):
    trainer = train(student_of(f"{trained_run}{file}", photos, tmp_path / "second"), "train.steps=2")
    teachers = trainer.task.teachers
    images = torch.randn(2, 3, 56, 56)
    tokens = teachers(images)["proxy"]
    proxy = load_encoder(trained_run)
    with torch.no_grad():
        features = proxy(images)
    assert torch.equal(tokens["cls"], features["x_norm_clstoken"])
    assert torch.equal(tokens["patch"], features["x_norm_patchtokens"])
    assert load_encoder(tmp_path / "second")(images)["x_norm_patchtokens"].shape == (2, 16, 24)


def test_an_unfinished_run_teaches_with_its_newest_checkpoint(finished, photos, tmp_path):
    for name in ("encoder.safetensors", "student.safetensors"):
        (finished / name).unlink()
    trainer = train(student_of(str(finished), photos, tmp_path / "second"), "train.steps=2")
    assert trainer.task.teachers(torch.randn(1, 3, 56, 56))["proxy"]["patch"].shape == (1, 16, 48)
