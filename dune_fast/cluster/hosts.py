"""`dune-fast distill --hostfile`: looks at every host before anything starts, then starts the ranks on all of them.

One ssh connection a host carries everything (see `agent`). Nothing passes through a shell: overrides and variables
arrive as they are, and no list of processes shows variables, which may hold keys.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import re
import signal
import time
import uuid
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from dune_fast.cluster.agent import forwarded
from dune_fast.cluster.ranks import caught_signals, ended_by, host_command
from dune_fast.cluster.session import Host, HostError, Session
from dune_fast.engine.config import RunConfig
from dune_fast.engine.launch import HOSTS, new_job

logger = logging.getLogger(__name__)

GRACE = 30.0
"""Seconds that ranks of the other hosts have to end by themselves once a host's have failed, before they are killed."""


def read_hostfile(path: Path) -> list[Host]:
    """The hosts, in the order of their ranks.

    Raises:
        ValueError: there is no such file, no host in it, or a line that is not `name slots=8`.
    """
    if not path.is_file():
        raise ValueError(f"there is no hostfile {path}: give a file with a line `name slots=8` for each machine")
    hosts: list[Host] = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        found = re.fullmatch(r"([^\s-]\S*)\s+slots=([1-9]\d*)", text)
        if found is None:
            raise ValueError(f"{path}, line {number}: {text!r} is not of the form `name slots=8`")
        hosts.append(Host(found[1], int(found[2])))
    if not hosts:
        raise ValueError(f"the hostfile {path} names no host: give a line `name slots=8` for each machine")
    if twice := [name for name, count in Counter(host.name for host in hosts).items() if count > 1]:
        raise ValueError(f"{path} names {', '.join(twice)} twice: give each machine one line with all its slots")
    return hosts


def launch_on_hosts(args: argparse.Namespace, cfg: RunConfig, arguments: list[str]) -> int:
    """Checks the hosts of `args.hostfile`, runs the ranks on them; the exit status.

    Raises:
        ValueError: the hostfile, or a host, cannot be used; the message names all hosts that cannot, and why.
    """
    hosts = read_hostfile(args.hostfile)
    with ThreadPoolExecutor(len(hosts)) as pool:
        sessions = list(pool.map(Session, hosts))
        try:
            facts = _look(sessions, pool, args.missing_hosts, cfg)
            sessions_used = [session for session in sessions if session.host in facts]
            _compare(sessions_used, facts)
            _share_folder(sessions_used, pool, cfg.output_dir)
            address, port = _meeting_point(sessions_used, pool, facts, args.master_addr, args.port)
            return _run(sessions_used, address, port, arguments, args.debug)
        finally:
            list(pool.map(Session.end, sessions))


def _look(
    sessions: list[Session], pool: ThreadPoolExecutor, missing_allowed: bool, cfg: RunConfig
) -> dict[Host, dict[str, Any]]:
    """What each host says of itself; with `missing_allowed`, of those that answer and share the batch."""

    def ask(session: Session) -> dict[str, Any] | str:
        try:
            return session.ask("look")
        except HostError as error:
            return str(error)

    answers = dict(zip((s.host for s in sessions), pool.map(ask, sessions), strict=True))
    found, faults = {}, []
    for host, answer in answers.items():
        if isinstance(answer, str):
            faults.append(answer)
        elif 0 < answer["gpus"] < host.slots:
            faults.append(f"{host.name} has {answer['gpus']} GPUs for slots={host.slots}")
        else:
            found[host] = answer
    if faults and not (missing_allowed and found):
        raise HostError("; ".join(faults) + " (--missing-hosts leaves out hosts that do not answer)" * (len(found) > 0))
    for fault in faults:
        logger.warning("%s: left out", fault)
    if not faults:
        return found
    chosen = list(found)
    parts = max(1, cfg.train.accumulation)
    while chosen and cfg.train.global_batch % (parts * sum(host.slots for host in chosen)):
        chosen.pop()
    if not chosen:
        raise HostError(
            f"train.global_batch={cfg.train.global_batch} cannot be shared by any of the hosts that are left: "
            f"{', '.join(f'{host.name} slots={host.slots}' for host in found)}; lower their slots"
        )
    if idle := [host.name for host in found if host not in chosen]:
        logger.warning("%s: left idle, so that the others share the batch evenly", ", ".join(idle))
    return {host: found[host] for host in chosen}


def _compare(sessions: list[Session], facts: dict[Host, dict[str, Any]]) -> None:
    """HostError if hosts have different code or packages."""
    first = sessions[0].host
    expected = facts[first]["same"]
    faults = []
    for session in sessions[1:]:
        same = facts[session.host]["same"]
        for name in sorted(expected.keys() | same.keys()):
            ours, theirs = expected.get(name, "none"), same.get(name, "none")
            if ours != theirs:
                faults.append(f"{name} on {session.host.name} is not that of {first.name}: {theirs} and {ours}")
    if faults:
        raise HostError("; ".join(faults) + ": install the same on all hosts")


def _share_folder(sessions: list[Session], pool: ThreadPoolExecutor, folder: str) -> None:
    """HostError unless all hosts see what each of them writes into the run's folder."""
    token = uuid.uuid4().hex
    names = [f".host_{index}_{token}" for index in range(len(sessions))]
    try:
        wrong = pool.map(lambda session, name: session.ask("mark", folder=folder, name=name), sessions, names)
        if faults := [f"{s.host.name}: {text}" for s, text in zip(sessions, wrong, strict=True) if text]:
            raise HostError(f"output_dir={folder} cannot be written everywhere: {'; '.join(faults)}")
        lost = list(pool.map(lambda session: session.ask("see", folder=folder, names=names, seconds=10.0), sessions))
        if alone := [s.host.name for s, missing in zip(sessions, lost, strict=True) if missing]:
            raise HostError(
                f"output_dir={folder} is not one folder that all hosts share: {', '.join(alone)} cannot see what the "
                "others write there; choose one on a shared file system"
            )
    finally:
        with contextlib.suppress(HostError):
            list(pool.map(lambda session: session.ask("unmark", folder=folder, names=names), sessions))


def _meeting_point(
    sessions: list[Session], pool: ThreadPoolExecutor, facts: dict[Host, dict[str, Any]], address: str, port: int
) -> tuple[str, int]:
    """An address and a port of the first host that all others reach; HostError if there is none."""
    first, *others = sessions
    try:
        port = first.ask("listen", port=port)
    except HostError as error:
        raise HostError(f"port {port} cannot be used: {error}; --port chooses another") from None
    candidates = [address] if address else [first.host.name.rpartition("@")[2], *facts[first.host]["addresses"]]
    answers = list(pool.map(lambda s: s.ask("reach", addresses=candidates, port=port, seconds=5.0), others))
    for candidate in candidates:
        if all(candidate in reached for reached, _ in answers):
            return candidate, port
    reasons = "; ".join(f"from {s.host.name} {why}" for s, (_, why) in zip(others, answers, strict=True) if why)
    raise HostError(
        f"{first.host.name} cannot be reached at port {port} by the other hosts ({reasons}): open the port in its "
        "firewall, choose another by --port, or give an address that all reach by --master-addr"
    )


def _run(sessions: list[Session], address: str, port: int, arguments: list[str], debug: bool) -> int:
    """Starts the ranks, waits until all hosts have ended; the first status that is not 0, or 0."""
    names = [session.host.name for session in sessions]
    world = {session.host.name: [str(i) for i in range(session.host.slots)] for session in sessions}
    environment = forwarded(dict(os.environ)) | new_job() | {HOSTS: ",".join(names)}
    logger.info("%d processes on %s, meeting at %s:%d", sum(map(len, world.values())), ", ".join(names), address, port)
    for node, session in enumerate(sessions):
        command = host_command(world, node, address, port, arguments, debug)
        session.run({"command": command, "environment": environment, "meet": [address, port]})

    def pass_on(number: int) -> None:
        for session in sessions:
            session.send(signal.Signals(number).name)

    ended: dict[str, int] = {}
    since, killed = 0.0, False
    with caught_signals(pass_on):
        while any(session.process.poll() is None for session in sessions):
            for session in sessions:
                if (status := session.process.poll()) and session.host.name not in ended and not killed:
                    since = since or time.monotonic()
                    ended[session.host.name] = status
                    logger.error("%s; the other hosts' processes end too", _ending(session.host.name, status))
            if ended and time.monotonic() - since > GRACE:
                since, killed = time.monotonic(), True
                for session in sessions:
                    session.send("SIGKILL")
            time.sleep(0.2)
    return next((status for status in [*ended.values(), *(s.process.wait() for s in sessions)] if status), 0)


def _ending(host: str, status: int) -> str:
    """How a host's processes have ended, in words."""
    if status == 255:
        return f"the connection to {host} is lost: it is down, or the network is"
    how = f"by {name}" if (name := ended_by(status)) else f"with the status {status}"
    return f"a process on {host} has ended {how}"
