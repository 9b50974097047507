"""The configuration of a run: typed, composed by Hydra from `configs/`, checked, dumped beside the run."""

from __future__ import annotations

import dataclasses
import difflib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dali_pipelines.datasets import DataConfig
from dune_fast.distill.objective import ObjectiveConfig
from dune_fast.distill.standardization import CONVENTIONS
from dune_fast.engine.optimizer import OptimizerConfig
from dune_fast.engine.schedules import iterations
from dune_fast.nn.projectors import ProjectorConfig
from dune_fast.nn.vit import ViTConfig, nearest_multiples
from teachers.config import TeacherConfig
from teachers.registry import check_family


class ConfigError(ValueError):
    """The configuration cannot be composed or does not make sense; the message says what to change."""


@dataclass
class StandardizationConfig:
    """How teachers' features are standardized."""

    convention: str = "dune"
    """"dune" (statistics of the current global batch) or "unic" (running ones from before the step)."""
    eps: float | None = None
    """Of the convention's formula; null for its own."""
    ema_start: float = 1.0
    """Momentum of the running statistics at the first step."""
    ema_end: float = 0.001
    """Momentum that its cosine ends at."""


@dataclass
class TrainConfig:
    """Length, batch and bookkeeping of the training."""

    images: int = 128_116_700
    """Images that the run sees; steps = images / global_batch, rounded up to an even number."""
    steps: int | None = None
    """Steps of the run; overrides `images`."""
    global_batch: int = 1024
    """Images a step over all ranks."""
    seed: int = 0
    """Of initial weights, order of samples, augmentation and teacher dropping."""
    precision: str = "auto"
    """"bf16" (autocast, float32 weights), "fp32", or "auto": bf16 on a GPU and on CPUs with matrix units for it."""
    log_every: int = 50
    """Steps between reads of the metrics by the host."""
    checkpoint_every: int = 2000
    """Steps between checkpoints."""
    keep_checkpoints: int = 2
    """Newest checkpoints that are kept."""
    resume: bool = True
    """Go on from the newest checkpoint in the output folder, if there is one."""
    overwrite: bool = False
    """Start anew in an output folder that holds a run: its checkpoints and results are deleted."""
    max_loss: float = 100.0
    """A loss above this (standardized features start near 1) or one that is not finite stops the run."""


@dataclass
class EvaluationConfig:
    """What is measured and drawn when the training has ended."""

    held_out: bool = True
    """Cosine similarity of the student's projections to every teacher on held-out images, before and after."""
    batch: int = 16
    """Images a forward pass, per rank."""
    figures: bool = False
    """Write `pca.png` and `loss.png` into the run's folder."""
    figure_size: int = 336
    """Input size of the figure's photographs, in pixels."""
    figure_images: int = 2
    """Held-out photographs in the figure."""


@dataclass
class DeepSpeedConfig:
    """What DeepSpeed is told."""

    zero_stage: int = 1
    """0, 1 or 2: nothing, optimizer states, and gradients too are sharded over ranks."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further entries of DeepSpeed's own configuration, merged last."""


@dataclass
class RunConfig:
    """One distillation run."""

    name: str = "run"
    """Name of the run and of its folder."""
    output_dir: str = "runs/${name}"
    """Everything that the run writes goes here."""
    image_size: int = 336
    """Side of the student's training images, in pixels."""
    student: ViTConfig = field(default_factory=ViTConfig)
    student_weights: str = ""
    """What the student starts from: the folder of a finished run, a published checkpoint, any encoder of the same
    architecture; positions are resized to `image_size`. Empty for initial weights by `train.seed`."""
    projector: ProjectorConfig = field(default_factory=ProjectorConfig)
    teachers: dict[str, TeacherConfig] = field(default_factory=dict)
    data: DataConfig = field(default_factory=DataConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    standardization: StandardizationConfig = field(default_factory=StandardizationConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return self.train.steps or iterations(self.train.images, self.train.global_batch)

    @property
    def teacher_features(self) -> dict[str, tuple[int, tuple[str, ...]]]:
        """teacher -> (channels, token types)."""
        return {name: (t.num_features, tuple(t.token_types)) for name, t in self.teachers.items()}


def config_dir() -> Path:
    """The folder `configs/` of this installation."""
    return Path(__file__).resolve().parents[2] / "configs"


def compose_config(overrides: list[str], folder: Path | None = None) -> RunConfig:
    """Composes and checks a configuration.

    Args:
        overrides: Hydra overrides, e.g. ["experiment=demo", "train.steps=10"].
        folder: where the groups are; `configs/` by default.

    Raises:
        ConfigError: an unknown experiment, teacher, field or value; the message names close ones.
    """
    folder = (folder or config_dir()).resolve()
    ConfigStore.instance().store(name="schema", node=RunConfig)
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(folder), version_base="1.3"):
            composed = compose("config", overrides=overrides)
        cfg = OmegaConf.to_object(_strict(OmegaConf.to_container(composed, resolve=True)))
    except MissingConfigException as error:
        raise ConfigError(_explain_missing(error, folder)) from None
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_explain(error, overrides)) from None
    except ValueError as error:  # a dataclass refused its values
        raise ConfigError(str(error)) from None
    assert isinstance(cfg, RunConfig)
    validate(cfg)
    return cfg


def _strict(values: Any) -> DictConfig:
    """Values under the schema; a field that it does not have is an error, even one added with Hydra's `+`."""
    return OmegaConf.merge(OmegaConf.structured(RunConfig), values)


def load_config(path: Path) -> RunConfig:
    """Reads the `config.yaml` that a run has dumped."""
    try:
        cfg = OmegaConf.to_object(_strict(OmegaConf.load(path)))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist: {path.parent} is not the folder of a run") from None
    except (OmegaConfBaseException, ValueError) as error:
        raise ConfigError(f"{path} is not the configuration of a run: {_first_line(error)}") from None
    assert isinstance(cfg, RunConfig)
    return cfg


def dump_config(cfg: RunConfig, path: Path) -> None:
    """Writes the resolved configuration as YAML."""
    path.write_text(OmegaConf.to_yaml(OmegaConf.structured(cfg), resolve=True))


def validate(cfg: RunConfig) -> None:
    """Checks what no single field shows; ConfigError with a sentence."""
    if not cfg.teachers:
        experiments = ", ".join(sorted(p.stem for p in (config_dir() / "experiment").glob("*.yaml")))
        raise ConfigError(
            f"no teacher is configured: choose an experiment, e.g. experiment=demo (there are: {experiments})"
        )
    if cfg.image_size % cfg.student.patch_size:
        raise ConfigError(
            f"image_size={cfg.image_size} is not a multiple of the student's patch size {cfg.student.patch_size}; "
            f"the nearest are {nearest_multiples(cfg.image_size, cfg.student.patch_size)}"
        )
    grid = cfg.image_size // cfg.student.patch_size
    for name, teacher in cfg.teachers.items():
        check_family(name, teacher.family)
        if grid % teacher.grid_multiple:
            step = cfg.student.patch_size * teacher.grid_multiple
            raise ConfigError(
                f"image_size={cfg.image_size} gives a grid of {grid} patches, but teacher {name!r} needs a multiple of "
                f"{teacher.grid_multiple}; the nearest image sizes are {nearest_multiples(cfg.image_size, step)}"
            )
    if cfg.standardization.convention not in CONVENTIONS:
        raise ConfigError(
            f"standardization.convention={cfg.standardization.convention!r}; choose one of {', '.join(CONVENTIONS)}"
        )
    if cfg.train.precision not in ("auto", "bf16", "fp32"):
        raise ConfigError(f"train.precision={cfg.train.precision!r}; choose auto, bf16 or fp32")
    if cfg.deepspeed.zero_stage not in (0, 1, 2):
        raise ConfigError(
            f"deepspeed.zero_stage={cfg.deepspeed.zero_stage}; choose 0, 1 or 2 (per-parameter clipping needs whole "
            "gradients or DeepSpeed's partitions of stages 1 and 2)"
        )
    for path in ("train.global_batch", "train.log_every", "train.checkpoint_every", "train.keep_checkpoints"):
        section, key = path.split(".")
        if getattr(getattr(cfg, section), key) < 1:
            raise ConfigError(f"{path}={getattr(getattr(cfg, section), key)}; it must be at least 1")
    if cfg.steps < 2:
        raise ConfigError(f"the run has {cfg.steps} steps; set train.steps or train.images for at least 2")


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


def _explain_missing(error: MissingConfigException, folder: Path) -> str:
    """'experiment/dmeo' -> a sentence with the close names and all names."""
    group, _, name = (error.missing_cfg_file or "").rpartition("/")
    names = sorted(path.stem for path in (folder / group).glob("*.yaml"))
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    kind = {"teachers": "teacher", "data": "dataset"}.get(group, group or "configuration")
    return f"there is no {kind} {name!r}: {hint}known are {', '.join(names) or 'none'} (files in configs/{group})"


def _field_names(kind: Any = RunConfig, prefix: str = "") -> list[str]:
    """All dotted field names of the configuration."""
    names = []
    for f in dataclasses.fields(kind):
        names.append(prefix + f.name)
        default = f.default_factory() if callable(f.default_factory) else f.default
        if dataclasses.is_dataclass(default):
            names += _field_names(type(default), f"{prefix}{f.name}.")
    return names


def _explain(error: Exception, overrides: list[str]) -> str:
    """A sentence for an override that does not fit the schema."""
    text = str(error.__cause__ or error).strip()
    match = re.search(r"Could not override '([\w.@/]+)'|Key '([\w.]+)' not in", str(error))
    key = (match.group(1) or match.group(2)) if match else None
    if key is not None:
        close = difflib.get_close_matches(key, _field_names(), n=3, cutoff=0.5)
        hint = f"; did you mean {' or '.join(close)}?" if close else "; `dune-fast config` prints all fields"
        return f"the configuration has no field {key!r}{hint}"
    lines = [line.strip() for line in text.split("\n") if line.strip() and "object_type" not in line]
    return f"the configuration cannot be composed from {' '.join(overrides) or 'no override'}: {'; '.join(lines)}"
