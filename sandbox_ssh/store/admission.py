"""Admission: one transaction that counts what is in use against the quotas and records the session, let in or not.

It cannot be raced. On SQLite there is one writer at a time (BEGIN IMMEDIATE); on PostgreSQL the rows of the node and
of the tenant are locked first, so that all logins of a tenant, on whichever node, and all logins of a node come one
after the other, and each counts what the one before it has inserted.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, time, timedelta
from typing import TYPE_CHECKING, Any, cast

from sqlalchemy import (
    ColumnElement,
    Connection,
    FromClause,
    Insert,
    Row,
    Select,
    bindparam,
    func,
    insert,
    select,
    true,
    update,
)

from sandbox_ssh import capacity
from sandbox_ssh.errors import RefusedError, StoreError
from sandbox_ssh.quotas import UNLIMITED, render
from sandbox_ssh.store import audit, quotas, usage
from sandbox_ssh.store.columns import now
from sandbox_ssh.store.database import Database
from sandbox_ssh.store.models import Node, Session, State, Tenant, Usage, User

if TYPE_CHECKING:
    from sqlalchemy import Table

TABLE = cast("Table", Session.__table__)
Wanted = tuple[tuple[str, str], ...]
"""Keys of quotas, and the columns by which they are counted."""
HOUR = timedelta(hours=1)


@dataclass(frozen=True, slots=True)
class Login:
    """Who wants to come in, from where and how, and where to."""

    user: User
    node: str
    worker: int
    client_address: str
    client_port: int
    client_version: str
    auth_method: str
    key_fingerprint: str | None
    image: str
    shortage: str | None = None
    """What the host has too little of for one more sandbox (`capacity.shortage`)."""


@dataclass(frozen=True, slots=True)
class Admitted:
    number: int
    """The session's."""
    quotas: quotas.Effective
    in_use: Mapping[str, int]
    """What was counted for the user, this session not included."""


@dataclass(frozen=True, slots=True)
class _Limit:
    """A quota of the user's or the tenant's that admission counts for."""

    key: str
    value: int
    of: str
    """`user ada` or `tenant physics`, for the sentence."""
    column: Any
    """What to count rows of sessions and of usage by."""
    owner: int


async def admit(database: Database, login: Login, profile: Mapping[str, int]) -> Admitted:
    """Let a session in, as a row `starting`, or record that it was refused.

    Raises `RefusedError` when that is committed, and `StoreError` when nothing could be recorded.
    """
    decision = await database.transact(lambda connection: _decide(connection, login, profile))
    if isinstance(decision, RefusedError):
        raise decision
    return decision


def _decide(connection: Connection, login: Login, profile: Mapping[str, int]) -> Admitted | RefusedError:
    owners = {"user_id": login.user.id, "tenant_id": login.user.tenant_id, "node": login.node}
    rows = connection.execute(_LOCK, owners).all()
    if not rows:
        raise StoreError(f"node {login.node} is not registered, or the tenant of {login.user.name} was removed")
    effective = quotas.combine(rows, profile)
    limits = _limits(login.user, effective)
    values = {**_row(login), "an_hour_ago": now() - HOUR, "today": now().date()}
    counted, number = _enter(connection, tuple((limit.key, limit.column) for limit in limits), values)
    until = functools.partial(_until, connection, effective, {**values, "number": number})
    refusal = _refusal(login, rows[0], limits, counted, until)
    if refusal is not None:
        _refuse(connection, login, number, refusal, values)
        return refusal
    used = {limit.key: _used(counted, limit) for limit in limits if limit.column == "user_id"}
    return Admitted(number, effective, used)


# The rows of quotas that have a say, and with each of them what the node can carry. The rows of node and tenant are
# locked where a database has such locks. Not FOR UPDATE: sessions refer to both rows, and inserting one would wait for
# as long (PostgreSQL, 13.3.2).
_LOCK = (
    select(Node.capacity, Node.nested, quotas.TABLE)
    .select_from(Node)
    .join(Tenant, true())
    .join(quotas.TABLE, quotas.owned_by(bindparam("user_id"), bindparam("tenant_id")))
    .where(Node.name == bindparam("node"), Tenant.id == bindparam("tenant_id"))
    .with_for_update(key_share=True, of=(Node, Tenant))
)


def _limits(user: User, effective: quotas.Effective) -> list[_Limit]:
    keys = ("sessions", "logins_per_hour", "session_time_per_day", "network_per_day")
    found = []
    for of, values, column, owner in (
        (f"user {user.name}", effective.values, "user_id", user.id),
        (f"tenant {user.tenant.name}", effective.tenant, "tenant_id", user.tenant_id),
    ):
        for key in keys:
            value = values.get(key, UNLIMITED)
            # The user's sessions are counted in any case: `quota` tells of them.
            if value != UNLIMITED or (key, column) == ("sessions", "user_id"):
                found.append(_Limit(key, value, of, column, owner))
    return found


def _enter(connection: Connection, wanted: Wanted, values: Mapping[str, Any]) -> tuple[Row[Any], int]:
    """Write the row of a session that is let in, and count what is in use without it: while its fate is open, both
    are for nobody else to see. On PostgreSQL in one statement, which does not see what it writes.
    """
    if connection.dialect.name == "postgresql":
        counted = connection.execute(_count_and_insert(wanted), values).one()
        return counted, counted.number
    counted = connection.execute(_count(wanted), values).one()
    row = {name: values[name] for name in _COLUMNS}
    key = connection.execute(_INSERT, row).inserted_primary_key
    assert key is not None
    return counted, int(key[0])


def _used(counted: Row[Any], limit: _Limit) -> int:
    return int(getattr(counted, f"{limit.key}_{limit.column}") or 0)


@functools.lru_cache
def _count_and_insert(wanted: Wanted) -> Select[Any]:
    new = insert(TABLE).values({name: bindparam(name) for name in _COLUMNS}).returning(TABLE.c.id).cte()
    return _count(wanted).add_columns(new.c.id.label("number")).join(new, true())


@functools.lru_cache
def _count(wanted: Wanted) -> Select[Any]:
    """One row: what is in use of the node, and of each limit.

    Kept, for making such a statement takes longer than the database takes to answer it.
    """
    live = TABLE.c.node == bindparam("node"), TABLE.c.ended_at.is_(None)
    others = func.count(TABLE.c.user_id.distinct()).filter(TABLE.c.user_id != bindparam("user_id"))
    found: FromClause = select(func.count().label("sandboxes"), others.label("users")).where(*live).subquery()
    for part, column in dict.fromkeys((_PARTS[key], column) for key, column in wanted):
        found = found.join(part(column).subquery(), true())
    return select(found)


def _live(column: str) -> Select[Any]:
    mine = TABLE.c[column] == bindparam(column), TABLE.c.ended_at.is_(None)
    return select(func.count().label(f"sessions_{column}")).where(*mine)


def _logins(column: str) -> Select[Any]:
    return select(func.count().label(f"logins_per_hour_{column}")).where(*_lately(column))


def _lately(column: str) -> tuple[ColumnElement[bool], ...]:
    mine = TABLE.c[column] == bindparam(column)
    return mine, TABLE.c.started_at > bindparam("an_hour_ago"), TABLE.c.state != State.REFUSED


def _today(column: str) -> Select[Any]:
    sums: list[Any] = [
        func.sum(Usage.seconds).label(f"session_time_per_day_{column}"),
        func.sum(Usage.network_in + Usage.network_out).label(f"network_per_day_{column}"),
    ]
    return select(*sums).where(getattr(Usage, column) == bindparam(column), Usage.day == bindparam("today"))


_PARTS = {"sessions": _live, "logins_per_hour": _logins, "session_time_per_day": _today, "network_per_day": _today}


def _refusal(
    login: Login, node: Row[Any], limits: list[_Limit], counted: Row[Any], until: Callable[[_Limit, int], str]
) -> RefusedError | None:
    for limit in limits:
        used = _used(counted, limit)
        if used >= limit.value != UNLIMITED:
            amount = f"{render(limit.key, used)} of {render(limit.key, limit.value)}"
            reason = f"quota {limit.key} of {limit.of}: {amount} in use, until {until(limit, used)}"
            return RefusedError(limit.key, reason)
    if (full := _full(login, node, counted)) is not None:
        return RefusedError("capacity", f"this server is full: {full} in use, until a session ends")
    return None


def _full(login: Login, node: Row[Any], counted: Row[Any]) -> str | None:
    """What the node has no more of; before the kernel says so."""
    if login.shortage is not None:
        return login.shortage
    if node.capacity is None:
        return None  # it has just started
    if counted.sandboxes >= node.capacity["sandboxes"]:
        return f"{counted.sandboxes} of {node.capacity['sandboxes']} sessions ({node.capacity['bound']})"
    if counted.users >= node.capacity["users"]:
        return f"the ids of all {node.capacity['users']} users"
    return capacity.nested_left(node.capacity["limits"], counted.sandboxes, node.nested or {})


def _until(
    connection: Connection, effective: quotas.Effective, values: Mapping[str, Any], limit: _Limit, used: int
) -> str:
    """When the one who was refused may try again."""
    if limit.key == "sessions":
        # Only of the user's own sessions is it known how long they may last.
        length = effective.values["session_time"] if limit.column == "user_id" else UNLIMITED
        # Not min(): with it, SQLite walks all past sessions by their start.
        mine = TABLE.c[limit.column] == limit.owner, TABLE.c.ended_at.is_(None), TABLE.c.id != values["number"]
        started = min(connection.scalars(select(TABLE.c.started_at).where(*mine))) if length != UNLIMITED else None
        latest = f", {_moment(started + timedelta(seconds=length))} at the latest" if started else ""
        return f"one of them ends{latest}"
    if limit.key == "logins_per_hour":
        query = select(TABLE.c.started_at).where(*_lately(limit.column), TABLE.c.id != values["number"])
        query = query.order_by(TABLE.c.started_at)
        started = connection.scalar(query.offset(used - limit.value).limit(1), values)
        return _moment((started or now()) + HOUR)
    return _moment(datetime.combine(now().date() + timedelta(days=1), time(), UTC))


def _moment(when: datetime) -> str:
    return when.strftime("%Y-%m-%d %H:%M:%SZ")


# The table, not the model: the ORM would ask for the row again to make an object that nobody wants.
_INSERT = insert(TABLE)
_COLUMNS = (
    "user_id", "user_name", "tenant_id", "tenant_name", "node", "worker", "client_address", "client_port",
    "client_version", "auth_method", "key_fingerprint", "image", "state", "started_at", "bytes_in", "bytes_out",
)  # fmt: skip


def _row(login: Login) -> dict[str, Any]:
    return {
        "user_id": login.user.id,
        "user_name": login.user.name,
        "tenant_id": login.user.tenant_id,
        "tenant_name": login.user.tenant.name,
        "node": login.node,
        "worker": login.worker,
        "client_address": login.client_address,
        "client_port": login.client_port,
        "client_version": login.client_version,
        "auth_method": login.auth_method,
        "key_fingerprint": login.key_fingerprint,
        "image": login.image,
        "state": State.STARTING,
        "started_at": now(),
        "bytes_in": 0,
        "bytes_out": 0,
    }


def _refuse(
    connection: Connection, login: Login, number: int, refusal: RefusedError, values: Mapping[str, Any]
) -> None:
    ended = {"state": State.REFUSED, "refused_by": refusal.key, "end_reason": str(refusal)}
    connection.execute(update(TABLE).where(TABLE.c.id == number).values(**ended, ended_at=values["started_at"]))
    connection.execute(usage.refused(connection, values))
    connection.execute(_event(login, number, str(refusal)))


def _event(login: Login, number: int, reason: str) -> Insert:
    return audit.event(
        "session-refused",
        node=login.node,
        user=login.user.name,
        tenant=login.user.tenant.name,
        session=number,
        address=login.client_address,
        detail={"reason": reason},
    )
