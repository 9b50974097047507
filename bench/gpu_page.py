"""The page that `python -m bench.gpu` leaves in a device's folder: what was measured, beside what was predicted."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench.gpu_jobs import Job
from bench.gpu_targets import BOTH, EXPERIMENT, FORWARD, IMAGES, Results, Target, is_main, percent, targets
from bench.records import RESULTS, Row, read_csv

TARGET = "sm_90"
IMAGENET_100 = 100 * 1_281_167
"""Images of 100 epochs of ImageNet-1K."""
VARIANTS = (
    "Forward of student and teachers, loss, backward and update, on images that are on the device. *eager*: plain "
    "PyTorch with the published structure. *ours*: this project in bf16, *+lean* with a bf16 token stream in the "
    "teachers, *+fp8* with FP8 teachers, *+routing* with each teacher on its own images, *+bf16stream* with a bf16 "
    "token stream in the student. \"Idle\" is the share of the step in which no kernel runs."
)  # fmt: skip
MARKS = {True: "met", False: "**missed**", None: "not measured"}


def read_predicted(folder: Path = RESULTS) -> dict:
    """What is predicted of an H100; anything but the first three may lack.

    From predicted.json "device", "source", "copy_gb_s" and "step": {experiment: {variant: {"median_ms", "peak_gib",
    "host_syncs"}}}; "kernels": {(operation, passes, dtype, shape): microseconds} from the CSV that `python -m
    bench.kernels --aot sm_90 --predict --csv bench/results/predicted_sm_90.csv` writes, a line a launch.
    """
    times: dict[tuple[str, ...], float] = {}
    for line in read_csv(folder / f"predicted_{TARGET}.csv"):
        if line["target"] != TARGET or not line["us"]:
            continue
        for passes in (FORWARD, BOTH) if line["passes"] == FORWARD else (BOTH,):
            key = line["operation"], passes, line["dtype"], line["shape"]
            times[key] = times.get(key, 0.0) + float(line["us"])
    return json.loads((folder / "predicted.json").read_text()) | {"kernels": times}


def shown(value: float | None, form: str = ".0f", unit: str = "") -> str:
    """A number, nothing for None."""
    return "" if value is None else format(value, form) + unit


def markdown(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table."""
    rows = [columns, ["---"] * len(columns), *lines]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)


def page(folder: Path, jobs: Sequence[Job], predicted: dict) -> str:
    """The page of a device's folder, as Markdown.

    Args:
        folder: with the results of `bench.kernels`, `bench.step` and `bench.data`, and `gpu.json`.
        jobs: all that there are, in order.
        predicted: from `read_predicted`.
    """
    results = Results.read(folder)
    found = targets(results)
    lines = [(target.about, target.wanted, target.found, MARKS[target.met]) for target in found]
    curve = f"\n\nLosses of every step: [values](curve_{EXPERIMENT}.csv)." if results.curves else ""
    sections = [
        *_head(results, found, predicted),
        "## Targets, for an H100\n\n" + markdown(("target", "wanted", "measured", ""), lines) + curve,
        _kernels(results, predicted),
        *(_step(name, results, predicted) for name in results.steps),
        *_jobs(results, jobs),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _head(results: Results, found: Sequence[Target], predicted: dict) -> Iterator[str]:
    """What a reader needs who reads nothing else."""
    device = results.device
    yield (
        f"# {device['name']}\n\nMeasured by `python -m bench.gpu` (`make gpu`), last on {device['date']}: "
        f"{device['memory'] / 2**30:.0f} GiB, compute capability {device['capability']}, {device['multiprocessors']} "
        f"multiprocessors, driver {device['driver']}, {device['versions']}.\n\nPredictions are for "
        f"{predicted['device']}, by {predicted['source']}."
    )
    tests = {name: results.outcomes[name] for name in ("gpu-tests", "kernel-tests") if name in results.outcomes}
    sums = "; ".join(f"{name}: {outcome.last.strip('= ')}" for name, outcome in tests.items())
    if any(outcome.status == "failed" for outcome in tests.values()):
        yield f"**Correctness: FAILED** ({sums}). Numbers of what is wrong mean nothing."
    elif len(tests) == 2 and all(outcome.status == "done" for outcome in tests.values()):
        yield f"**Correctness: passed** ({sums})."
    else:
        yield "**Correctness: not tested in full.**"
    if best := max(results.published(), key=lambda line: line.images_per_second, default=None):
        eager = [line.images_per_second for line in results.steps[EXPERIMENT] if line.variant == "eager"]
        times = "".join(f", {best.images_per_second / rate:.1f} times plain PyTorch" for rate in eager)
        yield (
            f"**Speed**: {best.images_per_second:.0f} images/s at 336 px ({best.variant}){times}. 100 epochs of "
            f"ImageNet-1K take this GPU {IMAGENET_100 / best.images_per_second / 3600:.0f} hours."
        )
    count = {met: sum(target.met is met for target in found) for met in MARKS}
    yield f"**Targets: {count[True]} met, {count[False]} missed, {count[None]} not measured.**"
    if missed := [f"- {t.about}: {t.found}, wanted {t.wanted}" for t in found if t.met is False]:
        yield "\n".join(["Missed:\n", *missed])


def _kernels(results: Results, predicted: dict) -> str:
    if not results.rows:
        return ""
    groups: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in sorted(results.rows, key=lambda row: not is_main(row)):
        groups.setdefault((row.operation, row.passes, row.dtype, row.shape), {})[row.implementation] = row
    lines = []
    for key, found in groups.items():
        any_row, ours, us = next(iter(found.values())), found.get("ours"), predicted["kernels"].get(key)
        expected = 100 * any_row.bytes / us / 1e3 / predicted["copy_gb_s"] if us and any_row.bytes else None
        lines.append([
            f"`{key[0]}`", *key[1:], shown(ours and ours.median_us), shown(expected, ".0f", " %"),
            shown(ours.percent_of_copy if ours.bytes else None, ".1f", " %") if ours else "failed its check",
            *(shown(ours and i in found and found[i].median_us / ours.median_us or None, ".2f", " x")
              for i in ("eager", "compile")),
        ])  # fmt: skip
    columns = ("operation", "passes", "type", "shape", "us", "predicted", "of a copy", "over PyTorch", "over compile")
    copy = max(row.copy_gb_s for row in results.rows)
    return (
        f"## Kernels\n\nA device-to-device copy reaches {copy:.0f} GB/s here, bytes read and written. \"Of a copy\" is "
        "the bytes that an operation must move at least, over its time, in percent of that. Times are of the device "
        "with a cold L2 cache. First the shapes that targets are for.\n\n" + markdown(columns, lines)
    )  # fmt: skip


def _step(experiment: str, results: Results, predicted: dict) -> str:
    lines = []
    for line in results.steps[experiment]:
        expected = predicted["step"].get(experiment, {}).get(line.variant, {}) if line.batch == IMAGES else {}
        lines.append([
            line.variant, str(line.batch), shown(expected.get("median_ms")),
            f"{line.median_ms:.0f} ({line.p20_ms:.0f} to {line.p80_ms:.0f})", shown(line.images_per_second),
            shown(line.tflops), percent(line.share_of_matrix_rate), shown(expected.get("peak_gib"), ".1f"),
            shown(line.peak_bytes and line.peak_bytes / 2**30, ".1f"), shown(line.host_syncs, "d"),
            percent(line.gap_share), line.versions,
        ])  # fmt: skip
    columns = (
        "variant", "images", "ms: predicted", "ms: measured", "images/s", "TFLOP/s", "of the matrix rate",
        "GiB: predicted", "GiB: measured", "host syncs", "idle", "versions",
    )  # fmt: skip
    return f"## Training step, {experiment}\n\n{VARIANTS}\n\n{markdown(columns, lines)}"


def _jobs(results: Results, jobs: Sequence[Job]) -> Iterator[str]:
    """What ran and how it ended; what did not."""
    lines, failures = [], []
    for job in jobs:
        if outcome := results.outcomes.get(job.name):
            status = {"done": "done", "running": "**cut off**, or still running"}.get(outcome.status)
            status = status or f"**{outcome.status}**: {outcome.reason}"
            ran = f"{outcome.seconds / 60:.1f}", outcome.date, outcome.commit, f"`{outcome.command}`"
            lines.append((str(job.part), job.name, status, *ran))
            if outcome.tail:
                text = "\n".join(outcome.tail).replace("```", "'''")
                failures.append(f"`{job.name}` ended with:\n\n```\n{text}\n```")
    yield "## What ran\n\n" + markdown(("part", "what", "result", "minutes", "begun", "commit", "command"), lines)
    yield from failures
    left = [job for job in jobs if job.name not in results.outcomes]
    if left:
        lines = [(str(job.part), job.about, f"{job.minutes:g}", f"`{job.command}`") for job in left]
        yield (
            "## Not run yet\n\n`python -m bench.gpu --part N` runs one part and adds its results to this page.\n\n"
            + markdown(("part", "what", "minutes, estimated", "command"), lines)
        )
