"""Theia's recipe in small: statistics measured beforehand, translators, a draw of teachers, a resume; its sizes."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from dune_fast import cli
from dune_fast.engine import checkpoints
from dune_fast.engine.config import ConfigError, compose_config
from dune_fast.engine.memory import trained_parameters
from dune_fast.engine.metrics import read_metrics
from dune_fast.evaluate.run import evaluate_run
from dune_fast.load import load_encoder, load_model
from tests.engine.conftest import build, same_weights, timeless, train

THEIA = (
    "student.family=theia", "student.normed=true", "student.num_registers=2", "student.layer_scale=null",
    "student.image_size=56", "projector=theia", "teachers.two.grid=own", "teachers.two.input_size=64",
    "objective.cls={cosine: 0, smooth_l1: 0.1, map_cosine: 0.9}", "objective.drop_probability=0",
    "objective.patch={cosine: 0, smooth_l1: 0.1, map_cosine: 0.9}", "objective.teachers_per_step=1",
    "standardization.convention=stored_bf16", "train.steps=20", "train.checkpoint_every=10",
    "evaluation.held_out=false",
    "optimizer.schedule=constant", "optimizer.warmup_fraction=0.1", "optimizer.warmup_start=0.01",
    "optimizer.clip_per_parameter=0", "optimizer.lr_per_256=0.03",
)  # fmt: skip


def test_a_small_run_learns_and_a_resumed_one_ends_bit_identical(overrides, tmp_path):
    statistics = tmp_path / "statistics.safetensors"
    overrides = [*overrides, *THEIA, f"standardization.file={statistics}"]
    assert cli.main(["cache", "statistics", str(statistics), *overrides, "--images", "12"]) == 0
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(overrides, f"output_dir={whole}")
    shutil.copytree(whole, parts)
    shutil.rmtree(parts / "checkpoints" / checkpoints.tag(20))
    statistics.unlink()  # they are in the checkpoint
    again = build(overrides, f"output_dir={parts}")
    assert again.step == 10
    again.run()
    assert same_weights(whole, parts) and timeless(whole) == timeless(parts)
    records = [record for record in read_metrics(whole / "metrics.jsonl") if "loss" in record]
    assert {record[f"kept/{name}"] for name in ("one", "two") for record in records} == {0.0, 1.0}
    of_two = [record["loss/two"] for record in records if record["kept/two"]]
    assert of_two[-1] < 0.9 * of_two[0]
    encoder, model = load_encoder(whole), load_model(whole)
    images = torch.randn(1, 3, 56, 56)
    with torch.no_grad():
        assert torch.equal(encoder(images)["x_norm_patchtokens"], model(images)["x_norm_patchtokens"])
    assert hasattr(encoder, "register_positions") and encoder.norm.eps == 1e-12
    assert not torch.equal(encoder.norm.weight, torch.ones(48))  # trained


def test_a_student_without_a_cls_token_trains_and_is_evaluated(overrides, tmp_path):
    plain = [word for word in THEIA if "teachers_per_step" not in word and "convention" not in word]
    more = ["student.cls_token=false", "teachers.one.token_types=[patch]", "train.steps=2", "evaluation.held_out=true"]
    train([*overrides, *plain, *more])
    evaluate_run(tmp_path / "run", figures=False)
    result = json.loads((tmp_path / "run" / "held_out.json").read_text())
    assert set(result["after"]["one"]) == {"patch"} and result["window_knn"] == {}


def lconv(dim: int, channels: int, target: int) -> int:
    """Parameters of a translator from 14 x 14 patches, by the layers of the paper."""
    convolution = 9 * dim * dim + dim
    sides = {16: (16, 16, 16), 64: (16, 31, 64)}[target]
    return 3 * convolution + sum(2 * dim * side * side for side in sides) + dim * channels + channels


@pytest.mark.parametrize(
    ("experiment", "student", "encoder", "maps"),
    [
        ("theia", "deit_base16", (768, 85_798_656), [(1024, 16), (1024, 16), (1280, 16)]),
        ("theia_cddsv", "deit_tiny16", (192, 5_524_416), [(1024, 16), (1024, 16), (1280, 16), (256, 64), (32, 64)]),
    ],
)  # fmt: skip
def test_sizes_at_full_scale(experiment, student, encoder, maps):
    """Hugging Face's ViT without its pooler, and the translators, counted on the meta device."""
    cfg = compose_config([f"experiment={experiment}", f"student={student}"])
    dim, expected = encoder
    assert trained_parameters(cfg) == (expected, sum(lconv(dim, channels, target) for channels, target in maps))
    assert cfg.optimizer.peak(cfg.train.global_batch) == pytest.approx(5e-4)


def test_what_a_run_cannot_do_is_refused(overrides):
    common = [*overrides, *(word for word in THEIA if "stored" not in word and "teachers_per_step" not in word)]
    stage = "progressive=[{until:0.5,image_size:56,teachers:[one]}]"
    for more, sentence in (
        (["standardization.convention=stored"], "standardization.file and standardization.files say where"),
        (["standardization.convention=stored", "+standardization.files.one=[a.npy,b.npy]"], "nothing of two"),
        (["standardization.convention=stored", "+standardization.files.one=[a.npy]"], "give two files"),
        (["standardization.file=x"], "and none without"),
        (["objective.teachers_per_step=2"], "of 2 teachers: give fewer"),
        (["image_size=70", "teachers.two.input_size=null"], "4 x 4 patches, and this run's have 5"),
        (["teachers.two.input_size=80"], "teacher 'two'.*from 4 x 4 patches to 5 x 5.*mlp"),
        (["objective.patch_share=0.5"], "patch_share"),
        (["+projector.teachers.two.source_grid=5"], "5 x 5 patches, and this run's have 4"),
        (["objective.teachers_per_step=1", stage], r"progressive\[0\].teachers leaves teachers out, .*draws among all"),
        (["stage_restarts=[statistics]", stage, "standardization.convention=stored_bf16", "standardization.file=x"],
         "convention=stored_bf16 are known"),
        (["student.cls_token=false", "teachers.one.token_types=[patch]", "evaluation.knn_dataset=images",
          "evaluation.every=2"], "compares cls tokens, and student.cls_token is false"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            compose_config([*common, *more])
