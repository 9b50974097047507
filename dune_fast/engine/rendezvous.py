"""How the ranks of a run meet: they find rank 0's store, say who they are, and connect to each other.

1. Rank 0 serves a key-value store over TCP (under torchrun its agent does). The others look for it at one address.
2. The store says whose it is. A rank of another job that came upon the same port ends with a sentence.
3. Every rank registers. Rank 0 answers with a token drawn for this start, and all further keys begin with it: a store
   that outlives a start, as torchrun's does with `--max-restarts`, holds addresses of processes that are gone.
4. Once all are here, the process group connects them.

Whoever waits for more than ten seconds says for whom. Nobody waits longer than `train.rendezvous_minutes`.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
import uuid
from datetime import timedelta

import torch
import torch.distributed as dist

from dune_fast.engine.launch import LaunchError, Place

logger = logging.getLogger(__name__)

_FIRST_WORD, _LAST_PAUSE = 10.0, 60.0
"""Seconds after which a rank first says what it waits for, and the longest pause until it says so again."""
_RESOLVING = 30.0
"""Seconds in which a host's name may become known: names of containers do a little later than these start."""
_PAUSE = 0.1
"""Seconds between two looks at the store."""


class _Progress:
    """Says from time to time what this rank waits for; ends the process where a library never returns."""

    def __init__(self, place: Place, limit: float) -> None:
        self.who = f"rank {place.rank} on {socket.gethostname()}"
        self.limit, self._began, self._end = limit, time.monotonic(), threading.Event()
        self._text, self._level = "", logging.DEBUG

    def __enter__(self) -> _Progress:
        threading.Thread(target=self._speak, name="rendezvous", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()

    def at(self, text: str, level: int = logging.WARNING) -> None:
        """Says what this rank waits for from now on; LaunchError once the time is over.

        Below WARNING rank 0 speaks for this rank, and has a few seconds more to say why it ends.
        """
        self._text, self._level = text, level
        if time.monotonic() - self._began > self.limit + (level < logging.WARNING) * _FIRST_WORD / 2:
            raise LaunchError(self._over())

    def _over(self) -> str:
        return f"{self._text}; given up after {_minutes(self.limit)} (train.rendezvous_minutes)"

    def _speak(self) -> None:
        pause = _FIRST_WORD
        while not self._end.wait(pause):
            waited = time.monotonic() - self._began
            if waited > self.limit + _FIRST_WORD:
                logger.error("%s", self._over())
                os._exit(2)  # the training thread is in a library that takes no time limit
            limit = _minutes(self.limit)
            logger.log(self._level, "%s; for %.0f s so far, for %s at most", self._text, waited, limit)
            pause = min(2 * pause, _LAST_PAUSE, max(1.0, self.limit + _FIRST_WORD - waited))


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} minutes" if seconds >= 120 else f"{seconds:.0f} s"


def join(place: Place, device: torch.device, minutes: float, timeout: timedelta) -> None:
    """Makes the process group of all ranks, which all call this.

    Args:
        place: this rank's.
        device: this rank's; collectives run over NCCL on a GPU, over gloo on the CPU.
        minutes: how long ranks wait for each other here.
        timeout: of every later collective.

    Raises:
        LaunchError: not all ranks came, or they could not connect; the message says who is missing and what to set.
    """
    backend = "nccl" if device.type == "cuda" else "gloo"
    if place.world_size == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        return
    limit = timedelta(minutes=minutes)
    with _Progress(place, limit.total_seconds()) as progress:
        store = _meet(place, progress)
        progress.at(f"{progress.who} connects to the other ranks")
        try:
            dist.init_process_group(
                backend, store=store, rank=place.rank, world_size=place.world_size, timeout=limit
            )  # fmt: skip
            dist.all_reduce(torch.zeros(1, device=device))  # NCCL connects at the first collective
            if backend == "nccl":  # ranks agree over gloo, too: see `interruption.Stop`
                hosts = dist.new_group(backend="gloo", timeout=limit)
                dist.all_reduce(torch.zeros(1), group=hosts)
                dist.destroy_process_group(hosts)
        except (RuntimeError, ValueError) as error:
            raise LaunchError(
                f"{progress.who}: all {place.world_size} ranks have met at {place.address}:{place.port}, but they "
                f"cannot connect to each other ({str(error).splitlines()[0]}): every host's name must lead the other "
                "hosts to it; GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME choose the network interface (`ip address` "
                "lists them)"
            ) from None
    store.set_timeout(timeout)
    dist.distributed_c10d._set_pg_timeout(timeout)


def _meet(place: Place, progress: _Progress) -> dist.Store:
    """The store of this start, once all ranks are here."""
    try:
        store = _serve(place) if place.serves and place.rank == 0 else _connect(place, progress)
        return (_gather if place.rank == 0 else _register)(store, place, progress)
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        raise LaunchError(
            f"{progress.who}: the store of rank 0 at {place.address}:{place.port} does not answer any more: see what "
            f"rank 0 wrote ({str(error).splitlines()[0]})"
        ) from None


def _serve(place: Place) -> dist.Store:
    """Rank 0's store."""
    try:
        return dist.TCPStore("localhost", place.port, None, True, timedelta(seconds=30), wait_for_workers=False)
    except (dist.DistNetworkError, RuntimeError) as error:
        raise LaunchError(
            f"rank 0 cannot listen on port {place.port} of {socket.gethostname()}, which another program, perhaps "
            f"another run, has taken: set MASTER_PORT to a free one, for all ranks ({str(error).splitlines()[0]})"
        ) from None


def _connect(place: Place, progress: _Progress) -> dist.Store:
    """A connection to rank 0's store, as soon as somebody listens there."""
    began, where = time.monotonic(), f"{place.address}:{place.port}"
    while True:
        try:
            socket.create_connection((place.address, place.port), timeout=5.0).close()
            break
        except socket.gaierror as error:
            if time.monotonic() - began > _RESOLVING:
                raise LaunchError(
                    f"{progress.who}: the name {place.address} of rank 0's host is not known here "
                    f"({error.strerror}): set MASTER_ADDR to an address of that host, for all ranks"
                ) from None
            reason = error.strerror
        except OSError as error:
            reason = error.strerror or str(error)
        progress.at(f"{progress.who}: rank 0 does not answer at {where} ({reason}); MASTER_ADDR says where it is")
        time.sleep(5 * _PAUSE)
    progress.at(f"{progress.who}: what listens at {where} is not a run's store; MASTER_PORT chooses another port")
    return dist.TCPStore(
        place.address, place.port, None, False, timedelta(seconds=progress.limit), wait_for_workers=False
    )  # fmt: skip


def _wait(store: dist.Store, key: str, progress: _Progress, text: str, level: int = logging.WARNING) -> str:
    """The value of a key, once it is there."""
    while not store.check([key]):
        progress.at(text, level)
        time.sleep(_PAUSE)
    return store.get(key).decode()


def _register(store: dist.Store, place: Place, progress: _Progress) -> dist.Store:
    """Of ranks but 0: says who it is, waits for the token and until all are here."""
    at = f"{place.address}:{place.port}"
    owner = _wait(store, "owner", progress, f"{progress.who}: rank 0 has not registered at {at} yet")
    if owner != place.job:
        raise LaunchError(
            f"{progress.who}: the store at {at} is that of {owner or 'an unnamed run'}, this rank belongs to "
            f"{place.job or 'an unnamed run'}: two runs use one port; set MASTER_PORT to another for one of them"
        )
    nonce = uuid.uuid4().hex
    mine = {"nonce": nonce, "node": place.node, "host": socket.gethostname(), "world": place.world_size}
    store.set(f"hello/{place.rank}", json.dumps(mine))
    # rank 0 speaks for all from here on
    token = _wait(store, f"answer/{nonce}", progress, f"{progress.who}: rank 0 does not take it in", logging.DEBUG)
    ours = dist.PrefixStore(token, store)
    ours.set(f"here/{place.rank}", json.dumps(mine))
    others = f"{progress.who}: rank 0 does not say that all ranks are here"
    if refused := _wait(ours, "all", progress, others, logging.DEBUG):
        raise LaunchError(f"{progress.who}: {refused}")
    return ours


def _gather(store: dist.Store, place: Place, progress: _Progress) -> dist.Store:
    """Of rank 0: gives every rank the token, waits until all have come."""
    token, answered = uuid.uuid4().hex, set()
    ours = dist.PrefixStore(token, store)
    store.set("owner", place.job)
    here = {0: {"node": place.node, "host": socket.gethostname(), "world": place.world_size}}
    while len(here) < place.world_size:
        for rank in (r for r in range(1, place.world_size) if r not in here):
            if ours.check([f"here/{rank}"]):
                here[rank] = json.loads(ours.get(f"here/{rank}"))
            elif store.check([f"hello/{rank}"]):  # of this start or, in a store that outlived one, of an earlier one
                nonce = json.loads(store.get(f"hello/{rank}"))["nonce"]
                if nonce not in answered:
                    store.set(f"answer/{nonce}", token)
                    answered.add(nonce)
        try:
            _refuse_sizes(here, place.world_size)
            progress.at(missing(here, place))
        except LaunchError as error:
            ours.set("all", str(error))
            time.sleep(5 * _PAUSE)  # the store ends with this process: the others read why first
            raise
        time.sleep(_PAUSE)
    ours.set("all", "")
    return ours


def _refuse_sizes(here: dict[int, dict], world_size: int) -> None:
    """LaunchError if a rank was started for another number of ranks."""
    for rank, about in here.items():
        if about["world"] != world_size:
            raise LaunchError(
                f"rank {rank} on {about['host']} was started as one of {about['world']} ranks, rank 0 as one of "
                f"{world_size}: give every host the same numbers of hosts and processes"
            )


def missing(here: dict[int, dict], place: Place) -> str:
    """ "1 of 2 hosts is here (nodeA), waiting for nodeB", or which ranks are missing where all hosts are here.

    Args:
        here: rank -> {"node": index of its host, "host": the host's own name}.
        place: of rank 0.
    """
    absent = [rank for rank in range(place.world_size) if rank not in here]
    nodes = {about["node"]: about["host"] for about in here.values()}
    lost = [name for node, name in enumerate(place.nodes) if node not in nodes]
    if lost:
        found, total = len(nodes), len(place.nodes)
        return f"{found} of {total} hosts here ({_few(list(nodes.values()))}), waiting for {_few(lost)}"
    ranks = f"rank{'s' * (len(absent) > 1)} {_few([str(rank) for rank in absent])}"
    return f"{len(here)} of {place.world_size} ranks here, waiting for {ranks}"


def _few(names: list[str]) -> str:
    """At most eight of them."""
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
