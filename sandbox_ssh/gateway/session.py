"""A session: one authenticated connection, its row in the database and its sandbox.

    authenticated -> admitted (row `starting`) -> sandbox made (row `running`) -> ... -> destroyed -> row closed

The sandbox is asked for as soon as the row is committed, while the client still opens its first channel; channels
wait for it. A session ends with its connection, and the sandbox with the session: whatever ends first, `finish`
runs once, and it is the only way out.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import asyncssh
import structlog

from sandbox_ssh import capacity
from sandbox_ssh.errors import RefusedError, SpawnerError, StoreError
from sandbox_ssh.gateway import limits
from sandbox_ssh.gateway.channel import OVER_QUOTA, Channel, Refusal
from sandbox_ssh.gateway.record import Record
from sandbox_ssh.quotas import NAMESPACES, QUOTAS, SUMMED, UNLIMITED, kernel_limits
from sandbox_ssh.spawner import protocol
from sandbox_ssh.store import admission, quotas, sessions, usage
from sandbox_ssh.store.usage import Sample, Together

if TYPE_CHECKING:
    from sandbox_ssh.gateway.transport import Transport
    from sandbox_ssh.gateway.worker import Worker
    from sandbox_ssh.store.models import User
    from sandbox_ssh.store.quotas import Effective

LAST_WORDS = 1.0
"""Seconds that a client gets to show a sentence and leave before it is disconnected."""

CHANNEL_WITHIN = 5.0
"""Seconds that one who is turned away gets to open the channel on which that can be said."""

RECORDED_WITHIN = 5.0
"""Seconds that the first byte of a session waits for its row."""

PROMPTLY = 0.25
"""Seconds in which a sandbox is gone as a rule. Only where it is not does the row say `closing` meanwhile."""

USAGE_WITHIN = 10.0
"""Seconds that a session's row waits for what its sandbox used."""

_ENDS = {
    "init-died": "its first process has died",
    "uplink-died": "its network has died",
    "out-of-memory": "it used more memory than quota `memory` allows",
}

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Login:
    """Who has authenticated, from where and how."""

    user: User
    address: str
    port: int
    local_address: str
    local_port: int
    client_version: str
    method: str
    key_fingerprint: str | None


class Session:
    def __init__(self, worker: Worker, transport: Transport, login: Login) -> None:
        self.id = 0
        self.bytes_in = 0
        self.bytes_out = 0
        self.flowing = True
        self.accept_env = worker.config.ssh.accept_env
        self.environment = {
            "SSH_CLIENT": f"{login.address} {login.port} {login.local_port}",
            "SSH_CONNECTION": f"{login.address} {login.port} {login.local_address} {login.local_port}",
        }
        self._worker = worker
        self._transport = transport
        self._login = login
        self._record = Record(worker.spawn_task)
        self._channels: dict[int, Channel] = {}
        self._next_channel = 0
        self._dropped = False
        self._gone = False
        self._exit_status: int | None = None
        self._refusal: Refusal | None = None
        self.clock: limits.Clock | None = None
        self._in_use: dict[str, int] = {}
        self._peaks: dict[str, int] = {}
        self._namespaces_peak: dict[str, int] = {}
        self._looked_at = False
        self._ended_at = datetime.now(UTC)
        self._lasted: float | None = None
        self._made = asyncio.Event()
        self._running: asyncio.Task[bool] | None = None
        self._sandbox_lives = False
        self._ended = asyncio.Event()
        self._usage: Mapping[str, Any] = {}
        self._end_reason: str | None = None
        self._starting = worker.spawn_task(self._start())

    # The beginning.

    async def _start(self) -> None:
        try:
            await self._admit()
            if not self._gone:
                await self._create()
        except Refusal as refusal:
            self._refusal = refusal
            self._leave(str(refusal))
        finally:
            self._made.set()

    async def _admit(self) -> None:
        worker, login = self._worker, self._login
        wanted = admission.Login(
            user=login.user,
            node=worker.node,
            worker=worker.number,
            client_address=login.address,
            client_port=login.port,
            client_version=login.client_version,
            auth_method=login.method,
            key_fingerprint=login.key_fingerprint,
            image=worker.config.sandbox.image,
            shortage=capacity.shortage(),
        )
        profile, revision = worker.config.sandbox.quotas, worker.quotas_revision
        try:
            admitted = await admission.admit(worker.database, wanted, profile)
            self.id = admitted.number
            effective = admitted.quotas
            if worker.quotas_revision != revision:  # changed meanwhile: the worker has told only those with a clock
                effective = await quotas.effective(worker.database, self.user_id, self.tenant_id, profile)
        except RefusedError as error:
            log.warning("a session was refused", user=login.user.name, address=login.address, reason=str(error))
            raise Refusal(f"refused: {error}", OVER_QUOTA) from error
        except StoreError as error:
            log.error("a session could not be recorded and was refused", user=login.user.name, error=str(error))
            raise Refusal("this server cannot record sessions at the moment; try again later") from error
        used = admitted.in_use
        self._in_use = {key: used[key] for key in used if key != "logins_per_hour"} | {"sessions": used["sessions"] + 1}
        self.clock = limits.Clock(effective)
        self.clock.user = Together(
            used.get("session_time_per_day", 0), used.get("network_per_day", 0), self._in_use["sessions"]
        )

    async def _create(self) -> None:
        assert self.clock is not None
        config, effective = self._worker.config.sandbox, self.clock.quotas
        values = effective.values
        request = protocol.Create(
            sandbox=self.sandbox,
            user=self.user_id,
            user_limits=kernel_limits(values),
            tenant=self.tenant_id,
            tenant_limits=kernel_limits(effective.tenant),
            image=config.image,
            hostname=config.hostname,
            network=config.network,
            disk=values["disk"],
            inodes=values["inodes"],
            ptys=values["ptys"],
            open_files=values["open_files"],
            notes=limits.notes(self.clock, self._in_use),
        )
        try:
            reply = await self._worker.spawner.create(self, request)
        except SpawnerError as error:
            log.error("no sandbox could be made", session=self.id, code=error.code, error=str(error))
            if error.code == "limit":
                reason = await self._limit_reached() or str(error)
                self._record.write(lambda: sessions.refused(self._worker.database, self.id, reason))
                raise Refusal(f"refused: {reason}", OVER_QUOTA) from error
            self._end_reason = "server-failure" if error.code == "ended" else "sandbox-failure"
            raise Refusal(f"no sandbox could be made for you: {error}") from error
        self._sandbox_lives = True
        self._namespaces_peak = dict.fromkeys(reply["namespaces"], 1)
        self._running = self._record.write(
            lambda: sessions.running(self._worker.database, self.id, reply["init_pid"], reply["namespaces"])
        )
        if self.clock.quotas is not effective:  # changed while there was no holder yet that could have been told
            self._worker.spawn_task(self.limit(self.clock.quotas))
        log.info("session started", session=self.id, user=self._login.user.name, address=self._login.address)

    async def _limit_reached(self) -> str | None:
        """Which quota it was that the kernel held, for it does not say; None where it was none that can be seen."""
        assert self.clock is not None
        worker, user = self._worker, self._login.user
        mine = [one for one in worker.sessions if one.tenant_id == user.tenant_id]
        samples = [sample for one in mine if (sample := await one.measure()) is not None]
        try:
            await usage.sample(worker.database, worker.node, samples)
            together = await usage.of_user(worker.database, worker.node, user.id, user.tenant_id)
        except StoreError:
            return None
        of = (f"user {user.name}", f"tenant {user.tenant.name}")
        for whose, values, used in zip(of, (self.clock.quotas.values, self.clock.quotas.tenant), together, strict=True):
            for key in ("processes", *NAMESPACES):
                count, value = used.use.get(key, 0), values.get(key, UNLIMITED)
                if value != UNLIMITED and count + QUOTAS[key].least > value:
                    return f"quota {key} of {whose}: {count} of {value} in use, until one of them is gone"
        return None

    @property
    def user_id(self) -> int:
        return self._login.user.id

    @property
    def tenant_id(self) -> int:
        return self._login.user.tenant_id

    @property
    def sandbox(self) -> str:
        return f"s{self.id}"

    async def made(self) -> None:
        """Wait for the sandbox.

        Raises `Refusal` when there will be none.
        """
        await self._made.wait()
        if self._refusal is not None:
            raise Refusal(str(self._refusal), self._refusal.status)

    async def recorded(self) -> None:
        """Wait until the row says `running`: no byte of a shell without a record.

        Raises `Refusal` when the database does not take it.
        """
        assert self._running is not None
        done, _ = await asyncio.wait([self._running], timeout=RECORDED_WITHIN)
        if not done or not self._running.result():
            raise Refusal("this server cannot record sessions at the moment; try again later")

    # Channels.

    def open_channel(self) -> Channel | None:
        """A new channel, or None where the session has as many as it may."""
        if len(self._channels) >= self._worker.config.ssh.max_sessions:
            return None
        channel = Channel(self, self._next_channel)
        self._channels[self._next_channel] = channel
        self._next_channel += 1
        return channel

    async def spawn(
        self, number: int, command: str | None, environment: dict[str, str], pty: dict[str, Any] | None
    ) -> list[int]:
        request = protocol.Spawn(self.sandbox, number, command, environment, pty)
        _, fds = await self._worker.spawner.request(request)
        return fds

    async def signal(self, number: int, signal: str) -> None:
        with contextlib.suppress(SpawnerError):  # the process, or all of the sandbox, has just ended
            await self._worker.spawner.request(protocol.Signal(self.sandbox, number, signal))

    def channel_opened(self, channel: Channel, kind: str, command: str | None, *, pty: bool) -> None:
        self._record.write(
            lambda: sessions.open_channel(self._worker.database, self.id, channel.number, kind, command, pty)
        )

    def channel_closed(self, channel: Channel, status: int | None, signal: str | None) -> None:
        self._exit_status = status
        self._record.write(
            lambda: sessions.close_channel(self._worker.database, self.id, channel.number, status, signal)
        )

    def channel_gone(self, channel: Channel, exc: Exception | None) -> None:
        self._channels.pop(channel.number, None)
        self._dropped = self._dropped or exc is not None

    def flow(self, flowing: bool) -> None:
        """The connection's socket is full, or has room again."""
        self.flowing = flowing
        for channel in self._channels.values():
            channel.flow()

    # What the spawner says.

    def process_exited(self, event: Mapping[str, Any]) -> None:
        channel = self._channels.get(event["channel"])
        if channel is not None:
            channel.exited(event)

    def sandbox_ended(self, event: Mapping[str, Any]) -> None:
        self._sandbox_lives = False
        self._usage = event
        self._ended.set()
        if event["reason"] != "destroyed":
            reason = "out-of-memory" if event["reason"] == "out-of-memory" else "sandbox-failure"
            self.end(reason, f"the sandbox has ended: {_ENDS[event['reason']]}")

    def spawner_lost(self) -> None:
        self._sandbox_lives = False
        self._ended.set()
        self.end("server-failure", "the sandbox has ended: the server's part that runs it has failed")

    # The end.

    def notice(self, sentence: str) -> None:
        for channel in list(self._channels.values()):
            channel.notice(sentence)

    def notice_terminals(self, sentence: str) -> None:
        """Only where a person looks: a program that reads standard error is left alone."""
        for channel in list(self._channels.values()):
            if channel.terminal:
                channel.notice(sentence)

    def end(self, reason: str, sentence: str) -> None:
        """End the session from this side, and tell the client why."""
        if self._end_reason is not None:
            return
        self._end_reason = reason
        log.info("session is being ended", session=self.id, user=self._login.user.name, reason=reason)
        if self._refusal is None:
            self._refusal = Refusal(sentence)
        for channel in list(self._channels.values()):
            channel.notice(sentence)
            channel.kill()
        self._worker.spawn_task(self._destroy())
        self._leave(sentence)

    def _leave(self, sentence: str) -> None:
        """Disconnect a client that does not leave by itself when its channels are closed."""
        loop = asyncio.get_running_loop()
        patience = LAST_WORDS if self._next_channel else CHANNEL_WITHIN
        loop.call_later(patience, self._transport.disconnect, asyncssh.DISC_SERVICE_NOT_AVAILABLE, sentence)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._end_reason is None:
            # Without a DISCONNECT message (RFC 4253 section 11.1) the client or the network has failed, unless
            # its channels were closed before: not every client says goodbye.
            left = exc is None or (self._next_channel > 0 and not self._dropped)
            self._end_reason = "exit" if left else "disconnect"
        self._gone = True
        self._worker.spawn_task(self._finish())

    async def _destroy(self) -> None:
        if self._sandbox_lives:
            self._sandbox_lives = False
            with contextlib.suppress(SpawnerError):  # it has just ended, or the spawner has
                await self._worker.spawner.request(protocol.Destroy(self.sandbox))

    async def _finish(self) -> None:
        self._ended_at, self._lasted = datetime.now(UTC), self._seconds()
        await asyncio.wait([self._starting])
        if self._running is not None:
            await self._destroy()
            if not await _set_within(self._ended, PROMPTLY):
                self._record.write(lambda: sessions.closing(self._worker.database, self.id))
            if not await _set_within(self._ended, USAGE_WITHIN):
                self._worker.spawner.forget(self.sandbox)
                log.error("the spawner does not say what became of a sandbox", session=self.id)
        if self.id:
            # However long the database is away: a row that stays open takes a place of its user's.
            await self._record.write(self._close_row, for_ever=True)
        log.info("session ended", session=self.id, reason=self._end_reason, user=self._login.user.name)
        self._worker.session_over(self)

    async def _close_row(self) -> None:
        assert self._end_reason is not None
        await sessions.close(
            self._worker.database,
            self.id,
            reason=self._end_reason,
            exit_status=self._exit_status,
            used=self._sample(self._usage),
            ended=self._ended_at,
        )

    def _seconds(self) -> float:
        """How long it has lasted, or had lasted when its connection ended."""
        if self._lasted is not None:
            return self._lasted
        return time.monotonic() - self.clock.started if self.clock is not None else 0.0

    # What is used, and how long it may go on.

    async def measure(self) -> Sample | None:
        """What the session has used so far; None where there is nothing to ask."""
        if not self._sandbox_lives or self._running is None or not self._running.done():
            return None
        try:
            measured, _ = await self._worker.spawner.request(protocol.Measure(self.sandbox))
        except SpawnerError:  # it has just ended
            return None
        return self._sample(measured)

    def _sample(self, measured: Mapping[str, Any]) -> Sample:
        for peak, now in (("memory", "memory_bytes"), ("processes", "processes"), ("disk", "disk_bytes")):
            self._peaks[peak] = max(self._peaks.get(peak, 0), measured.get(now, 0))
        use = {
            "processes": measured.get("processes", 0),
            "memory": measured.get("memory_bytes", 0),
            "disk": measured.get("disk_bytes", 0),
            "inodes": measured.get("inodes", 0),
            "ptys": measured.get("ptys", 0),
        }
        for kind, count in measured.get("namespaces", {}).items():
            use[f"{kind}_namespaces"] = count
            self._namespaces_peak[kind] = max(self._namespaces_peak.get(kind, 0), count)
        self._in_use |= use
        return Sample(
            session=self.id,
            seconds=self._seconds(),
            cpu_seconds=measured.get("cpu_seconds", 0.0),
            memory_peak_bytes=max(measured.get("memory_peak_bytes", 0), self._peaks["memory"]),
            processes_peak=self._peaks["processes"],
            disk_peak_bytes=self._peaks["disk"],
            namespaces_peak=self._namespaces_peak,
            bytes_in=self.bytes_in,
            bytes_out=self.bytes_out,
            network_in=measured.get("network_in", 0),
            network_out=measured.get("network_out", 0),
            use=use,
        )

    def tick(self) -> None:
        """Once a second: warn of ends that come near, and end when one has come."""
        if self.clock is None or not self._sandbox_lives or self._end_reason is not None:
            return
        if not self._looked_at and self._running is not None and self._running.done():
            self._looked_at = True  # long before the first sample, `quota` says what is in use
            self._worker.spawn_task(self._look())
        self.clock.moved(self.bytes_in + self.bytes_out)
        for end in self.clock.ends():
            if end.seconds <= 0:
                self.end(f"quota {end.quota}", f"this session has ended: {end} is used up")
                return
            if (warning := self.clock.warning(end)) is not None:
                self.notice_terminals(warning)

    async def _look(self) -> None:
        if await self.measure() is not None:
            await self._post_notes()

    def sampled(self, user: Together, tenant: Together) -> None:
        """What all sessions of the user and of the tenant use, just written."""
        if self.clock is None:
            return
        self.clock.sampled, self.clock.day = time.monotonic(), datetime.now(UTC).date()
        self.clock.user, self.clock.tenant = user, tenant
        # Of what is bounded for each sandbox, `quota` shows this one's.
        self._in_use |= {key: value for key, value in user.use.items() if key in SUMMED}
        self._in_use |= {
            "sessions": user.sessions,
            "session_time_per_day": int(user.seconds),
            "network_per_day": user.network,
        }
        self.greet()
        self._worker.spawn_task(self._post_notes())

    def greet(self) -> None:
        """Tell the terminals of what is nearly used up."""
        for sentence in self.clock.near() if self.clock is not None else ():
            self.notice_terminals(sentence)

    async def limit(self, quotas: Effective) -> None:
        """Quotas of the user or the tenant have changed: hold to them from now on.

        Raises `SpawnerError` where the kernel could not be told.
        """
        if self.clock is None:
            return
        self.clock.quotas = quotas
        request = protocol.Limit(
            self.user_id, kernel_limits(quotas.values), self.tenant_id, kernel_limits(quotas.tenant)
        )
        try:
            await self._worker.spawner.request(request)
        except SpawnerError as error:
            if error.code != "ended":
                raise
        await self._post_notes()

    async def _post_notes(self) -> None:
        if self._sandbox_lives and self.clock is not None:
            with contextlib.suppress(SpawnerError):  # it has just ended
                text = limits.notes(self.clock, self._in_use)
                await self._worker.spawner.request(protocol.Note(self.sandbox, text))

    def spawn_task(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        return self._worker.spawn_task(coroutine)


async def _set_within(event: asyncio.Event, seconds: float) -> bool:
    try:
        await asyncio.wait_for(event.wait(), seconds)
    except TimeoutError:
        return False
    return True
