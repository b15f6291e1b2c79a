"""What is written about a session, in order, and written again when the database is away for a moment."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from itertools import chain, repeat
from typing import Any

import structlog

from sandbox_ssh.errors import StoreError

PAUSES = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 10.0)
"""Seconds between the attempts: half a minute in all, or the last one for ever."""

log = structlog.get_logger()

Statement = Callable[[], Awaitable[object]]


class Record:
    """The rows of one session. Nobody waits for them but the shell's first byte, and the end of the server."""

    def __init__(self, spawn_task: Callable[[Any], asyncio.Task[Any]]) -> None:
        self._spawn_task = spawn_task
        self._last: asyncio.Task[bool] | None = None

    def write(self, statement: Statement, *, for_ever: bool = False) -> asyncio.Task[bool]:
        """Write after all that was given before; the task's result says whether it was written."""
        self._last = self._spawn_task(_write(self._last, statement, for_ever))
        return self._last


async def _write(before: asyncio.Task[bool] | None, statement: Statement, for_ever: bool) -> bool:
    if before is not None:
        await asyncio.wait([before])
    for pause in chain(PAUSES, repeat(PAUSES[-1]) if for_ever else ()):
        try:
            await statement()
        except StoreError as error:
            log.warning("a session's record could not be written, trying again", error=str(error), pause=pause)
            await asyncio.sleep(pause)
        else:
            return True
    log.error("a session's record could not be written, giving up")
    return False
