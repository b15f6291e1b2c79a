"""`sandbox-ssh session`: who was in, from where, for how long, what it cost; and ending a session."""

from __future__ import annotations

import asyncio
import ipaddress
import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sandbox_ssh import units
from sandbox_ssh.cli import context, output
from sandbox_ssh.cli.context import Context, examples, invoker

if TYPE_CHECKING:
    from sandbox_ssh.store.database import Database
    from sandbox_ssh.store.models import Channel, Session

# Not store.models.State: the help of a command must not load SQLAlchemy. A test holds that they are the same.
STATES = ("starting", "running", "closing", "closed", "refused", "lost")

KILLED_WITHIN = 10.0
"""Seconds that `session kill` waits: a gateway looks for requests twice a second, and its clients get a moment
to read why."""

MAX_ID = 2**63 - 1

app = context.group("Sessions, past and present.")


def _states(values: list[str] | None) -> list[str] | None:
    for value in values or ():
        if value not in STATES:
            raise typer.BadParameter(f"one of {', '.join(STATES)}")
    return values


def _time(text: str | None) -> str | None:
    """Check a time where typer reports it as wrong usage; `parse_time` is called again for its value."""
    if text is not None:
        parse_time(text)
    return text


def parse_time(text: str) -> datetime:
    """An ISO 8601 time, UTC where it names no zone, or how long ago: `90s`, `30m`, `2h`, `7d`."""
    from sandbox_ssh.units import parse_duration

    try:
        return datetime.now(UTC) - timedelta(seconds=parse_duration(text))
    except ValueError:
        pass
    except OverflowError:
        return datetime.min.replace(tzinfo=UTC)
    try:
        moment = datetime.fromisoformat(text)
        return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
    except (ValueError, OverflowError):
        raise typer.BadParameter("a time such as 2025-01-31T18:00Z, or how long ago, such as 30m, 2h or 7d") from None


def _address(text: str | None) -> str | None:
    try:
        return None if text is None else str(ipaddress.ip_address(text))
    except ValueError:
        raise typer.BadParameter("an IPv4 or IPv6 address") from None


@app.command(
    "list",
    epilog=examples(
        "sandbox-ssh session list --state running",
        "sandbox-ssh session list --user alice --since 7d --json",
        "sandbox-ssh session list --since 2025-01-31T18:00Z --until 2025-02-01T06:00Z",
    ),
)
@context.command
def list_(
    here: Context,
    user: Annotated[str | None, typer.Option(metavar="USER", help="Only sessions of this user.")] = None,
    tenant: Annotated[str | None, typer.Option(metavar="TENANT", help="Only sessions of this tenant.")] = None,
    state: Annotated[
        list[str] | None,
        typer.Option(metavar="STATE", help=f"{', '.join(STATES)}; may be repeated.", callback=_states),
    ] = None,
    since: Annotated[
        str | None, typer.Option(metavar="TIME", help="Only sessions that started then or later.", callback=_time)
    ] = None,
    until: Annotated[
        str | None, typer.Option(metavar="TIME", help="Only sessions that started before.", callback=_time)
    ] = None,
    address: Annotated[
        str | None, typer.Option(metavar="IP", help="Only sessions from this address.", callback=_address)
    ] = None,
    node: Annotated[str | None, typer.Option(metavar="NODE", help="Only sessions on this node.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List sessions, the newest last.

    TIME is an ISO 8601 time, in UTC unless it names a zone, or how long ago: 30m, 2h, 7d.
    """
    from sandbox_ssh.store import sessions
    from sandbox_ssh.store.models import State

    found = here.run(
        lambda database: sessions.list_sessions(
            database,
            user=user,
            tenant=tenant,
            states=[State(name) for name in state or ()],
            since=parse_time(since) if since else None,
            until=parse_time(until) if until else None,
            address=address,
            node=node,
        )
    )
    if as_json:
        output.print_json([_as_json(session) for session in found])
    else:
        output.print_table(
            ("ID", "USER", "TENANT", "NODE", "STATE", "STARTED", "LASTED", "FROM", "EXIT", "REASON"),
            map(_row, found),
        )


Number = Annotated[int, typer.Argument(metavar="ID", min=1, max=MAX_ID, help="As `session list` prints it.")]


@app.command("show", epilog=examples("sandbox-ssh session show 42 --json"))
@context.command
def show(
    here: Context, number: Number, as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False
) -> None:
    """Show one session with its channels."""
    from sandbox_ssh.store import sessions

    session = here.run(lambda database: sessions.get(database, number))
    if as_json:
        output.print_json(_as_json(session))
        return
    output.print_details(_details(session))
    if session.channels:
        output.print_table(
            ("CHANNEL", "KIND", "PTY", "OPENED", "LASTED", "EXIT", "COMMAND"), map(_channel_row, session.channels)
        )


@app.command("kill", epilog=examples("sandbox-ssh session kill 42"))
@context.command
def kill(
    here: Context,
    numbers: Annotated[
        list[int], typer.Argument(metavar="ID...", min=1, max=MAX_ID, help="As `session list` prints it.")
    ],
) -> None:
    """End sessions, and wait until they have ended."""
    left = here.run(lambda database: _kill(database, list(dict.fromkeys(numbers)), invoker()))
    if left:
        raise typer.Exit(1)


async def _kill(database: Database, numbers: list[int], by: str) -> list[int]:
    """Ask for the end of each, and say how it came; return those that live on."""
    from sandbox_ssh.store import sessions

    for number in numbers:
        await sessions.request_kill(database, number, by)
    deadline = time.monotonic() + KILLED_WITHIN
    waiting = numbers
    while True:
        left = []
        for number in waiting:
            session = await sessions.get(database, number)
            if session.ended_at is None:
                left.append(number)
            else:
                output.message(f"session {number} has ended: {session.end_reason}")
        waiting = left
        if not waiting or time.monotonic() > deadline:
            break
        await asyncio.sleep(0.1)
    for number in waiting:
        session = await sessions.get(database, number)
        output.message(
            f"session {number} has not ended within {KILLED_WITHIN:.0f} s: is the server on {session.node} running? "
            "Its next start closes the record"
        )
    return waiting


def _lasted(start: datetime, end: datetime | None) -> str | None:
    if end is None:
        return None
    seconds = (end - start).total_seconds()
    return f"{seconds:.1f}s" if seconds < 60 else str(timedelta(seconds=round(seconds)))


def _row(session: Session) -> tuple[object, ...]:
    return (
        session.id,
        session.user_name,
        session.tenant_name,
        session.node,
        session.state,
        session.started_at,
        _lasted(session.started_at, session.ended_at),
        session.client_address,
        session.exit_status,
        session.end_reason,
    )


def _channel_row(channel: Channel) -> tuple[object, ...]:
    return (
        channel.number,
        channel.kind,
        channel.pty,
        channel.opened_at,
        _lasted(channel.opened_at, channel.closed_at),
        channel.exit_signal or channel.exit_status,
        channel.command,
    )


def _details(session: Session) -> list[tuple[str, object]]:
    """All of a session's columns, for a person."""
    killed = session.kill_requested_at and f"{output.cell(session.kill_requested_at)} by {session.kill_requested_by}"
    namespaces, peak = session.namespaces or {}, session.namespaces_peak or {}
    return [
        ("id", session.id),
        ("user", session.user_name),
        ("tenant", session.tenant_name),
        ("node", f"{session.node} (worker {session.worker})"),
        ("state", session.state),
        ("started", session.started_at),
        ("ended", session.ended_at),
        ("lasted", _lasted(session.started_at, session.ended_at)),
        ("reason of the end", session.end_reason),
        ("kill requested", killed),
        ("exit status", session.exit_status),
        ("client", f"{session.client_address} port {session.client_port}"),
        ("client version", session.client_version),
        ("authentication", session.auth_method),
        ("key", session.key_fingerprint),
        ("image", session.image),
        ("bytes in, out", f"{session.bytes_in}, {session.bytes_out}"),
        ("CPU seconds", None if session.cpu_seconds is None else f"{session.cpu_seconds:.3f}"),
        ("peak memory", units.size(session.memory_peak_bytes)),
        ("peak processes", session.processes_peak),
        ("peak disk", units.size(session.disk_peak_bytes)),
        ("peak namespaces", " ".join(f"{kind}:{count}" for kind, count in peak.items()) or None),
        ("network in, out", f"{units.size(session.network_in) or '-'}, {units.size(session.network_out) or '-'}"),
        ("refused by", session.refused_by),
        ("init pid", session.init_pid),
        ("namespaces", " ".join(f"{kind}:[{inode}]" for kind, inode in namespaces.items()) or None),
    ]


def _as_json(session: Session) -> dict[str, Any]:
    return {
        "id": session.id,
        "tenant": session.tenant_name,
        "user": session.user_name,
        "node": session.node,
        "worker": session.worker,
        "state": session.state,
        "end_reason": session.end_reason,
        "client_address": session.client_address,
        "client_port": session.client_port,
        "client_version": session.client_version,
        "auth_method": session.auth_method,
        "key_fingerprint": session.key_fingerprint,
        "image": session.image,
        "started_at": session.started_at,
        "ended_at": session.ended_at,
        "exit_status": session.exit_status,
        "bytes_in": session.bytes_in,
        "bytes_out": session.bytes_out,
        "cpu_seconds": session.cpu_seconds,
        "memory_peak_bytes": session.memory_peak_bytes,
        "processes_peak": session.processes_peak,
        "disk_peak_bytes": session.disk_peak_bytes,
        "namespaces_peak": session.namespaces_peak,
        "network_in": session.network_in,
        "network_out": session.network_out,
        "refused_by": session.refused_by,
        "namespaces": session.namespaces,
        "init_pid": session.init_pid,
        "kill_requested_at": session.kill_requested_at,
        "kill_requested_by": session.kill_requested_by,
        "channels": [_channel_as_json(channel) for channel in session.channels],
    }


def _channel_as_json(channel: Channel) -> dict[str, Any]:
    return {
        "number": channel.number,
        "kind": channel.kind,
        "command": channel.command,
        "pty": channel.pty,
        "opened_at": channel.opened_at,
        "closed_at": channel.closed_at,
        "exit_status": channel.exit_status,
        "exit_signal": channel.exit_signal,
    }
