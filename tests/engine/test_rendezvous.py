"""How ranks meet: threads of this process stand for the ranks, up to the point where torch connects them."""

from __future__ import annotations

import logging
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta

import pytest
import torch.distributed as dist

from dune_fast.engine import rendezvous
from dune_fast.engine.launch import LaunchError, Place, free_port
from dune_fast.engine.rendezvous import missing

NODES = ("nodeA", "nodeB")


def places(count: int, **more) -> list[Place]:
    port = free_port()
    return [
        Place(rank, count, 0, "127.0.0.1", port, node=rank % 2, nodes=NODES[:count], **more) for rank in range(count)
    ]


def meet(place: Place, seconds: float = 20.0) -> dist.Store:
    with rendezvous._Progress(place, seconds) as progress:
        return rendezvous._meet(place, progress)


def outcome(place: Place, seconds: float = 20.0) -> dist.Store | str:
    """The store, or what the rank says instead."""
    try:
        return meet(place, seconds)
    except LaunchError as error:
        return str(error)


def all_meet(ranks: list[Place], seconds: float = 20.0) -> list[dist.Store | str]:
    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(lambda place: outcome(place, seconds), ranks))


def test_ranks_that_meet_share_a_store():
    stores = all_meet(places(3, job="one"))
    stores[2].set("key", "value")
    assert stores[0].get("key") == b"value"


def test_a_rank_of_another_job_is_refused_with_a_sentence():
    """Regression: it joined the store of the job that had the same port."""
    ours = places(2, job="SLURM job 7.0")
    foreign = replace(ours[1], job="SLURM job 8.0")
    with ThreadPoolExecutor(3) as pool:
        first, other = pool.submit(outcome, ours[0]), pool.submit(outcome, foreign)
        said = other.result()
        second = pool.submit(outcome, ours[1])
        assert not isinstance(first.result(), str) and not isinstance(second.result(), str)
    assert "is that of SLURM job 7.0" in said and "set MASTER_PORT" in said


def test_a_port_that_is_taken_is_said():
    with socket.create_server(("0.0.0.0", 0)) as listener:
        place = Place(0, 2, 0, "127.0.0.1", listener.getsockname()[1])
        with pytest.raises(LaunchError, match=f"cannot listen on port {place.port} .* set MASTER_PORT"):
            meet(place)


def test_a_name_that_nobody_knows_asks_for_master_addr(monkeypatch):
    monkeypatch.setattr(rendezvous, "_RESOLVING", 0.3)
    with pytest.raises(LaunchError, match=r"the name df1\.invalid .* is not known here .* set MASTER_ADDR"):
        meet(Place(1, 2, 0, "df1.invalid", 29500))


def test_who_is_missing_is_said_soon_and_again_at_the_end(monkeypatch, caplog):
    """Regression: ranks waited 37 minutes without a word, and ended with a traceback."""
    monkeypatch.setattr(rendezvous, "_FIRST_WORD", 0.3)
    caplog.set_level(logging.WARNING)
    began = time.monotonic()
    said = outcome(places(2)[0], 1.0)
    assert 1.0 <= time.monotonic() - began < 3.0
    assert "1 of 2 hosts here" in said and "waiting for nodeB; given up after 1 s (train.rendezvous_minutes)" in said
    assert any("waiting for nodeB; for 0 s so far, for 1 s at most" in record.message for record in caplog.records)


def test_a_rank_that_waits_for_a_third_hears_from_rank_0():
    ranks = places(3)
    said = all_meet(ranks[:2], 1.0)
    assert all("2 of 3 ranks here, waiting for rank 2; given up" in text for text in said)


def test_rank_0_that_does_not_come_is_said(monkeypatch, caplog):
    monkeypatch.setattr(rendezvous, "_FIRST_WORD", 0.3)
    caplog.set_level(logging.WARNING)
    said = outcome(places(2)[1], 1.0)
    assert "rank 0 does not answer at 127.0.0.1:" in said and "refused" in said and "MASTER_ADDR" in said
    assert any("so far" in record.message for record in caplog.records)


def test_a_store_that_outlives_a_start_serves_the_next(monkeypatch):
    """Regression: under `torchrun --max-restarts` a rank found the address of a process of the attempt before."""
    monkeypatch.setattr(rendezvous, "_FIRST_WORD", 0.5)
    agent = dist.TCPStore("localhost", 0, None, True, timedelta(seconds=20), wait_for_workers=False)
    ranks = [replace(place, port=agent.port, serves=False, job="run") for place in places(2)]
    for attempt in range(3):
        if attempt == 1:  # a rank registered, and was gone before the others came
            with ThreadPoolExecutor(1) as pool:
                assert isinstance(pool.submit(outcome, ranks[1], 0.5).result(), str)
        stores = all_meet(ranks)
        assert not stores[0].check(["address"])
        stores[0].set("address", str(attempt))
        assert stores[1].get("address") == str(attempt).encode()


def test_ranks_that_were_started_for_other_sizes_are_refused():
    first, second = places(2)
    said = all_meet([replace(first, world_size=3), second])
    assert all("rank 1 on " in text and "as one of 2 ranks, rank 0 as one of 3" in text for text in said)


def test_rank_0_that_ends_meanwhile_is_said():
    """Rank 0 is a process here, so that its store ends with it."""
    second = places(2)[1]
    script = (
        "import sys, time, datetime, torch.distributed as dist\n"
        "store = dist.TCPStore('localhost', int(sys.argv[1]), None, True, wait_for_workers=False)\n"
        "store.set('owner', '')\n"
        "store.get('hello/1')\n"
    )
    first = subprocess.Popen([sys.executable, "-c", script, str(second.port)])
    try:
        assert "does not answer any more" in outcome(second, 60.0)
    finally:
        first.kill()
        first.wait()


def test_what_is_missing():
    here = {0: {"node": 0, "host": "a"}}
    assert missing(here, Place(0, 2, 0, nodes=NODES)) == "1 of 2 hosts here (a), waiting for nodeB"
    assert missing(here, Place(0, 3, 0)) == "1 of 3 ranks here, waiting for ranks 1, 2"
    many = tuple(f"n{i}" for i in range(20))
    assert missing(here, Place(0, 20, 0, nodes=many)).endswith("n1, n2, n3, n4, n5, n6, n7, n8 and 11 more")


def test_a_library_that_never_returns_does_not_hold_the_process():
    script = (
        "import time; from dune_fast.engine import rendezvous; from dune_fast.engine.launch import Place\n"
        "rendezvous._FIRST_WORD = 0.2\n"
        "with rendezvous._Progress(Place(0, 2, 0), 0.4) as progress:\n"
        "    progress.at('it connects')\n"
        "    time.sleep(60)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=50)
    assert done.returncode == 2 and "it connects; given up after 0 s" in done.stderr


@pytest.mark.slow
def test_torchruns_of_two_hosts_start_again_after_a_rank_has_died(tmp_path):
    """Regression: both attempts failed, and one side hung. Two agents on this machine stand for the hosts."""
    script = tmp_path / "rank.py"
    script.write_text(
        "import os, datetime, torch, torch.distributed as dist\n"
        "from dune_fast.engine.launch import place\n"
        "from dune_fast.engine.rendezvous import join\n"
        "here = place(os.environ)\n"
        "join(here, torch.device('cpu'), 3.0, datetime.timedelta(minutes=3))\n"
        "if here.rank == 1 and os.environ['TORCHELASTIC_RESTART_COUNT'] == '0':\n"
        "    os._exit(3)\n"
        "total = torch.ones(1)\n"
        "dist.all_reduce(total)\n"
        f"open(rf'{tmp_path}/met{{here.rank}}', 'w').write(str(total.item()))\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    command += ["--rdzv-id", "1"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{free_port()}", "--max-restarts", "2"]
    agents = [subprocess.Popen([*command, str(script)]) for _ in range(2)]
    try:
        assert [agent.wait(280) for agent in agents] == [0, 0]
    finally:
        for agent in agents:
            agent.kill()
            agent.wait()
    assert [(tmp_path / f"met{rank}").read_text() for rank in range(2)] == ["2.0"] * 2
