"""`dune-fast distill --hostfile` on this machine: a program in the place of ssh runs what it would run elsewhere."""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from dune_fast import cli
from dune_fast.cluster import agent, hosts, session
from dune_fast.cluster.hosts import Host, HostError, launch_on_hosts, read_hostfile
from dune_fast.cluster.ranks import host_command, visible_devices
from dune_fast.cluster.session import Session

SSH = """while true; do case "$1" in -o) shift 2;; -*) shift;; *) break;; esac; done
case "$1" in
    gone*) echo "ssh: connect to host $1 port 22: Connection refused" >&2; exit 255;;
    bare*) echo "sh: 1: cd: can't cd to /work" >&2; exit 2;;
esac
shift; exec sh -c "$*"
"""
RANKS = """
import json, os, signal, sys, time
def leave(number, _):
    print("told", signal.Signals(number).name, flush=True)
    sys.exit(0)
signal.signal(signal.SIGTERM, leave)
print(json.dumps([sys.argv[1:], os.environ["QUOTED"], os.environ["DUNE_FAST_HOSTS"]]), flush=True)
if "fail" in sys.argv and sys.argv[1] == "1":
    sys.exit(3)
time.sleep(60)
"""
WORDS = ['data.datasets={a: {root: "/x y"}}', "name='it''s'", "$HOME `id`"]


@pytest.fixture
def fake_ssh(program) -> None:
    program("ssh", SSH)


@pytest.fixture
def launch(fake_ssh, tmp_path, monkeypatch) -> Callable:
    """Launches `RANKS` in the place of DeepSpeed's launcher; the exit status."""
    monkeypatch.setattr(
        hosts, "host_command", lambda world, node, *rest: [sys.executable, "-u", "-c", RANKS, str(node), *rest[2]]
    )

    def call(lines: str, arguments: list[str], **more) -> int:
        hostfile = tmp_path / "hosts"
        hostfile.write_text(lines)
        options = {"hostfile": hostfile, "missing_hosts": False, "master_addr": "", "port": 0, "debug": False}
        train = SimpleNamespace(global_batch=8, accumulation=1)
        cfg = SimpleNamespace(output_dir=str(tmp_path / "run"), train=train)
        return launch_on_hosts(argparse.Namespace(**options | more), cfg, arguments)

    return call


def test_two_hosts_get_everything_and_save_when_asked(launch, monkeypatch, capfd, tmp_path):
    """Regression: pdsh lost variables and quotes, and signals did not reach the ranks."""
    monkeypatch.setenv("QUOTED", "a 'b' \"c\" $d")

    def stop() -> None:
        said = ""
        while said.count("[[") < 2:
            time.sleep(0.1)
            said += capfd.readouterr().err
        heard.append(said)
        os.kill(os.getpid(), signal.SIGINT)

    heard: list[str] = []
    killer = threading.Thread(target=stop, daemon=True)
    killer.start()
    assert launch("localhost slots=1\n127.0.0.1 slots=1  # the same, by another name\n", WORDS) == 0
    lines = sorted(heard[0].splitlines() + capfd.readouterr().err.splitlines())
    for name, node in (("localhost", "0"), ("127.0.0.1", "1")):
        expected = json.dumps([[node, *WORDS], "a 'b' \"c\" $d", "localhost,127.0.0.1"])
        assert f"{name}: {expected}" in lines and f"{name}: told SIGTERM" in lines
    assert not list((tmp_path / "run").iterdir())


def test_a_host_that_fails_ends_the_others_with_its_status(launch, monkeypatch, caplog):
    monkeypatch.setenv("QUOTED", "")
    monkeypatch.setattr(hosts, "GRACE", 0.5)
    assert launch("localhost slots=1\n127.0.0.1 slots=1\n", ["fail"]) == 3
    assert "a process on 127.0.0.1 has ended with the status 3" in caplog.text


def test_hosts_that_cannot_be_used_are_all_named(launch):
    with pytest.raises(HostError) as caught:
        launch("gone1 slots=1\nbare2 slots=1\n", [])
    assert "gone1: ssh cannot reach it without a password (ssh: connect to host gone1 port 22" in str(caught.value)
    assert "bare2: dune_fast does not start there (sh: 1: cd" in str(caught.value)


def sessions(answers: dict[str, dict], slots: int = 1) -> list[SimpleNamespace]:
    """Host -> what its agent says to each question; an exception is raised."""

    def ask(host: str, do: str, **_: object) -> object:
        answer = answers[host][do]
        if isinstance(answer, Exception):
            raise answer
        return answer

    return [SimpleNamespace(host=Host(name, slots), ask=partial(ask, name)) for name in answers]


FACTS = {"same": {"torch": "2.13.0", "the code of dune_fast": "a" * 64}, "gpus": 0, "addresses": ["10.0.0.1"]}
CFG = SimpleNamespace(train=SimpleNamespace(global_batch=24, accumulation=1))


@pytest.fixture
def pool():
    with ThreadPoolExecutor(4) as threads:
        yield threads


def test_a_host_that_is_lost_is_left_out_if_that_is_asked_for(pool, caplog):
    gone = HostError("c: ssh cannot reach it")
    answers = {"a": {"look": FACTS}, "b": {"look": FACTS}, "c": {"look": gone}, "d": {"look": FACTS}}
    with pytest.raises(HostError, match="c: ssh cannot reach it .--missing-hosts leaves out"):
        hosts._look(sessions(answers, 8), pool, False, CFG)
    found = hosts._look(sessions(answers, 8), pool, True, CFG)
    assert [host.name for host in found] == ["a", "b", "d"] and "c: ssh cannot reach it: left out" in caplog.text


def test_hosts_that_cannot_share_the_batch_stay_idle(pool, caplog):
    answers = {"a": {"look": FACTS}, "b": {"look": FACTS}, "c": {"look": FACTS}, "d": {"look": HostError("d: off")}}
    cfg = SimpleNamespace(train=SimpleNamespace(global_batch=32, accumulation=1))
    found = hosts._look(sessions(answers, 8), pool, True, cfg)
    assert [host.name for host in found] == ["a", "b"] and "c: left idle" in caplog.text
    with pytest.raises(HostError, match="batch=32 cannot be shared by any .* lower their slots"):
        hosts._look(sessions(answers, 5), pool, True, cfg)


def test_too_many_slots_are_refused(pool):
    answers = {"a": {"look": FACTS | {"gpus": 4}}}
    with pytest.raises(HostError, match="a has 4 GPUs for slots=8"):
        hosts._look(sessions(answers, 8), pool, False, CFG)
    answers["b"] = {"look": FACTS}
    assert [host.name for host in hosts._look(sessions(answers, 8), pool, True, CFG)] == ["b"]


def test_other_code_or_packages_are_named():
    answers = {"a": {}, "b": {}}
    other = {"torch": "2.12.0", "the code of dune_fast": "b" * 64}
    both = sessions(answers)
    with pytest.raises(HostError) as caught:
        hosts._compare(both, {both[0].host: FACTS, both[1].host: FACTS | {"same": other}})
    for name, theirs in other.items():
        assert f"{name} on b is not that of a: {theirs} and {FACTS['same'][name]}" in str(caught.value)


def test_a_folder_that_is_not_shared_is_refused(pool):
    answers = {"a": {"mark": "", "see": [], "unmark": None}, "b": {"mark": "", "see": [".host_0"], "unmark": None}}
    with pytest.raises(HostError, match="output_dir=/runs is not one folder that all hosts share: b cannot see"):
        hosts._share_folder(sessions(answers), pool, "/runs")
    answers["b"]["mark"] = "Permission denied: '/runs'"
    with pytest.raises(HostError, match="output_dir=/runs cannot be written everywhere: b: Permission"):
        hosts._share_folder(sessions(answers), pool, "/runs")


def test_the_address_is_one_that_all_reach(pool):
    both = sessions({"a": {"listen": 4000}, "b": {"reach": [["10.0.0.1"], "a: unknown"]}})
    facts = {both[0].host: FACTS}
    assert hosts._meeting_point(both, pool, facts, "", 0) == ("10.0.0.1", 4000)
    with pytest.raises(HostError, match="a cannot be reached at port 4000 .* .from b a: unknown.: open"):
        hosts._meeting_point(both, pool, facts, "10.0.0.9", 0)
    both = sessions({"a": {"listen": HostError("a: Address already in use")}})
    with pytest.raises(HostError, match="port 80 cannot be used: a: Address already in use; --port"):
        hosts._meeting_point(both, pool, facts, "", 80)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "there is no hostfile"), ("", "names no host"), ("# a comment\n\n", "names no host"),
        ("a slots=8\nb\n", "line 2: 'b' is not of the form"), ("a slots=0", "is not of the form"),
        ("a slots=1\na slots=1", "names a twice"), ("-oProxyCommand=x slots=1", "is not of the form"),
    ],
)  # fmt: skip
def test_a_hostfile_that_is_missing_or_wrong_is_refused(text, words, tmp_path, capsys):
    """Regression: with a wrong path the run trained on one machine, and ended with 0."""
    path = tmp_path / "hosts"
    if text is not None:
        path.write_text(text)
    assert cli.main(["distill", "experiment=demo", "--hostfile", str(path)]) == 2
    assert words in capsys.readouterr().err


def test_a_hostfile_is_read(tmp_path):
    path = tmp_path / "hosts"
    path.write_text("# all\nme@a.cluster slots=8 # rack 1\n\nb\tslots=2\n")
    assert read_hostfile(path) == [Host("me@a.cluster", 8), Host("b", 2)]


def test_options_of_hosts_go_with_a_hostfile(tmp_path, capsys):
    (tmp_path / "hosts").write_text("a slots=1\n")
    assert cli.main(["distill", "experiment=demo", "-n", "2", "--hostfile", str(tmp_path / "hosts")]) == 2
    assert cli.main(["distill", "experiment=demo", "--missing-hosts"]) == 2
    said = capsys.readouterr().err
    assert "--processes goes without --hostfile" in said and "go with --hostfile" in said


def test_variables_that_are_a_hosts_own_stay_there():
    environment = {
        "OMP_NUM_THREADS": "4", "DUNE_FAST_CACHE": "/c", "NCCL_DEBUG": "INFO", "HOME": "/me", "SSH_TTY": "x",
        "CUDA_VISIBLE_DEVICES": "3", "RANK": "0", "SLURM_JOB_ID": "1",
    }  # fmt: skip
    assert agent.forwarded(environment).keys() == {"OMP_NUM_THREADS", "DUNE_FAST_CACHE", "NCCL_DEBUG"}


def test_what_the_agent_finds_out(tmp_path):
    run = str(tmp_path / "new" / "run")
    assert agent.mark(run, "a") == "" and agent.see(run, ["a"], 0.0) == [] and agent.see(run, ["a", "b"], 0.0) == ["b"]
    (tmp_path / "file").touch()
    assert "file" in agent.mark(str(tmp_path / "file"), "a")
    with agent.listen(0) as listener:
        port = listener.getsockname()[1]
        assert agent.reach(["127.0.0.1"], port, 1.0) == (["127.0.0.1"], "")
    reached, reason = agent.reach(["127.0.0.1"], port, 1.0)
    assert not reached and reason.startswith("127.0.0.1: ")


def test_gloo_is_told_the_interface_where_the_hosts_name_leads_to_itself(monkeypatch):
    """Debian gives a host's own name the address 127.0.1.1, under which no other host finds it."""
    named = SimpleNamespace(address="10.0.0.5")
    monkeypatch.setattr(agent.psutil, "net_if_addrs", lambda: {"lo": [], "ib0": [named]})
    monkeypatch.setattr(socket, "gethostbyname", lambda _: "127.0.1.1")

    class Probe(socket.socket):
        def getsockname(self):
            return ("10.0.0.5", 1)

    monkeypatch.setattr(socket, "socket", Probe)
    assert agent.interface("127.0.0.1", 9) == "ib0"
    monkeypatch.setattr(socket, "gethostbyname", lambda _: "10.0.0.5")
    assert agent.interface("127.0.0.1", 9) == ""


def test_the_ranks_end_when_nobody_listens_any_more(fake_ssh, monkeypatch, tmp_path):
    """The command, or the network, is gone: they save; nothing stays behind."""
    one = Session(Host("localhost", 1))
    script = (
        "import signal, sys, time\n"
        f"signal.signal(signal.SIGTERM, lambda *_: (open({str(tmp_path / 'saved')!r}, 'w').close(), sys.exit()))\n"
        f"open({str(tmp_path / 'began')!r}, 'w').close()\n"
        "time.sleep(60)\n"
    )
    one.run({"command": [sys.executable, "-c", script], "environment": {}, "meet": ["127.0.0.1", 1]})
    limit = time.monotonic() + 180
    while not (tmp_path / "began").exists():
        assert one.process.poll() is None and time.monotonic() < limit
        time.sleep(0.05)
    one.process.stdin.close()
    assert one.process.wait(20) == 0 and (tmp_path / "saved").exists()
    one.end()


def test_a_host_that_does_not_answer_is_named(fake_ssh, monkeypatch):
    monkeypatch.setattr(session, "ANSWER", 0.1)
    one = Session(Host("localhost", 1))
    try:
        with pytest.raises(HostError, match="localhost has not answered within 0 s"):
            one.ask("look")
    finally:
        one.end()


def test_devices_that_the_user_has_chosen_are_used():
    """Regression: DeepSpeed's runner took the first devices of the machine instead."""
    assert visible_devices({"CUDA_VISIBLE_DEVICES": "2,3"}, 2) == ["2", "3"]
    assert visible_devices({"CUDA_VISIBLE_DEVICES": "2,3"}, 1) == ["2"]
    assert visible_devices({"CUDA_VISIBLE_DEVICES": ""}, 2) == visible_devices({}, 2) == ["0", "1"]


def test_the_launchers_command_is_one_that_deepspeed_understands(monkeypatch):
    from deepspeed.launcher.launch import parse_args

    command = host_command({"a": ["0", "1"], "b": ["0"]}, 1, "10.0.0.1", 4000, ["x={a: 1}"], False)
    assert command[:4] == [sys.executable, "-u", "-m", "deepspeed.launcher.launch"]
    monkeypatch.setattr(sys, "argv", command[3:])
    parsed = parse_args()
    assert (parsed.node_rank, parsed.master_addr, parsed.master_port) == (1, "10.0.0.1", 4000)
    assert Path(parsed.training_script).name == "train.py" and parsed.training_script_args == ["x={a: 1}"]
