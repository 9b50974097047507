"""The page that `python -m bench.gpu` leaves in a device's folder: what was measured, beside what was predicted."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench.gpu_jobs import Job
from bench.gpu_targets import (
    BOTH,
    EXPERIMENT,
    FORWARD,
    LARGE,
    OF_A_COPY,
    OF_COPY,
    Results,
    Target,
    is_main,
    is_published,
    missed,
    percent,
    targets,
)
from bench.records import CURVE_LIMITS, RESULTS, Measured, Row, read_csv, relative_difference

TARGET = "sm_90"
IMAGENET_100 = 100 * 1_281_167
"""Images of 100 epochs of ImageNet-1K."""
VARIANTS = (
    "Forward of student and teachers, loss, backward and update, on images that are on the device. *eager*: plain "
    "PyTorch with the published structure, *+compile* under torch.compile. *ours*: this project in bf16, *+lean* with "
    "a bf16 token stream in the teachers, *+fp8* with FP8 teachers, *+routing* with each teacher on its own images, "
    "*+bf16stream* with a bf16 token stream in the student, *+stream* with the teachers on a second CUDA stream."
)
MARKS = {True: "met", False: "**missed**", None: "not measured"}


def markdown(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table."""
    rows = [columns, ["---"] * len(columns), *lines]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)


def shown(value: float | None, form: str = ".0f", unit: str = "") -> str:
    """A number, nothing for None."""
    return "" if value is None else format(value, form) + unit


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
        for name in (FORWARD, BOTH) if line["passes"] == FORWARD else (BOTH,):
            key = line["operation"], name, line["dtype"], line["shape"]
            times[key] = times.get(key, 0.0) + float(line["us"])
    return json.loads((folder / "predicted.json").read_text()) | {"kernels": times}


def page(folder: Path, jobs: Sequence[Job], predicted: dict) -> str:
    """The page of a device's folder, as Markdown.

    Args:
        folder: with the results of `bench.kernels`, `bench.step` and `bench.data`, and `gpu.json`.
        jobs: all that there are, in order.
        predicted: from `read_predicted`.
    """
    results = Results.read(folder)
    found = targets(results)
    sections = [
        _head(results, predicted),
        *_verdict(results, found),
        _targets(found),
        _correctness(results),
        _kernels(folder, results, predicted),
        *(_step(folder, name, results, predicted) for name in (EXPERIMENT, LARGE)),
        _curves(folder, results),
        _ran(results, jobs),
        _left(results, jobs),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _head(results: Results, predicted: dict) -> str:
    device = results.device
    versions = {row.versions for row in results.rows} - {device["versions"]}
    older = f" Some rows were measured with other versions: {'; '.join(sorted(versions))}." if versions else ""
    return (
        f"# {device['name']}\n\nMeasured by `python -m bench.gpu` (`make gpu`), last on {device['date']}: "
        f"{device['memory'] / 2**30:.0f} GiB, compute capability {device['capability']}, {device['multiprocessors']} "
        f"multiprocessors, driver {device['driver']}, {device['versions']}.{older}\n\nPredictions are for "
        f"{predicted['device']}, by {predicted['source']}."
    )


def _verdict(results: Results, found: Sequence[Target]) -> Iterator[str]:
    """What a reader needs who reads nothing else."""
    runs = [results.outcomes[name] for name in ("gpu-tests", "kernel-tests") if name in results.outcomes]
    passed = sum(run.tests.passed for run in runs if run.tests)
    failed = sum(len(run.tests.failed) for run in runs if run.tests)
    skipped = sum(sum(run.tests.skipped.values()) for run in runs if run.tests)
    if failed or any(run.status == "failed" for run in runs):
        yield (
            f"**Correctness: FAILED**, {failed} of {passed + failed} tests. Numbers of what is wrong mean nothing."
        )
    elif len(runs) < 2 or any(run.status != "done" for run in runs):
        yield f"**Correctness: not tested in full**; {passed} tests passed."
    else:
        yield f"**Correctness: passed**, {passed} tests; {skipped} were skipped, for the reasons below."
    ours = [line for line in results.steps.get(EXPERIMENT, []) if is_published(line)]
    if ours:
        best, eager = max(ours, key=lambda line: line.images_per_second), results.variant("eager")
        times = f", {best.images_per_second / eager.images_per_second:.1f} times plain PyTorch" if eager else ""
        hours = IMAGENET_100 / best.images_per_second / 3600
        yield (
            f"**Speed**: {best.images_per_second:.0f} images/s at 336 px ({best.variant}){times}. 100 epochs of "
            f"ImageNet-1K take this GPU {hours:.0f} hours."
        )
    wrong = missed(found)
    unknown = sum(target.met is None for target in found)
    yield f"**Targets: {len(found) - len(wrong) - unknown} met, {len(wrong)} missed, {unknown} not measured.**"
    if wrong:
        yield "Missed:\n\n" + "\n".join(f"- {t.about}: {t.found}, wanted {t.wanted}" for t in wrong)
    if left := [name for name, outcome in results.outcomes.items() if outcome.status != "done"]:
        yield f"**Failed, skipped or cut off**: {', '.join(left)}; reasons are under \"What ran\"."


def _targets(found: Sequence[Target]) -> str:
    """Those of the kernels' rates as a count: the table of kernels has each."""
    rates, others = ([t for t in found if t.wanted.endswith(OF_A_COPY) == chosen] for chosen in (True, False))
    known = [target for target in rates if target.met is not None]
    unknown = f", {len(rates) - len(known)} not measured" if len(rates) > len(known) else ""
    count = f"{sum(target.met for target in known)} of {len(known)}{unknown}" if known else ""
    mark = MARKS[not missed(known)] if known else MARKS[None]
    lines = [("kernels that reach their share of a copy's bandwidth", "all", count, mark)]
    lines += [(target.about, target.wanted, target.found, MARKS[target.met]) for target in others]
    return "## Targets, for an H100\n\n" + markdown(("target", "wanted", "measured", ""), lines)


def _correctness(results: Results) -> str:
    runs = [outcome for outcome in results.outcomes.values() if outcome.tests is not None]
    if not runs:
        return ""
    lines, names = [], []
    for run in runs:
        tests = run.tests
        lines.append((f"`{run.command}`", str(tests.passed), str(len(tests.failed)), str(sum(tests.skipped.values()))))
        names += [f"- failed: `{name}`" for name in tests.failed]
        names += [f"- skipped, {count} of {run.name}: {reason}" for reason, count in tests.skipped.items()]
    parts = ["## Correctness", markdown(("tests", "passed", "failed", "skipped"), lines)]
    return "\n\n".join([*parts, "\n".join(names)] if names else parts)


def _kernels(folder: Path, results: Results, predicted: dict) -> str:
    if not results.rows:
        return ""
    main = [row for row in results.rows if row.dtype == "bfloat16" and is_main(row.shape)]
    others = [row for row in results.rows if row not in main]
    copy = max(row.copy_gb_s for row in results.rows)
    text = (
        f"## Kernels\n\nA device-to-device copy reaches {copy:.0f} GB/s here, bytes read and written. \"Of a copy\" is "
        "the bytes that an operation must move at least, over its time, in percent of that. Times are of the device "
        "with a cold L2 cache. All rows: [kernels.csv](kernels.csv)."
    )  # fmt: skip
    if main:
        text += "\n\nbf16, ViT-L at 336 px, the shapes that targets are for:\n\n" + _kernel_table(main, predicted)
    if others:
        table = _kernel_table(others, predicted, all_shapes=True)
        text += f"\n\n<details><summary>Other shapes and types</summary>\n\n{table}\n\n</details>"
    return text + _plot(folder, "kernels.png", "Roofline, and shares of a copy's bandwidth")


def _kernel_table(rows: Sequence[Row], predicted: dict, all_shapes: bool = False) -> str:
    groups: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        groups.setdefault((row.operation, row.passes, row.dtype, row.shape), {})[row.implementation] = row
    order = list(dict.fromkeys(name for name, _ in OF_COPY))
    where = ("type", "shape") if all_shapes else ()
    lines = []
    for key in sorted(groups, key=lambda key: (order.index(key[0]) if key[0] in order else len(order), key)):
        found, target = groups[key], OF_COPY.get(key[:2])
        ours = found.get("ours")
        share = ours.percent_of_copy if ours and ours.bytes else None
        line = [f"`{key[0]}`", *key[1 : 4 if all_shapes else 2], shown(ours and ours.median_us)]
        line.append(shown(predicted_percent(predicted, next(iter(found.values()))), ".0f", " %"))
        line.append("failed its check" if ours is None else shown(share, ".1f", " %"))
        if not all_shapes:
            reached = target and share is not None and share >= target
            line.append(f"{target} % {MARKS[bool(reached)]}" if target else "")
        line += [
            shown(ours and other and other.median_us / ours.median_us, ".2f", " x")
            for other in (found.get("eager"), found.get("compile"))
        ]
        lines.append(line)
    goal = () if all_shapes else ("target",)
    columns = "operation", "passes", *where, "time, us", "predicted, of a copy", "measured, of a copy", *goal
    return markdown((*columns, "faster than PyTorch", "than torch.compile"), lines)


def predicted_percent(predicted: dict, row: Row) -> float | None:
    """Percent of a copy that is predicted for an operation; its bytes are the measured row's."""
    us = predicted["kernels"].get((row.operation, row.passes, row.dtype, row.shape))
    return 100 * row.bytes / us / 1e3 / predicted["copy_gb_s"] if us and row.bytes else None


def _step(folder: Path, experiment: str, results: Results, predicted: dict) -> str:
    steps = results.steps.get(experiment, [])
    if not steps:
        return ""
    expected = predicted["step"].get(experiment, {})
    rate = max(line.matrix_tflops or 0 for line in steps)
    fp8 = max(line.matrix_tflops_fp8 or 0 for line in steps)
    columns = (
        "variant", "images", "ms: predicted", "ms: measured", "images/s", "TFLOP/s", "of the matrix rate",
        "GiB: predicted", "GiB: measured", "host syncs", "idle",
    )  # fmt: skip
    lines = [_step_line(line, expected.get(line.variant, {})) for line in steps]
    return (
        f"## Training step, {experiment}\n\n{VARIANTS}\n\nA large bf16 matrix product reaches {rate:.0f} TFLOP/s here"
        + (f", an FP8 one {fp8:.0f}" if fp8 else "")
        + f"; \"idle\" is the share of the step in which no kernel runs.\n\n{markdown(columns, lines)}"
        + _plot(folder, f"step_{experiment}.png", "Milliseconds of every part of the step")
    )  # fmt: skip


def _step_line(line: Measured, expected: dict) -> list[str]:
    at_full = expected if line.batch == 128 else {}  # what predictions are for
    return [
        line.variant, str(line.batch), shown(at_full.get("median_ms")),
        f"{line.median_ms:.0f} ({line.p20_ms:.0f} to {line.p80_ms:.0f})", shown(line.images_per_second),
        shown(line.tflops), percent(line.share_of_matrix_rate), shown(at_full.get("peak_gib"), ".1f"),
        shown(line.peak_bytes and line.peak_bytes / 2**30, ".1f"), shown(line.host_syncs, "d"),
        percent(line.gap_share),
    ]  # fmt: skip


def _curves(folder: Path, results: Results) -> str:
    losses = results.curves
    if not losses:
        return ""
    lines = []
    for name, values in losses.items():
        limit = CURVE_LIMITS.get(name)
        difference = relative_difference(values, losses["eager"])
        allowed = f"{percent(limit)} {MARKS[difference < limit]}" if limit else ""
        lines.append((name, f"{values[0]:.4f}", f"{values[-1]:.4f}", percent(difference, 2) if limit else "", allowed))
    columns = "variant", "first loss", "last loss", "mean difference from eager", "allowed"
    return (
        f"## Loss curves, {EXPERIMENT}\n\nThe same images, weights and draws for every variant, "
        f"{len(losses['eager'])} steps: [values](curve_{EXPERIMENT}.csv).\n\n{markdown(columns, lines)}"
        + _plot(folder, f"curve_{EXPERIMENT}.png", "Losses over the steps")
    )


def _plot(folder: Path, name: str, about: str) -> str:
    return f"\n\n![{about}]({name})" if (folder / name).exists() else ""


def _ran(results: Results, jobs: Sequence[Job]) -> str:
    lines, failures = [], []
    for job in jobs:
        if (outcome := results.outcomes.get(job.name)) is None:
            continue
        status = {"done": "done", "running": "**cut off**"}.get(outcome.status, f"**{outcome.status}**")
        reason = {"done": "", "running": ", or still running"}.get(outcome.status, f": {outcome.reason}")
        lines.append((
            f"{job.part}", job.name, status + reason, f"{outcome.seconds / 60:.1f}", outcome.date, outcome.commit,
            f"`{outcome.command}`",
        ))  # fmt: skip
        if outcome.tail:
            text = "\n".join(outcome.tail).replace("```", "'''")
            failures.append(f"`{job.name}` ended with:\n\n```\n{text}\n```")
    columns = "part", "what", "result", "minutes", "begun", "commit", "command"
    return "\n\n".join(["## What ran", markdown(columns, lines), *failures])


def _left(results: Results, jobs: Sequence[Job]) -> str:
    left = [job for job in jobs if job.name not in results.outcomes]
    if not left:
        return ""
    lines = [(str(job.part), job.about, f"{job.minutes:g}", f"`{job.command}`") for job in left]
    return (
        "## Not run yet\n\n`python -m bench.gpu --part N` runs one part and adds its results to this page.\n\n"
        + markdown(("part", "what", "minutes, estimated", "command"), lines)
    )
