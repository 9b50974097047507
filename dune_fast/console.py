"""What all commands share: how one is declared, and how tables and a status look in a terminal."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

_COLOURS = {"ok": "green", "warn": "yellow", "fail": "bold red"}


def add_command(
    commands: argparse._SubParsersAction, name: str, run: Callable[[argparse.Namespace], int], summary: str, **more: Any
) -> argparse.ArgumentParser:
    """Declares a command and returns its parser, for the options.

    Args:
        run: takes the parsed arguments, returns the exit status; its docstring is the help text.
        summary: its line in the list of commands.
        more: of `argparse.ArgumentParser`, such as `epilog`.
    """
    parser = commands.add_parser(name, help=summary, description=inspect.cleandoc(run.__doc__ or ""), **more)
    parser.set_defaults(run_command=run)
    return parser


def console() -> Console:
    """Standard output; lines are not broken, so that paths can be copied."""
    return Console(highlight=False, soft_wrap=True)


def table(*columns: str | Column) -> Table:
    """An empty table without lines."""
    return Table(*columns, box=None, pad_edge=False)


def in_colour(text: str, status: str) -> Text:
    """A text in the colour of "ok", "warn" or "fail"; what is appended to it has none."""
    return Text.assemble((text, _COLOURS[status]))
