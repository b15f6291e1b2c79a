"""A gateway worker: what its connections share, how it starts and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import socket
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, TypeVar

import asyncssh
import structlog

from sandbox_ssh import capacity
from sandbox_ssh.errors import ConfigError, QuotaError, SpawnerError, StoreError
from sandbox_ssh.gateway import listener
from sandbox_ssh.gateway.spawner import Spawner
from sandbox_ssh.quotas import bounded, check_host
from sandbox_ssh.spawner import protocol
from sandbox_ssh.store import nodes, quotas, sessions, usage
from sandbox_ssh.store.database import Database

if TYPE_CHECKING:
    from sandbox_ssh.config import Config
    from sandbox_ssh.gateway.session import Session
    from sandbox_ssh.gateway.transport import Transport

ORDERS_POLL = 0.5
"""Seconds between two looks for what administrators want."""

SAMPLE_INTERVAL = 10.0
"""Seconds between two measurements of every session: the most that a crash makes the accounts forget."""

BEAT_INTERVAL, DEAD_AFTER = 10.0, 120.0
"""Seconds between two signs of life of a node, and without one after which the others take it for dead."""

SWEEP_INTERVAL = 60.0
"""Seconds between two looks for records that nobody would close."""

RECORDS_WITHIN = 10.0
"""Seconds that the last records of a server that shuts down may take."""

T = TypeVar("T")

log = structlog.get_logger()


class Worker:
    def __init__(self, config: Config, number: int, load: Callable[[], Config]) -> None:
        self.config = config
        self.node = config.server.node
        self.number = number
        self.database = Database(config.database.url)
        self.spawner = Spawner(config.server.state_dir / "run" / "spawner.sock", self._spawner_is_there)
        self.options = listener.options(self, config, listener.host_keys(config.ssh.host_keys))
        self.hashing = asyncio.Semaphore(os.cpu_count() or 1)
        self.startups: set[Transport] = set()
        self.sessions: set[Session] = set()
        self.quotas_revision = 0
        """The latest change of quotas that sessions have been told of (`store.quotas.revision`)."""
        self._limits: Mapping[str, int] = {}
        self._nested = False
        self._beats: dict[str, tuple[int, float]] = {}
        self._idle = asyncio.Event()
        self._idle.set()
        self._load = load
        self._tasks: set[asyncio.Task[Any]] = set()

    async def run(self, listening: Sequence[socket.socket], ready: Callable[[], None]) -> None:
        """Serve until SIGTERM or SIGINT.

        Raises `StoreError` when the database cannot be used.
        """
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        loop.add_signal_handler(signal.SIGHUP, self.reload)
        await self.database.check_schema()
        await nodes.register(self.database, self.node, self.config.mode, version("sandbox-ssh"))
        await sessions.recover(self.database, self.node, self.number)
        loops = (
            self.spawner.keep_connected(),
            self._every(ORDERS_POLL, self._watch_orders),
            self._every(SAMPLE_INTERVAL, self._sample),
            self._every(1, self._tick),
            self._every(BEAT_INTERVAL, self._beat),
            self._every(SWEEP_INTERVAL, self._sweep),
        )
        standing = [asyncio.create_task(coroutine) for coroutine in loops]
        servers = [await listener.listen(self, sock) for sock in listening]
        _settle_memory()
        ready()
        await stop.wait()
        await self._shut_down(servers)
        for task in standing:
            task.cancel()
        self.spawner.close()
        await self.database.dispose()

    def spawn_task(self, coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run something that belongs to no caller; the worker does not end before it has."""
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._task_done)
        return task

    def _task_done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a task failed", exc_info=error)

    def session_began(self, session: Session) -> None:
        self.sessions.add(session)
        self._idle.clear()

    def session_over(self, session: Session) -> None:
        self.sessions.discard(session)
        if not self.sessions:
            self._idle.set()

    def reload(self) -> None:
        """SIGHUP: take the configuration as it is now for new sessions, or keep the old one if it has an error."""
        try:
            config = self._load()
            check_host(config.sandbox.quotas, self._limits)
            options = listener.options(self, config, listener.host_keys(config.ssh.host_keys))
        except (ConfigError, QuotaError) as error:
            log.error("the configuration was not reloaded", error=str(error))
            return
        if waiting := _changed_for_the_next_start(self.config, config):
            log.warning("these settings count from the next start on", keys=", ".join(waiting))
        self.config, self.options = config, options
        log.info("the configuration was reloaded for new connections")
        self.spawn_task(self._learn_capacity())
        self.spawn_task(self._change_quotas())  # those of the configuration may have changed

    def _spawner_is_there(self) -> None:
        self.spawn_task(self._learn_capacity())

    async def _learn_capacity(self) -> None:
        """What the host can carry, for admission; read again with the configuration."""
        try:
            reply, _ = await self.spawner.request(protocol.Capacity())
            effective = await quotas.effective(self.database, None, None, self.config.sandbox.quotas)
            room = capacity.read(reply["users"], reply["rlimits"], bounded(effective.values))
            await nodes.set_capacity(self.database, self.node, asdict(room))
        except (SpawnerError, StoreError, OSError) as error:
            log.error("what this host can carry could not be noted", error=str(error))
            return
        self._limits = room.limits
        if self.number == 0:
            log.info(
                "this host has room", sessions=room.sandboxes, bound=room.bound, users=room.users,
                users_at_their_quotas=room.full, bound_then=room.full_bound,
            )  # fmt: skip

    async def _every(self, seconds: float, step: Callable[[], Awaitable[None]]) -> None:
        """Do a step again and again. An error in one is told, and is not the end of them all."""
        while True:
            await asyncio.sleep(seconds)
            try:
                await step()
            except (StoreError, SpawnerError) as error:
                log.warning("a step of the gateway's has failed, trying again", error=str(error))
            except Exception:
                log.exception("a step of the gateway's has failed, trying again")

    async def _watch_orders(self) -> None:
        """What administrators want of live sessions: that they end, or other quotas."""
        if not self.sessions:
            return
        for number, by in await sessions.kills_requested(self.database, self.node, self.number):
            for session in [session for session in self.sessions if session.id == number]:
                session.end("killed", f"this session was ended by {by}" if by else "this session was ended")
        revision = await quotas.revision(self.database)
        if revision != self.quotas_revision:
            self.quotas_revision = revision  # first: a session that is being admitted looks whether it has changed
            await self._change_quotas()

    async def _change_quotas(self) -> None:
        try:
            for user, tenant in {(session.user_id, session.tenant_id) for session in self.sessions}:
                effective = await quotas.effective(self.database, user, tenant, self.config.sandbox.quotas)
                for session in [one for one in self.sessions if (one.user_id, one.tenant_id) == (user, tenant)]:
                    await session.limit(effective)
        except BaseException:
            self.quotas_revision = -1  # to be done again
            raise

    async def _sample(self) -> None:
        """Measure the sessions, write it down, and let each know what its user has used today."""
        live = {session.id: session for session in self.sessions}
        samples = [sample for session in live.values() if (sample := await session.measure()) is not None]
        if samples:
            found = await usage.sample(self.database, self.node, samples)
            for session in [live[sample.session] for sample in samples]:
                if session.id in found.sessions:
                    session.sampled(found.users[session.user_id], found.tenants[session.tenant_id])
                else:  # unless it has just ended by itself
                    session.end("server-failure", "its record was closed, for this server seemed to be dead")
        if samples or self._nested:
            self._nested = await nodes.count_nested(self.database, self.node)

    async def _beat(self) -> None:
        """Say that this node lives, and close the records of one that does not.

        Beats are compared by our own clock: those of two hosts need not agree.
        """
        moment = time.monotonic()
        for node, beats in (await nodes.beat(self.database, self.node)).items():
            heard, when = self._beats.get(node, (-1, moment))
            if node == self.node or beats != heard:
                self._beats[node] = beats, moment
            elif moment - when > DEAD_AFTER and self.number == 0:
                self._beats[node] = beats, moment
                if lost := await sessions.recover(self.database, node, None):
                    log.warning("a node has died, and its sessions' records are closed", node=node, sessions=lost)

    async def _sweep(self) -> None:
        """Close records of this worker that nobody would: of a login that was written and not answered, say."""
        known = {session.id for session in self.sessions}
        before = datetime.now(UTC) - timedelta(seconds=SWEEP_INTERVAL)
        if lost := await sessions.recover(self.database, self.node, self.number, known=known, before=before):
            log.warning("records of sessions that are not there are closed", sessions=lost)

    async def _tick(self) -> None:
        for session in list(self.sessions):
            session.tick()

    async def _shut_down(self, servers: Sequence[asyncio.Server]) -> None:
        """Stop accepting, let sessions end by themselves for a while, then end them, and wait for their records."""
        for server in servers:
            server.close()
        for transport in list(self.startups):
            transport.disconnect(asyncssh.DISC_SERVICE_NOT_AVAILABLE, "The server is shutting down")
        patience = self.config.server.shutdown_timeout
        log.info("shutting down", sessions=len(self.sessions), patience=patience)
        for session in self.sessions:
            session.notice(f"the server is shutting down; this session ends within {patience:g} seconds")
        await self._sessions_gone(patience)
        for session in list(self.sessions):
            session.end("shutdown", "the server has shut down")
        await self._sessions_gone(RECORDS_WITHIN)
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=RECORDS_WITHIN)

    async def _sessions_gone(self, timeout: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), timeout)


def _changed_for_the_next_start(old: Config, new: Config) -> list[str]:
    """What a reload cannot change: sockets, processes and the database are made once."""
    fixed = [("server", key) for key in type(old.server).model_fields if key != "shutdown_timeout"]
    fixed += [("sandbox", key) for key in ("id_first", "id_blocks", "uplinks_ready")]
    fixed += [("database", "url"), ("log", "level"), ("log", "format")]
    return [
        f"{section}.{key}"
        for section, key in fixed
        if getattr(getattr(old, section), key) != getattr(getattr(new, section), key)
    ]


def _settle_memory() -> None:
    """Leave what was loaded at the start out of every later garbage collection."""
    gc.collect()
    gc.freeze()
