"""What a launcher starts on every rank: `deepspeed dune_fast/train.py experiment=demo`.

Composes the configuration from Hydra overrides, trains, evaluates: all ranks within the run, rank 0 at its end.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import logging
import os
import shlex
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

# Launched as a script, this folder comes first in the path: `nn`, `distill`, ... would then exist twice.
if sys.path and Path(sys.path[0] or ".").resolve() == Path(__file__).resolve().parent:
    sys.path.pop(0)

from dune_fast.engine.overrides import CONFIGS
from dune_fast.engine.run_log import setup_logging
from dune_fast.teachers.local_paths import local

if TYPE_CHECKING:
    from dune_fast.engine.config import RunConfig

from dune_fast.engine.launch import set_openmp

logger = logging.getLogger("dune_fast")

END_SECONDS = 10.0
"""How long the end of a process may take once everything is saved and said."""

_ELSEWHERE = (
    "choose another place (output_dir=... for the run, --out for results, the variable DUNE_FAST_CACHE for the cache)"
)
_CURES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), f"make room there, or {_ELSEWHERE}"),
    **dict.fromkeys(
        (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.ENAMETOOLONG),
        f"see to it that this user can use it, or {_ELSEWHERE}",
    ),
    **dict.fromkeys((errno.EEXIST, errno.EISDIR), f"take away what is there, or {_ELSEWHERE}"),
    **dict.fromkeys(
        (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENOTCONN, errno.ENXIO),
        f"see to it that the storage answers, or {_ELSEWHERE}",
    ),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "allow more open files (`ulimit -n`)"),
}
"""What a user can do about an error of the system; those that are not here are ours, and keep their traceback."""


def parse(argv: list[str]) -> argparse.Namespace:
    """Our flags and the launcher's; everything else is a Hydra override."""
    parser = argparse.ArgumentParser(prog="dune_fast/train.py", description=__doc__)
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--debug", action="store_true", help="log more, show tracebacks")
    parser.add_argument("--config-dir", help="a folder of your own files, like configs/ (also: ./configs)")
    parser.add_argument("--run", type=local, help="go on with the run in this folder, under its own configuration")
    parser.add_argument("overrides", nargs="*", help="e.g. experiment=demo train.steps=100 deepspeed=zero2")
    return parse_mixed(parser, argv)


def parse_mixed(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """Parses overrides that have options between them, which argparse on its own refuses."""
    args, rest = parser.parse_known_args(argv)
    if rest and ("overrides" not in args or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides = [*args.overrides, *rest]
    if getattr(args, "config_dir", None):
        os.environ[CONFIGS] = os.pathsep.join(filter(None, [args.config_dir, os.environ.get(CONFIGS)]))
    return args


def run_config(run: Path | None, overrides: list[str]) -> RunConfig:
    """The configuration of a start: composed from `configs/`, or that of a run that goes on.

    Args:
        run: folder of the run that goes on; None for a new one.
        overrides: Hydra overrides.

    Raises:
        ConfigError: it cannot be composed, or `run` is not a run's folder.
    """
    from dune_fast.engine.config import compose_config

    if run is None:
        return compose_config(overrides)
    going_on = ["train.resume=true", "train.overwrite=false", f"output_dir={run}"]
    return compose_config([*overrides, *going_on], run)


def explain_system_error(error: OSError, output_dir: str) -> str | None:
    """What is wrong, where, and what to do about it, in a sentence; None for an error that no user can mend.

    Args:
        error: from a run that could not start or go on.
        output_dir: of the run, "" where it is not known yet.
    """
    if error.errno not in _CURES:
        return None
    where = error.filename2 or error.filename  # a disk that is full does not say which file it was
    if isinstance(where, (str, bytes, os.PathLike)):
        place = os.fsdecode(where)
    else:
        from dune_fast.teachers.files import cache_dir

        places = [f"output_dir={output_dir}"] if output_dir else []
        with contextlib.suppress(ValueError):  # a user without a home folder has none
            places.append(f"the cache folder {cache_dir()}")
        place = ", ".join([*places, "the temporary folder"])
    return f"{error.strerror or error}: {place}. Please {_CURES[error.errno]}, then start the command again"


def what_next(run: str) -> str:
    """What a user does with a run that has ended, in commands that can be copied."""
    folder = shlex.quote(run)
    return (
        f"done. Next: `dune-fast evaluate {folder}`, `dune-fast export {folder} --to timm` (or hf, onnx, safetensors, "
        f"dune), in Python dune_fast.load_encoder({run!r})"
    )


def main(argv: list[str] | None = None) -> int:
    """Entry point of one rank; returns the exit status."""
    set_openmp(os.environ)
    args = parse(sys.argv[1:] if argv is None else argv)
    rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))
    setup_logging(args.debug, rank)
    if not args.debug:  # a lost connection is one sentence of ours, not forty lines of torch's
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    started = Started()
    try:
        status, why = train(args, rank, started), ""
    except ValueError as error:  # the user's: a sentence; --debug shows where it came from
        status, why = 2, str(error)
        logger.error("%s", error, exc_info=args.debug)
    except OSError as error:
        sentence = explain_system_error(error, started.output_dir)
        status, why = (1, str(error)) if sentence is None else (2, sentence)
        if sentence is None:
            logger.critical("an error that should not be", exc_info=True)
        else:
            logger.error("%s", sentence)
            logger.debug("this is where it came from", exc_info=True)
    except KeyboardInterrupt:
        status, why = 130, "interrupted"
        logger.error("interrupted; %s", started.go_on)
    except Exception as error:
        from dune_fast.engine.watchdog import LostRankError, is_communication_error

        status, why = 1, str(error)
        if isinstance(error, LostRankError):
            logger.error("%s", error, exc_info=args.debug)
        elif is_communication_error(error):  # before the watchdog looks
            first = str(error).splitlines()[0]
            logger.error("another rank cannot be reached (%s); %s", first, started.go_on, exc_info=args.debug)
        else:  # ours; the traceback goes to the run's folder too
            logger.critical("an error that should not be", exc_info=True)
    if why and started.output_dir:
        from dune_fast.engine.run_state import fail

        fail(Path(started.output_dir), why)
    return status


@dataclass
class Started:
    """What is known of a run when it fails."""

    output_dir: str = ""
    go_on: str = "the run had not begun"
    """How it goes on."""


def train(args: argparse.Namespace, rank: int, started: Started) -> int:
    """Trains and evaluates; returns the exit status. Fills in `started` as soon as it is known."""
    from dune_fast.engine.run_folder import how_to_go_on

    cfg = run_config(args.run, args.overrides)
    started.output_dir, started.go_on = cfg.output_dir, how_to_go_on(cfg)
    if not cfg.head.kind:
        return distill(cfg, rank)
    from dune_fast.tasks.run import train_head

    return train_head(cfg, rank)


def distill(cfg: RunConfig, rank: int) -> int:
    """Trains a student and evaluates it; returns the exit status."""
    from dune_fast.engine.run_state import FINISHED, write_state
    from dune_fast.engine.trainer import Trainer
    from dune_fast.evaluate.in_run import InRunEvaluation

    with InRunEvaluation(cfg) as evaluate:
        trainer = Trainer(cfg, evaluate)
        held_out = cfg.evaluation.held_out and any(len(dataset.val) for dataset in trainer.task.loader.datasets)
        if rank == 0 and cfg.evaluation.held_out and not held_out:
            logger.warning(
                "no image is held out, so the student will not be compared with its teachers at the end: set "
                "data.datasets.<name>.holdout or val_root for that, or evaluation.held_out=false"
            )
        trainer.run()
    if rank:
        return 0
    from dune_fast.evaluate.live_report import LiveReport

    report = LiveReport(Path(cfg.output_dir))
    if trainer.stopped:
        report.write()
        return 0
    if held_out:
        from dune_fast.evaluate.run import evaluate_run

        evaluate_run(Path(cfg.output_dir), cfg.evaluation.figures, trainer.device, must_draw=False)
    report.write(finished=True)
    write_state(Path(cfg.output_dir), FINISHED, cfg.steps, cfg.steps)
    logger.info("%s", what_next(cfg.output_dir))
    return 0


def leave(status: int) -> NoReturn:
    """Ends the process: after a while in any case, for a thread may be stuck in a read that nothing ends."""
    end = threading.Timer(END_SECONDS, os._exit, [status])
    end.daemon = True
    end.start()
    sys.exit(status)


if __name__ == "__main__":
    leave(main())
