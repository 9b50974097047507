"""The configuration of a run: typed, composed by Hydra from `configs/`, checked, dumped beside the run.

More than 300 lines: every field has its meaning beside it.
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
from dune_fast.distill.phi_s import HadamardError, hadamard_base
from dune_fast.distill.standardization import CONVENTIONS
from dune_fast.engine.config_limits import find_fault
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
from dune_fast.engine.schedules import iterations, scaled_learning_rate
from dune_fast.kernels.nn.vit import ViTConfig, nearest_multiples
from dune_fast.student import ProjectorConfig
from dune_fast.teachers.config import TeacherConfig
from dune_fast.teachers.local_paths import address_fault
from dune_fast.teachers.registry import check_family


class ConfigError(ValueError):
    """The configuration cannot be composed or does not make sense; the message says what to change."""


@dataclass
class StandardizationConfig:
    """How teachers' features are standardized."""

    convention: str = "dune"
    """"dune" (statistics of the current global batch), "unic" (running ones from before the step) or "phi_s" (rotated
    to equal variances, estimated before the first step and then frozen)."""
    eps: float | None = None
    """Of the convention's formula; null for its own."""
    ema_start: float = 1.0
    """Momentum of the running statistics at the first step."""
    ema_end: float = 0.001
    """Momentum that its cosine ends at."""
    phi_s_batches: int = 100
    """PHI-S: the global batches, the run's first, that rotations and scales are estimated from, by the teachers alone.
    A run that goes on has them in its checkpoint."""

    def __post_init__(self) -> None:
        if self.convention not in CONVENTIONS:
            raise ConfigError(f"standardization.convention={self.convention!r}; choose one of {', '.join(CONVENTIONS)}")


@dataclass
class StartConfig:
    """What is computed in closed form before the first step, out of the run's first images. The papers train from drawn
    weights; on a short schedule a start decides how good the student gets (docs/training_well.md)."""

    teacher: str = ""
    """A ViT teacher, wider than the student, that its first weights are made from (`dune_fast.distill.narrowing`);
    empty for none."""
    blocks: int = 10
    """Of that teacher, from its first; the student's blocks beyond them stay as drawn."""
    fit_projectors: bool = False
    """Fit the last layer of every projector to the standardized teachers (`dune_fast.distill.projector_fit`)."""
    images: int = 512
    """The run's first images that either is made on."""

    @property
    def wanted(self) -> bool:
        """Whether anything is computed."""
        return bool(self.teacher) or self.fit_projectors


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
    """"bf16" (autocast, float32 weights), "fp32", or "auto": bf16 on a GPU and on CPUs that have instructions for its
    products, if that holds for all ranks; a run that goes on keeps what it began with."""
    student_stream: str = "fp32"
    """Type of the student's tokens between blocks, in encoder and projectors: "fp32", or "bf16" with products in bf16.
    bf16 moves half the bytes in every residual addition and norm and keeps half of them for the backward pass; the
    curve of losses may differ a little (`python -m bench.step --curve 200 --only eager,ours,ours+bf16stream`)."""
    overlap_teachers: bool = False
    """On a GPU: run the teachers on a second CUDA stream while the student's forward pass runs, to fill what a kernel
    leaves of the device. The same numbers; off until it is measured."""
    deterministic: bool = False
    """The same bits from every run with as many processes on the same kind of GPU, killed or not, instead of the same
    numbers within rounding. Costs time and memory in attention: see `dune_fast.engine.determinism`. On a CPU a run is
    deterministic anyway."""
    log_every: int = 50
    """Steps between reads of the metrics by the host."""
    checkpoint_every: int = 2000
    """Steps between checkpoints."""
    keep_checkpoints: int = 2
    """Newest checkpoints that are kept."""
    accumulation: int = 1
    """Backward passes a step: `global_batch` is split into so many parts on every rank, for less memory. 0: as few as
    fit the device, worked out at the start (`dune_fast.engine.memory`) and kept when the run goes on. The order of
    samples and the dropping do not depend on it. Two things do: the teachers' batch statistics are those of a part
    over all ranks, not of the whole global batch, which would need every teacher to run twice (the running ones keep
    the same share of their past a step); and the loss is the mean of the parts' losses, each by its own kept pairs."""
    activation_checkpointing: bool = False
    """Keep the student's activations between blocks alone and compute the rest again in the backward pass."""
    compile: bool = False
    """torch.compile of each of the student's blocks; not under ZeRO 3."""
    timeout_minutes: float = 30.0
    """A run in which nothing happens for so long ends, naming the rank that the others wait for."""
    rendezvous_minutes: float = 10.0
    """Ranks that start wait so long for each other; then those that came end, and say who is missing."""
    keep_every: int = 0
    """Checkpoints of steps that are multiples of this are kept for good; 0 for none."""
    resume: bool = True
    """Go on from the newest checkpoint in the output folder, if there is one: with any number of processes, under any
    ZeRO stage. A broken one is passed over, with a warning, for the one before."""
    allow_config_change: bool = False
    """Go on from a checkpoint under a configuration that has changed since; the fields are named either way."""
    overwrite: bool = False
    """Start anew in an output folder that holds a run: its checkpoints and results are deleted."""
    drift_images: int = 8
    """Images of the first step on which teachers in less than float32 are compared with float32, as `dune-fast teachers
    drift` does; 0 leaves it out."""
    max_loss: float = 100.0
    """A loss above this (standardized features start near 1) stops the run. A step with a loss or gradient that is
    not finite is skipped; three of them in a row stop the run."""
    notice_seconds: float = 30.0
    """Seconds between a signal and the end of the process: SLURM's KillWait, what `--signal=USR1@120` gives, a pod's
    terminationGracePeriodSeconds. If a step and a checkpoint take longer, the run says so after its first save."""

    def __post_init__(self) -> None:
        if self.drift_images == 1:
            raise ConfigError(
                f"train.drift_images={self.drift_images}; give at least 2, to have deviations to standardize with, "
                "or 0 to compare nothing"
            )
        if self.precision not in ("auto", "bf16", "fp32"):
            raise ConfigError(f"train.precision={self.precision!r}; choose auto, bf16 or fp32")
        if self.student_stream not in ("fp32", "bf16"):
            raise ConfigError(f"train.student_stream={self.student_stream!r}; choose fp32 or bf16")
        if self.student_stream == "bf16" and self.precision == "fp32":
            raise ConfigError(
                "train.student_stream=bf16 with train.precision=fp32: it belongs to products in bf16; choose "
                "precision=bf16 or auto, or student_stream=fp32"
            )


@dataclass
class LoggingConfig:
    """Where a run's numbers go besides `metrics.jsonl` and the terminal."""

    tensorboard: bool = True
    """Event files in the run's folder."""
    wandb_project: str = ""
    """Project of Weights & Biases; empty for none. Needs the package wandb."""
    mlflow_experiment: str = ""
    """Experiment of MLflow, on the server that MLFLOW_TRACKING_URI names; empty for none. Needs the package mlflow."""
    conflicts: bool = True
    """Whether the losses' changes are correlated for every pair of teachers; see `dune_fast.engine.conflicts`."""


@dataclass
class EvaluationConfig:
    """What is measured and drawn while the training goes on and when it has ended."""

    held_out: bool = True
    """Cosine similarity of the student's projections to every teacher on held-out images, before and after."""
    every: int = 0
    """Steps between evaluations within the run, by all ranks: the distillation loss of every teacher on the held-out
    images of every dataset (`held_out/*` in `metrics.jsonl`), k-NN if asked for; the last step has one too. 0 for none.
    The training does not notice."""
    knn_dataset: str = ""
    """Dataset of `data` whose sub-folders are classes (root/CLASS/.../image), or shards of such folders: with `every`,
    its images are classified by their nearest neighbours among the student's cls features (`knn/<dataset>`). Empty for
    none. `evaluation_only` of the dataset keeps it out of training."""
    knn_images: int = 5000
    """At most so many of its images to search among, and so many to classify."""
    knn_k: int = 20
    """Neighbours that vote."""
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
    """0, 1, 2 or 3: nothing; optimizer states; gradients too; weights too are sharded over ranks. A run of one rank has
    nobody to share with and uses 0."""
    gradient_dtype: str = "fp32"
    """In which gradients are averaged over ranks: "fp32", or "bf16" for half the traffic."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further entries of DeepSpeed's own configuration, merged last."""

    def __post_init__(self) -> None:
        if self.gradient_dtype not in ("fp32", "bf16"):
            raise ConfigError(f"deepspeed.gradient_dtype={self.gradient_dtype!r}; choose fp32 or bf16")


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
    start: StartConfig = field(default_factory=StartConfig)
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
    def teacher_features(self) -> dict[str, tuple[int, tuple[str, ...]]]:
        """teacher -> (channels, token types)."""
        return {name: (t.num_features, tuple(t.token_types)) for name, t in self.teachers.items()}


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
    if not cfg.teachers:
        experiments = ", ".join(sorted(config_names("experiment")))
        raise ConfigError(
            f"no teacher is configured: choose an experiment, e.g. experiment=demo (there are: {experiments})"
        )
    places = {"output_dir": cfg.output_dir, "student_weights": cfg.student_weights}
    places |= {f"teachers.{name}.weights": teacher.weights for name, teacher in cfg.teachers.items()}
    if fault := next(filter(None, (address_fault(place, what) for what, place in places.items())), ""):
        raise ConfigError(fault)
    for name, teacher in cfg.teachers.items():
        check_family(name, teacher.family)
    if fault := find_fault(flatten(as_dict(cfg))):
        raise ConfigError(fault)
    sizes, patch = {"image_size": cfg.image_size}, cfg.student.patch_size
    sizes |= {"evaluation.figure_size": cfg.evaluation.figure_size} if cfg.evaluation.figures else {}
    for field_name, size in sizes.items():
        if size % patch:
            raise ConfigError(
                f"{field_name}={size} is not a multiple of the student's patch size {patch}; the nearest are "
                f"{nearest_multiples(size, patch)}"
            )
        for name, teacher in cfg.teachers.items():
            if size // patch % teacher.grid_multiple:
                raise ConfigError(
                    f"{field_name}={size} gives a grid of {size // patch} patches, but teacher {name!r} needs a "
                    f"multiple of {teacher.grid_multiple}; the nearest image sizes are "
                    f"{nearest_multiples(size, patch * teacher.grid_multiple)}"
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
    if cfg.standardization.convention == "phi_s":
        for name, teacher in cfg.teachers.items():
            try:
                hadamard_base(teacher.num_features)
            except HadamardError as error:
                choice = "choose standardization.convention=dune or unic"
                raise ConfigError(f"teacher {name!r}: {error}; {choice}") from None
    if cfg.train.compile and cfg.deepspeed.zero_stage == 3:
        raise ConfigError(
            "train.compile=true with deepspeed.zero_stage=3: the compiler does not see DeepSpeed gather weights; "
            "choose stage 0, 1 or 2, or compile=false"
        )
    if knn := cfg.evaluation.knn_dataset:
        if knn not in cfg.data.datasets:
            known = ", ".join(sorted(cfg.data.datasets)) or "none"
            raise ConfigError(f"evaluation.knn_dataset={knn!r} is not a dataset of this run; there are: {known}")
        if not cfg.evaluation.every:
            raise ConfigError("evaluation.knn_dataset is set, but evaluation.every=0 evaluates never: set both")
    peak = scaled_learning_rate(cfg.optimizer.lr_per_256, cfg.train.global_batch)
    if cfg.optimizer.min_lr > peak:
        raise ConfigError(
            f"optimizer.min_lr={cfg.optimizer.min_lr:g} is above the peak of the learning rate, {peak:.3g} "
            f"(optimizer.lr_per_256={cfg.optimizer.lr_per_256:g} x train.global_batch / 256): lower it"
        )
    if cfg.steps < 2:
        raise ConfigError(f"the run has {cfg.steps} steps; set train.steps or train.images for at least 2")
