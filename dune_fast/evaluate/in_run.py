"""Evaluation while a run goes on: held-out distillation loss of every teacher on every dataset, and k-NN.

All ranks share the images; sums and counts are added over ranks, so the means are those of all images, broken ones
left out. The training does not notice: nothing draws random numbers, the images come from a loader of its own, and the
student is a copy, which under ZeRO 3 is also the one way to a whole one.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from dune_fast.dali_pipelines.datasets import Dataset, index_dataset
from dune_fast.dali_pipelines.loader import Batch, ValLoader
from dune_fast.distill.normalizers import Standardizer
from dune_fast.distill.objective import ObjectiveConfig, teacher_losses
from dune_fast.distill.standardization import Features
from dune_fast.distill.terms import TermStates
from dune_fast.engine.config import RunConfig
from dune_fast.engine.deepspeed_engine import sum_over_ranks
from dune_fast.engine.trainer import Trainer
from dune_fast.evaluate.knn import Labelled, knn_predict, labelled
from dune_fast.evaluate.live_report import LiveReport
from dune_fast.student import Student, build_student

logger = logging.getLogger(__name__)


class HeldOutLoss:
    """Sums of the losses of every teacher on the images of every dataset.

    Args:
        teachers: teacher -> token types.
        datasets: their names, in the order of a batch's indices.
        device: of the losses.
    """

    def __init__(self, teachers: Mapping[str, Sequence[str]], datasets: Sequence[str], device: torch.device) -> None:
        self.teachers, self.datasets = list(teachers), list(datasets)
        self.tokens = [(name, token) for name, tokens in teachers.items() for token in tokens]
        rows = len(self.teachers) + len(self.tokens) + 1
        self.sums = torch.zeros(rows, len(self.datasets), dtype=torch.float64, device=device)
        """[losses of the teachers, cosines of their token types, images; dataset]"""

    @torch.no_grad()
    def add(
        self,
        projections: Features,
        features: Features,
        standardizers: Mapping[str, Mapping[str, Standardizer]],
        objective: ObjectiveConfig,
        dataset: Tensor,
        states: TermStates | None = None,
    ) -> None:
        """Takes a batch in.

        Args:
            projections: the student's.
            features: the teachers', rotated.
            standardizers: of the running statistics.
            objective: its loss; every teacher counts on every image here, whatever the sharing.
            dataset: int64 [B], of each image.
            states: statistics of the loss's terms.
        """
        losses, parts = teacher_losses(projections, features, standardizers, objective, states=states)
        cosines = torch.stack([1 - parts[f"{name}/{token}/cosine"] for name, token in self.tokens])
        rows = torch.cat([losses, cosines, torch.ones_like(losses[:1])]).double()
        self.sums.index_add_(1, dataset, rows)

    def result(self) -> dict[str, float]:
        """Means over images: `held_out/<teacher>/<dataset>`, `held_out/<teacher>` over all datasets,
        `held_out_cosine/<teacher>/<token type>`, and `held_out_images`, how many there were."""
        *rows, counts = self.sums.tolist()
        images = sum(counts)
        if not images:  # all of them are broken
            return {"held_out_images": 0.0}
        values = {}
        for name, row in zip(self.teachers, rows, strict=False):
            values[f"held_out/{name}"] = sum(row) / images
            for dataset, total, count in zip(self.datasets, row, counts, strict=True):
                if count:
                    values[f"held_out/{name}/{dataset}"] = total / count
        for (name, token), row in zip(self.tokens, rows[len(self.teachers) :], strict=True):
            values[f"held_out_cosine/{name}/{token}"] = sum(row) / images
        return values | {"held_out_images": images}


class _StoppedError(Exception):
    """The run has been asked to stop: what has been evaluated so far is of no use."""


class InRunEvaluation:
    """What `Trainer` calls every `evaluation.every` steps; a context, at whose end the loaders are closed.

    Args:
        cfg: the run's.
    """

    def __init__(self, cfg: RunConfig) -> None:
        self.cfg = cfg
        self._loaders: dict[str, ValLoader] = {}
        self._labelled: Labelled | None = None
        self._report = LiveReport(Path(cfg.output_dir))

    def __enter__(self) -> InRunEvaluation:
        return self

    def __exit__(self, *_: object) -> None:
        for loader in self._loaders.values():
            loader.close()

    def check(self, datasets: Sequence[Dataset]) -> None:
        """Looks, before the first step, whether there is anything to evaluate on.

        Args:
            datasets: of the training.

        Raises:
            ValueError: no held-out image, and no k-NN.
            DataError: the dataset for k-NN, which is not trained on, cannot be found.
            LabelError: its images have no classes.
        """
        wanted = self.cfg.evaluation
        if not wanted.knn_dataset and not any(len(dataset.val) for dataset in datasets):
            raise ValueError(
                f"evaluation.every={wanted.every}, but there is no held-out image: set "
                "data.datasets.<name>.holdout or val_root, or evaluation.knn_dataset, or evaluation.every=0"
            )
        if name := wanted.knn_dataset:
            trained_on = {dataset.name: dataset for dataset in datasets}
            dataset = trained_on.get(name) or index_dataset(name, self.cfg.data.datasets[name])
            patience = self.cfg.data.read_patience
            self._labelled = labelled(dataset, wanted.knn_images, self.cfg.train.seed, patience)

    @torch.no_grad()
    def __call__(self, trainer: Trainer) -> dict[str, float] | None:
        """Evaluates; all ranks call it after the same step.

        Returns:
            Name -> value, the same on all ranks; None if a signal broke it off.
        """
        student = self._copy(trainer)
        values: dict[str, float] = {}
        try:
            if any(len(dataset.val) for dataset in trainer.task.loader.datasets):
                values |= self._held_out(trainer, student)
            if self._labelled is not None:
                values[f"knn/{self.cfg.evaluation.knn_dataset}"] = self._knn(trainer, student)
        except _StoppedError:
            return None
        if trainer.rank == 0:
            trainer.watchdog.at(f"report after step {trainer.step}")
            self._report.write({"step": trainer.step, **values})
        return values

    def _copy(self, trainer: Trainer) -> Student:
        cfg = self.cfg
        student = build_student(cfg.student, cfg.projector, cfg.teacher_features, cfg.train.seed).to(trainer.device)
        with trainer.engine.evaluated_weights() as module:
            student.load_state_dict(module.state_dict())
            student.autocast_dtype = module.autocast_dtype
            student.encoder.stream_dtype = module.encoder.stream_dtype
        return student.eval()

    def _held_out(self, trainer: Trainer, student: Student) -> dict[str, float]:
        teachers = {name: tokens for name, (_, tokens, *_) in self.cfg.teacher_features.items()}
        sums = HeldOutLoss(teachers, trainer.task.loader.dataset_names, trainer.device)
        statistics = trainer.task.statistics
        standardizers = statistics.running()
        for batch in self._batches(trainer, "held-out images", trainer.task.loader.datasets):
            features = statistics.rotated(trainer.task.teachers(batch.images))
            given = student(batch.images), features, standardizers, self.cfg.objective, batch.dataset
            sums.add(*given, trainer.task.states)
        sum_over_ranks(sums.sums)
        return sums.result()

    def _knn(self, trainer: Trainer, student: Student) -> float:
        """Accuracy; NaN if no image could be classified."""
        data, device = self._labelled, trainer.device
        # the last column: whether the image was seen
        features = torch.zeros(len(data.labels), student.encoder.cls_channels + 1, device=device)
        for batch in self._batches(trainer, "k-NN", data.datasets):
            with torch.autocast(device.type, student.autocast_dtype, enabled=student.autocast_dtype is not None):
                cls = student.encoder(batch.images)["x_norm_clstoken"]
            features[batch.positions, :-1] = cls.float()
            features[batch.positions, -1] = 1.0
        sum_over_ranks(features)  # every image is one rank's
        seen, labels, classes = features[:, -1] > 0, data.labels.to(device), len(data.classes)
        bank, others = seen.clone(), seen.clone()
        bank[data.bank :], others[: data.bank] = False, False
        alone = len(data.datasets) == 1
        queries = bank if alone else others
        if bank.sum() < 2 or not queries.any():
            return math.nan
        found = knn_predict(
            features[queries, :-1], features[bank, :-1], labels[bank], classes, self.cfg.evaluation.knn_k, alone
        )
        return (found == labels[queries]).double().mean().item()

    def _batches(self, trainer: Trainer, what: str, datasets: Sequence[Dataset]) -> Iterator[Batch]:
        """This rank's batches. Ranks may have different numbers of them, but go through the same number of rounds, in
        which they agree on whether to stop."""
        if what not in self._loaders:
            self._loaders[what] = ValLoader(
                self.cfg.data, self.cfg.image_size, self.cfg.evaluation.batch, trainer.rank, trainer.world_size,
                trainer.device, datasets,
            )  # fmt: skip
        loader = self._loaders[what]
        rounds = math.ceil(math.ceil(loader.num_images / trainer.world_size) / self.cfg.evaluation.batch)
        batches = loader.batches(0, trainer.stop.waits)
        try:
            for i in range(rounds):
                trainer.watchdog.at(f"evaluation after step {trainer.step}, {what}, batch {i + 1} of {rounds}")
                batch = trainer.stop.take(batches, trainer.watchdog.at)
                if trainer.stop.why:
                    raise _StoppedError
                if batch is not None:
                    yield batch
        finally:
            batches.close()
        trainer.watchdog.at(f"evaluation after step {trainer.step}, sums of {what}")
