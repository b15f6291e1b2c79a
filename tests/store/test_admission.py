"""Admission: what is counted, what is said of a refusal, and that nobody slips through."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections import Counter
from dataclasses import asdict
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import select, update

from sandbox_ssh.capacity import Capacity
from sandbox_ssh.errors import RefusedError
from sandbox_ssh.store import admission, nodes, quotas, sessions, tenants, usage, users
from sandbox_ssh.store.columns import now
from sandbox_ssh.store.database import Database
from sandbox_ssh.store.models import AuditEvent, Session, State, Usage, User
from sandbox_ssh.store.quotas import Owner
from sandbox_ssh.store.usage import Sample
from tests.rows import admit, close, login

ADA, PHYSICS = Owner("user", "ada"), Owner("tenant", "physics")


@pytest.fixture
async def ada(database: Database) -> User:
    await nodes.register(database, "one", "service", "1")
    await nodes.register(database, "two", "service", "1")
    await tenants.add(database, "physics", by="root")
    await users.add(database, "bob", tenant="physics", by="root")
    return await users.add(database, "ada", tenant="physics", by="root")


async def refusal(database: Database, user: User, **changed: Any) -> RefusedError:
    with pytest.raises(RefusedError) as caught:
        await admit(database, user, **changed)
    return caught.value


async def other_user(database: Database) -> User:
    found = await users.find(database, "bob")
    assert found is not None
    return found


async def test_sessions_of_a_user(database: Database, ada: User) -> None:
    await quotas.change(database, ADA, {"sessions": 2}, by="root")
    first = await admit(database, ada)
    await admit(database, ada, node="two")
    refused = await refusal(database, ada)
    assert refused.key == "sessions"
    assert str(refused) == "quota sessions of user ada: 2 of 2 in use, until one of them ends"
    await admit(database, await other_user(database))
    await close(database, first)
    await admit(database, ada)


async def test_until_when_where_sessions_have_an_end(database: Database, ada: User) -> None:
    await quotas.change(database, ADA, {"sessions": 1, "session_time": 3600}, by="root")
    number = await admit(database, ada)
    end = (await sessions.get(database, number)).started_at + timedelta(hours=1)
    assert str(await refusal(database, ada)).endswith(f"ends, {end:%Y-%m-%d %H:%M:%SZ} at the latest")


async def test_sessions_of_a_tenant(database: Database, ada: User) -> None:
    await quotas.change(database, PHYSICS, {"sessions": 2}, by="root")
    await quotas.change(database, ADA, {"sessions": 10}, by="root")
    await admit(database, ada)
    await admit(database, ada)
    for user in (ada, await other_user(database)):
        assert "of tenant physics: 2 of 2 in use" in str(await refusal(database, user))


async def test_a_refusal_is_a_row_an_event_and_counted(database: Database, ada: User) -> None:
    await quotas.change(database, ADA, {"sessions": 1}, by="root")
    await admit(database, ada)
    refused = await refusal(database, ada)
    row = (await sessions.list_sessions(database, states=[State.REFUSED]))[0]
    assert (row.refused_by, row.end_reason, row.ended_at) == ("sessions", str(refused), row.started_at)
    async with database.read() as transaction:
        event = await transaction.scalar(select(AuditEvent).order_by(AuditEvent.id.desc()).limit(1))
        assert event is not None
        assert (event.kind, event.session_id, event.detail) == ("session-refused", row.id, {"reason": str(refused)})
        line = (await transaction.scalars(select(Usage))).one()
        assert (line.user_name, line.refused, line.sessions) == ("ada", 1, 0)
    assert (await admission.admit(database, login(await other_user(database)), {})).in_use["sessions"] == 0


async def test_logins_of_an_hour(database: Database, ada: User) -> None:
    await quotas.change(database, ADA, {"logins_per_hour": 2}, by="root")
    first = await admit(database, ada)
    await close(database, first)
    await close(database, await admit(database, ada))
    refused = await refusal(database, ada)
    await refusal(database, ada)  # those that were refused do not count
    until = (await sessions.get(database, first)).started_at + timedelta(hours=1)
    assert str(refused) == f"quota logins_per_hour of user ada: 2 of 2 in use, until {until:%Y-%m-%d %H:%M:%SZ}"
    async with database.write() as transaction:
        an_hour_ago = now() - timedelta(minutes=60, seconds=1)
        await transaction.execute(update(Session).where(Session.id == first).values(started_at=an_hour_ago))
    await admit(database, ada)


@pytest.mark.parametrize("owner", [ADA, PHYSICS], ids=str)
async def test_what_may_be_used_in_a_day(database: Database, ada: User, owner: Owner) -> None:
    if owner is PHYSICS:  # else what users inherit from the tenant refuses them first
        await quotas.change(database, ADA, {"network_per_day": -1, "session_time_per_day": -1}, by="root")
    number = await admit(database, ada)
    await usage.sample(database, "one", [Sample(number, network_in=600, network_out=500)])
    await close(database, number, network_in=600, network_out=500)
    await quotas.change(database, owner, {"network_per_day": 1101}, by="root")
    await close(database, await admit(database, ada))
    await quotas.change(database, owner, {"network_per_day": 1100}, by="root")
    refused = await refusal(database, ada)
    midnight = f"{now() + timedelta(days=1):%Y-%m-%d} 00:00:00Z"
    assert str(refused) == f"quota network_per_day of {owner}: 1.1K of 1.1K in use, until {midnight}"
    await quotas.change(database, owner, {"network_per_day": None, "session_time_per_day": 100}, by="root")
    await close(database, await admit(database, ada))
    async with database.write() as transaction:
        await transaction.execute(update(Usage).values(seconds=100.0))
    assert (await refusal(database, ada)).key == "session_time_per_day"
    async with database.write() as transaction:
        await transaction.execute(update(Usage).values(day=now().date() - timedelta(days=1)))
    await admit(database, ada)


async def test_what_a_node_can_carry(database: Database, ada: User) -> None:
    limits = {"net_namespaces": 1000}
    await nodes.set_capacity(database, "one", asdict(Capacity(2, "memory", 10, 3, "memory", limits)))
    await admit(database, ada)
    await admit(database, ada)
    refused = await refusal(database, ada)
    assert (refused.key, str(refused)) == (
        "capacity", "this server is full: 2 of 2 sessions (memory) in use, until a session ends"
    )  # fmt: skip
    await admit(database, ada, node="two")
    await nodes.set_capacity(database, "one", asdict(Capacity(10, "memory", 1, 3, "memory", limits)))
    await admit(database, ada)  # has ids already
    assert "the ids of all 1 users" in str(await refusal(database, await other_user(database)))


async def test_nested_namespaces_are_in_use_too(database: Database, ada: User) -> None:
    limits = {"net_namespaces": 100}
    await nodes.set_capacity(database, "one", asdict(Capacity(10, "memory", 10, 3, "memory", limits)))
    number = await admit(database, ada)
    await usage.sample(database, "one", [Sample(number, use={"net_namespaces": 66, "processes": 70})])
    await nodes.count_nested(database, "one")
    assert "user.max_net_namespaces (100)" in str(await refusal(database, ada))
    await close(database, number)
    await nodes.count_nested(database, "one")
    await admit(database, ada)


async def test_what_the_host_is_short_of(database: Database, ada: User) -> None:
    assert "full: 9 of 9 terminals in use" in str(await refusal(database, ada, shortage="9 of 9 terminals"))


RACE = """
import asyncio, sys
from sandbox_ssh.errors import RefusedError
from sandbox_ssh.store import users
from sandbox_ssh.store.database import Database
from tests.rows import admit
async def main(url, node, worker, count):
    database = Database(url)
    user = await users.find(database, 'ada')
    print('ready', flush=True)
    sys.stdin.readline()
    async def one():
        try: return str(await admit(database, user, profile={}, node=node, worker=worker))
        except RefusedError as error: return error.key
    print(*await asyncio.gather(*(one() for _ in range(count))))
    await database.dispose()
asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
"""


async def test_of_200_at_once_exactly_7_get_in(database_url: str, database: Database, ada: User) -> None:
    """Four processes, two workers of each of two nodes, fifty logins each."""
    await quotas.change(database, ADA, {"sessions": 7}, by="root")
    racers = [
        subprocess.Popen(  # noqa: ASYNC220 - it returns at once; what waits is in threads
            [sys.executable, "-c", RACE, database_url, node, str(worker), "50"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for node in ("one", "two") for worker in (0, 1)
    ]  # fmt: skip
    for racer in racers:
        assert racer.stdout is not None
        assert await asyncio.to_thread(racer.stdout.readline) == "ready\n"
    answers: Counter[str] = Counter()
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("go\n")
        racer.stdin.flush()
    for racer in racers:
        out, _ = await asyncio.to_thread(racer.communicate, None, 120)
        assert racer.returncode == 0
        answers.update("in" if word.isdecimal() else word for word in out.split())
    assert answers == {"in": 7, "sessions": 193}
    assert len(await sessions.list_sessions(database, states=[State.STARTING])) == 7
    assert len(await sessions.list_sessions(database, states=[State.REFUSED])) == 193


async def test_a_tenants_users_cannot_race_past_its_quota(database_url: str, database: Database, ada: User) -> None:
    await quotas.change(database, PHYSICS, {"sessions": 5}, by="root")
    bob, other = await other_user(database), Database(database_url)
    pairs = [(database, ada, "one"), (other, bob, "two")] * 20
    done = await asyncio.gather(
        *(admit(one, user, profile={}, node=node) for one, user, node in pairs), return_exceptions=True
    )
    await other.dispose()
    assert Counter(type(result).__name__ for result in done) == {"int": 5, "RefusedError": 35}
