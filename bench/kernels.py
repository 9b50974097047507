"""Measures every kernel against eager torch, torch.compile and the bandwidth of a copy: `python -m bench.kernels`.

Times are of the device: the queue is held by a spinning kernel while the host enqueues the call, so that neither Python
nor launch latency counts (a training step hides both). Before every call the L2 cache is filled with other data by
reading them, and inputs rotate among several sets. Medians and the 20th and 80th percentiles of CUDA events. An
implementation that fails its check against float64 is not timed, and the status is 1.

`--aot sm_80,sm_90,sm_100` compiles everything without a GPU instead and prints registers, spills and shared memory;
the status is 1 if anything spills or does not compile. `--aot sm_90 --predict` predicts times from the compiled code
(bench/predict.py); the status is 1 if a launch does not compile.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from bench.aot import TARGETS, Resources, compile_all
from bench.kernel_cases import (
    IMAGE_SHAPES,
    SHAPES,
    Operation,
    Shape,
    check,
    draw_upstream,
    moved_bytes,
    run_both,
    select,
)
from bench.predict import TARGET, predict_all, totals, write_predictions
from bench.records import RESULTS, Row, folder_name, versions, write_rows

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
PREDICTED: tuple[Shape, ...] = (*SHAPES[:2], IMAGE_SHAPES[0])
"""Shapes that are predicted unless others are given."""
REPETITIONS = 60
WARM_UP = 3


class Stopwatch:
    """Times calls on the current CUDA device, with a cold L2 cache and without the host's share.

    The cache is flushed by reading: a buffer that was written leaves as many dirty lines as the cache holds, 50 MB on
    an H100, and the timed kernel would pay for writing them back. triton's `do_bench_cudagraph` does not flush between
    the calls of its graph, and times them together, without percentiles of single calls.
    """

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        properties = torch.cuda.get_device_properties(self.device)
        self.device_name = properties.name
        self.l2_bytes = max(properties.L2_cache_size, 32 << 20)
        self.other = torch.zeros(2 * self.l2_bytes // 4, device=self.device)
        self.largest = torch.empty((), device=self.device)

    def time(self, calls: Sequence[Callable[[], object]], repetitions: int = REPETITIONS) -> tuple[float, float, float]:
        """(median, 20th, 80th percentile) in microseconds of one call, the calls taking turns."""
        enqueue = 0.0
        for call in calls * WARM_UP:
            torch.cuda.synchronize()
            start = time.perf_counter()
            call()
            enqueue = time.perf_counter() - start
        # the spin outlasts the host's work twice over, at clocks up to 2 GHz
        spin = int(2e9 * (2 * enqueue + 2e-4))
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repetitions)]
        for i, (start, end) in enumerate(events):
            torch.amax(self.other, 0, out=self.largest)  # fills the cache with clean lines that nobody else reads
            torch.cuda._sleep(spin)
            start.record()
            calls[i % len(calls)]()
            end.record()
        torch.cuda.synchronize()
        times = torch.tensor([start.elapsed_time(end) * 1e3 for start, end in events])
        low, median, high = times.quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
        return median, low, high

    def copy_bandwidth(self) -> float:
        """GB/s of a copy of 1 GiB, bytes read and written."""
        source = torch.randint(255, (1 << 30,), dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        median, _, _ = self.time([lambda: target.copy_(source)])
        return 2 * source.nbytes / median / 1e3


def measure(
    operation: Operation, shape: Shape, dtype: torch.dtype, stopwatch: Stopwatch, copy_gb_s: float, skip: Sequence[str],
    report: Callable[[str], None],
) -> tuple[list[Row], bool]:  # fmt: skip
    """Checks, then times every implementation of one operation; (rows, whether ours was right)."""
    label, rows, correct = f"{operation.name} {str(dtype)[6:]} {'x'.join(map(str, shape))}", [], True
    size = moved_bytes(operation, shape, dtype, backward=False)
    copies = min(8, max(2, -(-4 * stopwatch.l2_bytes // max(size, 1 << 20))))
    for name, call in operation.implementations(skip).items():
        torch.manual_seed(0)
        sets = [operation.make(shape, dtype, stopwatch.device) for _ in range(copies)]
        upstream = draw_upstream(operation, sets[0])
        try:
            errors = list(check(operation, call, sets[0], upstream))
            wrong = [f"error {error:.1e} of {allowed:.1e}" for error, allowed in errors if not error <= allowed]
        except Exception as error:  # the others are still worth measuring
            wrong = [f"{type(error).__name__}: {str(error).splitlines()[0]}"]
        if wrong:
            report(f"{label} {name}: {', '.join(wrong)}")
            correct &= name != "ours"
            continue
        for backward in (False, True) if upstream else (False,):
            calls = [
                (lambda x=x: run_both(call, x, upstream)) if backward else (lambda x=x: call(*x))  # noqa: B023
                for x in sets
            ]
            about = operation.name, "forward+backward" if backward else "forward", *label.split()[1:], name
            size = moved_bytes(operation, shape, dtype, backward)
            row = Row(*about, *stopwatch.time(calls), size, copy_gb_s, stopwatch.device_name, versions())
            report(
                f"{label} {row.passes:16} {name:8} {row.median_us:9.1f} us ({row.p20_us:.1f} to {row.p80_us:.1f})  "
                f"{row.percent_of_copy:5.1f} % of a copy"
            )
            rows.append(row)
    return rows, correct


def shapes_of(operation: Operation, given: Sequence[Shape] | None) -> Sequence[Shape]:
    """Which of the given shapes are for the operation, those of images having 3 in the middle; all if none is given."""
    if not given:
        return IMAGE_SHAPES if operation.on_images else SHAPES
    return [shape for shape in given if (shape[1] == 3) == operation.on_images]


def bench(args: argparse.Namespace, console: Console) -> int:
    """The measurements; returns the exit status."""
    operations = [operation for operation in select(args.only) if shapes_of(operation, args.shape)]
    if not operations:
        raise ValueError("no --shape is for this operation: those on images take IMAGES,3,SIDE, the others do not")
    if not torch.cuda.is_available():
        raise ValueError(
            "bench.kernels measures on a GPU and found none; `python -m bench.kernels --aot sm_90` compiles the "
            "kernels without one."
        )
    stopwatch = Stopwatch()
    copy_gb_s = stopwatch.copy_bandwidth()
    console.print(f"{stopwatch.device_name}, {versions()}: a copy reaches {copy_gb_s:.0f} GB/s")
    correct, path = True, args.output / folder_name(stopwatch.device_name) / "kernels.csv"
    for operation in operations:
        for dtype in args.dtype:
            for shape in shapes_of(operation, args.shape):
                rows, right = measure(operation, shape, dtype, stopwatch, copy_gb_s, args.skip, console.print)
                write_rows(path, rows)  # now: what cuts the run short takes no numbers along
                correct &= right
                torch.cuda.empty_cache()
    console.print(f"written to {path}")
    return 0 if correct else 1


def aot_table(lines: Sequence[Resources]) -> Table:
    """One line a kernel and target: the most of everything over its cases, and the cases that fail."""
    columns = ("registers", "spilled", "shared", "threads")
    table = Table("kernel", "target", "cases", *columns, box=None)
    groups: dict[tuple[str, str, str], list[Resources]] = {}
    for line in lines:
        groups.setdefault((line.module, line.kernel, line.target), []).append(line)
    for (module, kernel, target), group in sorted(groups.items()):
        most = [str(max(getattr(line, name) for line in group)) for name in columns]
        table.add_row(f"{module}.{kernel}", target, str(len(group)), *most)
    return table


def aot(args: argparse.Namespace, console: Console) -> int:
    """Compiles ahead of time; returns the exit status."""
    start = time.perf_counter()
    lines = compile_all(args.aot.split(","), args.only, args.quick)
    console.print(aot_table(lines))
    bad = [line for line in lines if not line.ok]
    for line in bad:
        reason = line.error or f"{line.spilled} bytes spilled"
        console.print(f"{line.module}.{line.kernel}, {line.case}, {line.target}: {reason}")
    seconds = time.perf_counter() - start
    console.print(f"{len(lines)} kernels compiled in {seconds:.0f} s, {len(bad)} spill or do not compile")
    return 1 if bad else 0


def predict(args: argparse.Namespace, console: Console) -> int:
    """Predictions for the operations, of ViT-B and L at 336 pixels unless shapes are given; returns the exit status."""
    if args.aot != TARGET:
        raise ValueError(f"predictions are for an H100: --aot {TARGET} --predict")
    start = time.perf_counter()
    operations = {operation.name: operation for operation in select(args.only)}
    tasks = [
        (name, shape, dtype)
        for name, operation in operations.items()
        for dtype in args.dtype
        for shape in shapes_of(operation, args.shape or PREDICTED)
    ]
    lines = predict_all(tasks)
    table = Table("operation", "passes", "type", "shape", "us", "% of a copy", "limited by", "goal", box=None)
    for *case, us, percent, limit in totals(lines):
        goal = operations[case[0]].goal
        verdict = f"{goal} {'met' if percent >= goal else 'below'}" if goal else ""
        table.add_row(*case, f"{us:.1f}", f"{percent:.0f}", limit, verdict)
    console.print(table)
    failed = [line for line in lines if line["error"]]
    for line in failed:
        console.print(" ".join(line.values()))
    if args.csv:
        write_predictions(args.csv, lines)
    seconds = time.perf_counter() - start
    console.print(f"{len(lines)} launches in {seconds:.0f} s, {len(failed)} do not compile")
    return 1 if failed else 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.kernels", description=__doc__.split("\n\n")[0])
    parser.add_argument("--aot", metavar="TARGETS", help=f"compile for these instead, of {','.join(TARGETS)}")
    parser.add_argument("--predict", action="store_true", help="with --aot sm_90: times, from compiled code")
    parser.add_argument("--csv", type=Path, help="with --predict: write every launch there")
    parser.add_argument("--quick", action="store_true", help="with --aot: the first case of each file alone")
    parser.add_argument("--only", metavar="NAME", help="one operation, or all of one file of kernels/")
    parser.add_argument("--dtype", type=_dtypes, default=_dtypes("bfloat16,float32"), help="comma-separated")
    shapes = "IMAGES,TOKENS,CHANNELS, or for operations on images IMAGES,3,SIDE; repeatable"
    parser.add_argument("--shape", type=_shape, action="append", help=shapes)
    parser.add_argument("--skip", type=lambda text: text.split(","), default=[], help="eager,compile: not measured")
    parser.add_argument("--output", type=Path, default=RESULTS, help="results go to a folder of the device in here")
    return parser.parse_args(argv)


def _dtypes(text: str) -> list[torch.dtype]:
    unknown = [name for name in text.split(",") if name not in DTYPES]
    if unknown:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}; choose from {', '.join(DTYPES)}")
    return [DTYPES[name] for name in text.split(",")]


def _shape(text: str) -> Shape:
    numbers = tuple(int(part) for part in text.split(","))
    if len(numbers) != 3 or min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not IMAGES,TOKENS,CHANNELS")
    return numbers


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status, 2 for what cannot be done."""
    args = parse(argv)
    console = Console(highlight=False, width=220, soft_wrap=True)
    try:
        return (predict if args.predict else aot if args.aot else bench)(args, console)
    except ValueError as error:
        console.print(str(error))
        return 2


if __name__ == "__main__":
    sys.exit(main())
