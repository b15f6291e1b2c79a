"""Audit events: what somebody tried, and what an administrator changed."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Insert, insert
from sqlalchemy.ext.asyncio import AsyncSession

from sandbox_ssh.store.database import Database
from sandbox_ssh.store.models import AuditEvent


async def record(
    database: Database,
    kind: str,
    *,
    node: str | None,
    user: str | None = None,
    tenant: str | None = None,
    session: int | None = None,
    address: str | None = None,
    detail: dict[str, Any],
) -> None:
    """Write an event of its own: `auth-failure` and other things that change nothing else."""
    async with database.write() as transaction:
        await note(
            transaction, kind, node=node, user=user, tenant=tenant, session=session, address=address, detail=detail
        )


async def note(
    transaction: AsyncSession,
    kind: str,
    *,
    node: str | None = None,
    user: str | None = None,
    tenant: str | None = None,
    session: int | None = None,
    address: str | None = None,
    detail: dict[str, Any],
) -> None:
    """Write an event in the transaction of the change that it is about."""
    await transaction.execute(
        event(kind, node=node, user=user, tenant=tenant, session=session, address=address, detail=detail)
    )


def event(
    kind: str,
    *,
    node: str | None = None,
    user: str | None = None,
    tenant: str | None = None,
    session: int | None = None,
    address: str | None = None,
    detail: dict[str, Any],
) -> Insert:
    return insert(AuditEvent).values(
        kind=kind,
        node=node,
        user_name=user,
        tenant_name=tenant,
        session_id=session,
        address=address,
        detail=detail,
    )
