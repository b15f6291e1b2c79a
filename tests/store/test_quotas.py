"""Quotas as they are set, and as they come out."""

from __future__ import annotations

import asyncio
from dataclasses import asdict

import pytest
from sqlalchemy import select

from sandbox_ssh.capacity import Capacity
from sandbox_ssh.errors import NotFoundError, QuotaError
from sandbox_ssh.quotas import QUOTAS, UNLIMITED
from sandbox_ssh.store import nodes, quotas, tenants, users
from sandbox_ssh.store.database import Database
from sandbox_ssh.store.models import AuditEvent, Quotas, User
from sandbox_ssh.store.quotas import Owner

ADA, BOB = Owner("user", "ada"), Owner("user", "bob")
PHYSICS, CHEMISTRY, ALL = Owner("tenant", "physics"), Owner("tenant", "chemistry"), Owner("default")


@pytest.fixture
async def ada(database: Database) -> User:
    await tenants.add(database, "physics", by="root")
    await tenants.add(database, "chemistry", by="root")
    await users.add(database, "bob", tenant="chemistry", by="root")
    return await users.add(database, "ada", tenant="physics", by="root")


async def value(database: Database, owner: Owner, key: str, **profile: int) -> tuple[int, str]:
    found = await quotas.of_owner(database, owner, profile)
    return found.values[key], found.sources[key]


async def test_the_nearest_value_counts(database: Database, ada: User) -> None:
    assert await value(database, ADA, "processes") == (QUOTAS["processes"].default, "built-in")
    await quotas.change(database, ALL, {"processes": 50}, by="root")
    assert await value(database, ADA, "processes") == (50, "default")
    assert await value(database, ADA, "processes", processes=60) == (60, "profile")
    await quotas.change(database, PHYSICS, {"processes": 70}, by="root")
    assert await value(database, ADA, "processes", processes=60) == (70, "tenant")
    await quotas.change(database, ADA, {"processes": UNLIMITED}, by="root")
    assert await value(database, ADA, "processes", processes=60) == (UNLIMITED, "user")
    await quotas.change(database, ADA, {"processes": None}, by="root")
    assert await value(database, ADA, "processes", processes=60) == (70, "tenant")
    assert await value(database, ALL, "processes") == (50, "default")


async def test_another_tenants_are_not_mine(database: Database, ada: User) -> None:
    await quotas.change(database, PHYSICS, {"processes": 70}, by="root")
    await quotas.change(database, ADA, {"memory": 2**28}, by="root")
    for owner in (BOB, CHEMISTRY, ALL):
        assert (await value(database, owner, "processes"))[1] == "built-in", owner
    assert (await value(database, PHYSICS, "memory"))[1] == "built-in"
    assert (await quotas.effective(database, ada.id, ada.tenant_id, {})).values["processes"] == 70


async def test_a_tenants_value_binds_the_sum_too(database: Database, ada: User) -> None:
    await quotas.change(database, PHYSICS, {"processes": 70, "disk": 2**30, "memory": UNLIMITED}, by="root")
    await quotas.change(database, ADA, {"processes": 700}, by="root")
    found = await quotas.of_owner(database, ADA, {"sessions": 5})
    assert found.values["processes"] == 700
    assert found.tenant == {"processes": 70}, "a disk is of one sandbox; and neither no bound nor a profile's is a sum"


async def test_a_change_is_an_event_with_both_values(database: Database, ada: User) -> None:
    await quotas.change(database, ADA, {"processes": 70}, by="carol")
    await quotas.change(database, ADA, {"processes": 80, "memory": None}, by="carol")
    async with database.read() as transaction:
        events = (await transaction.scalars(select(AuditEvent).where(AuditEvent.kind == "quota-changed"))).all()
    assert [event.user_name for event in events] == ["ada", "ada"]
    assert events[-1].detail == {"by": "carol", "of": "user ada", "processes": [70, 80], "memory": [None, None]}


async def test_owners_that_are_not_there(database: Database, ada: User) -> None:
    for owner in (Owner("user", "nobody"), Owner("tenant", "nobody")):
        with pytest.raises(NotFoundError, match="nobody"):
            await quotas.change(database, owner, {"processes": 70}, by="root")
        with pytest.raises(NotFoundError, match="nobody"):
            await quotas.of_owner(database, owner, {})


async def test_quotas_go_with_their_owner(database: Database, ada: User) -> None:
    await quotas.change(database, ADA, {"processes": 70}, by="root")
    await users.remove(database, "ada", by="root")
    async with database.read() as transaction:
        assert len((await transaction.scalars(select(Quotas))).all()) == 1


async def test_every_change_has_a_number_of_its_own(database_url: str, database: Database, ada: User) -> None:
    """Also of two that change different owners at once, on two connections: a gateway misses none."""
    before = await quotas.revision(database)
    other = Database(database_url)
    await asyncio.gather(
        *(
            quotas.change(one, owner, {"processes": 100 + i}, by="root")
            for i in range(10)
            for one, owner in ((database, ADA), (other, PHYSICS), (other, ALL))
        )
    )
    await other.dispose()
    assert await quotas.revision(database) == before + 30
    async with database.read() as transaction:
        assert len((await transaction.scalars(select(Quotas))).all()) == 3


def room(sandboxes: int, **limits: int) -> dict[str, object]:
    return asdict(Capacity(sandboxes, "memory", 10, 3, "memory", limits))


async def test_no_more_is_promised_than_a_host_has(database: Database, ada: User) -> None:
    await quotas.change(database, ADA, {"memory": 2**50}, by="root")  # no node has started: nobody knows better
    await nodes.register(database, "one", "service", "1")
    await nodes.register(database, "two", "service", "1")
    await nodes.register(database, "new", "service", "1")
    await nodes.set_capacity(database, "one", room(100, memory=2**30, processes=1000))
    await nodes.set_capacity(database, "two", room(50, memory=2**31, processes=500))
    await quotas.change(database, ADA, {"memory": 2**31, "processes": 1000, "sessions": 150}, by="root")
    for key, most in (("memory", 2**31), ("processes", 1000), ("sessions", 150)):
        with pytest.raises(QuotaError, match=f"{key}: .* is over the limit of the host"):
            await quotas.change(database, ADA, {key: most + 1}, by="root")
    assert (await value(database, ADA, "memory"))[0] == 2**31
