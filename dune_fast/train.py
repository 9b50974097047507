"""What a launcher starts on every rank: `deepspeed dune_fast/train.py experiment=demo`.

Composes the configuration from Hydra overrides, trains, evaluates: all ranks within the run, rank 0 at its end.
"""

from __future__ import annotations

import argparse
import errno
import logging
import os
import sys
from pathlib import Path
from typing import Any

# Launched as a script, this folder comes first in the path: `nn`, `distill`, ... would then exist twice.
if sys.path and Path(sys.path[0] or ".").resolve() == Path(__file__).resolve().parent:
    sys.path.pop(0)

from rich.console import Console, Group, RenderableType
from rich.logging import RichHandler

from dune_fast.engine.launch import set_openmp

logger = logging.getLogger("dune_fast")

_ELSEWHERE = "choose another place (output_dir=... for the run, the variable DUNE_FAST_CACHE for the cache)"
_CURES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), f"make room there, or {_ELSEWHERE}"),
    **dict.fromkeys(
        (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.ENAMETOOLONG),
        f"see to it that this user can use it, or {_ELSEWHERE}",
    ),
    **dict.fromkeys(
        (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENOTCONN, errno.ENXIO),
        f"see to it that the storage answers, or {_ELSEWHERE}",
    ),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "allow more open files (`ulimit -n`)"),
}
"""What a user can do about an error of the system; those that are not here are ours, and keep their traceback."""


class _LineHandler(RichHandler):
    """A message is one line, however long: addresses and paths that are folded cannot be copied or searched for."""

    def render(self, *, record: Any, traceback: Any, message_renderable: Any) -> RenderableType:
        line = self.get_level_text(record) + " " + message_renderable
        return line if traceback is None else Group(line, traceback)


def setup_logging(debug: bool, rank: int) -> None:
    """Our own messages on rank 0, warnings of all ranks."""
    handler = _LineHandler(console=Console(stderr=True, soft_wrap=True), rich_tracebacks=debug)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler], force=True)
    for name in ("dune_fast", "teachers", "dali_pipelines"):
        logging.getLogger(name).setLevel(logging.DEBUG if debug else logging.INFO if rank == 0 else logging.WARNING)


def parse(argv: list[str]) -> argparse.Namespace:
    """Our flags and the launcher's; everything else is a Hydra override."""
    parser = argparse.ArgumentParser(prog="dune_fast/train.py", description=__doc__)
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--debug", action="store_true", help="log more, show tracebacks")
    parser.add_argument("overrides", nargs="*", help="e.g. experiment=demo train.steps=100 deepspeed=zero2")
    return parser.parse_args(argv)


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
        from teachers.assets import cache_dir

        places = [f"output_dir={output_dir}"] if output_dir else []
        place = ", ".join([*places, f"the cache folder {cache_dir()}"]) + " or the temporary folder"
    return f"{error.strerror or error}: {place}. Please {_CURES[error.errno]}, then start the command again"


def main(argv: list[str] | None = None) -> int:
    """Entry point of one rank; returns the exit status."""
    set_openmp(os.environ)
    args = parse(sys.argv[1:] if argv is None else argv)
    rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))
    setup_logging(args.debug, rank)
    output_dir, go_on = "", "the run had not begun"
    try:
        from dune_fast.engine.config import compose_config
        from dune_fast.engine.run_folder import how_to_go_on
        from dune_fast.engine.trainer import Trainer
        from dune_fast.evaluate.in_run import InRunEvaluation

        cfg = compose_config(args.overrides)
        output_dir, go_on = cfg.output_dir, how_to_go_on(cfg)
        with InRunEvaluation(cfg) as evaluate:
            trainer = Trainer(cfg, evaluate)
            held_out = cfg.evaluation.held_out and any(len(dataset.val) for dataset in trainer.loader.datasets)
            if rank == 0 and cfg.evaluation.held_out and not held_out:
                logger.warning(
                    "no image is held out, so the student will not be compared with its teachers at the end: set "
                    "data.datasets.<name>.holdout or val_root for that, or evaluation.held_out=false"
                )
            trainer.run()
        if rank == 0 and held_out and not trainer.stopped:
            from dune_fast.evaluate.run import evaluate_run

            evaluate_run(Path(cfg.output_dir), cfg.evaluation.figures, trainer.device)
    except ValueError as error:  # the user's: a sentence; --debug shows where it came from
        logger.error("%s", error, exc_info=args.debug)
        return 2
    except OSError as error:
        if (sentence := explain_system_error(error, output_dir)) is None:
            raise
        logger.error("%s", sentence)
        logger.debug("this is where it came from", exc_info=True)
        return 2
    except KeyboardInterrupt:
        logger.error("interrupted; %s", go_on)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
