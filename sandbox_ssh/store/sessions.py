"""Sessions and their channels: the record of who was in, from where, for how long, and what it cost.

    starting -> running -> closing -> closed        refused: was never let in        lost: its node or worker died

Every transition is one UPDATE that names the states it may come from, so two that want to end the same session at
once (its gateway and a recovery, say) cannot both believe that they did: each function says whether it was the one.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, cast

from sqlalchemy import Update, select, update
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import selectinload

from sandbox_ssh.errors import NotFoundError
from sandbox_ssh.store import audit, usage
from sandbox_ssh.store.columns import now
from sandbox_ssh.store.database import Database, insert_or
from sandbox_ssh.store.models import LIVE, Channel, Session, State

if TYPE_CHECKING:
    from sqlalchemy import CursorResult


async def running(database: Database, number: int, init_pid: int, namespaces: Mapping[str, int]) -> bool:
    """The sandbox is there."""
    return await _move(
        database, number, (State.STARTING,), state=State.RUNNING, init_pid=init_pid, namespaces=dict(namespaces)
    )


async def closing(database: Database, number: int) -> bool:
    """The connection has ended, or is being ended; the sandbox is on its way out."""
    return await _move(database, number, (State.STARTING, State.RUNNING), state=State.CLOSING)


async def refused(database: Database, number: int, reason: str) -> bool:
    """The kernel, or the host, had no room for the sandbox of a session that was let in."""
    ended = now()
    async with database.write() as transaction:
        moved = await _changes(
            transaction,
            _transition(
                (State.STARTING,), state=State.REFUSED, refused_by="kernel", end_reason=reason, ended_at=ended
            ).where(Session.id == number),
        )
        if moved:
            row = (await transaction.execute(select(usage.TABLE).where(usage.TABLE.c.id == number))).one()
            await transaction.execute(usage.refused(transaction, dict(row._mapping)))
            await audit.note(
                transaction, "session-refused", node=row.node, user=row.user_name, tenant=row.tenant_name,
                session=number, address=row.client_address, detail={"reason": reason},
            )  # fmt: skip
        return moved


async def close(
    database: Database, number: int, *, reason: str, exit_status: int | None, used: usage.Sample, ended: datetime
) -> bool:
    """The sandbox is gone, and this is what it cost. Channels that are still open end with it."""
    live = select(usage.TABLE).where(usage.TABLE.c.id == number, usage.TABLE.c.state.in_(LIVE)).with_for_update()
    async with database.write() as transaction:
        row = (await transaction.execute(live)).first()
        if row is None:
            return False
        await transaction.execute(
            _transition(
                LIVE,
                state=State.CLOSED,
                end_reason=reason,
                ended_at=ended,
                exit_status=exit_status,
                **usage.totals(row, used),
                use=None,
            ).where(Session.id == number)
        )
        await usage.account(transaction, [row], {number: used})
        open_channels = Channel.session_id == number, Channel.closed_at.is_(None)
        await transaction.execute(_unsynchronized(update(Channel)).where(*open_channels).values(closed_at=ended))
        return True


async def recover(
    database: Database,
    node: str,
    worker: int | None,
    *,
    known: Collection[int] = (),
    before: datetime | None = None,
) -> int:
    """Call the live sessions of a worker that has died `lost`, or of a whole node (None); return how many they were.

    A worker that lives asks for those that it does not know (any more) and that started `before` some time.
    """
    ended = now()
    query = select(usage.TABLE).where(usage.TABLE.c.node == node, usage.TABLE.c.ended_at.is_(None))
    if worker is not None:
        query = query.where(usage.TABLE.c.worker == worker)
    async with database.write() as transaction:
        live = (await transaction.execute(query.order_by(usage.TABLE.c.id).with_for_update())).all()
        # Not in the query: with `started_at` in it, SQLite goes through all past sessions of the node.
        rows = [row for row in live if row.id not in known and (before is None or row.started_at < before)]
        lost = [row.id for row in rows]
        if lost:
            # What they used after their last sample, nobody knows.
            await usage.account(transaction, [row for row in rows if row.seconds is None], {})
            ending = _transition(LIVE, state=State.LOST, end_reason="server-failure", ended_at=ended, use=None)
            await transaction.execute(ending.where(Session.id.in_(lost)))
            open_channels = Channel.session_id.in_(lost), Channel.closed_at.is_(None)
            await transaction.execute(_unsynchronized(update(Channel)).where(*open_channels).values(closed_at=ended))
        return len(lost)


async def open_channel(
    database: Database, session: int, number: int, kind: str, command: str | None, pty: bool
) -> None:
    """Record a channel: `shell`, `exec` or `subsystem`. A second time is no error, so that it can be tried again."""
    async with database.write() as transaction:
        await transaction.execute(
            insert_or(transaction, Channel)
            .values(session_id=session, number=number, kind=kind, command=command, pty=pty)
            .on_conflict_do_nothing(index_elements=["session_id", "number"])
        )


async def close_channel(
    database: Database, session: int, number: int, exit_status: int | None, exit_signal: str | None
) -> bool:
    which = Channel.session_id == session, Channel.number == number, Channel.closed_at.is_(None)
    values = {"closed_at": now(), "exit_status": exit_status, "exit_signal": exit_signal}
    async with database.write() as transaction:
        return await _changes(transaction, _unsynchronized(update(Channel)).where(*which).values(values))


async def request_kill(database: Database, number: int, by: str) -> bool:
    """Ask the session's gateway to end it; False when it has ended already. Raises `NotFoundError`."""
    asked = _unsynchronized(update(Session)).where(
        Session.id == number, Session.state.in_(LIVE), Session.kill_requested_at.is_(None)
    )
    async with database.write() as transaction:
        new = await _changes(transaction, asked.values(kill_requested_at=now(), kill_requested_by=by))
        session = await transaction.get(Session, number)
        if session is None:
            raise NotFoundError(f"there is no session {number}: see `sandbox-ssh session list`")
        if new:
            await audit.note(
                transaction,
                "session-kill-requested",
                node=session.node,
                user=session.user_name,
                tenant=session.tenant_name,
                session=number,
                detail={"by": by},
            )
        return session.state in LIVE


async def kills_requested(database: Database, node: str, worker: int) -> list[tuple[int, str]]:
    """The sessions of a worker that are to be ended, and who asked for it."""
    query = select(Session.id, Session.kill_requested_by).where(
        Session.node == node,
        Session.worker == worker,
        Session.kill_requested_at.is_not(None),
        Session.ended_at.is_(None),
    )
    async with database.read() as transaction:
        return [(number, by or "") for number, by in await transaction.execute(query)]


async def get(database: Database, number: int) -> Session:
    """A session with its channels. Raises `NotFoundError`."""
    query = select(Session).where(Session.id == number).options(selectinload(Session.channels))
    async with database.read() as transaction:
        session = await transaction.scalar(query)
    if session is None:
        raise NotFoundError(f"there is no session {number}: see `sandbox-ssh session list`")
    return session


async def list_sessions(
    database: Database,
    *,
    user: str | None = None,
    tenant: str | None = None,
    states: Sequence[State] = (),
    since: datetime | None = None,
    until: datetime | None = None,
    address: str | None = None,
    node: str | None = None,
) -> Sequence[Session]:
    """Sessions with their channels, the newest last. `since` and `until` bound the time of their start."""
    query = select(Session)
    for column, value in (
        (Session.user_name, user),
        (Session.tenant_name, tenant),
        (Session.client_address, address),
        (Session.node, node),
    ):
        if value is not None:
            query = query.where(column == value)
    if states:
        query = query.where(Session.state.in_(states))
    if since is not None:
        query = query.where(Session.started_at >= since)
    if until is not None:
        query = query.where(Session.started_at < until)
    query = query.order_by(Session.started_at, Session.id).options(selectinload(Session.channels))
    async with database.read() as transaction:
        return (await transaction.scalars(query)).all()


async def _move(database: Database, number: int, sources: Sequence[State], **values: object) -> bool:
    async with database.write() as transaction:
        return await _changes(transaction, _transition(sources, **values).where(Session.id == number))


async def _changes(transaction: AsyncSession, statement: Update) -> bool:
    """Whether a statement found a row in the state that it asks for."""
    return cast("CursorResult[Any]", await transaction.execute(statement)).rowcount > 0


def _transition(sources: Sequence[State], **values: object) -> Update:
    return _unsynchronized(update(Session)).where(Session.state.in_(sources)).values(**values)


def _unsynchronized(statement: Update) -> Update:
    """No object of the transaction holds what changes, so there is none that the ORM must bring up to date."""
    return statement.execution_options(synchronize_session=False)
