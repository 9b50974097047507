"""Runs that spend less a step: several ranks, parts, a resume, what is counted, what is refused."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch

from dune_fast.distill.objective import presampled
from dune_fast.engine import checkpoints
from dune_fast.engine.config import ConfigError, compose_config
from dune_fast.engine.flops import block_flops, linear_flops, run_flops
from dune_fast.engine.metrics import read_metrics
from dune_fast.planner.describe import describe
from tests.engine.conftest import build, run_ranks, same_weights, timeless, train

ECONOMIES = ("objective.presample=true", "objective.patch_share=0.5", "teachers.two.scale=0.5")


def test_a_resumed_run_ends_bit_identical(overrides, tmp_path):
    more = ("train.accumulation=2",)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(overrides, *ECONOMIES, *more, f"output_dir={whole}")
    shutil.copytree(whole, parts)
    shutil.rmtree(parts / "checkpoints" / checkpoints.tag(6))
    again = build(overrides, *ECONOMIES, *more, f"output_dir={parts}")
    assert again.step == 3
    again.run()
    assert same_weights(parts, whole) and timeless(parts) == timeless(whole)


def test_parts_and_ranks_drop_what_one_rank_drops(overrides, tmp_path):
    """The draw belongs to the image; so do the statistics of the first step, and from them its losses."""
    folders = {name: tmp_path / name for name in ("one", "parts", "two")}
    frozen = ("standardization.convention=phi_s", "standardization.phi_s_batches=2", "train.steps=2")
    common = [*overrides, *ECONOMIES, *frozen]
    one = build(common, f"output_dir={folders['one']}")
    outputs = []
    plain = one.task.distill.__class__.__call__

    def kept(self, *arguments):
        outputs.append(plain(self, *arguments))
        return outputs[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(one.task.distill.__class__, "__call__", kept)
        one.run()
    train(common, f"output_dir={folders['parts']}", "train.accumulation=2")
    run_ranks(2, "dune_fast/train.py", *common, f"output_dir={folders['two']}", "deepspeed=zero2")
    first = {name: read_metrics(folder / "metrics.jsonl")[0] for name, folder in folders.items()}
    drawn = presampled(np.arange(8), 2, 0, one.cfg.train.seed, one.cfg.objective)
    losses = outputs[0].images.losses
    assert torch.equal(losses > 0, torch.from_numpy(drawn)) and not drawn.all()
    for name, halves in (("parts", (slice(0, None, 2), slice(1, None, 2))), ("two", (slice(4), slice(4, 8)))):
        expected = np.mean([losses[:, half].sum().item() / drawn[:, half].sum() for half in halves])
        assert first[name]["loss"] == pytest.approx(expected, rel=1e-4), name
        for teacher, row in zip(("one", "two"), drawn, strict=True):
            assert first[name][f"kept/{teacher}"] == first["one"][f"kept/{teacher}"] == row.mean()


def test_operations_are_counted():
    cfg = compose_config(["experiment=demo"])
    whole = run_flops(cfg)
    cfg.objective.presample = True
    counted, share, of_either = run_flops(cfg), 0.5 + 0.125 / 3, 1 - 0.25 + 2 * 0.125 / 3
    assert counted.student == whole.student and counted.projectors == pytest.approx(share * whole.projectors, rel=1e-4)
    assert counted.teachers["geometric"] == pytest.approx(share * whole.teachers["geometric"], rel=1e-4)
    assert counted.teachers["semantic"] == pytest.approx(of_either * whole.teachers["semantic"], rel=1e-4)  # one trunk
    assert any("presample" in line for line in describe(cfg, "demo", [1]))

    cfg.objective.presample, cfg.teachers["geometric"].scale = False, 0.5
    counted = run_flops(cfg)
    assert counted.teachers["geometric"] == pytest.approx(whole.teachers["geometric"] / 4, rel=0.01)
    assert counted.projectors == whole.projectors and counted.teachers["semantic"] == whole.teachers["semantic"]

    cfg.objective.patch_share = 0.25  # 16 of 64 patches
    dim, widths = cfg.student.embed_dim, [teacher.num_features for teacher in cfg.teachers.values()]
    block = block_flops(65, dim) - linear_flops(48, dim, 8 * dim)
    assert run_flops(cfg).projectors == sum(block + linear_flops(17, dim, width) for width in widths)
    for kind in ("sp", "lp"):
        cfg.projector.kind, counts = kind, []
        for share in (1.0, 0.25):
            cfg.objective.patch_share = share
            counts.append(run_flops(cfg).projectors)
        assert counts[1] == pytest.approx(counts[0] / 4, rel=0.06)  # and the cls token


@pytest.mark.parametrize(("compiled", "named"), [("train", "train"), ("teachers.one", "teachers.one")])
def test_a_number_of_images_that_changes_is_not_compiled(overrides, compiled, named):
    with pytest.raises(ConfigError, match=f"presample=true with {named}.compile=true: in every step .* another number"):
        compose_config([*overrides, "objective.presample=true", f"{compiled}.compile=true"])


def test_a_share_of_patches_out_of_range_is_refused(overrides):
    with pytest.raises(ConfigError, match="patch_share"):
        compose_config([*overrides, "objective.patch_share=0"])
