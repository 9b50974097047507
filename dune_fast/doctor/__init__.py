"""`dune-fast doctor`: is this machine, and what an experiment needs, ready? One line a check, with the cure."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

logger = logging.getLogger(__name__)

OK, WARN, FAIL = "ok", "warn", "fail"


@dataclass(frozen=True)
class Finding:
    """What a check has found."""

    name: str
    """What was looked at."""
    status: str
    """`OK`, `WARN` (a training starts, but see the text) or `FAIL` (it does not, or goes wrong)."""
    text: str
    """What it is like."""
    cure: str = ""
    """What to do; never empty where the status is not `OK`."""

    def __post_init__(self) -> None:
        assert self.status in (OK, WARN, FAIL) and (self.status == OK or self.cure), self


Check = Callable[[], "Finding | Iterable[Finding]"]


def examine(checks: Iterable[tuple[str, Check]]) -> Iterator[Finding]:
    """Makes one check (name, function) after the other; one that breaks down is a finding too."""
    for name, check in checks:
        try:
            found = check()
            yield from [found] if isinstance(found, Finding) else found
        except Exception as error:  # whatever a broken installation raises
            logger.debug("check %s", name, exc_info=True)
            reason = (str(error) or type(error).__name__).strip().splitlines()[0]
            yield Finding(name, FAIL, reason, "`dune-fast --debug doctor` shows where it comes from")
