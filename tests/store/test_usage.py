"""What sessions use, by session and by day: every byte and second once, whatever ends when."""

from __future__ import annotations

import asyncio
from datetime import timedelta

import pytest
from sqlalchemy import update

from sandbox_ssh.store import nodes, sessions, tenants, usage, users
from sandbox_ssh.store.columns import now
from sandbox_ssh.store.database import Database
from sandbox_ssh.store.models import Session, State, User
from sandbox_ssh.store.usage import Sample
from tests.rows import admit, close


@pytest.fixture
async def ada(database: Database) -> User:
    await nodes.register(database, "one", "service", "1")
    return await users.add(database, "ada", by="root")


async def line(database: Database, **filters: str) -> usage.Line:
    (found,) = await usage.report(database, by=["user"], **filters)  # type: ignore[arg-type]
    return found


async def test_samples_and_the_end_add_up(database: Database, ada: User) -> None:
    number = await admit(database, ada)
    await usage.sample(
        database, "one", [Sample(number, seconds=10, cpu_seconds=1.0, bytes_in=10, network_in=5, memory_peak_bytes=900)]
    )
    await usage.sample(
        database,
        "one",
        [Sample(number, seconds=20.5, cpu_seconds=2.5, bytes_in=30, network_in=5, memory_peak_bytes=500)],
    )
    assert (await line(database)).sums["cpu_seconds"] == 2.5
    assert await close(
        database, number, seconds=25, cpu_seconds=4.0, bytes_in=31, network_in=6, network_out=7, processes_peak=3
    )
    assert not await close(database, number, cpu_seconds=99.0)
    found = await line(database)
    assert found.sums == {
        "seconds": 25, "sessions": 1, "refused": 0, "cpu_seconds": 4.0, "bytes_in": 31, "bytes_out": 0, "network_in": 6,
        "network_out": 7,
    }  # fmt: skip
    assert found.memory_peak_bytes == 900
    row = await sessions.get(database, number)
    assert (row.cpu_seconds, row.memory_peak_bytes, row.processes_peak, row.use) == (4.0, 900, 3, None)


async def test_what_is_less_than_before_takes_nothing_back(database: Database, ada: User) -> None:
    number = await admit(database, ada)
    await usage.sample(
        database, "one", [Sample(number, cpu_seconds=5, bytes_out=50, namespaces_peak={"net": 4, "pid": 1})]
    )
    await close(database, number, cpu_seconds=1, bytes_out=2, namespaces_peak={"net": 1, "mnt": 2})
    row = await sessions.get(database, number)
    assert (row.cpu_seconds, row.bytes_out) == (5, 50)
    assert row.namespaces_peak == {"net": 4, "pid": 1, "mnt": 2}
    assert (await line(database)).sums["bytes_out"] == 50


async def test_a_crash_keeps_what_was_sampled(database: Database, ada: User) -> None:
    sampled, _ = await admit(database, ada), await admit(database, ada)
    await usage.sample(database, "one", [Sample(sampled, seconds=50, cpu_seconds=3, bytes_in=30)])
    assert await sessions.recover(database, "one", None) == 2
    found = await line(database)
    assert (found.sums["sessions"], found.sums["cpu_seconds"], found.sums["bytes_in"]) == (2, 3, 30)
    assert found.sums["seconds"] == 50, "of the other nobody knows"
    assert (await sessions.get(database, sampled)).bytes_in == 30
    assert not (await usage.sample(database, "one", [Sample(sampled, cpu_seconds=9)])).sessions
    assert (await line(database)).sums["cpu_seconds"] == 3, "a late word of a dead gateway changes nothing"


async def test_what_users_and_tenants_use_together(database: Database, ada: User) -> None:
    bob = await users.add(database, "bob", by="root")
    numbers = [await admit(database, user) for user in (ada, ada, bob)]
    use = [
        {"processes": 5, "disk": 100, "net_namespaces": 2},
        {"processes": 7, "disk": 300, "net_namespaces": 1},
        {"processes": 1, "disk": 200, "net_namespaces": 1},
    ]
    samples = [Sample(n, network_in=10, use=u) for n, u in zip(numbers, use, strict=True)]
    await usage.sample(database, "one", samples[1:2])
    found = await usage.sample(database, "one", samples)
    of_users, of_tenants = found.users, found.tenants
    assert found.sessions == set(numbers)
    assert await usage.of_user(database, "one", ada.id, ada.tenant_id) == (
        of_users[ada.id],
        of_tenants[ada.tenant_id],
    )
    elsewhere, _ = await usage.of_user(database, "two", ada.id, ada.tenant_id)
    assert (elsewhere.sessions, elsewhere.use) == (2, {}), "what a kernel holds, it holds on its node"
    assert (of_users[ada.id].sessions, of_users[ada.id].network) == (2, 20)
    assert of_users[ada.id].use == {"processes": 12, "disk": 300, "net_namespaces": 3}
    assert of_users[bob.id].use == use[2]
    assert (of_tenants[ada.tenant_id].sessions, of_tenants[ada.tenant_id].network) == (3, 30)
    assert of_tenants[ada.tenant_id].use["processes"] == 13
    used = await usage.in_use(database, user="ada")
    assert (used["sessions"], used["processes"], used["pid_namespaces"], used["network_per_day"]) == (2, 12, 0, 20)
    assert (await usage.in_use(database, tenant="default"))["sessions"] == 3


async def test_days_and_groups(database: Database, ada: User) -> None:
    await tenants.add(database, "physics", by="root")
    bob = await users.add(database, "bob", tenant="physics", by="root")
    for user in (ada, bob, bob):
        await close(database, await admit(database, user), bytes_in=10)
    today = now().date()
    assert [(x.tenant, x.sums["bytes_in"]) for x in await usage.report(database, by=["tenant"])] == [
        ("default", 10),
        ("physics", 20),
    ]
    (everything,) = await usage.report(database, by=["day"])
    assert (everything.day, everything.user, everything.sums["sessions"]) == (today, None, 3)
    assert await usage.report(database, by=["day"], until=today - timedelta(days=1)) == []
    assert len(await usage.report(database, by=["day", "user"], since=today)) == 2
    assert [x.user for x in await usage.report(database, by=["user"], tenant="physics")] == ["bob"]
    await users.remove(database, "bob", by="root")
    assert (await line(database, user="bob")).sums["sessions"] == 2, "kept when the user is gone"


async def test_many_gateways_at_once_lose_nothing(database_url: str, database: Database, ada: User) -> None:
    """Each with sessions of the same users, in another order: no deadlock, no lost sum."""
    bob = await users.add(database, "bob", by="root")
    numbers = [await admit(database, user) for _ in range(5) for user in (ada, bob)]
    others = [Database(database_url) for _ in range(3)]

    async def run(one: Database, mine: list[int]) -> None:
        for step in range(1, 11):
            await usage.sample(one, "one", [Sample(number, bytes_in=step) for number in mine])

    shares = [numbers[0:4], numbers[4:7][::-1], numbers[7:10]]
    await asyncio.gather(*(run(one, mine) for one, mine in zip(others, shares, strict=True)))
    for one in others:
        await one.dispose()
    assert sum(x.sums["bytes_in"] for x in await usage.report(database, by=["user"])) == 100
    assert len(await sessions.list_sessions(database, states=[State.STARTING])) == 10


async def test_a_user_who_is_removed_and_added_again_has_the_day_that_was_used(database: Database, ada: User) -> None:
    await close(database, await admit(database, ada), network_in=1000)
    await users.remove(database, "ada", by="root")
    again = await users.add(database, "ada", by="root")
    await close(database, await admit(database, again), network_in=1)
    used, _ = await usage.of_user(database, "one", again.id, again.tenant_id)
    assert used.network == 1001


async def test_records_that_nobody_would_close(database: Database, ada: User) -> None:
    """Of a login that was written and not answered, say; and of a node that is gone."""
    known, young, lost = [await admit(database, ada) for _ in range(3)]
    await nodes.register(database, "two", "service", "1")
    elsewhere = await admit(database, ada, node="two")
    async with database.write() as transaction:
        old = Session.id.in_([known, lost])
        await transaction.execute(update(Session).where(old).values(started_at=now() - timedelta(hours=1)))
    before = now() - timedelta(minutes=1)
    assert await sessions.recover(database, "one", 0, known={known}, before=before) == 1
    states = {number: (await sessions.get(database, number)).state for number in (known, young, lost, elsewhere)}
    assert [number for number, state in states.items() if state == State.LOST] == [lost]
    assert (await nodes.beat(database, "one"))["two"] == 0
    assert (await nodes.beat(database, "one"))["one"] == 2
