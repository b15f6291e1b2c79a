"""Quotas as they are set, and as they come out for a user: user, tenant, profile, default, built in, in this order.

The profile is what the configuration of the node says (`[sandbox.quotas]`); it is not in the database.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

from sqlalchemy import BindParameter, ColumnElement, and_, false, or_, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from sandbox_ssh.errors import NotFoundError
from sandbox_ssh.quotas import QUOTAS, SUMMED, UNLIMITED, check_host
from sandbox_ssh.store import audit
from sandbox_ssh.store.columns import now
from sandbox_ssh.store.database import Database
from sandbox_ssh.store.models import Node, Quotas, User
from sandbox_ssh.store.users import get_tenant

if TYPE_CHECKING:
    from sqlalchemy import Row, Table

TABLE = cast("Table", Quotas.__table__)
Number = int | BindParameter[int]
_OF_ALL = and_(TABLE.c.user_id.is_(None), TABLE.c.tenant_id.is_(None))


@dataclass(frozen=True, slots=True)
class Owner:
    """Whose quotas: a user's or a tenant's by name, or those of all."""

    kind: Literal["user", "tenant", "default"]
    name: str = ""

    def __str__(self) -> str:
        return f"{self.kind} {self.name}".strip()


@dataclass(frozen=True, slots=True)
class Effective:
    """What counts for a user, or for a tenant as a whole."""

    values: Mapping[str, int]
    """Every quota of the user's own."""
    sources: Mapping[str, str]
    """Quota -> `user`, `tenant`, `profile`, `default` or `built-in`."""
    tenant: Mapping[str, int]
    """What is set for the tenant and binds the sum of its users."""


def owned_by(user: Number | None, tenant: Number | None) -> ColumnElement[bool]:
    """The rows that have a say for a user of a tenant."""
    return or_(_is(TABLE.c.user_id, user), _is(TABLE.c.tenant_id, tenant), _OF_ALL)


def _is(column: ColumnElement[Any], number: Number | None) -> ColumnElement[bool]:
    """Not `column == None`, which SQLAlchemy reads as IS NULL."""
    return false() if number is None else column == number


def combine(rows: Sequence[Row[Any]], profile: Mapping[str, int]) -> Effective:
    """Effective values of rows that `owned_by` selected."""
    by_kind: dict[str, Mapping[str, Any]] = {"profile": profile}
    for row in rows:
        kind = "user" if row.user_id is not None else "tenant" if row.tenant_id is not None else "default"
        by_kind[kind] = dict(row._mapping)
    values = {key: quota.default for key, quota in QUOTAS.items()}
    sources = dict.fromkeys(QUOTAS, "built-in")
    for kind in ("default", "profile", "tenant", "user"):
        for key, value in by_kind.get(kind, {}).items():
            if value is not None and key in values:
                values[key], sources[key] = value, kind
    own = by_kind.get("tenant", {})
    tenant = {key: own[key] for key in SUMMED if own.get(key, None) not in (None, UNLIMITED)}
    return Effective(values, sources, tenant)


async def effective(database: Database, user: int | None, tenant: int | None, profile: Mapping[str, int]) -> Effective:
    async with database.read() as transaction:
        rows = (await transaction.execute(select(TABLE).where(owned_by(user, tenant)))).all()
    return combine(rows, profile)


async def of_owner(database: Database, owner: Owner, profile: Mapping[str, int]) -> Effective:
    """What counts for an owner, with the values that it inherits. Raises `NotFoundError`."""
    async with database.read() as transaction:
        user, tenant = await _ids(transaction, owner)
        if user is not None:
            tenant = await transaction.scalar(select(User.tenant_id).where(User.id == user))
        rows = (await transaction.execute(select(TABLE).where(owned_by(user, tenant)))).all()
    return combine(rows, profile)


async def change(database: Database, owner: Owner, values: Mapping[str, int | None], *, by: str) -> None:
    """Set quotas, or with None let them be inherited again.

    Raises `NotFoundError` for the owner, `QuotaError` for a value over what any node's host could keep.
    """
    async with database.write() as transaction:
        # One change at a time: gateways look at the number of the latest, and none may come in behind it.
        of_all = (await transaction.execute(select(TABLE).where(_OF_ALL).with_for_update())).one()
        user, tenant = await _ids(transaction, owner)
        await _check_hosts(transaction, {key: value for key, value in values.items() if value is not None})
        mine = _OF_ALL if owner.kind == "default" else or_(_is(TABLE.c.user_id, user), _is(TABLE.c.tenant_id, tenant))
        before = (await transaction.execute(select(TABLE).where(mine))).first()
        changed = {**values, "changed_at": now(), "revision": of_all.revision + 1}
        if before is None:
            await transaction.execute(TABLE.insert().values(user_id=user, tenant_id=tenant, **changed))
        else:
            await transaction.execute(update(TABLE).where(TABLE.c.id == before.id).values(changed))
        await transaction.execute(update(TABLE).where(_OF_ALL).values(revision=of_all.revision + 1))
        old = before._mapping if before is not None else {}
        detail = {"by": by, "of": str(owner), **{key: [old.get(key), value] for key, value in values.items()}}
        names = {owner.kind: owner.name} if owner.kind != "default" else {}
        await audit.note(transaction, "quota-changed", **names, detail=detail)  # type: ignore[arg-type]


async def revision(database: Database) -> int:
    """A number that grows with every change: for a gateway, which asks twice a second."""
    async with database.read() as transaction:
        return await transaction.scalar(select(TABLE.c.revision).where(_OF_ALL)) or 0


async def _ids(transaction: AsyncSession, owner: Owner) -> tuple[int | None, int | None]:
    if owner.kind == "tenant":
        return None, (await get_tenant(transaction, owner.name)).id
    if owner.kind == "default":
        return None, None
    user = await transaction.scalar(select(User.id).where(User.name == owner.name))
    if user is None:
        raise NotFoundError(f"there is no user {owner.name}: see `sandbox-ssh user list`")
    return user, None


async def _check_hosts(transaction: AsyncSession, values: Mapping[str, int]) -> None:
    """A value makes sense if one of the nodes could keep it, or all together the sessions.

    Without a node that has started, any does.
    """
    nodes = [node for node in await transaction.scalars(select(Node.capacity)) if node]
    if nodes:
        keys = {key for node in nodes for key in node["limits"]}
        most = {key: max(node["limits"].get(key, 0) for node in nodes) for key in keys}
        most["sessions"] = sum(node["sandboxes"] for node in nodes)
        check_host(values, most)
