"""What sessions use, as it was sampled, and its sum by user and day.

A session's row holds its totals as they were last told. Whoever writes newer ones adds the difference to the day's
sums in the same transaction, so nothing is counted twice, and a crash loses what one interval had not written yet.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, timedelta
from typing import TYPE_CHECKING, Any, cast

from sqlalchemy import ColumnElement, Connection, Insert, Row, bindparam, func, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from sandbox_ssh.quotas import NAMESPACES
from sandbox_ssh.store.columns import now
from sandbox_ssh.store.database import Database, dialect_of, insert_or
from sandbox_ssh.store.models import Session, State, Usage

if TYPE_CHECKING:
    from sqlalchemy import Table

TABLE = cast("Table", Session.__table__)
SUMS = ("sessions", "refused", "seconds", "cpu_seconds", "bytes_in", "bytes_out", "network_in", "network_out")
_TOTALS = ("seconds", "cpu_seconds", "bytes_in", "bytes_out", "network_in", "network_out")
_OF_ONE = ("disk", "inodes", "ptys")
_PEAKS = ("memory_peak_bytes", "processes_peak", "disk_peak_bytes")


@dataclass(frozen=True, slots=True)
class Sample:
    """What a session has used since it began; bytes and seconds."""

    session: int
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    memory_peak_bytes: int = 0
    processes_peak: int = 0
    disk_peak_bytes: int = 0
    namespaces_peak: dict[str, int] = field(default_factory=dict)
    bytes_in: int = 0
    bytes_out: int = 0
    network_in: int = 0
    network_out: int = 0
    use: dict[str, int] = field(default_factory=dict)
    """What is in use now, by the quota's name."""


@dataclass(frozen=True, slots=True)
class Together:
    """What all sessions of a user or of a tenant use together, on whichever node, up to their last samples."""

    seconds: float = 0.0
    """On this day; and below, bytes through the network."""
    network: int = 0
    sessions: int = 0
    """Live ones."""
    use: Mapping[str, int] = field(default_factory=dict)
    """What is in use now, by the quota's name."""


@dataclass(frozen=True, slots=True)
class Sampled:
    """What came of a sample: by the number of a user and of a tenant; and the sessions that are still live."""

    users: Mapping[int, Together]
    tenants: Mapping[int, Together]
    sessions: frozenset[int]


async def sample(database: Database, node: str, samples: Sequence[Sample]) -> Sampled:
    """Write samples of live sessions of a node. Of others, somebody has closed the rows: they are passed over."""
    given = {one.session: one for one in samples}
    live = select(TABLE).where(TABLE.c.id.in_(given), TABLE.c.ended_at.is_(None)).order_by(TABLE.c.id)
    async with database.write() as transaction:
        rows = (await transaction.execute(live.with_for_update())).all()
        updates = [{"number": row.id, **totals(row, given[row.id]), "use": given[row.id].use} for row in rows]
        if updates:
            columns: dict[str, Any] = {name: bindparam(name) for name in updates[0] if name != "number"}
            connection = await transaction.connection()
            await connection.execute(update(TABLE).where(TABLE.c.id == bindparam("number")).values(columns), updates)
        await account(transaction, rows, given)
        return Sampled(
            await _together(transaction, node, {row.user_id for row in rows}, TABLE.c.user_id, Usage.user_id),
            await _together(transaction, node, {row.tenant_id for row in rows}, TABLE.c.tenant_id, Usage.tenant_id),
            frozenset(row.id for row in rows),
        )


def totals(row: Row[Any], given: Sample) -> dict[str, Any]:
    """The new totals of a row: never less than it had."""
    before = row.namespaces_peak or {}
    kinds = before.keys() | given.namespaces_peak.keys()
    return {
        **{name: max(getattr(row, name) or 0, getattr(given, name)) for name in (*_TOTALS, *_PEAKS)},
        "namespaces_peak": {kind: max(before.get(kind, 0), given.namespaces_peak.get(kind, 0)) for kind in kinds},
    }


async def account(transaction: AsyncSession, rows: Iterable[Row[Any]], given: Mapping[int, Sample]) -> None:
    """Add to the day's sums what is new since the rows' last samples."""
    lines: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        new = given.get(row.id, Sample(row.id))
        line = lines.setdefault((row.tenant_name, row.user_name), _line(row._mapping))
        for name in _TOTALS:
            line[name] += max(0, getattr(new, name) - (getattr(row, name) or 0))
        line["sessions"] += int(row.seconds is None)  # never told of before
        line["memory_peak_bytes"] = max(line["memory_peak_bytes"], new.memory_peak_bytes)
    if lines:
        await transaction.execute(_adding(transaction, lines))


def refused(transaction: AsyncSession | Connection, session: Mapping[str, Any]) -> Insert:
    """What counts a session that was refused."""
    return _adding(transaction, {(session["tenant_name"], session["user_name"]): {**_line(session), "refused": 1}})


def _line(session: Mapping[Any, Any]) -> dict[str, Any]:
    who = {name: session[name] for name in ("user_id", "user_name", "tenant_id", "tenant_name")}
    return {**who, **dict.fromkeys(SUMS, 0), "memory_peak_bytes": 0}


def _adding(transaction: AsyncSession | Connection, lines: Mapping[tuple[str, str], Mapping[str, Any]]) -> Insert:
    """In the order of names, so that no two that do this wait for each other's rows."""
    day = now().date()
    statement = insert_or(transaction, Usage).values([{"day": day, **lines[name]} for name in sorted(lines)])
    new = statement.excluded
    higher = func.greatest if dialect_of(transaction) == "postgresql" else func.max
    changed: dict[str, ColumnElement[Any]] = {name: getattr(Usage, name) + new[name] for name in SUMS}
    changed["memory_peak_bytes"] = higher(Usage.memory_peak_bytes, new.memory_peak_bytes)
    # A user of this name may have been removed and added again: the line is the new one's too.
    changed |= {"user_id": new.user_id, "tenant_id": new.tenant_id}
    return statement.on_conflict_do_update(index_elements=["day", "user_name", "tenant_name"], set_=changed)


async def of_user(database: Database, node: str, user: int, tenant: int) -> tuple[Together, Together]:
    """What a user, and the tenant, use."""
    async with database.read() as transaction:
        users = await _together(transaction, node, {user}, TABLE.c.user_id, Usage.user_id)
        tenants = await _together(transaction, node, {tenant}, TABLE.c.tenant_id, Usage.tenant_id)
    return users.get(user, Together()), tenants.get(tenant, Together())


async def _together(
    transaction: AsyncSession, node: str, numbers: set[Any], sessions_of: ColumnElement[Any], usage_of: Any
) -> Mapping[int, Together]:
    """What the owners of these numbers use, by the columns that say whose a session and a line of usage are.

    What the kernel holds, it holds on each node by itself: `use` is of one.
    """
    day = (
        select(usage_of, func.sum(Usage.seconds), func.sum(Usage.network_in + Usage.network_out))
        .where(usage_of.in_(numbers - {None}), Usage.day == now().date())
        .group_by(usage_of)
    )
    live = select(sessions_of, TABLE.c.node, TABLE.c.use).where(
        sessions_of.in_(numbers - {None}), TABLE.c.ended_at.is_(None)
    )
    count: Counter[int] = Counter()
    uses: dict[int, list[Mapping[str, int]]] = {}
    for number, where, use in await transaction.execute(live):
        count[number] += 1
        if where == node:
            uses.setdefault(number, []).append(use or {})
    sums = {number: (seconds, int(network)) for number, seconds, network in await transaction.execute(day)}
    return {
        number: Together(*sums.get(number, (0.0, 0)), count[number], combine(uses.get(number, ())))
        for number in count.keys() | sums.keys()
    }


def combine(uses: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """What several sessions use together; of what is bounded for each sandbox, what the one with most uses."""
    found: dict[str, int] = {}
    for use in uses:
        for key, value in use.items():
            found[key] = max(found.get(key, 0), value) if key in _OF_ONE else found.get(key, 0) + value
    return found


@dataclass(frozen=True, slots=True)
class Line:
    """A line of `sandbox-ssh usage`: None where it is the sum over all."""

    day: date | None
    tenant: str | None
    user: str | None
    sums: Mapping[str, float]
    memory_peak_bytes: int


async def report(
    database: Database,
    *,
    by: Sequence[str],
    user: str | None = None,
    tenant: str | None = None,
    since: date | None = None,
    until: date | None = None,
) -> Sequence[Line]:
    """Sums grouped `by` any of `day`, `tenant` and `user`; the days `since` and `until` are included."""
    groups = {"day": Usage.day, "tenant": Usage.tenant_name, "user": Usage.user_name}
    chosen = [groups[name].label(name) for name in by]
    sums = [func.sum(getattr(Usage, name)).label(name) for name in SUMS]
    query = select(*chosen, *sums, func.max(Usage.memory_peak_bytes).label("peak"))
    for column, value in ((Usage.user_name, user), (Usage.tenant_name, tenant)):
        if value is not None:
            query = query.where(column == value)
    if since is not None:
        query = query.where(Usage.day >= since)
    if until is not None:
        query = query.where(Usage.day <= until)
    query = query.group_by(*chosen).order_by(*chosen)
    async with database.read() as transaction:
        rows = (await transaction.execute(query)).all()
    return [
        Line(
            getattr(row, "day", None),
            getattr(row, "tenant", None),
            getattr(row, "user", None),
            {name: float(getattr(row, name) or 0) for name in SUMS},
            int(row.peak or 0),
        )
        for row in rows
    ]


async def in_use(database: Database, *, user: str | None = None, tenant: str | None = None) -> Mapping[str, int]:
    """What a user's or a tenant's live sessions use together, and what counts by the hour and the day, by quota.

    Of what each node's kernel holds by itself, what is used on the node where it is most.
    """
    names = (
        (TABLE.c.user_name, Usage.user_name, user)
        if user is not None
        else (TABLE.c.tenant_name, Usage.tenant_name, tenant)
    )
    live = select(TABLE.c.node, TABLE.c.use).where(names[0] == names[2], TABLE.c.ended_at.is_(None))
    lately = (
        select(func.count())
        .select_from(TABLE)
        .where(names[0] == names[2], TABLE.c.started_at > now() - timedelta(hours=1), TABLE.c.state != State.REFUSED)
    )
    day = select(func.sum(Usage.seconds), func.sum(Usage.network_in + Usage.network_out)).where(
        names[1] == names[2], Usage.day == now().date()
    )
    async with database.read() as transaction:
        rows = (await transaction.execute(live)).all()
        logins = await transaction.scalar(lately)
        seconds, network = (await transaction.execute(day)).one()
    nodes: dict[str, list[Mapping[str, int]]] = {}
    for node, use in rows:
        nodes.setdefault(node, []).append(use or {})
    found = dict.fromkeys(("processes", "memory", "disk", "inodes", "ptys", *NAMESPACES), 0)
    for uses in nodes.values():
        found |= {key: max(found.get(key, 0), value) for key, value in combine(uses).items()}
    return {
        **found,
        "sessions": len(rows),
        "logins_per_hour": logins or 0,
        "session_time_per_day": int(seconds or 0),
        "network_per_day": int(network or 0),
    }
