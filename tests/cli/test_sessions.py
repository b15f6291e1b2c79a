"""`sandbox-ssh session`."""

from __future__ import annotations

import asyncio
import os
import pwd
import threading
import time
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import update

from sandbox_ssh.cli import session as session_commands
from sandbox_ssh.store import nodes, sessions, users
from sandbox_ssh.store.database import Database
from sandbox_ssh.store.models import Session, State
from tests import rows
from tests.cli.conftest import Command
from tests.rows import do

CONTRACT = {
    "id", "tenant", "user", "node", "state", "end_reason", "client_address", "client_version", "auth_method",
    "key_fingerprint", "image", "started_at", "ended_at", "exit_status", "bytes_in", "bytes_out", "cpu_seconds",
    "memory_peak_bytes", "namespaces", "init_pid", "channels",
}  # fmt: skip
HOSTILE = "SSH-2.0-\x1b]0;owned\x07[bold]\u202e\x9b2J"


async def admit(database: Database, name: str = "alice", **changed: Any) -> int:
    user = await users.find(database, name) or await users.add(database, name, by="root")
    await nodes.register(database, "one", "service", "0.1")
    return await rows.admit(database, user, **changed)


async def finish(database: Database, number: int, reason: str = "exit") -> None:
    await rows.close(database, number, reason, bytes_in=1, bytes_out=2, cpu_seconds=0.5, memory_peak_bytes=4096)


async def started(database: Database, number: int, moment: datetime) -> None:
    async with database.write() as transaction:
        await transaction.execute(update(Session).where(Session.id == number).values(started_at=moment))


def test_states_are_those_of_the_store() -> None:
    assert list(session_commands.STATES) == list(State)


def test_list_is_the_interface_that_scripts_rely_on(on: Command, database_url: str) -> None:
    async def work(database: Database) -> None:
        number = await admit(database)
        await sessions.running(database, number, 4711, {"user": 4026532801, "mnt": 4026532802})
        await sessions.open_channel(database, number, 0, "exec", "true", False)
        await sessions.close_channel(database, number, 0, 0, None)
        await finish(database, number)
        await admit(database, "bob")

    do(database_url, work)
    listed = on("session", "list", "--json")
    assert (listed.status, listed.err) == (0, "")
    first, second = listed.json
    assert first.keys() >= CONTRACT and second.keys() >= CONTRACT
    assert (first["user"], first["tenant"], first["state"], first["end_reason"]) == (
        "alice",
        "default",
        "closed",
        "exit",
    )
    assert first["namespaces"] == {"user": 4026532801, "mnt": 4026532802}
    assert first["channels"][0]["command"] == "true" and first["channels"][0]["exit_status"] == 0
    for name in ("started_at", "ended_at"):
        assert first[name].endswith("Z") and datetime.fromisoformat(first[name]).utcoffset() == timedelta(0)
    assert (second["state"], second["ended_at"], second["namespaces"], second["channels"]) == (
        "starting",
        None,
        None,
        [],
    )
    assert on("session", "show", first["id"], "--json").json == first
    assert "4026532801" in on("session", "show", first["id"]).out
    lines = on("session", "list").out.splitlines()
    assert len(lines) == 3 and lines[1].split()[:5] == [str(first["id"]), "alice", "default", "one", "closed"]


def test_empty_list(on: Command) -> None:
    assert on("session", "list", "--json").json == []
    assert on("session", "list").status == 0


def test_filters(on: Command, database_url: str) -> None:
    now = datetime.now(UTC)

    async def work(database: Database) -> list[int]:
        old = await admit(database)
        await finish(database, old)
        await started(database, old, now - timedelta(days=3))
        recent = await admit(database, "bob", client_address="2001:db8::1")
        await started(database, recent, now - timedelta(minutes=90))
        return [old, recent, await admit(database)]

    old, recent, new = do(database_url, work)

    def ids(*arguments: str) -> list[int]:
        result = on("session", "list", "--json", *arguments)
        assert result.status == 0, result.err
        return [session["id"] for session in result.json]

    assert ids() == [old, recent, new]
    assert ids("--user", "alice") == [old, new]
    assert ids("--state", "closed") == [old]
    assert ids("--state", "closed", "--state", "starting", "--user", "bob") == [recent]
    assert ids("--since", "2h") == ids("--since", "7200s") == ids("--since", "1d") == [recent, new]
    assert ids("--since", "7d", "--until", "2h") == [old]
    moment = now - timedelta(days=1)
    assert ids("--since", moment.isoformat()) == ids("--since", moment.strftime("%Y-%m-%dT%H:%M")) == [recent, new]
    assert ids("--until", f"{moment:%Y-%m-%d}") == [old]
    assert ids("--address", "2001:0db8:0::1") == [recent]
    assert ids("--node", "one", "--tenant", "default") == [old, recent, new]
    assert ids("--node", "two") == ids("--tenant", "physics") == []


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (("list", "--state", "zombie"), 2, "starting, running"),
        (("list", "--since", "yesterday"), 2, "30m, 2h or 7d"),
        (("list", "--until", "2025-13-01"), 2, "30m, 2h or 7d"),
        (("list", "--address", "host"), 2, "address"),
        (("show", "0"), 2, "greater than or equal to 1"),
        (("show", "9223372036854775808"), 2, "less than or equal to 9223372036854775807"),
        (("show", "9223372036854775807"), 1, "no session 9223372036854775807"),
        (("show", "x"), 2, "x"),
        (("kill",), 2, "ID"),
        (("kill", "77"), 1, "no session 77"),
    ],
)
def test_mistakes(command: Command, sqlite_url: str, arguments: tuple[str, ...], status: int, words: str) -> None:
    result = command("--database-url", sqlite_url, "session", *arguments)
    assert (result.status, result.out) == (status, "")
    assert words in result.sentence and "Traceback" not in result.err


def test_no_stranger_writes_to_the_terminal(on: Command, database_url: str) -> None:
    async def work(database: Database) -> int:
        number = await admit(database, client_version=HOSTILE)
        await sessions.open_channel(database, number, 0, "exec", f"echo {HOSTILE}\n\x00\udc80", False)
        return number

    number = do(database_url, work)
    for arguments in (("list",), ("show", number), ("show", number, "--json"), ("list", "--json")):
        result = on("session", *arguments)
        assert result.status == 0
        assert all(character.isprintable() or character == "\n" for character in result.out)
    shown = on("session", "show", number).out
    assert "\\x1b]0;owned\\x07[bold]\\u202e\\x9b2J" in shown
    assert on("session", "show", number, "--json").json["client_version"] == HOSTILE


def test_kill_waits_until_the_gateway_has_ended_it(on: Command, database_url: str) -> None:
    number = do(database_url, admit)

    async def gateway(database: Database) -> list[tuple[int, str]]:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            if wanted := await sessions.kills_requested(database, "one", 0):
                await finish(database, number, "killed")
                return wanted
            await asyncio.sleep(0.05)
        return []

    found: list[tuple[int, str]] = []
    thread = threading.Thread(target=lambda: found.extend(do(database_url, gateway)))
    thread.start()
    killed = on("session", "kill", number)
    thread.join()
    assert (killed.status, killed.err) == (0, f"session {number} has ended: killed\n")
    assert found == [(number, pwd.getpwuid(os.getuid()).pw_name)]
    again = on("session", "kill", number)
    assert (again.status, again.err) == (0, f"session {number} has ended: killed\n")


def test_kill_says_so_when_nobody_answers(command: Command, sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_commands, "KILLED_WITHIN", 0.3)
    number = do(sqlite_url, admit)
    result = command("--database-url", sqlite_url, "session", "kill", number)
    assert result.status == 1 and f"session {number} has not ended" in result.err and "one" in result.err
