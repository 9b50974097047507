"""The batch script of `dune-fast launch slurm`: trains, saves ahead of the time limit, queues itself again."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dune_fast.cluster.ranks import TRAIN_SCRIPT
from dune_fast.engine.run_state import STOPPED_STATUS


@dataclass(frozen=True)
class Job:
    """What SLURM is asked for."""

    name: str
    nodes: int
    tasks_per_node: int
    """Ranks on each node, one a GPU."""
    gpus_per_node: int = 0
    time: str = ""
    """Limit in SLURM's form, e.g. 24:00:00; "" for the partition's."""
    partition: str = ""
    cpus_per_task: int = 0
    save_ahead: int = 300
    """Seconds before the limit at which the run is asked to save. SLURM may ask up to a minute earlier."""
    options: tuple[str, ...] = ()
    """Further options of sbatch, e.g. --account=mine."""

    def directives(self) -> list[str]:
        """The #SBATCH lines."""
        found = {
            "job-name": self.name, "nodes": self.nodes, "ntasks-per-node": self.tasks_per_node,
            "gpus-per-node": self.gpus_per_node or "", "cpus-per-task": self.cpus_per_task or "",
            "partition": self.partition, "time": self.time, "signal": f"USR1@{self.save_ahead}",
            "open-mode": "append", "output": "slurm-%j.out",
        }  # fmt: skip
        lines = [f"--{name}={value}" for name, value in found.items() if value != ""]
        return [f"#SBATCH {shlex.quote(line)}" for line in [*lines, "--requeue", *self.options]]


_BODY = """\
cd {folder}
{variables}\
# what the run says of itself, "finished" at its end, and how many steps it has saved
state() {{
    {python} -c 'import json, sys; print(json.load(open(sys.argv[1])).get(sys.argv[2], ""))' {state} "$1" 2>/dev/null
}}
# a node's name in SLURM need not be known to the others, its address in SLURM is
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$(scontrol show node "$first" | sed -n 's/.*NodeAddr=\\([^ ]*\\).*/\\1/p' | head -n 1)
export MASTER_ADDR="${{MASTER_ADDR:-${{address:-$first}}}}"
# srun does not take it over from sbatch; each rank's threads follow from it
[ -z "${{SLURM_CPUS_PER_TASK:-}}" ] || export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"
before=$(state step)

srun --kill-on-bad-exit=1 --wait=0 {command}
status=$?

case "$(state state)" in
    finished | "") exit "$status" ;;
esac
# it was stopped or killed, or has failed: it goes on from the newest checkpoint, unless it gets nowhere
if [ "$status" != 0 ] && [ "$(state step)" = "${{before:-0}}" ]; then
    echo "the run has ended with the status $status, not a step further than before: not queued again" >&2
    exit "$status"
fi
scontrol requeue "$SLURM_JOB_ID" && exit 0
echo "not queued again; \\`sbatch\\` with this script goes on" >&2
exit {unfinished}
"""


def script(job: Job, arguments: Sequence[str], output_dir: str, variables: Mapping[str, str]) -> str:
    """The text of the script, to be run by bash.

    Args:
        arguments: of `train.py`.
        output_dir: the run's folder, relative to the current one or absolute.
        variables: set in the script, by name.
    """
    body = _BODY.format(
        folder=shlex.quote(str(Path.cwd())),
        variables="".join(f"export {name}={shlex.quote(value)}\n" for name, value in variables.items()),
        python=shlex.quote(sys.executable), state=shlex.quote(str(Path(output_dir) / "state.json")),
        command=shlex.join([sys.executable, "-u", str(TRAIN_SCRIPT), *arguments]), unfinished=STOPPED_STATUS,
    )  # fmt: skip
    return "\n".join(["#!/bin/bash", *job.directives(), body])


def submit(text: str) -> str:
    """Gives a script to sbatch; what that says.

    Raises:
        ValueError: there is no sbatch, or it refuses the script.
    """
    try:
        done = subprocess.run(["sbatch"], input=text, capture_output=True, text=True)
    except FileNotFoundError:
        raise ValueError(
            "there is no program sbatch here: leave --submit out, and give the script that is printed to sbatch on a "
            "machine of the cluster"
        ) from None
    if done.returncode:
        raise ValueError(f"sbatch refuses the script: {done.stderr.strip() or done.returncode}")
    return done.stdout.strip()
