"""Admission: one transaction that counts what is in use against the quotas and records the session, let in or not.

It cannot be raced. On SQLite there is one writer at a time (BEGIN IMMEDIATE); on PostgreSQL the rows of the node and
of the tenant are locked first, so that all logins of a tenant, on whichever node, and all logins of a node come one
after the other, and each counts what the one before it has inserted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, time, timedelta
from typing import TYPE_CHECKING, Any, cast

from sqlalchemy import Row, Select, and_, func, insert, select, true
from sqlalchemy.ext.asyncio import AsyncSession

from sandbox_ssh import capacity
from sandbox_ssh.errors import RefusedError, StoreError
from sandbox_ssh.quotas import UNLIMITED, render
from sandbox_ssh.store import audit, quotas, usage
from sandbox_ssh.store.columns import now
from sandbox_ssh.store.database import Database
from sandbox_ssh.store.models import Node, Session, State, Tenant, Usage, User

if TYPE_CHECKING:
    from sqlalchemy import CursorResult, Table

TABLE = cast("Table", Session.__table__)
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
    async with database.write() as transaction:
        node = await _lock(transaction, login)
        rows = (
            await transaction.execute(select(quotas.TABLE).where(quotas.owned_by(login.user.id, login.user.tenant_id)))
        ).all()
        effective = quotas.combine(rows, profile)
        limits = _limits(login.user, effective)
        counted = (await transaction.execute(_count(login, limits))).one()
        refusal = await _refusal(transaction, login, node, limits, counted, effective)
        number = await _insert(transaction, login, refusal)
        if refusal is not None:
            await _note(transaction, login, number, str(refusal))
    if refusal is not None:
        raise refusal
    used = {limit.key: _used(counted, i) for i, limit in enumerate(limits) if limit.column == "user_id"}
    return Admitted(number, effective, used)


async def _lock(transaction: AsyncSession, login: Login) -> Row[Any]:
    """What the node can carry, with the rows of node and tenant locked where a database has such locks.

    Not FOR UPDATE: sessions refer to both rows, and inserting one would wait for as long (PostgreSQL, 13.3.2).
    """
    query = (
        select(Node.capacity, Node.nested)
        .join(Tenant, true())
        .where(Node.name == login.node, Tenant.id == login.user.tenant_id)
        .with_for_update(key_share=True)
    )
    row = (await transaction.execute(query)).first()
    if row is None:
        raise StoreError(f"node {login.node} is not registered, or the tenant of {login.user.name} was removed")
    return row


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


def _used(counted: Row[Any], number: int) -> int:
    return int(getattr(counted, f"c{number}") or 0)


def _count(login: Login, limits: list[_Limit]) -> Select[Any]:
    """One row: what is in use of each limit, and of the node."""
    live = and_(TABLE.c.node == login.node, TABLE.c.ended_at.is_(None))
    sandboxes = select(func.count()).select_from(TABLE).where(live)
    others = select(func.count(TABLE.c.user_id.distinct())).where(live, TABLE.c.user_id != login.user.id)
    return select(
        sandboxes.scalar_subquery().label("sandboxes"),
        others.scalar_subquery().label("users"),
        *(_in_use(limit).label(f"c{i}") for i, limit in enumerate(limits)),
    )


def _in_use(limit: _Limit) -> Any:
    mine = TABLE.c[limit.column] == limit.owner
    if limit.key == "sessions":
        return select(func.count()).select_from(TABLE).where(mine, TABLE.c.ended_at.is_(None)).scalar_subquery()
    if limit.key == "logins_per_hour":
        return select(func.count()).select_from(TABLE).where(_lately(limit)).scalar_subquery()
    what = Usage.seconds if limit.key == "session_time_per_day" else Usage.network_in + Usage.network_out
    today = and_(getattr(Usage, limit.column) == limit.owner, Usage.day == now().date())
    return select(func.sum(what)).where(today).scalar_subquery()


def _lately(limit: _Limit) -> Any:
    return and_(TABLE.c[limit.column] == limit.owner, TABLE.c.started_at > now() - HOUR, TABLE.c.state != State.REFUSED)


async def _refusal(
    transaction: AsyncSession,
    login: Login,
    node: Row[Any],
    limits: list[_Limit],
    counted: Row[Any],
    effective: quotas.Effective,
) -> RefusedError | None:
    for i, limit in enumerate(limits):
        used = _used(counted, i)
        if used >= limit.value != UNLIMITED:
            until = await _until(transaction, limit, used, effective)
            amount = f"{render(limit.key, used)} of {render(limit.key, limit.value)}"
            return RefusedError(limit.key, f"quota {limit.key} of {limit.of}: {amount} in use, until {until}")
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


async def _until(transaction: AsyncSession, limit: _Limit, used: int, effective: quotas.Effective) -> str:
    """When the one who was refused may try again."""
    if limit.key == "sessions":
        # Only of the user's own sessions is it known how long they may last.
        length = effective.values["session_time"] if limit.column == "user_id" else UNLIMITED
        # Not min(): with it, SQLite walks all past sessions by their start.
        live = select(TABLE.c.started_at).where(TABLE.c[limit.column] == limit.owner, TABLE.c.ended_at.is_(None))
        started = min(await transaction.scalars(live)) if length != UNLIMITED else None
        latest = f", {_moment(started + timedelta(seconds=length))} at the latest" if started else ""
        return f"one of them ends{latest}"
    if limit.key == "logins_per_hour":
        query = select(TABLE.c.started_at).where(_lately(limit)).order_by(TABLE.c.started_at)
        started = await transaction.scalar(query.offset(used - limit.value).limit(1))
        return _moment((started or now()) + HOUR)
    return _moment(datetime.combine(now().date() + timedelta(days=1), time(), UTC))


def _moment(when: datetime) -> str:
    return when.strftime("%Y-%m-%d %H:%M:%SZ")


async def _insert(transaction: AsyncSession, login: Login, refusal: RefusedError | None) -> int:
    """The table, not the model: the ORM would ask for the row again to make an object that nobody wants."""
    started = now()
    values: dict[str, Any] = {
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
        "started_at": started,
        "bytes_in": 0,
        "bytes_out": 0,
    }
    if refusal is not None:
        values |= {"state": State.REFUSED, "refused_by": refusal.key, "end_reason": str(refusal), "ended_at": started}
        await usage.count_refused(transaction, values)
    result = await transaction.execute(insert(TABLE), values)
    key = cast("CursorResult[Any]", result).inserted_primary_key
    assert key is not None
    return int(key[0])


async def _note(transaction: AsyncSession, login: Login, number: int, reason: str) -> None:
    await audit.note(
        transaction,
        "session-refused",
        node=login.node,
        user=login.user.name,
        tenant=login.user.tenant.name,
        session=number,
        address=login.client_address,
        detail={"reason": reason},
    )
