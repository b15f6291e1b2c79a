"""Sessions: every transition once, whoever tries it; recovery; filters; hostile text; audit events."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import select, update

from sandbox_ssh.errors import NotFoundError, StoreError
from sandbox_ssh.store import audit, nodes, sessions, tenants, users
from sandbox_ssh.store.columns import clean
from sandbox_ssh.store.database import Database
from sandbox_ssh.store.models import AuditEvent, Session, State, User
from tests.rows import admit, close

NAMESPACES = {"user": 4026532801, "mnt": 4026532802, "pid": 4026532803}
HOSTILE = "SSH-2.0-\x1b]0;owned\x07\0\udc80\u202e'; DROP TABLE sessions; --"


@pytest.fixture
async def alice(database: Database) -> User:
    await nodes.register(database, "one", "service", "0.1")
    return await users.add(database, "alice", by="root")


async def end(database: Database, number: int, reason: str = "exit") -> bool:
    return await close(
        database, number, reason, 3, bytes_in=2**40, bytes_out=7, cpu_seconds=0.25, memory_peak_bytes=2**41
    )


async def test_the_life_of_a_session(database: Database, alice: User) -> None:
    before = datetime.now(UTC)
    number = await admit(database, alice)
    assert (await sessions.get(database, number)).state == State.STARTING
    assert await sessions.running(database, number, 4711, NAMESPACES)
    await sessions.open_channel(database, number, 0, "exec", "make test", False)
    await sessions.open_channel(database, number, 1, "shell", None, True)
    assert await sessions.close_channel(database, number, 0, 2, None)
    assert await sessions.close_channel(database, number, 1, None, "KILL")
    assert await sessions.closing(database, number)
    assert await end(database, number)
    session = await sessions.get(database, number)
    assert (session.state, session.end_reason, session.exit_status) == (State.CLOSED, "exit", 3)
    assert (session.bytes_in, session.bytes_out, session.cpu_seconds, session.memory_peak_bytes) == (
        2**40,
        7,
        0.25,
        2**41,
    )
    assert (session.init_pid, session.namespaces) == (4711, NAMESPACES)
    assert (session.user_name, session.tenant_name, session.node, session.worker) == ("alice", "default", "one", 0)
    assert session.ended_at is not None
    assert before <= session.started_at <= session.ended_at <= datetime.now(UTC)
    assert [(c.number, c.kind, c.command, c.pty, c.exit_status, c.exit_signal) for c in session.channels] == [
        (0, "exec", "make test", False, 2, None),
        (1, "shell", None, True, None, "KILL"),
    ]
    assert all(channel.closed_at is not None for channel in session.channels)


Move = Callable[[Database, int], Any]
MOVES: dict[str, Move] = {
    "running": lambda database, number: sessions.running(database, number, 1, NAMESPACES),
    "closing": sessions.closing,
    "close": end,
}
ALLOWED = {
    State.STARTING: {"running", "closing", "close"},
    State.RUNNING: {"closing", "close"},
    State.CLOSING: {"close"},
    State.CLOSED: set(),
    State.REFUSED: set(),
    State.LOST: set(),
}


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("move", MOVES)
async def test_transitions_are_guarded(database: Database, alice: User, state: State, move: str) -> None:
    number = await admit(database, alice)
    async with database.write() as transaction:
        await transaction.execute(update(Session).where(Session.id == number).values(state=state))
    assert await MOVES[move](database, number) == (move in ALLOWED[state])
    if move not in ALLOWED[state]:
        assert (await sessions.get(database, number)).state == state


async def test_one_of_many_ends_a_session(database: Database, alice: User) -> None:
    number = await admit(database, alice)
    ends = await asyncio.gather(*(end(database, number, f"attempt {i}") for i in range(20)))
    assert ends.count(True) == 1
    assert (await sessions.get(database, number)).end_reason == f"attempt {ends.index(True)}"


async def test_fifty_at_once_are_all_admitted(database: Database, alice: User) -> None:
    numbers = await asyncio.gather(*(admit(database, alice) for _ in range(50)))
    assert len(set(numbers)) == 50
    assert len(await sessions.list_sessions(database, states=[State.STARTING])) == 50


async def test_two_processes_worth_of_writers(database_url: str, database: Database, alice: User) -> None:
    other = Database(database_url)
    await asyncio.gather(*(admit(one, alice) for one in (database, other) for _ in range(40)))
    await other.dispose()
    assert len(await sessions.list_sessions(database)) == 80


async def test_an_unknown_node_cannot_admit(database: Database, alice: User) -> None:
    with pytest.raises(StoreError, match="not registered"):
        await admit(database, alice, node="elsewhere")


async def test_no_state_but_the_known(database: Database, alice: User) -> None:
    number = await admit(database, alice)
    with pytest.raises(StoreError, match="state"):
        async with database.write() as transaction:
            await transaction.execute(update(Session).where(Session.id == number).values(state="zombie"))


async def test_recovery_of_a_worker_and_of_a_node(database: Database, alice: User) -> None:
    await nodes.register(database, "two", "service", "0.1")
    mine, others, elsewhere = [
        await admit(database, alice, worker=worker, node=node) for worker, node in ((0, "one"), (1, "one"), (0, "two"))
    ]
    done = await admit(database, alice)
    await end(database, done)
    await sessions.running(database, mine, 1, NAMESPACES)
    await sessions.open_channel(database, mine, 0, "shell", None, True)
    assert await sessions.recover(database, "one", 0) == 1
    lost = await sessions.get(database, mine)
    assert (lost.state, lost.end_reason) == (State.LOST, "server-failure")
    assert lost.ended_at is not None and lost.channels[0].closed_at == lost.ended_at
    assert not await end(database, mine), "a late word of a dead gateway changes nothing"
    assert await sessions.recover(database, "one", None) == 1
    states = {number: (await sessions.get(database, number)).state for number in (others, elsewhere, done)}
    assert states == {others: State.LOST, elsewhere: State.STARTING, done: State.CLOSED}


async def test_open_channels_end_with_their_session(database: Database, alice: User) -> None:
    number = await admit(database, alice)
    await sessions.open_channel(database, number, 0, "shell", None, True)
    await sessions.open_channel(database, number, 0, "shell", None, True)  # tried again: no error, no second row
    await end(database, number)
    session = await sessions.get(database, number)
    assert [channel.closed_at for channel in session.channels] == [session.ended_at]
    assert not await sessions.close_channel(database, number, 0, 0, None)


async def test_refused_by_the_kernel_is_a_record_and_an_event(database: Database, alice: User) -> None:
    """Admitted, and then the kernel had no room: the row says so."""
    number = await admit(database, alice)
    assert await sessions.refused(database, number, "refused: no room")
    assert not await sessions.refused(database, number, "twice")
    session = await sessions.get(database, number)
    assert (session.state, session.refused_by, session.end_reason) == (State.REFUSED, "kernel", "refused: no room")
    assert session.ended_at is not None
    event = await last_event(database)
    assert (event.kind, event.session_id, event.user_name, event.address) == (
        "session-refused",
        number,
        "alice",
        "192.0.2.1",
    )


async def test_kill_requests_reach_their_worker_once(database: Database, alice: User) -> None:
    number = await admit(database, alice, worker=1)
    assert await sessions.kills_requested(database, "one", 1) == []
    assert await sessions.request_kill(database, number, "carol")
    assert await sessions.request_kill(database, number, "dave")
    assert await sessions.kills_requested(database, "one", 0) == []
    assert await sessions.kills_requested(database, "one", 1) == [(number, "carol")]
    assert (await last_event(database)).kind == "session-kill-requested"
    await end(database, number, "killed")
    assert await sessions.kills_requested(database, "one", 1) == []
    assert not await sessions.request_kill(database, number, "carol")
    with pytest.raises(NotFoundError, match="999"):
        await sessions.request_kill(database, 999, "carol")


async def test_filters(database: Database, alice: User) -> None:
    await tenants.add(database, "physics", by="root")
    await nodes.register(database, "two", "service", "0.1")
    bob = await users.add(database, "bob", tenant="physics", by="root")
    first = await admit(database, alice)
    second = await admit(database, bob, client_address="2001:db8::1", node="two")
    third = await admit(database, alice)
    noon = datetime(2025, 6, 1, 12, tzinfo=UTC)
    async with database.write() as transaction:
        for hour, number in enumerate((first, second, third)):
            start = noon + timedelta(hours=hour)
            await transaction.execute(update(Session).where(Session.id == number).values(started_at=start))
    await end(database, third)

    async def ids(**filters: Any) -> list[int]:
        return [session.id for session in await sessions.list_sessions(database, **filters)]

    berlin = timezone(timedelta(hours=2))
    assert await ids() == [first, second, third]
    assert await ids(user="alice") == [first, third]
    assert await ids(tenant="physics") == [second]
    assert await ids(node="two") == await ids(address="2001:db8::1") == [second]
    assert await ids(states=[State.CLOSED]) == [third]
    assert await ids(states=[State.CLOSED, State.STARTING]) == [first, second, third]
    assert await ids(since=datetime(2025, 6, 1, 15, tzinfo=berlin)) == [second, third]
    assert await ids(until=noon + timedelta(hours=1)) == [first]
    assert await ids(user="alice", states=[State.STARTING], since=noon, until=noon + timedelta(days=1)) == [first]
    assert await ids(user="' OR ''='") == []


async def test_hostile_text_is_kept_harmlessly(database: Database, alice: User) -> None:
    number = await admit(database, alice, client_version=HOSTILE)
    await sessions.open_channel(database, number, 0, "exec", HOSTILE * 10_000, False)
    await audit.record(
        database, "auth-failure", node="one", user=HOSTILE * 1000, address="192.0.2.1",
        detail={"user": HOSTILE, HOSTILE: [HOSTILE, {"deep": HOSTILE}]},
    )  # fmt: skip
    session = await sessions.get(database, number)
    assert session.client_version == clean(HOSTILE, 255)
    assert session.channels[0].command == clean(HOSTILE * 10_000, 65536)
    event = await last_event(database)
    assert event.user_name == clean(HOSTILE * 1000, 255)
    assert event.detail[clean(HOSTILE, 255)][1]["deep"] == clean(HOSTILE, 255)


ANY_TEXT = st.text(st.characters(), max_size=40)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(version=ANY_TEXT, command=ANY_TEXT, detail=st.dictionaries(ANY_TEXT, ANY_TEXT, max_size=3))
def test_any_text_can_be_stored(database_url: str, version: str, command: str, detail: dict[str, str]) -> None:
    async def store() -> None:
        database = Database(database_url)
        try:
            await nodes.register(database, "one", "service", "0.1")
            user = await users.find(database, "eve") or await users.add(database, "eve", by="root")
            number = await admit(database, user, client_version=version)
            await sessions.open_channel(database, number, 0, "exec", command, False)
            await audit.record(database, "auth-failure", node="one", user=version, detail=detail)
            session = await sessions.get(database, number)
            assert session.client_version == clean(version, 255)
            assert session.channels[0].command == clean(command, 65536)
        finally:
            await database.dispose()

    asyncio.run(store())


def test_clean() -> None:
    assert clean("a\0b\ud800c\U0001f600", 10) == "a\ufffdb\ufffdc\U0001f600"
    assert clean("abc", 2) == "ab"


async def test_times_without_a_zone_are_refused(database: Database, alice: User) -> None:
    with pytest.raises(StoreError, match="zone"):
        await sessions.list_sessions(database, since=datetime(2025, 1, 1))


async def test_nodes_register_again(database: Database) -> None:
    await nodes.register(database, "one", "service", "0.1")
    await nodes.register(database, "one", "rootless", "0.2")


async def last_event(database: Database) -> AuditEvent:
    async with database.read() as transaction:
        event = await transaction.scalar(select(AuditEvent).order_by(AuditEvent.id.desc()).limit(1))
    assert event is not None
    return event
