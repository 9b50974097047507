"""The configuration of a run: typed, composed by Hydra from `configs/`, checked, dumped beside the run.

More than 300 lines: what is composed, kept and checked is one thing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dune_fast.dali_pipelines.datasets import DataConfig
from dune_fast.distill.objective import ObjectiveConfig
from dune_fast.engine.config_inputs import check_crops, check_own_grids, check_sizes
from dune_fast.engine.config_limits import find_fault
from dune_fast.engine.config_objective import check_objective, check_standardization
from dune_fast.engine.config_projectors import check_projectors
from dune_fast.engine.config_sections import (
    CacheConfig,
    ConfigError,
    DeepSpeedConfig,
    EvaluationConfig,
    HeadConfig,
    LoggingConfig,
    StandardizationConfig,
    StartConfig,
    TrainConfig,
)
from dune_fast.engine.config_stages import (
    PartitionConfig,
    ProgressiveConfig,
    check_stages,
    image_sizes,
    moves_teachers,
    teacher_zooms,
)
from dune_fast.engine.optimizer import OptimizerConfig
from dune_fast.engine.overrides import (
    config_names,
    expand_home,
    explain,
    explain_group,
    explain_missing,
    first_line,
    own_folders,
    packaged_folder,
    quoted,
    take_text_literally,
    with_timm_teachers,
)
from dune_fast.engine.schedules import iterations
from dune_fast.engine.student_checks import check_student
from dune_fast.heads.head import KINDS
from dune_fast.projectors.base import TeacherFeatures, placed
from dune_fast.projectors.config import ProjectorConfig
from dune_fast.student import StudentConfig
from dune_fast.teachers.config import TeacherConfig, seen
from dune_fast.teachers.local_paths import address_fault
from dune_fast.teachers.registry import check_family


@dataclass
class RunConfig:
    """One run: a distillation or, with `head.kind`, the training of a task head."""

    name: str = "run"
    """Name of the run and of its folder."""
    output_dir: str = "runs/${name}"
    """Everything that the run writes goes here."""
    image_size: int = 336
    """Side of the student's training images, in pixels."""
    progressive: list[ProgressiveConfig] = field(default_factory=list)
    """Stages. Departs from DUNE: smaller images first, e.g. [{until: 0.5, image_size: 112}, {until: 0.8, image_size:
    224}], then `image_size`. Empty for one size throughout."""
    stage_restarts: list[str] = field(default_factory=list)
    """What begins anew with every stage: "learning_rate" (the schedule over its steps; PHI-S' paper), "statistics" (the
    teachers')."""
    partitions: list[PartitionConfig] = field(default_factory=list)
    """Parts of every step's images at sizes of their own, e.g. [{image_size: 256, images: 1024, teachers: [clip,
    dino]}, {image_size: 1024, images: 128, teachers: [sam]}] (RADIO). Empty for one."""
    partition_by: str = "ranks"
    """Who works on a partition: "ranks" (each a group of ranks of its own) or "steps" (every rank on one after the
    other, within a step). Weights change alike, but for statistics of a teacher that several partitions share: by
    ranks they are taken over all of these, by steps over one after the other."""
    student: StudentConfig = field(default_factory=StudentConfig)
    student_weights: str = ""
    """What the student starts from: the folder of a finished run, a published checkpoint, any encoder of the same
    architecture; positions are resized to `image_size`. Empty for initial weights by `train.seed`."""
    projector: ProjectorConfig = field(default_factory=ProjectorConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    start: StartConfig = field(default_factory=StartConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    teachers: dict[str, TeacherConfig] = field(default_factory=dict)
    data: DataConfig = field(default_factory=DataConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    standardization: StandardizationConfig = field(default_factory=StandardizationConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return iterations(self.train.images, self.train.global_batch) if self.train.steps is None else self.train.steps

    @property
    def teacher_features(self) -> dict[str, TeacherFeatures]:
        """teacher -> what it gives."""
        side = self.image_size // self.student.patch_size
        given = {
            name: (t.num_features, tuple(t.token_types), t.source, seen(t, side).grid if t.grid == "own" else 0)
            for name, t in self.teachers.items()
        }
        return placed(given)


def compose_config(overrides: list[str], folder: Path | None = None, complete: bool = True) -> RunConfig:
    """Composes and checks a configuration.

    Args:
        overrides: Hydra overrides, e.g. ["experiment=demo", "train.steps=10"], and teachers of timm's by name, see
            `overrides.with_timm_teachers`.
        folder: of a run, whose `config.yaml` is what the overrides change; the groups of `configs/` by default, the
            packaged ones and the user's (`own_folders`).
        complete: whether it is of a run, teachers and all; False for a command that needs a part of it.

    Raises:
        ConfigError: an unknown experiment, teacher, field or value; the message names close ones.
    """
    if folder is not None and not (folder / "config.yaml").is_file():
        raise ConfigError(f"{folder / 'config.yaml'} does not exist: {folder} is not the folder of a run")
    ConfigStore.instance().store(name="schema", node=RunConfig)
    GlobalHydra.instance().clear()
    try:
        literal = take_text_literally(with_timm_teachers(overrides), RunConfig)
        if folder is None:
            literal.append(f"hydra.searchpath=[{','.join(quoted(f'file://{path}') for path in own_folders())}]")
        with initialize_config_dir(str((folder or packaged_folder()).resolve()), version_base="1.3"):
            composed = compose("config", overrides=literal)
        cfg = OmegaConf.to_object(_strict(OmegaConf.to_container(composed, resolve=True)))
    except MissingConfigException as error:
        raise ConfigError(explain_missing(error)) from None
    except (HydraException, OmegaConfBaseException) as error:
        wrong_group = explain_group(overrides) if folder is not None else ""
        raise ConfigError(wrong_group or explain(error, overrides, RunConfig)) from None
    except ValueError as error:  # a dataclass refused its values, or timm does not know a name
        raise ConfigError(str(error)) from None
    assert isinstance(cfg, RunConfig)
    if complete:
        validate(cfg)
    return cfg


def _strict(values: Any) -> DictConfig:
    """Values under the schema; a field that it does not have is an error, even one added with Hydra's `+`."""
    plain = OmegaConf.to_container(values) if OmegaConf.is_config(values) else values
    return OmegaConf.merge(OmegaConf.structured(RunConfig), without_removed(expand_home(plain)))


def without_removed(values: Any) -> Any:
    """A run's values without `teachers.*.cuda_graph`, which older versions had; ConfigError where one is true."""
    if not isinstance(values, dict) or not isinstance(values.get("teachers"), dict):
        return values
    kept = dict(values["teachers"])
    for name, teacher in kept.items():
        if isinstance(teacher, dict) and "cuda_graph" in teacher:
            if teacher["cuda_graph"]:
                raise ConfigError(
                    f"teachers.{name}.cuda_graph is true, but CUDA graphs of teachers are gone; the features are the "
                    "same without: take the line out"
                )
            kept[name] = {key: value for key, value in teacher.items() if key != "cuda_graph"}
    return values | {"teachers": kept}


def load_config(path: Path) -> RunConfig:
    """Reads the `config.yaml` that a run has dumped."""
    try:
        values = OmegaConf.load(path)
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(f"{path} does not exist: {path.parent} is not the folder of a run") from None
    except (OmegaConfBaseException, ValueError) as error:
        raise ConfigError(f"{path} is not the configuration of a run: {first_line(error)}") from None
    return config_of(values, path)


def config_of(values: Any, source: Path) -> RunConfig:
    """The configuration that a run has kept: in its `config.yaml`, or in a checkpoint; ConfigError names `source`."""
    try:
        cfg = OmegaConf.to_object(_strict(values))
    except (OmegaConfBaseException, ValueError) as error:
        raise ConfigError(f"{source} is not the configuration of a run: {first_line(error)}") from None
    assert isinstance(cfg, RunConfig)
    return cfg


def dump_config(cfg: RunConfig, path: Path) -> None:
    """Writes the resolved configuration as YAML."""
    path.write_text(OmegaConf.to_yaml(OmegaConf.structured(cfg), resolve=True))


def as_dict(cfg: RunConfig) -> dict[str, Any]:
    """The resolved configuration as plain dictionaries, lists, strings and numbers."""
    values = OmegaConf.to_container(OmegaConf.structured(cfg), resolve=True)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def flatten(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested values as dotted name -> leaf; lists and empty dictionaries are leaves."""
    if not isinstance(values, dict) or not values:
        return {prefix: values}
    return {
        name: leaf
        for key, value in values.items()
        for name, leaf in flatten(value, f"{prefix}.{key}" if prefix else str(key)).items()
    }


def validate(cfg: RunConfig) -> None:
    """Checks what no single section shows, and the range of every number; ConfigError with a sentence."""
    if not cfg.teachers and not cfg.head.kind:
        experiments = ", ".join(sorted(config_names("experiment")))
        raise ConfigError(
            f"no teacher is configured: choose an experiment, e.g. experiment=demo (there are: {experiments})"
        )
    places = {"output_dir": cfg.output_dir, "student_weights": cfg.student_weights}
    places |= {"standardization.file": cfg.standardization.file}
    places |= {"cache.folder": cfg.cache.folder, "head.encoder": cfg.head.encoder, "head.weights": cfg.head.weights}
    places |= {f"teachers.{name}.weights": teacher.weights for name, teacher in cfg.teachers.items()}
    if fault := next(filter(None, (address_fault(place, what) for what, place in places.items())), ""):
        raise ConfigError(fault)
    for name, teacher in cfg.teachers.items():
        check_family(name, teacher.family)
    if fault := find_fault(flatten(as_dict(cfg))):
        raise ConfigError(fault)
    peak = cfg.optimizer.peak(cfg.train.global_batch)
    if cfg.optimizer.min_lr > peak:
        raise ConfigError(
            f"optimizer.min_lr={cfg.optimizer.min_lr:g} is above the peak of the learning rate, {peak:.3g} "
            f"(optimizer.lr, or optimizer.lr_per_256={cfg.optimizer.lr_per_256:g} x train.global_batch / 256): lower it"
        )
    if cfg.steps < 2:
        raise ConfigError(f"the run has {cfg.steps} steps; set train.steps or train.images for at least 2")
    if cfg.head.kind:
        _check_head(cfg)
    else:
        _check_distillation(cfg)


def _check_head(cfg: RunConfig) -> None:
    """What the training of a head needs, and what of a distillation it has not."""
    if cfg.head.kind not in KINDS:
        raise ConfigError(f"head.kind={cfg.head.kind!r}; choose one of {', '.join(KINDS)}")
    if not cfg.head.encoder:
        raise ConfigError(
            "head.encoder is empty: give the frozen encoder, head.encoder=PATH (the folder of a run, a weights file, a "
            "published name such as dune_vitbase14_448_paper)"
        )
    if cfg.train.accumulation == 0 and cfg.head.data.get("keep_tokens"):
        raise ConfigError(
            "train.accumulation=0 with head.data.keep_tokens=true: the estimate does not know how many views are kept; "
            "give the number of parts"
        )
    of_distillation = {
        "teachers": cfg.teachers, "cache.folder": cfg.cache.folder, "progressive": cfg.progressive,
        "partitions": cfg.partitions,
        "train.compile": cfg.train.compile, "evaluation.knn_dataset": cfg.evaluation.knn_dataset,
        "optimizer.frozen_trunk_steps": cfg.optimizer.frozen_trunk_steps, "start": cfg.start.wanted,
        "student_weights": cfg.student_weights,
    }  # fmt: skip
    if given := [name for name, value in of_distillation.items() if value]:
        raise ConfigError(f"head.kind={cfg.head.kind} trains a head: {', '.join(given)} belongs to a distillation")


def _check_distillation(cfg: RunConfig) -> None:
    check_student(cfg.student, cfg.image_size, cfg.train.compile)
    sizes, patch = image_sizes(cfg), cfg.student.patch_size
    check_projectors(
        cfg.projector, cfg.student, cfg.teacher_features, cfg.image_size, len(set(sizes.values())) > 1,
        cfg.objective.patch_share,
    )  # fmt: skip
    sizes |= {"evaluation.figure_size": cfg.evaluation.figure_size} if cfg.evaluation.figures else {}
    check_sizes(sizes, patch, cfg.teachers)
    check_crops(
        cfg.data, cfg.teachers, cfg.objective.align, cfg.cache.folder, teacher_zooms(cfg), moves_teachers(cfg)
    )
    shares = {"objective.patch_share": cfg.objective.patch_share}
    shares |= {"cache.patch_share": cfg.cache.patch_share} if cfg.cache.folder else {}
    own = {} if cfg.objective.align else {name: cfg.projector.of(name) for name in cfg.teachers}
    finer = {n: p.patch_head.upsample if p.kind == "heads" else 1 for n, p in own.items() if p.kind != "theia"}
    check_own_grids(cfg.teachers, shares, image_sizes(cfg), patch, finer)
    if cfg.cache.folder and cfg.progressive:
        raise ConfigError(
            f"cache.folder={cfg.cache.folder!r} with progressive: a cache holds features of one image size; leave one "
            "of them out"
        )
    if cfg.cache.folder and not cfg.data.views:
        raise ConfigError(
            f"cache.folder={cfg.cache.folder!r} with data.views=0: a cache holds fixed views; give data.views the "
            "number that it was built with"
        )
    if cfg.start.teacher:
        if cfg.start.teacher not in cfg.teachers:
            known = ", ".join(sorted(cfg.teachers))
            raise ConfigError(f"start.teacher={cfg.start.teacher!r} is not a teacher of this run; there are: {known}")
        if cfg.student_weights:
            raise ConfigError(
                f"start.teacher={cfg.start.teacher!r} and student_weights={cfg.student_weights!r} exclude each other: "
                "the student starts from the one or from the other"
            )
    check_standardization(cfg.standardization, cfg.teachers, cfg.cache, cfg.start)
    check_objective(cfg.objective, cfg.teachers, cfg.cache)
    if cfg.train.compile and cfg.deepspeed.zero_stage == 3:
        raise ConfigError(
            "train.compile=true with deepspeed.zero_stage=3: the compiler does not see DeepSpeed gather weights; "
            "choose stage 0, 1 or 2, or compile=false"
        )
    compiled = [f"teachers.{name}.compile" for name, teacher in cfg.teachers.items() if teacher.compile]
    compiled += ["train.compile"] if cfg.train.compile else []
    if cfg.objective.presample and compiled:
        raise ConfigError(
            f"objective.presample=true with {compiled[0]}=true: in every step a teacher gets another number of images, "
            "and each is compiled anew; choose one of the two"
        )
    if knn := cfg.evaluation.knn_dataset:
        if knn not in cfg.data.datasets:
            known = ", ".join(sorted(cfg.data.datasets)) or "none"
            raise ConfigError(f"evaluation.knn_dataset={knn!r} is not a dataset of this run; there are: {known}")
        if not cfg.evaluation.every:
            raise ConfigError("evaluation.knn_dataset is set, but evaluation.every=0 evaluates never: set both")
        if not cfg.student.cls_token:
            raise ConfigError(f"evaluation.knn_dataset={knn!r} compares cls tokens, and student.cls_token is false")
    check_stages(cfg)


