"""Rows that tests begin with: a session that was admitted, one that has ended."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

from sandbox_ssh.store import admission, sessions
from sandbox_ssh.store.columns import now
from sandbox_ssh.store.database import Database
from sandbox_ssh.store.models import User
from sandbox_ssh.store.usage import Sample

T = TypeVar("T")

UNBOUNDED: Mapping[str, int] = {"sessions": -1}
"""A profile for tests that are not about quotas."""


def login(user: User, **changed: Any) -> admission.Login:
    values: dict[str, Any] = {
        "user": user, "node": "one", "worker": 0, "client_address": "192.0.2.1", "client_port": 50000, "image": "host",
        "client_version": "SSH-2.0-OpenSSH_9.2", "auth_method": "publickey", "key_fingerprint": "SHA256:x",
    }  # fmt: skip
    return admission.Login(**{**values, **changed})


async def admit(database: Database, user: User, *, profile: Mapping[str, int] = UNBOUNDED, **changed: Any) -> int:
    """Its number. Raises `RefusedError` as `admission.admit` does."""
    return (await admission.admit(database, login(user, **changed), profile)).number


async def close(database: Database, number: int, reason: str = "exit", exit_status: int = 0, **used: Any) -> bool:
    return await sessions.close(
        database, number, reason=reason, exit_status=exit_status, used=Sample(number, **used), ended=now()
    )


def do(database_url: str, work: Callable[[Database], Awaitable[T]]) -> T:
    """Work with a database, for a test that is no coroutine."""

    async def run() -> T:
        database = Database(database_url)
        try:
            return await work(database)
        finally:
            await database.dispose()

    return asyncio.run(run())
