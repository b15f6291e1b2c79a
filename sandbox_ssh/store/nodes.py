"""The servers that share this database."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from sqlalchemy import select, update

from sandbox_ssh.quotas import NAMESPACES
from sandbox_ssh.store.columns import now
from sandbox_ssh.store.database import Database, insert_or
from sandbox_ssh.store.models import Node, Session


async def register(database: Database, name: str, mode: str, version: str) -> None:
    """Note that a node has started. Sessions can be recorded for registered nodes only."""
    values = {"mode": mode, "version": version, "started_at": now(), "nested": None}
    async with database.write() as transaction:
        await transaction.execute(
            insert_or(transaction, Node)
            .values(name=name, **values)
            .on_conflict_do_update(index_elements=["name"], set_=values)
        )


async def beat(database: Database, name: str) -> Mapping[str, int]:
    """Say that a node lives; return the beats of all nodes, by name."""
    async with database.write() as transaction:
        await transaction.execute(update(Node).where(Node.name == name).values(beats=Node.beats + 1))
        return {row.name: row.beats for row in await transaction.execute(select(Node.name, Node.beats))}


async def count_nested(database: Database, name: str) -> bool:
    """Note how many namespaces the tenants of a node have made in their sandboxes, as they were sampled last.

    False when there are none.
    """
    uses = select(Session.use).where(Session.node == name, Session.ended_at.is_(None))
    async with database.write() as transaction:
        found: Counter[str] = Counter()
        for use in await transaction.scalars(uses):
            # Without the session's own set, which `capacity.NAMESPACES` has.
            found.update({key: max(0, count - 1) for key, count in (use or {}).items() if key in NAMESPACES})
        await transaction.execute(update(Node).where(Node.name == name).values(nested=dict(found)))
    return any(found.values())


async def set_capacity(database: Database, name: str, capacity: Mapping[str, Any]) -> None:
    """Note what a node's host can carry (`sandbox_ssh.capacity`), for admission."""
    async with database.write() as transaction:
        await transaction.execute(update(Node).where(Node.name == name).values(capacity=dict(capacity)))
