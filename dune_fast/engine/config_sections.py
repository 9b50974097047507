"""The sections of a run's configuration that are about the run itself; the others stand beside what they configure."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dune_fast.cache.formats import FORMATS
from dune_fast.distill.normalizers import CONVENTIONS, STORED
from dune_fast.distill.phi_s_running import PERIOD


class ConfigError(ValueError):
    """The configuration cannot be composed or does not make sense; the message says what to change."""


@dataclass
class StandardizationConfig:
    """How teachers' features are standardized."""

    convention: str = "dune"
    """"dune" (statistics of the current global batch), "unic" (running ones from before the step), "phi_s" (rotated to
    equal variances, estimated before the first step and then frozen), "phi_s_running" (the same as published: along
    the first steps, see `dune_fast.distill.phi_s_running`), "none" (raw features), "stored" and "stored_bf16"
    (of `file` or `files`, frozen; computed in bfloat16, as Theia), or "fixed" (departs from the papers:
    statistics of all views of the cache that the run reads, frozen, so that parts of a batch are standardized like the
    whole)."""
    cls: str = ""
    """The convention of cls tokens; empty for the common one. RADIO: none."""
    patch: str = ""
    """The convention of patches; empty for the common one. PHI-S as published: phi_s_running."""
    eps: float | None = None
    """Of the convention's formula; null for its own."""
    ema_start: float = 1.0
    """Momentum of the running statistics at the first step."""
    ema_end: float = 0.001
    """Momentum that its cosine ends at."""
    file: str = ""
    """Stored: the statistics that `dune-fast cache statistics` has measured, of all teachers that `files` has not."""
    files: dict[str, list[str]] = field(default_factory=dict)
    """Stored: teacher -> its mean and its deviation, two .npy files, as Theia publishes them (`imagenet_mean_*` and
    `imagenet_var_*`); for all its token types."""
    phi_s_batches: int = 100
    """PHI-S: the global batches, the run's first, that rotations and scales are estimated from, by the teachers alone.
    A run that goes on has them in its checkpoint."""
    phi_s_period: int = PERIOD
    """Running PHI-S: steps (with `train.accumulation`: parts of steps) between two rotations, which stay after 30 such
    periods. It starts anew with every stage of `progressive`."""

    def __post_init__(self) -> None:
        for name, chosen in {"convention": self.convention, "cls": self.cls, "patch": self.patch}.items():
            if chosen not in CONVENTIONS and (chosen or name == "convention"):
                raise ConfigError(f"standardization.{name}={chosen!r}; choose one of {', '.join(CONVENTIONS)}")

        if wrong := [name for name, pair in self.files.items() if len(pair) != 2]:
            raise ConfigError(
                f"standardization.files.{wrong[0]} is {list(self.files[wrong[0]])}; give two files: mean, deviation"
            )
        stored = any(self.of(token) in STORED for token in ("cls", "patch"))
        if stored != bool(self.file or self.files):
            raise ConfigError(
                "standardization.file and standardization.files say where the conventions stored and stored_bf16 have "
                "their statistics: give one with such a convention, and none without"
            )

    def of(self, token: str) -> str:
        """The convention of a token type."""
        return getattr(self, token) or self.convention


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
class HeadConfig:
    """A task head on a frozen encoder, which is trained instead of a student (`dune-fast heads train`)."""

    kind: str = ""
    """"linear_seg", "linear_depth", "mast3r" or "multihmr"; empty for a distillation."""
    encoder: str = ""
    """The frozen encoder, as `dune_fast.load_encoder` takes it: the folder of a run, a file, a published name."""
    weights: str = ""
    """What the head starts from: a head's file, or the folder of a head's run; empty for drawn weights."""
    options: dict[str, Any] = field(default_factory=dict)
    """Of the head, beside what the encoder decides; see the kind's own class."""
    data: dict[str, Any] = field(default_factory=dict)
    """Where the examples are and how they are made; see the kind's task in `dune_fast/tasks/`."""
    loss: dict[str, Any] = field(default_factory=dict)
    """Weights and variants of the loss, where a kind has them."""
    tf32: bool = True
    """On a GPU, float32 products in TF32, as the published trainings of these heads have them."""
    threads: int = 4
    """Of a rank, that read examples."""
    ahead: int = 3
    """Steps whose examples are read ahead."""

    def refuse(self, run: Path) -> None:
        """ConfigError if a run has trained a head, where a student or an encoder is asked for."""
        if self.kind:
            raise ConfigError(
                f"{run} is the run of a {self.kind} head, which dune_fast.load_head reads; its frozen encoder is "
                f"{self.encoder}"
            )


@dataclass
class CacheConfig:
    """Teachers' features from a folder instead of from the teachers (`dune-fast cache build`). Departs from the papers,
    which show every image in a new crop: it needs `data.views`."""

    folder: str = ""
    """The cache; empty for none."""
    format: str = "int8"
    """How features are stored: one of `dune_fast.cache.formats.FORMATS`. It and the next two belong to the fingerprint:
    a run names those of the build."""
    components: int = 0
    """Store so many principal components of patch tokens in place of their channels, where a teacher has more; they are
    decoded to the teacher's channels again. 0 stores all channels."""
    patch_share: float = 1.0
    """The share of a view's patches that is stored, random ones, of every view its own; the loss is taken on these."""
    shard_megabytes: float = 256.0
    """Size of a file, about."""

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ConfigError(f"cache.format={self.format!r}; choose one of {', '.join(FORMATS)}")


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
    ema: float = 0.0
    """Departs from the papers: decay of a running average of the student's weights, e.g. 0.999, which is what is
    evaluated and exported; the weights themselves go to `student_raw.safetensors`. In the first steps it is (1 + step)
    / (10 + step). The training does not notice, so a run may begin and end with it at any step. 0 for none."""
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
