"""Figures in memory, and those for which a run's metrics are enough: losses, keep rates, conflicts of teachers."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dune_fast.dali_pipelines.storage import write_whole
from dune_fast.evaluate import figures
from dune_fast.evaluate.figure_numbers import Records, loss_changes, teachers_of, training_records, write_csv

CAPTIONS = {
    "loss": "Distillation loss of every teacher on the training images; black: after teacher dropping.",
    "held_out": "Distillation loss of every teacher on held-out images, evaluated while the run went on.",
    "keep_rates": "Share of the images on which each teacher's loss counted, after teacher dropping.",
    "conflicts": "How the changes of two teachers' losses go together: below 0 (Pearson) or 0.5 (signs) one tends to "
    "rise when the other falls.",
    "pca": "First three principal components of the patch tokens of each image as colours, one range for a whole map.",
    "attention": "What the class token attends to in the student's last block; each map has the full range of colours.",
    "variance": "Cumulative explained variance of the teachers' features, standardized as the loss standardizes them "
    "and raw, and of the student's projections.",
}
"""Figure -> what it shows; in the order of the report."""
Table = tuple[Sequence[str], list[Sequence[Any]]]
"""Header and rows of a CSV file."""


@dataclass(frozen=True)
class Picture:
    """A figure in memory."""

    name: str
    """One of `CAPTIONS`."""
    png: bytes
    table: Table

    def write(self, folder: Path) -> list[Path]:
        """Writes NAME.png and NAME.csv."""
        paths = [folder / f"{self.name}.png", folder / f"{self.name}.csv"]
        write_whole(paths[0], self.png)
        write_csv(paths[1], *self.table)
        return paths


def curves(records: Records) -> Iterator[Picture]:
    """The figures for which the run's metrics are enough, as far as they have anything to show."""
    training = training_records(records)
    held_out = [record for record in records if "held_out_images" in record]
    for name, found, prefix, draw in (
        ("loss", training, "loss/", figures.draw_losses),
        ("held_out", held_out, "held_out/", figures.draw_held_out),
        ("keep_rates", training, "kept/", figures.draw_keep_rates),
    ):
        if teachers := teachers_of(found, prefix):
            keys = ["loss"] * (name == "loss") + [f"{prefix}{teacher}" for teacher in teachers]
            rows = [[record["step"], *map(record.get, keys)] for record in found]
            yield Picture(name, to_png(draw, records), (["step", *keys], rows))
    if (changes := loss_changes(records)) is not None:
        header = [
            "teacher", "other", "changes", "steps_between", "pearson", "sign_agreement", "every_step_pearson",
            "every_step_sign_agreement",
        ]  # fmt: skip
        rows = []
        for i, a in enumerate(changes.teachers):
            for j, b in enumerate(changes.teachers[i + 1 :], i + 1):
                recorded = [values[-1] for values in changes.recorded.get((a, b), ())] or [None, None]
                between = [changes.interval, changes.pearson[i, j], changes.agreement[i, j]]
                rows.append([a, b, changes.count, *(between if changes.count else [None] * 3), *recorded])
        yield Picture("conflicts", to_png(figures.conflict_figure, changes), (header, rows))


def to_png(draw: Callable[..., None], *args: Any) -> bytes:
    """What `draw(*args, file)` writes."""
    file = io.BytesIO()
    draw(*args, file)
    return file.getvalue()
