"""Plans: what servers ask all the time costs the same however many sessions there have been."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any, cast

import pytest
from sqlalchemy import Connection, Engine, event, insert, select, text

from sandbox_ssh.store import nodes, quotas, sessions, tenants, usage, users
from sandbox_ssh.store.columns import now
from sandbox_ssh.store.database import Database, connect
from sandbox_ssh.store.models import Session, State, User
from sandbox_ssh.store.quotas import Owner
from sandbox_ssh.store.usage import Sample
from tests.rows import admit

if TYPE_CHECKING:
    from sqlalchemy import Table

PAST, USERS = 20_000, 40
COUNTED = {"sessions": 100, "logins_per_hour": 1000, "session_time_per_day": 10**6, "network_per_day": 10**12}
KEY, SCAN = "the key", "a scan"
LIVE = {KEY, *(f"ix_sessions_{name}" for name in ("live_user_id", "live_tenant_id", "live_node", "kill_requests"))}
"""What no past session is in, or one session at a time."""
LATELY = {
    "sqlite": ("ix_sessions_user_id_started_at", "ix_sessions_tenant_id_started_at"),
    # It may take the sessions of all users in the last hour for fewer than they are.
    "postgresql": ("ix_sessions_user_id_started_at", "ix_sessions_tenant_id_started_at", "ix_sessions_started_at"),
}
"""Beginnings of names: the sessions of the last hour are together."""


@pytest.fixture
async def ada(database: Database, database_url: str) -> User:
    """One of many users, of one of four tenants, on one of two nodes; with quotas of all that admission counts."""
    for node in ("one", "two"):
        await nodes.register(database, node, "service", "1")
    for tenant in range(4):
        await tenants.add(database, f"tenant{tenant}", by="root")
        await quotas.change(database, Owner("tenant", f"tenant{tenant}"), COUNTED, by="root")
    for user in range(USERS):
        await users.add(database, f"user{user}", tenant=f"tenant{user % 4}", by="root")
    ada = await users.add(database, "ada", tenant="tenant0", by="root")
    await quotas.change(database, Owner("user", "ada"), COUNTED, by="root")
    async with database.read() as transaction:
        everybody = (await transaction.scalars(select(User))).all()
    with connect(database_url, writes=True) as connection:
        connection.execute(insert(cast("Table", Session.__table__)), list(_past(everybody)))
    if connection.dialect.name == "postgresql":  # as autovacuum does; for SQLite nobody does
        with connect(database_url, writes=True) as connection:
            connection.execute(text("ANALYZE"))
    return ada


def _past(everybody: Any) -> Iterator[dict[str, Any]]:
    for n in range(PAST):
        user = everybody[n % len(everybody)]
        started = now() - timedelta(minutes=PAST - n)
        yield {
            "user_id": user.id, "user_name": user.name, "tenant_id": user.tenant_id, "tenant_name": user.tenant.name,
            "node": ("one", "two")[n % 2], "worker": n % 3, "state": State.CLOSED, "client_address": "192.0.2.1",
            "client_port": 50000, "client_version": "SSH-2.0-OpenSSH_9.2", "auth_method": "publickey", "image": "host",
            "started_at": started, "ended_at": started + timedelta(seconds=30), "bytes_in": 1, "bytes_out": 1,
        }  # fmt: skip


@contextlib.contextmanager
def executed() -> Iterator[list[tuple[str, Any]]]:
    """Statements, with their values, that are executed meanwhile."""
    found: list[tuple[str, Any]] = []

    def note(_: Any, __: Any, statement: str, values: Any, ___: Any, many: bool) -> None:
        found.append((statement, values[0] if many else values))

    event.listen(Engine, "before_cursor_execute", note)
    yield found
    event.remove(Engine, "before_cursor_execute", note)


def reads(connection: Connection, statement: str, values: Any) -> list[str]:
    """How a statement comes by the rows of sessions: for each time that it does, the index."""
    if connection.dialect.name == "postgresql":
        (plan,) = connection.exec_driver_sql(f"EXPLAIN (FORMAT JSON) {statement}", values).scalar_one()
        return list(_postgresql(plan["Plan"]))
    steps = [str(row.detail) for row in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", values)]
    found = [re.fullmatch(r"(?:SEARCH|SCAN) sessions\b(?:.* USING (?:COVERING )?(?:INDEX )?(.*))?", s) for s in steps]
    return [_sqlite(match) for match in found if match is not None]


def _sqlite(step: re.Match[str]) -> str:
    if step[0].startswith("SCAN"):
        return SCAN
    return KEY if step[1].startswith("INTEGER PRIMARY KEY") else step[1].partition(" ")[0]


def _postgresql(plan: dict[str, Any]) -> Iterator[str]:
    index = plan.get("Index Name", "")
    if plan["Node Type"] == "Seq Scan" and plan["Relation Name"] == "sessions":
        yield SCAN
    elif index == "pk_sessions" or index.startswith("ix_sessions"):
        yield KEY if index == "pk_sessions" else index
    for below in plan.get("Plans", ()):
        yield from _postgresql(below)


async def test_past_sessions_are_left_alone(database: Database, database_url: str, ada: User) -> None:
    numbers = [await admit(database, ada, node=node) for node in ("one", "two")]
    assert await sessions.request_kill(database, numbers[0], "root")
    with executed() as statements:
        numbers.append(await admit(database, ada, profile=COUNTED))
        assert await sessions.kills_requested(database, "one", 0) == [(numbers[0], "root")]
        assert await quotas.revision(database) == 5
        await usage.sample(database, "one", [Sample(number, use={"processes": 1}) for number in numbers])
        await nodes.count_nested(database, "one")
        assert await sessions.recover(database, "one", 0, known=numbers, before=now() + timedelta(hours=1)) == 0
    asked = [one for one in statements if one[0].startswith(("SELECT", "UPDATE", "WITH"))]
    with connect(database_url) as connection:
        found = {statement: reads(connection, statement, values) for statement, values in asked}
    lately = 0
    for statement, indexes in found.items():
        live = [index for index in indexes if index in LIVE]
        others = [index for index in indexes if index not in LIVE]
        assert len(live) >= statement.count("ended_at IS NULL"), (indexes, statement)
        assert all(index.startswith(LATELY[connection.dialect.name]) for index in others), (indexes, statement)
        lately += len(others)
    assert lately == 2  # the logins of the user, and those of the tenant
