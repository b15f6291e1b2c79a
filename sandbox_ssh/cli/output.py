"""What commands print: tables for people and JSON for programs on stdout, messages on stderr.

Everything that comes out of the database may have been chosen by a stranger (a user name that was tried, a client's
version, a command). `printable` is the one place where such text is made harmless before a terminal sees it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

import typer

_NO_LIMIT = 1_000_000


def printable(text: str) -> str:
    """The text with every character that a terminal might act on written as an escape.

    `isprintable` leaves out control characters (C0, DEL, C1), lone surrogates, and the format characters that
    reorder a line (U+202E and its kind).
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def message(text: str) -> None:
    """A sentence for a person, out of the way of what programs read."""
    typer.echo(printable(text), err=True)


def print_json(value: Any) -> None:
    """JSON in ASCII, times in UTC as ISO 8601 with a Z."""
    # json escapes all of C0, and with ensure_ascii all from U+0080 on.
    typer.echo(json.dumps(value, indent=2, default=_plain).replace("\x7f", "\\u007f"))


def _plain(value: object) -> str:
    if isinstance(value, datetime):
        return iso(value)
    raise TypeError(f"{type(value).__name__} has no form in JSON")


def iso(time: datetime) -> str:
    return time.astimezone(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A table; `right` alignment for numbers. Into a pipe, plain lines that are never cut or wrapped."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    piped = not sys.stdout.isatty()
    # rich takes 80 columns where there is no terminal.
    console = Console(highlight=False, width=_NO_LIMIT if piped else None)
    table = Table(box=None if piped else box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, no_wrap=piped, overflow="fold")
    for row in rows:
        # Text, not str: square brackets in it are no markup of rich's.
        table.add_row(*(Text(cell(value), justify=_side(value)) for value in row))
    console.print(table)


def print_details(rows: Iterable[tuple[str, object]]) -> None:
    """One thing's properties, one a line."""
    named = [(name, cell(value)) for name, value in rows]
    width = max((len(name) for name, _ in named), default=0)
    for name, text in named:
        typer.echo(f"{name:<{width}}  {text}")


def cell(value: object) -> str:
    """A value as a person reads it. Times are UTC, as everything in the database is."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, datetime):
        return value.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%SZ")
    return printable(str(value))


def _side(value: object) -> Any:
    return "right" if isinstance(value, (int, float)) and not isinstance(value, bool) else "left"


def is_terminal() -> bool:
    return sys.stdin.isatty() and sys.stderr.isatty()
