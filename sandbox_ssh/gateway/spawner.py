"""The gateway's standing connection to the spawner: made again when it is lost, events given to their sessions."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog

from sandbox_ssh.errors import SpawnerError
from sandbox_ssh.spawner import protocol
from sandbox_ssh.spawner.client import SpawnerClient

if TYPE_CHECKING:
    from sandbox_ssh.gateway.session import Session

RETRY_FIRST, RETRY_LAST = 0.1, 1.0

LOGIN_WAIT = 5.0
"""Seconds that a login waits for a spawner that is being restarted."""

log = structlog.get_logger()


class Spawner:
    def __init__(self, socket: Path, on_connected: Callable[[], None]) -> None:
        self._path = socket
        self._on_connected = on_connected
        self._client = SpawnerClient(self._on_event, self._on_lost)
        self._connected = asyncio.Event()
        self._disconnected = asyncio.Event()
        self._sessions: dict[str, Session] = {}

    async def keep_connected(self) -> None:
        """Connect, and connect again, until cancelled."""
        pause = RETRY_FIRST
        while True:
            try:
                await self._client.connect(self._path)
            except OSError as error:
                if pause == RETRY_FIRST:
                    log.warning("the spawner is not there yet", socket=str(self._path), error=str(error))
                await asyncio.sleep(pause)
                pause = min(pause * 2, RETRY_LAST)
                continue
            pause = RETRY_FIRST
            self._disconnected.clear()
            self._connected.set()
            self._on_connected()
            await self._disconnected.wait()

    def close(self) -> None:
        self._client.close()

    async def create(self, session: Session, request: protocol.Create) -> dict[str, Any]:
        """Make a sandbox; from now on its events go to `session`.

        Raises `SpawnerError`.
        """
        try:
            await asyncio.wait_for(self._connected.wait(), LOGIN_WAIT)
        except TimeoutError as error:
            raise SpawnerError("ended", "the part of the server that makes sandboxes is not running") from error
        self._sessions[request.sandbox] = session
        try:
            message, _ = await self._client.request(request)
        except BaseException:
            self._sessions.pop(request.sandbox, None)
            raise
        return message

    async def request(self, request: protocol.Request) -> tuple[dict[str, Any], list[int]]:
        return await self._client.request(request)

    def forget(self, sandbox: str) -> None:
        self._sessions.pop(sandbox, None)

    def _on_event(self, message: dict[str, Any]) -> None:
        name = message["sandbox"]
        session = self._sessions.get(name)
        if session is None:
            return
        if message["event"] == "exited":
            session.process_exited(message)
        elif message["event"] == "ended":
            del self._sessions[name]
            session.sandbox_ended(message)

    def _on_lost(self) -> None:
        sessions, self._sessions = self._sessions, {}
        log.error("the spawner has gone, and the sandboxes with it", sessions=len(sessions))
        self._connected.clear()
        self._disconnected.set()
        for session in sessions.values():
            session.spawner_lost()
