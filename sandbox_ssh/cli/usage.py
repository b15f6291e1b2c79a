"""`sandbox-ssh usage`: what users and tenants have used, by day."""

from __future__ import annotations

import csv
import sys
from datetime import date
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sandbox_ssh import units
from sandbox_ssh.cli import context, output
from sandbox_ssh.cli.context import Context

if TYPE_CHECKING:
    from sandbox_ssh.store.usage import Line


class By(StrEnum):
    user = "user"
    tenant = "tenant"
    day = "day"


def _day(text: str | None) -> str | None:
    try:
        return None if text is None else date.fromisoformat(text).isoformat()
    except ValueError:
        raise typer.BadParameter("a day such as 2026-01-31") from None


@context.command
def usage(
    here: Context,
    by: Annotated[
        list[By] | None, typer.Option(help="What to sum by; may be repeated. \\[default: day and user]")
    ] = None,
    user: Annotated[str | None, typer.Option(metavar="NAME", help="Only of this user.")] = None,
    tenant: Annotated[str | None, typer.Option(metavar="NAME", help="Only of this tenant.")] = None,
    since: Annotated[str | None, typer.Option(metavar="DAY", help="From this day on.", callback=_day)] = None,
    until: Annotated[str | None, typer.Option(metavar="DAY", help="Up to this day, included.", callback=_day)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON; amounts in bytes and seconds.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV; amounts in bytes and seconds.")] = False,
) -> None:
    """Show what sessions have used, live ones up to their last measurement. Days are UTC.

    Exit status: 0 done, 1 failed, 2 wrong usage.

    Example: sandbox-ssh usage --by tenant --since 2026-01-01 --csv
    """
    from sandbox_ssh.store import usage as store

    if as_json and as_csv:
        raise typer.BadParameter("--json or --csv, not both")
    names = [kind.value for kind in dict.fromkeys(by or (By.day, By.user))]
    lines = here.run(
        lambda database: store.report(
            database,
            by=names,
            user=user,
            tenant=tenant,
            since=date.fromisoformat(since) if since else None,
            until=date.fromisoformat(until) if until else None,
        )
    )
    rows = [_plain(line, names) for line in lines]
    if as_json:
        output.print_json(rows)
    elif as_csv:
        _print_csv(rows, names)
    else:
        _print_table(lines, names)


def _plain(line: Line, names: list[str]) -> dict[str, Any]:
    whole = {name: value if name.endswith("seconds") else int(value) for name, value in line.sums.items()}
    return {
        **{name: _text(getattr(line, name)) for name in names},
        **whole,
        "memory_peak_bytes": line.memory_peak_bytes,
    }


def _text(value: object) -> str | None:
    return None if value is None else str(value)


def _print_csv(rows: list[dict[str, Any]], names: list[str]) -> None:
    from sandbox_ssh.store.usage import SUMS

    writer = csv.DictWriter(sys.stdout, [*names, *SUMS, "memory_peak_bytes"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)


def _print_table(lines: Any, names: list[str]) -> None:
    columns = ("SESSIONS", "REFUSED", "TIME", "CPU", "PEAK MEMORY", "IN", "OUT", "NET IN", "NET OUT")
    output.print_table(
        [*(name.upper() for name in names), *columns],
        (
            (
                *(_text(getattr(line, name)) for name in names),
                int(line.sums["sessions"]),
                int(line.sums["refused"]),
                units.duration(line.sums["seconds"]),
                units.duration(line.sums["cpu_seconds"]),
                units.size(line.memory_peak_bytes),
                *(units.size(int(line.sums[name])) for name in ("bytes_in", "bytes_out", "network_in", "network_out")),
            )
            for line in lines
        ),
    )
