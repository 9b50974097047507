"""Measures the whole training step as a user runs it against plain PyTorch: `python -m bench.step`.

Random weights, synthetic images that are on the device already. All variants are built in one process and take turns,
a few steps each, so that clocks and neighbours hit them alike; medians over the steps of all rounds. Then each runs
once under the profiler (launches, gaps, longest kernels), once under CUDA's sync debug mode and once for its peak
memory. The matrix rate that the step's arithmetic is compared with is measured in the same run.

`--count` counts operations, host reads and bytes without a GPU: see `bench.step_count`. `--curve STEPS` trains every
variant on the same images and compares its losses with the eager one's.
"""

from __future__ import annotations

import argparse
import gc
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from bench.plots import plot_curves, plot_parts
from bench.records import (
    CURVE_LIMITS,
    RESULTS,
    Measured,
    compare_curves,
    folder_name,
    versions,
    write_curves,
    write_steps,
)
from bench.step_count import count_step
from bench.step_meter import PartTimer, host_syncs, matrix_rate, peak_memory, profile
from bench.step_variants import VARIANTS, Step, SyntheticLoader, Variant, build, configure, synthetic_config
from dune_fast.engine.config import RunConfig, compose_config
from dune_fast.engine.deepspeed_engine import init_distributed
from dune_fast.engine.devices import autocast_dtype, device_name
from dune_fast.engine.flops import Flops, run_flops
from dune_fast.kernels.fp8 import E4M3

TURN = 5
"""Steps that a variant runs before it is the next one's turn."""


def chosen(names: Sequence[str]) -> list[Variant]:
    """Variants by name, all if none is given; ValueError for others."""
    known = {variant.name: variant for variant in VARIANTS}
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"there is no variant {', '.join(unknown)}; choose from {', '.join(known)}")
    return [known[name] for name in names] if names else list(VARIANTS)


@dataclass
class Running:
    """A variant that is ready for its turns."""

    step: Step
    held_bytes: int
    """Device memory that it keeps between steps."""
    flops: Flops
    spans: list[list[tuple[str, float]]] = field(default_factory=list)
    """(part, milliseconds) of every measured step."""


class Bench:
    """One experiment on one device: variants, images, meters."""

    def __init__(self, cfg: RunConfig, batch: int, device: torch.device, steps: int, console: Console) -> None:
        self.cfg, self.batch, self.steps = synthetic_config(cfg, batch, steps), batch, steps
        self.device, self.console = device, console
        self.failed: list[str] = []
        """What ended in an error that is not the device's lack of something."""
        self.loader = SyntheticLoader(batch, cfg.image_size, device)
        self.on_gpu = device.type == "cuda"

    def build(self, variant: Variant, timer: PartTimer | None = None) -> Step:
        """A variant's step, with this bench's sizes."""
        return build(self.cfg, variant, self.loader, timer or (lambda part: nullcontext()))

    def measure(self, variants: Sequence[Variant], warm_up: int) -> Iterator[Measured]:
        """Times the variants in turns, then looks at each on its own; one that fails, or runs out of memory beside the
        others, is left out, with a line that says so. A result comes as soon as it is complete."""
        timer = PartTimer(self.device)
        running: dict[str, Running] = {}
        for variant in variants:
            self.console.print(f"{variant.name}: {variant.about}")
            self.attempt(variant.name, running, timer, partial(self.start, variant, running, timer, warm_up))
        for first in range(warm_up, self.steps - TURN + 1, TURN):
            for name in list(running):
                self.attempt(name, running, timer, partial(self.turn, name, running, timer, first))
        dtype = autocast_dtype(self.cfg.train.precision, self.device) or torch.float32
        rate = matrix_rate(self.device, dtype, 8192 if self.on_gpu else 1024)
        rate_fp8 = matrix_rate(self.device, E4M3) if self.on_gpu and "ours+fp8" in running else None
        for name, kept in running.items():
            result = Measured.from_spans(name, self.batch, kept.spans, kept.flops, rate, rate_fp8)
            if self.on_gpu:
                self.inspect(result, kept)
            yield result

    def inspect(self, result: Measured, kept: Running) -> None:
        """Memory, waits and launches of one more step each; what cannot be looked at does not cost the times."""
        last = partial(kept.step, self.steps - 1)
        looks = {
            "peak memory": lambda: setattr(result, "peak_bytes", peak_memory(last, kept.held_bytes)),
            "host syncs": lambda: setattr(result, "host_syncs", host_syncs(last)),
            "launches and gaps": lambda: result.add_profile(profile(last)),
        }
        for name, look in looks.items():
            try:
                look()
            except Exception as error:
                self.failed.append(f"{result.variant}, {name}")
                self.console.print(f"{result.variant}: {name} not measured: {type(error).__name__}: {error}")

    def start(self, variant: Variant, running: dict[str, Running], timer: PartTimer, warm_up: int) -> None:
        """Builds a variant, warms it up and puts it among those that run."""
        before = torch.cuda.memory_allocated() if self.on_gpu else 0
        step = self.build(variant, timer)
        for i in range(warm_up):
            step(i)
        held = (torch.cuda.memory_allocated() if self.on_gpu else 0) - before
        timer.collect()
        running[variant.name] = Running(step, held, run_flops(configure(self.cfg, variant)))

    def turn(self, name: str, running: dict[str, Running], timer: PartTimer, first: int) -> None:
        """Some steps of a variant, timed."""
        for i in range(first, first + TURN):
            with timer("step"):
                running[name].step(i)
        running[name].spans += split_steps(timer.collect())

    def attempt(
        self, name: str, running: dict[str, Running], timer: PartTimer | None, work: Callable[[], None]
    ) -> None:
        """Drops a variant that the device cannot run or has no memory for, with all that it holds."""
        try:
            return work()
        except torch.OutOfMemoryError:
            others = ", ".join(other for other in running if other != name)
            beside = f" beside {others}" if others else ""
            reason = f"out of memory{beside}, left out; to measure it alone: --only {name}"
        except ValueError as error:  # what this device does not have, such as float8
            reason = f"left out: {error}"
        except Exception:
            self.failed.append(name)
            reason = f"left out, failed:\n{traceback.format_exc()}"
        # the error, whose frames hold what the variant does, is gone from here on
        self.console.print(f"{name}: {reason}")
        running.pop(name, None)
        if timer is not None:
            timer.collect()
        self.free()

    def free(self) -> None:
        """Gives back what a variant held; its wrappers and hooks refer to each other."""
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()

    def curve(self, variants: Sequence[Variant]) -> Iterator[tuple[str, list[float]]]:
        """(variant, the loss of every step), each trained on its own from the same start."""
        for variant in variants:
            found: list[float] = []
            self.attempt(variant.name, {}, None, partial(self.train, variant, found))
            self.free()
            if found:
                self.console.print(f"{variant.name}: loss {found[0]:.5f} -> {found[-1]:.5f}")
                yield variant.name, found

    def train(self, variant: Variant, losses: list[float]) -> None:
        """Adds the loss of every step to `losses`, read when all have run."""
        step = self.build(variant)
        values = [step(i) for i in range(self.steps)]
        losses += torch.stack([value.float().cpu() for value in values]).tolist()


def split_steps(spans: Sequence[tuple[str, float]]) -> list[list[tuple[str, float]]]:
    """The spans of several steps, in order: a span called "step" ends each."""
    steps: list[list[tuple[str, float]]] = [[]]
    for span in spans:
        steps[-1].append(span)
        if span[0] == "step":
            steps.append([])
    assert not steps.pop(), "spans after the last step"
    return steps


def curves(bench: Bench, variants: Sequence[Variant], folder: Path, experiment: str) -> int:
    """Trains the eager step and those of the variants that have a limit, and compares; the exit status."""
    compared = [variant for variant in variants if variant.name in CURVE_LIMITS]
    if not compared:
        raise ValueError(f"--curve compares {', '.join(CURVE_LIMITS)} with the eager step; --only names none of them")
    losses = dict(bench.curve(chosen(["eager"])))
    if not losses:
        raise ValueError("without the eager step's losses there is nothing to compare with")
    for name, values in bench.curve(compared):
        losses[name] = values
        write_curves(folder / f"curve_{experiment}.csv", losses)  # now: what cuts the run short takes no curve along
        plot_curves(folder / f"curve_{experiment}.png", experiment, losses)
    good = compare_curves(losses, bench.console.print)
    return 0 if good and not bench.failed else 1


def table(results: Sequence[Measured]) -> Table:
    """One line a variant."""
    columns = ("variant", "ms a step", "images/s", "TFLOP/s", "of matrix rate", "peak GiB", "syncs", "launches", "gaps")
    lines = Table(*columns, box=None)
    for r in results:
        lines.add_row(
            r.variant, f"{r.median_ms:.1f} ({r.p20_ms:.1f} to {r.p80_ms:.1f})", f"{r.images_per_second:.1f}",
            _shown(r.tflops, ".0f"), _shown(r.share_of_matrix_rate, ".1%"),
            _shown(r.peak_bytes and r.peak_bytes / 2**30, ".1f"), _shown(r.host_syncs, "d"), _shown(r.launches, "d"),
            _shown(r.gap_share, ".1%"),
        )  # fmt: skip
    return lines


def _shown(value: float | int | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def count(cfg: RunConfig, batch: int, variants: Sequence[Variant], console: Console) -> int:
    """Prints what a step of every variant would launch, read and hold; the exit status."""
    lines = Table("variant", "operations", "host reads", "held GiB", "peak GiB", "operations by part", box=None)
    for variant in variants:
        if variant.compile:
            continue  # what a compiler makes of it is not known before it has run
        result = count_step(synthetic_config(cfg, batch, 4), variant)
        parts = ", ".join(f"{part} {number}" for part, number in result.operations.most_common())
        total = sum(result.operations.values())
        held, peak = (f"{value / 2**30:.1f}" for value in (result.held_bytes, result.peak_bytes))
        lines.add_row(variant.name, str(total), str(result.host_reads), held, peak, parts)
    console.print(lines)
    return 0


def run(args: argparse.Namespace, console: Console) -> int:
    """Returns the exit status."""
    variants = chosen(args.only)
    device = init_distributed()
    cfg = compose_config([f"experiment={args.experiment}", *args.overrides])
    if device.type == "cpu" and (left_out := [v.name for v in variants if v.gpu_only]):
        console.print(f"left out without a GPU: {', '.join(left_out)}")
        variants = [v for v in variants if not v.gpu_only]
    if args.count:
        return count(cfg, args.batch, variants, console)
    name = device_name(device)
    folder = args.output / folder_name(name)
    if args.curve:
        return curves(Bench(cfg, args.batch, device, args.curve, console), variants, folder, args.experiment)
    steps = args.warm_up + -(-args.steps // TURN) * TURN
    results, everything = [], []
    bench = Bench(cfg, args.batch, device, steps, console)
    for result in bench.measure(variants, args.warm_up):
        results.append(result)  # written one by one: what cuts the run short takes no finished numbers along
        everything = write_steps(folder / "step.json", args.experiment, name, versions(), [result])
    if not results:
        raise ValueError(f"no variant could be measured, see above; where memory lacks, --batch below {args.batch}")
    console.print(table(results))
    plot_parts(folder / f"step_{args.experiment}.png", args.experiment, everything)
    console.print(f"written to {folder}")
    if bench.failed:
        console.print(f"failed, see above: {'; '.join(bench.failed)}")
    return 1 if bench.failed else 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.step", description=__doc__.split("\n\n")[0])
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="Hydra overrides, for all variants")
    parser.add_argument("--experiment", default="dune_336", help="recipe in configs/experiment (default: dune_336)")
    parser.add_argument("--batch", type=int, default=128, help="images a step (default: 128)")
    parser.add_argument("--steps", type=int, default=30, help="measured steps of each variant (default: 30)")
    parser.add_argument("--warm-up", type=int, default=5, help="steps before (default: 5)")
    names = ", ".join(variant.name for variant in VARIANTS)
    parser.add_argument(
        "--only", type=lambda text: text.split(","), default=[], help=f"comma-separated variants, of {names}"
    )
    parser.add_argument("--curve", type=int, metavar="STEPS", help="compare the losses of this many steps instead")
    parser.add_argument("--count", action="store_true", help="count operations, host reads and bytes, without a GPU")
    parser.add_argument("--output", type=Path, default=RESULTS, help="results go to a folder of the device in here")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    console = Console(highlight=False, width=160, soft_wrap=True)
    try:
        return run(parse(argv), console)
    except ValueError as error:
        console.print(str(error))
        return 2


if __name__ == "__main__":
    sys.exit(main())
