"""`dune-fast figures RUN`: every figure of a run as PNG, its numbers as CSV, and the report.

    loss, keep_rates, conflicts, held_out   curves, of metrics.jsonl alone
    attention, pca, variance                of the student, its teachers and held-out or other photographs
"""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from dune_fast.dali_pipelines.datasets import DataConfig, Dataset, DatasetConfig, index_datasets
from dune_fast.dali_pipelines.loader import ValLoader
from dune_fast.engine.config import load_config
from dune_fast.engine.metrics import read_metrics
from dune_fast.evaluate import figures
from dune_fast.evaluate.feature_files import images_of
from dune_fast.evaluate.figure_numbers import Covariance, cls_attention, explained_variance, training_records
from dune_fast.evaluate.pictures import Picture, Table, curves, to_png
from dune_fast.evaluate.ranks import Ranks
from dune_fast.evaluate.report import write_report
from dune_fast.evaluate.run import Opened, figure_batch, open_trained
from dune_fast.teachers.ensemble import TeacherEnsemble
from dune_fast.teachers.local_paths import result_folder

logger = logging.getLogger(__name__)

def photographs(data: DataConfig, others: Sequence[str], per_dataset: int) -> list[Dataset]:
    """Datasets whose held-out images are what is drawn, evenly spaced among those that there are.

    Args:
        data: of the run.
        others: folders, lists, globs, shards or assets to take in place of the run's held-out images.
        per_dataset: images of each at most.

    Raises:
        DataError: nothing is there.
        ValueError: the run has no held-out image, and `others` is empty.
    """
    if others:
        found = []
        for given in others:
            name = given.rstrip("/").rpartition("/")[2].removeprefix("asset:") or given
            parts = images_of(given)
            names = [name] if len(parts) == 1 else [f"{name}, train", f"{name}, val"]
            found += [Dataset(n, DatasetConfig(), part, part) for n, part in zip(names, parts, strict=True)]
    else:
        found = [dataset for dataset in index_datasets(data) if len(dataset.val)]
    if not found:
        raise ValueError("the run has no held-out image: name some photographs with --data FOLDER")
    chosen = []
    for dataset in found:
        count = min(per_dataset, len(dataset.val))
        rows = np.unique(np.linspace(0, len(dataset.val) - 1, count).round().astype(int))
        chosen.append(replace(dataset, val=dataset.val.select(rows.tolist())))
    return chosen


@torch.no_grad()
def variance_spectra(
    opened: Opened, teachers: TeacherEnsemble, datasets: Sequence[Dataset]
) -> tuple[dict[tuple[str, str], dict[str, np.ndarray]], Table]:
    """Spectra of the teachers' features and the student's projections: (teacher, dataset) -> what -> explained, [C].

    Of patch tokens, or of cls tokens of a teacher that has no others. Features are standardized with the running
    statistics, as the loss compares them, and "raw teacher" is without.
    """
    cfg, statistics, device = opened.cfg, opened.statistics, opened.device
    tokens = {name: "patch" if "patch" in kinds else "cls" for name, (_, kinds, *_) in cfg.teacher_features.items()}
    standardizers = statistics.running()
    spectra, rows = {}, []
    for dataset in datasets:
        sums = {
            (name, what): Covariance(cfg.teacher_features[name][0], device)
            for name in tokens
            for what in ("teacher", "projection")
        }
        with (
            ValLoader(cfg.data, cfg.image_size, cfg.evaluation.batch, 0, 1, device, [dataset]) as loader,
            Ranks().progress(f"explained variance, {dataset.name}", loader.num_images) as progress,
        ):
            for batch in loader:
                features = statistics.rotated(teachers(batch.images))
                projections = opened.students["after"](batch.images)
                for name, token in tokens.items():
                    sums[name, "teacher"].add(features[name][token])
                    sums[name, "projection"].add(projections[name][token])
                progress.advance(len(batch))
        for name, token in tokens.items():
            raw = sums[name, "teacher"].value()
            scale = standardizers[name][token].inv_std.double().cpu()  # its mean does not matter to a covariance
            covariances = {
                "teacher": raw * scale[:, None] * scale,
                "projection": sums[name, "projection"].value(),
                "raw teacher": raw,
            }
            curve = {what: explained_variance(covariance) for what, covariance in covariances.items()}
            spectra[name, dataset.name] = curve
            rows += [
                [name, dataset.name, token, sums[name, "teacher"].count, what, i + 1, share]
                for what, shares in curve.items()
                for i, share in enumerate(shares.tolist())
            ]
    header = ["teacher", "dataset", "tokens", "vectors", "features", "components", "explained_variance"]
    return spectra, (header, rows)


def model_pictures(run: Path, others: Sequence[Dataset], per_dataset: int, device: torch.device) -> Iterator[Picture]:
    """The figures that need student, teachers and photographs, which are `others` or the run's held-out images.

    Raises as `evaluate_run` and `photographs`.
    """
    opened = open_trained(run, True, device)
    datasets = others or photographs(opened.cfg.data, (), per_dataset)
    images = figure_batch(opened.cfg, sum(len(dataset.val) for dataset in datasets), device, datasets)
    titles = {f"student, {name}": student for name, student in opened.students.items()}
    photograph = "photograph" if others else "held-out photograph"

    attention = {title: cls_attention(student.encoder, images).cpu() for title, student in titles.items()}
    rows = [
        [at[0] + 1, title, at[1] + 1, at[2], at[3], weight]
        for title, x in attention.items()
        for at, weight in zip(np.ndindex(x.shape), x.flatten().tolist(), strict=True)
    ]
    table = ["image", "features", "head", "row", "column", "attention"], rows
    yield Picture("attention", to_png(figures.attention_figure, images, attention, photograph), table)

    teachers = opened.teachers()  # only now: attention maps need none
    file = io.BytesIO()
    maps = figures.pca_figure(images, teachers, titles, file, True, photograph)
    rows = [
        [image + 1, what, *at, *rgb]
        for what, drawn in maps.items()
        for image, one in enumerate(drawn)
        for at, rgb in zip(np.ndindex(one.shape[:2]), one.reshape(-1, one.shape[-1]).tolist(), strict=True)
    ]
    yield Picture("pca", file.getvalue(), (["image", "features", "row", "column", "red", "green", "blue"], rows))

    spectra, table = variance_spectra(opened, teachers, datasets)
    yield Picture("variance", to_png(figures.variance_figure, spectra), table)


def draw_run(
    run: Path, out: Path | None = None, data: Sequence[str] = (), per_dataset: int = 256,
    device: torch.device | None = None,
) -> list[Path]:  # fmt: skip
    """Writes figures and `report.html`; returns the files.

    What a run that is moved or has not saved anything yet does not allow is left out with a warning, also in the
    report.

    Args:
        run: folder of a run, finished or not.
        out: folder for figures and report; `figures/` in the run's folder by default, and the report beside it.
        data: see `photographs`.
        per_dataset: images of each dataset from which explained variance is computed, at most.
        device: the first GPU where there is one, by default.

    Raises:
        ConfigError: `run` is not a run's folder.
        DataError: `data` names nothing.
    """
    if per_dataset < 1:
        raise ValueError(f"--images {per_dataset}: at least 1 is needed")
    cfg = load_config(run / "config.yaml")
    others = photographs(cfg.data, data, per_dataset) if data else []
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    folder = run / "figures" if out is None else out
    result_folder(folder)
    records = read_metrics(run / "metrics.jsonl") if (run / "metrics.jsonl").is_file() else []
    pictures, missing = list(curves(records)), []
    written = [path for picture in pictures for path in picture.write(folder)]
    if not training_records(records):
        missing.append(f"curves: {run / 'metrics.jsonl'} has no step of the training")
    try:
        for picture in model_pictures(run, others, per_dataset, device):
            pictures.append(picture)
            written += picture.write(folder)
    except ValueError as error:
        names = ("attention", "pca", "variance")
        left = [name for name in names if name not in {p.name for p in pictures}]
        missing.append(f"{', '.join(left)}: {error}")
    for text in missing:
        logger.warning("figures left out: %s", text)
    report = (run if out is None else out) / "report.html"
    write_report(run, report, records, pictures, missing)
    return [*written, report]
