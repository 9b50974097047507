"""Two hosts, the small run on them, and the table of what they survived: `make test-clusters`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.clusters.runs import Runs
from tests.clusters.two_hosts import TwoHosts, why_not
from tests.engine.conftest import photos

__all__ = ["photos"]  # a fixture


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where there can be no two hosts, the reason is said."""
    mine = [item for item in items if item.get_closest_marker("clusters")]
    asked = mine and mine[0].config.getoption("--clusters")
    if asked and (reason := why_not()):
        for item in mine:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def hosts(tmp_path_factory) -> Iterator[TwoHosts]:
    """nodeA and nodeB."""
    made = TwoHosts(tmp_path_factory.mktemp("hosts") / "cluster")
    try:
        made.begin()
        yield made
    finally:
        made.end()


@pytest.fixture(scope="session")
def runs(hosts, photos, tmp_path_factory) -> Runs:
    """The small run, with what becomes of it where nothing happens."""
    return Runs(hosts, photos, tmp_path_factory.mktemp("runs"))


@pytest.fixture(autouse=True)
def whole_again(hosts) -> Iterator[None]:
    """A test that fails leaves no command behind, and both hosts up."""
    yield
    for command in hosts.commands:
        command.end()
    for name in hosts.hosts:
        hosts.bring_back(name)


@dataclass
class Row:
    """A line of the table."""

    fault: str
    lost: int | None = None
    """Steps that had to be computed again."""
    seconds: float | None = None
    """From the fault to the message that names it."""
    note: str = ""


ROWS = pytest.StashKey[list[tuple[Row, str]]]()


@pytest.fixture
def row(request) -> Row:
    """The test's line, which it fills in."""
    made = Row(request.function.__name__.removeprefix("test_").replace("_", " "))
    request.node.stash[ROWS] = [made]
    return made


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    report = yield
    if call.when == "call" and ROWS in item.stash:
        verdict = "survived" if report.passed else "LOST"
        item.config.stash.setdefault(ROWS, []).append((item.stash[ROWS][0], verdict))
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """The table."""
    rows = config.stash.get(ROWS, [])
    if not rows:
        return
    terminalreporter.section("what a run on a cluster survives")
    terminalreporter.write_line(f"{'fault':<68} {'verdict':<9} {'steps lost':>10} {'seconds to the message':>23}")
    for row, verdict in rows:
        lost = "-" if row.lost is None else str(row.lost)
        seconds = "-" if row.seconds is None else f"{row.seconds:.1f}"
        terminalreporter.write_line(f"{row.fault:<68} {verdict:<9} {lost:>10} {seconds:>23} {row.note}".rstrip())
