"""The configuration composes, and says in a sentence what is wrong with it."""

from __future__ import annotations

import dataclasses
import random

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser

from dune_fast.engine.config import ConfigError, RunConfig, as_dict, compose_config, dump_config, load_config
from dune_fast.engine.config_identity import FREE, config_hash, flatten, freeze
from dune_fast.engine.config_limits import LIMITS
from dune_fast.engine.overrides import CONFIGS, packaged_folder, quoted

DEMO = "experiment=demo"


@pytest.mark.parametrize("name", sorted(p.stem for p in (packaged_folder() / "experiment").glob("*.yaml")))
def test_every_experiment_composes(name):
    cfg = compose_config([f"experiment={name}"])
    if cfg.head.kind:
        assert cfg.head.encoder and cfg.head.data and cfg.optimizer.lr
        return
    assert cfg.teachers and cfg.data.datasets and cfg.steps % 2 == 0
    larger = ("proof", "theia_demo", "radio_demo")  # positions of a larger grid
    assert cfg.student.image_size == cfg.image_size or name in larger


@pytest.mark.parametrize("group", ["student", "projector", "deepspeed"])
def test_every_choice_of_a_group_composes(group):
    for path in (packaged_folder() / group).glob("*.yaml"):
        patch = yaml.safe_load(path.read_text()).get("patch_size", 14)
        recipe = "experiment=sak_b" if path.stem == "sak" else DEMO  # whose teachers have its levels
        sizes = [f"image_size={8 * patch}", f"evaluation.figure_size={8 * patch}"]
        compose_config([recipe, f"{group}={path.stem}", *sizes])


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["experiment=dmeo"], "no experiment 'dmeo': did you mean demo"),
        ([DEMO, "+teachers@teachers.x=xfaet"], "no teacher 'xfaet': did you mean xfeat"),
        ([DEMO, "+teachers.x={family: xfeat}"], r"configs/teachers/NAME.yaml and give \+teachers@teachers.NAME=NAME"),
        ([DEMO, "+data.datasets.more.root=/x"], "configs/data/NAME.yaml with all of them and give data=NAME"),
        ([DEMO, "data=dmo"], "no dataset 'dmo': did you mean demo"),
        ([DEMO, "student=vit_tny14"], "no student 'vit_tny14': did you mean vit_tiny14"),
        ([DEMO, "train.stps=5"], "no field 'train.stps'; did you mean train.steps"),
        ([DEMO, "+train.stps=5"], "no field"),
        ([DEMO, "train.steps=many"], "'many'.*Integer"),
        ([DEMO, "teachers.semantic.family=onnx_vti"], "did you mean 'onnx_vit'"),
        ([DEMO, "image_size=100"], "not a multiple of the patch size 14; the nearest are 98 and 112"),
        ([DEMO, "image_size=126"], "'geometric' needs a multiple of 4; the nearest image sizes are 112 and 168"),
        ([DEMO, "objective.sharing=most"], "full, none, generic"),
        ([DEMO, "objective.route_by_dataset=true"], "route_by_dataset is true, but with objective.sharing=full"),
        ([DEMO, "standardization.convention=phis"], "dune, unic"),
        ([DEMO, "deepspeed.zero_stage=5"], "zero_stage=5; it must be from 0 to 3"),
        ([DEMO, "deepspeed.gradient_dtype=fp16"], "choose fp32 or bf16"),
        ([DEMO, "deepspeed.options={zero_optimization:{x:1}}"], r"\+deepspeed.options.SECTION.NAME=VALUE"),
        ([DEMO, "train.global_batch=0"], "at least 1"),
        ([DEMO, "train.steps=0"], "the run has 0 steps"),
        ([DEMO, "optimizer.warmup_fraction=1.5"], "warmup_fraction=1.5; it must be from 0 to 1"),
        ([DEMO, "train.accumulation=-1"], "at least 0, which works it out"),
        ([DEMO, "evaluation.every=-1"], "at least 0, which evaluates never"),
        ([DEMO, "evaluation.figure_size=100"], "evaluation.figure_size=100 is not a multiple .* 14; .* 98 and 112"),
        ([DEMO, "evaluation.figure_size=350"], "evaluation.figure_size=350 .* 'geometric' .* 336 and 392"),
        ([DEMO, "evaluation.knn_dataset=nature"], "'nature' is not a dataset of this run.*: interior, natural"),
        ([DEMO, "evaluation.knn_dataset=natural"], "evaluates never: set both"),
        ([DEMO, "train.compile=true", "deepspeed=zero3"], "choose stage 0, 1 or 2"),
        ([DEMO, "train.timeout_minutes=0"], "above 0"),
        ([DEMO, "optimizer.clip_global=1"], "exclude each other"),
        ([DEMO, "optimizer.lr_per_256=-0.1"], "lr_per_256=-0.1; it must be above 0 up to 10"),
        ([DEMO, "optimizer.clip_per_parameter=-1"], "clip_per_parameter=-1.0; it must be at least 0"),
        ([DEMO, "optimizer.eps=nan"], "eps=nan; it must be above 0 up to 1"),
        ([DEMO, "optimizer.min_lr=1"], "min_lr=1 is above the peak of the learning rate, 6.25e-05"),
        ([DEMO, "optimizer.betas=[0.9]"], r"betas=\[0.9\]; give two numbers"),
        ([DEMO, "student.depth=-1"], "student.depth=-1; it must be at least 1"),
        ([DEMO, "train.precision=fp8"], "auto, bf16 or fp32"),
        ([DEMO, "train.student_stream=fp16"], "student_stream='fp16'; choose fp32 or bf16"),
        ([DEMO, "train.student_stream=bf16", "train.precision=fp32"], "it belongs to products in bf16; choose"),
        ([DEMO, "no equals sign"], "cannot be composed"),
        ([], "no teacher is configured: choose an experiment"),
    ],
)
def test_mistakes_are_explained(overrides, words):
    with pytest.raises(ValueError, match=words) as caught:
        compose_config(overrides)
    assert "\n" not in str(caught.value)


def test_a_configuration_is_frozen_once_the_run_starts_dumped_and_read_back(tmp_path):
    cfg, free = compose_config([DEMO]), compose_config([DEMO])
    freeze(cfg)
    freeze(cfg)  # twice is as good as once
    for section, name in (
        (cfg, "name"), (cfg.train, "steps"), (cfg.objective.cls, "cosine"), (cfg.teachers["semantic"], "weights"),
        (cfg.data.datasets["natural"], "group"),
    ):  # fmt: skip
        with pytest.raises(dataclasses.FrozenInstanceError, match=f"{name} cannot be changed: .*frozen once"):
            setattr(section, name, None)
    assert cfg == free and isinstance(cfg, RunConfig) and type(cfg).__name__ == "RunConfig"
    assert dataclasses.replace(cfg.train, steps=3).steps == 3
    dump_config(cfg, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == free
    assert config_hash(cfg) == config_hash(free)


def test_the_hash_covers_what_is_computed_and_nothing_else():
    def hashed(*overrides: str) -> str:
        return config_hash(compose_config([DEMO, *overrides]))

    plain = hashed()
    for free in ("name=other", "train.log_every=7", "deepspeed=zero2", "data.num_threads=1", "evaluation.batch=2"):
        assert hashed(free) == plain, free
    for counts in ("train.seed=1", "objective.beta=2", "train.accumulation=2", "deepspeed.gradient_dtype=bf16"):
        assert hashed(counts) != plain, counts


def test_every_free_field_exists():
    names = set(flatten(as_dict(RunConfig())))
    for free in FREE:
        assert any(name == free or name.startswith(free + ".") for name in names), free
    assert {"data.num_threads", "data.prefetch", "data.read_ahead", "data.read_patience"} <= set(FREE)


def test_every_number_has_a_limit():
    """Whoever adds a field says which values make sense; datasets and teachers check their own."""
    values = flatten(as_dict(compose_config([DEMO])))
    numbers = {name for name, value in values.items() if isinstance(value, int | float) and not isinstance(value, bool)}
    numbers = {name for name in numbers if not name.startswith(("data.", "teachers."))}
    assert numbers <= set(LIMITS)
    assert set(LIMITS) <= set(flatten(as_dict(RunConfig())))


@pytest.mark.parametrize(
    "text", ["/data/a=b", "/data/\u732b", "/p(1)", "/data/a,b", "/data/a b", "it's", "/a[1]", "{x}", "1.10", "true"]
)
def test_text_is_taken_as_it_stands(text):
    """Hydra's grammar would refuse it, or make a list, a dictionary or a number of it."""
    fields = ("name", "data.datasets.natural.root", "teachers.semantic.weights")
    cfg = compose_config([DEMO, *(f"{field}={text}" for field in fields)])
    assert cfg.name == cfg.data.datasets["natural"].root == cfg.teachers["semantic"].weights == text
    assert compose_config([DEMO, "name='quoted, by hand'"]).name == "quoted, by hand"


def test_a_quoted_text_is_read_back_by_hydra():
    draw = random.Random(0)
    for _ in range(200):
        text = "".join(draw.choice("ab\\'\"=,()[]{} ~/:1.") for _ in range(draw.randint(0, 8)))
        assert OverridesParser.create().parse_override(f"key={quoted(text)}").value() == text


def test_a_tilde_is_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert compose_config([DEMO, "output_dir=~/runs/x"]).output_dir == str(tmp_path / "runs" / "x")


def test_own_files_are_found_in_the_current_folder_and_by_the_variable(monkeypatch, tmp_path):
    text = (packaged_folder() / "experiment" / "demo.yaml").read_text()
    for folder, name in ((tmp_path / "configs", "here"), (tmp_path / "else,where", "there")):
        (folder / "experiment").mkdir(parents=True)
        (folder / "experiment" / f"{name}.yaml").write_text(text.replace("name: demo", f"name: {name}"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(CONFIGS, str(tmp_path / "else,where"))
    for name in ("here", "there", "demo"):
        assert compose_config([f"experiment={name}"]).name == name
    with pytest.raises(ConfigError, match="did you mean here or there"):
        compose_config(["experiment=heere"])
    (tmp_path / "configs" / "experiment" / "demo.yaml").write_text("# other\n")
    with pytest.raises(ValueError, match="has the name of a configuration that dune_fast brings, experiment/demo"):
        compose_config([DEMO])


def test_a_folder_without_a_run_is_named(tmp_path):
    with pytest.raises(ConfigError, match="not the folder of a run"):
        load_config(tmp_path / "config.yaml")


def test_every_yaml_file_says_what_it_is():
    for path in packaged_folder().rglob("*.yaml"):
        text = path.read_text()
        assert text.startswith("#"), path
        yaml.safe_load(text)
