"""The longest schedule within some hours: its command composes, its numbers follow from the recipe's arithmetic."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from dune_fast import cli
from dune_fast.engine.cache_shard import bytes_per_view
from dune_fast.engine.config import compose_config
from dune_fast.engine.devices import peak_tflops
from dune_fast.engine.flops import run_flops
from dune_fast.engine.memory import fit
from dune_fast.planner.alternatives import QUALITY, alternatives
from dune_fast.planner.beside import START_S, beside
from dune_fast.planner.budget import image_flops, longest, of_table
from dune_fast.planner.cached import cached
from dune_fast.planner.gpus import EFFICIENCY, FP8_TEACHER, GPUS, find_gpu, gpu_of_device
from dune_fast.planner.numbers import COUNTED, ESTIMATED
from dune_fast.train import parse_mixed


@pytest.fixture(scope="module")
def dune():
    return compose_config(["experiment=dune_336"])


def two(name: str = "rtx4090", gpus: int = 2):
    return of_table(name, find_gpu(name), gpus)


@pytest.fixture(scope="module")
def all_plans(dune):
    """Of two 4090 for three days with 2 TB, by name."""
    return {a.name: a for a in alternatives(dune, "dune_336", [], two(), 72.0, 2e12, None)}


def composed(command: str):
    """What a printed command trains."""
    words = shlex.split(command)
    assert words.pop(0) == "dune-fast"
    return compose_config(parse_mixed(cli.build_parser(), words).overrides)


def test_two_4090_for_three_days(dune):
    plan = longest(dune, "dune_336", [], two(), 72.0)
    rate = 2 * EFFICIENCY * 165.2e12
    trained = 72 - plan.numbers["beside the steps"].value
    assert 0.98 < plan.images / (trained * 3600 * rate / run_flops(dune).training) <= 1
    assert plan.numbers["hours"].value <= 72
    assert plan.numbers["energy"].value == pytest.approx(2 * 0.45 * plan.numbers["hours"].value)
    cfg = composed(plan.command)
    assert cfg.steps == plan.steps and cfg.train.global_batch == 1024
    found = fit(cfg, 2, 24 * 2**30, parts=cfg.train.accumulation)
    assert found.fits and not fit(cfg, 2, 24 * 2**30, parts=cfg.train.accumulation // 2).fits
    assert plan.numbers["micro-batch"].value == found.images // found.parts


def test_the_whole_recipe_is_the_most(dune):
    plan = longest(dune, "dune_336", [], two("h100", 8), 1000.0)
    assert plan.full and plan.steps == dune.steps and plan.numbers["steps"].how == COUNTED
    assert plan.numbers["hours"].value < 1000 and "train.images" not in plan.command


def test_recomputing_is_counted_as_time(dune):
    again = compose_config(["experiment=dune_336", "train.activation_checkpointing=true"])
    assert image_flops(again)[0] - image_flops(dune)[0] == run_flops(dune).student


def test_alternatives_change_the_parts_that_they_name(dune, all_plans):
    found = all_plans
    assert set(found) == {
        "live", "FP8 teachers", "presample", "teachers' scale", "smaller student", "start", "warm start", "progressive",
        "cached",
    }  # fmt: skip
    trained, frozen = image_flops(dune)
    live, eight, small = (found[name] for name in ("live", "FP8 teachers", "smaller student"))
    gain = eight.schedule.images / live.schedule.images
    assert gain == pytest.approx((trained + frozen) / (trained + FP8_TEACHER * frozen), rel=2e-3)
    assert composed(eight.command).teachers["mast3r_vitlarge_16"].precision == "fp8"
    assert composed(small.command).student.embed_dim == 384 and small.schedule.images > live.schedule.images
    assert composed(found["start"].command).start.teacher == "dino2reg_vitlarge_14"
    (first,) = composed(found["progressive"].command).progressive
    assert (first.until, first.image_size) == (0.5, 224)
    assert composed(found["presample"].command).objective.presample
    assert composed(found["teachers' scale"].command).teachers["dino2reg_vitlarge_14"].scale == 0.75
    assert composed(found["warm start"].command).student_weights.endswith("dinov2_vitb14_reg4_pretrain.pth")
    arithmetic = {name: a.numbers["arithmetic"].value for name, a in found.items() if "arithmetic" in a.numbers}
    assert arithmetic["live"] == arithmetic["FP8 teachers"] == arithmetic["warm start"] == 100
    assert arithmetic["presample"] == pytest.approx(64, abs=1) and arithmetic["teachers' scale"] < 70
    for name in ("presample", "teachers' scale", "progressive"):
        more = found[name].schedule.images / live.schedule.images
        assert more == pytest.approx(100 / arithmetic[name], rel=0.02)
    for alternative in found.values():
        assert alternative.quality in QUALITY.values()
        if alternative.command:
            composed(alternative.command)
        else:
            assert alternative.why


def test_a_cache_pays_its_building_and_stays_on_its_disk(dune):
    images = 400_000
    found = cached(dune, "dune_336", [], two(), 72.0, 2e12, None, images, "")
    values = {name: number.value for name, number in found.numbers.items()}
    assert bytes_per_view(dune) == 3 * 1024 * (576 + 4) + 1024 * 2
    assert values["views"] == 2 * images and values["disk"] == 2 * images * bytes_per_view(dune) / 1e9 < 2000
    frozen, rate = image_flops(dune)[1], 2 * EFFICIENCY * 165.2e12
    assert values["building"] == pytest.approx(values["views"] * frozen / rate / 3600)
    assert values["hours"] <= 72 and values["passes"] > 4
    cfg = composed(found.command)
    assert cfg.cache.folder == "cache" and cfg.data.views == 2 and cfg.steps == found.schedule.steps
    loop, build = found.build.split("; do CUDA_VISIBLE_DEVICES=$((i-1)) ")
    assert loop == "for i in $(seq 2)" and build.endswith(" --part $i/2 & done; wait")
    words = shlex.split(build.removesuffix(" --part $i/2 & done; wait"))
    assert words[:3] == ["dune-fast", "cache", "build"]
    built = compose_config(words[3:])
    assert (built.cache, built.data, built.teachers) == (cfg.cache, cfg.data, cfg.teachers)


def test_a_cache_that_is_too_large_is_made_smaller_or_says_so(dune, all_plans):
    """The recipe's 20.7 million images are known to the configuration."""
    few = all_plans["cached"]
    assert not few.command and "fewer than the 20," in few.why and few.numbers["views"].value < 20e6
    weeks = cached(dune, "dune_336", [], two("h100", 8), 2000.0, 4e13, None, 0, "")
    assert "cache." not in weeks.command.replace("cache.folder=cache", "")  # 37 TB
    less = cached(dune, "dune_336", [], two("h100", 8), 2000.0, 1e13, None, 0, "")
    cfg = composed(less.command)
    assert cfg.cache.components == 256 and cfg.data.views == 1
    assert less.numbers["disk"].value < 1e4 and less.numbers["features"].value > 1
    assert less.numbers["disk"].value == pytest.approx(20_728_949 * bytes_per_view(cfg) / 1e9, rel=0.01)


def test_hours_hold_what_is_beside_the_steps(dune):
    """Start-up, checkpoints and evaluations; more of them leave fewer steps."""
    plain = longest(dune, "dune_336", [], two(), 72.0)
    often = ["train.checkpoint_every=10", "evaluation.every=100"]
    busy = longest(compose_config(["experiment=dune_336", *often]), "dune_336", often, two(), 72.0)
    other = plain.numbers["beside the steps"]
    assert START_S / 3600 < other.value < 2 and other.how == ESTIMATED
    assert busy.steps < plain.steps and busy.numbers["hours"].value <= 72
    evaluated = compose_config(["experiment=dune_336", "evaluation.every=100"])
    look = (beside(evaluated, 2, 1e14).step - beside(dune, 2, 1e14).step) * 100 * 1e14
    held_out = sum(d.holdout or d.expected_val for d in dune.data.datasets.values() if not d.evaluation_only)
    flops = run_flops(dune)
    assert held_out > 1000
    assert look == pytest.approx(held_out * (flops.student + flops.projectors + flops.all_teachers), rel=1e-6)


def test_a_gpu_without_fp8_is_not_offered_it(dune):
    found = {a.name: a for a in alternatives(dune, "dune_336", [], two("a100"), 72.0, None, None)}
    eight, without_disk = found["FP8 teachers"], found["cached"]
    whole = cached(dune, "dune_336", [], two("a100"), None, 2e12, None, 10**6, "")
    assert whole.numbers["share of the recipe"].value == 100  # without a limit of hours
    assert "--disk" in without_disk.why and not without_disk.command
    assert "no FP8" in eight.why and not eight.command and not eight.numbers


def test_a_machine_that_is_too_small_says_so(dune):
    tiny = of_table("rtx4090", find_gpu("rtx4090"), 1)
    with pytest.raises(ValueError, match="not enough for 2 steps"):
        longest(dune, "dune_336", [], tiny, 1e-4)
    with pytest.raises(ValueError, match="cannot share evenly; give train.global_batch=1026"):
        longest(dune, "dune_336", [], two("rtx4090", 3), 1.0)
    with pytest.raises(ValueError, match="does not fit 1 x rtx4090 with 1 GiB"):
        longest(dune, "dune_336", [], replace(tiny, memory=2**30), 1.0)


@pytest.mark.parametrize("name", GPUS)
def test_the_table_is_whole(name):
    gpu = GPUS[name]
    assert gpu.bf16 == peak_tflops(f"NVIDIA {gpu.device}") and gpu_of_device(f"NVIDIA {gpu.device}") is gpu
    assert gpu.fp8 is None or 1.9 < gpu.fp8 / gpu.bf16 < 2.1
    assert gpu.source.startswith("NVIDIA ") and gpu.watts and gpu.bandwidth and gpu.link


def test_other_chips_of_a_name_are_not_taken_for_it():
    assert peak_tflops("NVIDIA GeForce RTX 4090 Laptop GPU") is None
    assert peak_tflops("NVIDIA GeForce RTX 4090 D") is None and peak_tflops("NVIDIA GeForce RTX 3090 Ti") is None
    assert gpu_of_device("NVIDIA GeForce RTX 4090 Laptop GPU") is None


@pytest.mark.parametrize("quality", [text for text in QUALITY.values() if ", \"" in text])
def test_a_section_that_a_quality_comes_from_exists(quality):
    for page, section in re.findall(r'(\S+[.]md), "([^"]+)"', quality):
        assert f"\n## {section}" in (Path(__file__).parents[2] / page).read_text()
