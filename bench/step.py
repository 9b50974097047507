"""Measures the whole training step as a user runs it against plain PyTorch: `python -m bench.step`.

Random weights, synthetic images that are on the device already. The variants run one after the other; medians over the
steps. Then each runs once under the profiler (launches, gaps), once under CUDA's sync debug mode and once for its peak
memory. The matrix rate that the step's arithmetic is compared with is measured in the same run.

`--curve STEPS` trains every variant on the same images and compares its losses with the eager one's.
"""

from __future__ import annotations

import argparse
import gc
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median, quantiles

import torch
from rich.console import Console
from rich.table import Table

from bench.records import (
    CURVE_LIMITS,
    RESULTS,
    Measured,
    folder_name,
    relative_difference,
    versions,
    write_curves,
    write_step,
)
from bench.step_meter import host_syncs, matrix_rate, peak_memory, profile, time_calls
from bench.step_variants import VARIANTS, Step, SyntheticLoader, Variant, build, configure, synthetic_config
from dune_fast.engine.config import RunConfig, compose_config
from dune_fast.engine.deepspeed_engine import init_distributed
from dune_fast.engine.devices import autocast_dtype, device_name
from dune_fast.engine.flops import run_flops


def chosen(names: Sequence[str]) -> list[Variant]:
    """Variants by name, all if none is given; ValueError for others."""
    known = {variant.name: variant for variant in VARIANTS}
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"there is no variant {', '.join(unknown)}; choose from {', '.join(known)}")
    return [known[name] for name in names] if names else list(VARIANTS)


class Bench:
    """One experiment on one device: variants, images, meters."""

    def __init__(self, cfg: RunConfig, batch: int, device: torch.device, steps: int, console: Console) -> None:
        self.cfg, self.batch, self.steps = synthetic_config(cfg, batch, steps), batch, steps
        self.device, self.console = device, console
        self.failed: list[str] = []
        """What ended in an error that is not the device's lack of something."""
        self.loader = SyntheticLoader(batch, cfg.image_size, device)
        self.on_gpu = device.type == "cuda"

    def build(self, variant: Variant) -> Step:
        """A variant's step, with this bench's sizes."""
        return build(self.cfg, variant, self.loader)

    def attempt(self, variant: Variant, work: Callable[..., object], *arguments: object) -> object:
        """work(variant, ...); None, with a line that says why, where the device cannot run it. Nothing of it stays."""
        try:
            return work(variant, *arguments)
        except torch.OutOfMemoryError:
            reason = "out of memory"
        except ValueError as error:  # what this device does not have, such as float8
            reason = str(error)
        except Exception:
            self.failed.append(variant.name)
            reason = f"failed:\n{traceback.format_exc()}"
        finally:
            gc.collect()  # wrappers and hooks of a variant refer to each other
            if self.on_gpu:
                torch.cuda.empty_cache()
        self.console.print(f"{variant.name}: left out: {reason}")
        return None

    def measure(self, variant: Variant, warm_up: int, matrix_tflops: float) -> Measured:
        """Times a variant, then looks at it on its own."""
        self.console.print(f"{variant.name}: {variant.about}")
        before = torch.cuda.memory_allocated() if self.on_gpu else 0
        step = self.build(variant)
        times = time_calls(step, range(self.steps), self.device)[warm_up:]
        cuts = quantiles(times, n=5) if len(times) > 1 else times * 4
        result = Measured(variant.name, self.batch, median(times), cuts[0], cuts[-1], versions=versions())
        flops = run_flops(configure(self.cfg, variant)).training
        result.tflops = None if flops is None else flops * self.batch / result.median_ms / 1e9
        result.matrix_tflops = matrix_tflops
        if self.on_gpu:
            self.inspect(result, partial(step, self.steps - 1), before)
        return result

    def inspect(self, result: Measured, step: Callable[[], object], before: int) -> None:
        """Memory, waits and launches of one more step each; what cannot be looked at does not cost the times."""

        def gaps() -> None:
            result.launches, result.gap_share = profile(step)

        for name, look in {
            "peak memory": lambda: setattr(result, "peak_bytes", peak_memory(step) - before),
            "host syncs": lambda: setattr(result, "host_syncs", host_syncs(step)),
            "launches and gaps": gaps,
        }.items():
            try:
                look()
            except Exception as error:
                self.failed.append(f"{result.variant}, {name}")
                self.console.print(f"{result.variant}: {name} not measured: {type(error).__name__}: {error}")

    def curve(self, variant: Variant) -> list[float]:
        """The loss of every step, read when all have run; every variant starts from the same weights."""
        step = self.build(variant)
        values = [step(i) for i in range(self.steps)]
        losses = torch.stack([value.float().cpu() for value in values]).tolist()
        self.console.print(f"{variant.name}: loss {losses[0]:.5f} -> {losses[-1]:.5f}")
        return losses


def curves(bench: Bench, variants: Sequence[Variant], path: Path) -> int:
    """Trains the eager step and those of the variants that have a limit, and compares; the exit status."""
    compared = [variant for variant in variants if variant.name in CURVE_LIMITS]
    if not compared:
        raise ValueError(f"--curve compares {', '.join(CURVE_LIMITS)} with the eager step; --only names none of them")
    losses: dict[str, list[float]] = {}
    good = True
    for variant in [*chosen(["eager"]), *compared]:
        if found := bench.attempt(variant, bench.curve):
            losses[variant.name] = found
            write_curves(path, losses)  # now: what cuts the run short takes no curve along
        if "eager" not in losses:
            raise ValueError("without the eager step's losses there is nothing to compare with")
        if found and (limit := CURVE_LIMITS.get(variant.name)):
            difference = relative_difference(found, losses["eager"])
            good &= difference < limit
            bench.console.print(
                f"{variant.name}: mean relative difference of {len(found)} losses from eager {difference:.2%} "
                f"(limit {limit:.1%}) {'ok' if difference < limit else 'FAIL'}"
            )
    return 0 if good and not bench.failed else 1


def table(results: Sequence[Measured]) -> Table:
    """One line a variant."""
    columns = ("variant", "ms a step", "images/s", "TFLOP/s", "of matrix rate", "peak GiB", "syncs", "launches", "gaps")
    lines = Table(*columns, box=None)
    for r in results:
        peak = r.peak_bytes and r.peak_bytes / 2**30
        found = (
            (r.images_per_second, ".1f"), (r.tflops, ".0f"), (r.share_of_matrix_rate, ".1%"), (peak, ".1f"),
            (r.host_syncs, "d"), (r.launches, "d"), (r.gap_share, ".1%"),
        )  # fmt: skip
        shown = ["-" if value is None else format(value, form) for value, form in found]
        lines.add_row(r.variant, f"{r.median_ms:.1f} ({r.p20_ms:.1f} to {r.p80_ms:.1f})", *shown)
    return lines


def run(args: argparse.Namespace, console: Console) -> int:
    """Returns the exit status."""
    variants = chosen(args.only)
    device = init_distributed()
    cfg = compose_config([f"experiment={args.experiment}", *args.overrides])
    experiment, name = " ".join([args.experiment, *args.overrides]), device_name(device)
    folder = args.output / folder_name(name)
    if args.curve:
        bench = Bench(cfg, args.batch, device, args.curve, console)
        return curves(bench, variants, folder / f"curve_{args.experiment}.csv")
    bench = Bench(cfg, args.batch, device, args.warm_up + args.steps, console)
    dtype = autocast_dtype(cfg.train.precision, device) or torch.float32
    rate = matrix_rate(device, dtype, 8192 if bench.on_gpu else 1024)
    results: list[Measured] = []
    for variant in variants:
        if result := bench.attempt(variant, bench.measure, args.warm_up, rate):
            results.append(result)
            write_step(folder / "step.json", experiment, name, result)
    if not results:
        raise ValueError(f"no variant could be measured, see above; where memory lacks, --batch below {args.batch}")
    console.print(table(results))
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
    only = f"comma-separated variants, of {names}"
    parser.add_argument("--only", type=lambda text: text.split(","), default=[], help=only)
    parser.add_argument("--curve", type=int, metavar="STEPS", help="compare the losses of this many steps instead")
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
