"""Records are written in order, and again when the database is away."""

from __future__ import annotations

import asyncio

import pytest

from sandbox_ssh.errors import StoreError
from sandbox_ssh.gateway import record
from sandbox_ssh.gateway.record import Record


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "PAUSES", (0.001,) * 3)


class Away:
    """A database that does not answer the first times."""

    def __init__(self, times: int) -> None:
        self.left = times
        self.written: list[str] = []

    async def write(self, word: str) -> None:
        if self.left:
            self.left -= 1
            raise StoreError("away")
        self.written.append(word)


async def test_the_end_of_a_session_is_written_however_long_the_database_is_away() -> None:
    away, mine = Away(50), Record(asyncio.create_task)
    opened = mine.write(lambda: away.write("channel"))
    closed = mine.write(lambda: away.write("end"), for_ever=True)
    assert (await opened, await closed) == (False, True)
    assert away.written == ["end"]


async def test_what_is_given_first_is_written_first() -> None:
    away, mine = Away(2), Record(asyncio.create_task)
    tasks = [mine.write(lambda word=word: away.write(word)) for word in ("running", "closing", "closed")]  # type: ignore[misc]
    assert await asyncio.gather(*tasks) == [True, True, True]
    assert away.written == ["running", "closing", "closed"]
