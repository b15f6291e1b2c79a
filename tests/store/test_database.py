"""What an administrator reads when the database is not as it should be."""

from __future__ import annotations

import asyncio
import os
import threading
from pathlib import Path

import pytest
from sqlalchemy import Connection, text

from sandbox_ssh.errors import StoreError
from sandbox_ssh.store import migrate, users
from sandbox_ssh.store.database import Database


@pytest.mark.parametrize("url", ["mysql://host/name", "nonsense", "", "oracle://x", "postgresql://x:port/y"])
def test_urls_that_are_none(url: str) -> None:
    with pytest.raises(StoreError):
        Database(url)


async def test_server_that_is_not_there_and_password_that_is_not_told() -> None:
    database = Database("postgresql://alice:s3cret@127.0.0.1:1/name")
    with pytest.raises(StoreError, match=r"refused") as caught:
        await users.find(database, "alice")
    assert "s3cret" not in str(caught.value) and "\n" not in str(caught.value)


async def test_file_that_is_no_database(tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("not a database\n" * 1000)
    database = Database(f"sqlite:///{file}")
    for _ in range(3):
        with pytest.raises(StoreError, match=r"notes\.txt cannot be used: file is not a database"):
            await users.find(database, "alice")
    await database.dispose()
    with pytest.raises(StoreError, match=r"notes\.txt cannot be used: file is not a database"):
        migrate.upgrade(f"sqlite:///{file}")


async def test_directory_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="or it is not there"):
        await users.find(Database(f"sqlite:///{tmp_path}/missing/x.db"), "alice")
    # aiosqlite's thread has a last word for this loop, which must not be closed by then.
    for thread in threading.enumerate():
        if "_connection_worker_thread" in thread.name:
            thread.join(10)


async def test_a_failed_transaction_leaves_nothing_and_the_next_one_works(database: Database) -> None:
    async def half() -> None:
        async with database.write() as transaction:
            await transaction.execute(text("UPDATE tenants SET description = 'half done'"))
            await transaction.execute(text("INSERT INTO nowhere VALUES (1)"))

    with pytest.raises(StoreError):
        await half()
    await users.add(database, "alice", by="root")
    async with database.read() as transaction:
        assert await transaction.scalar(text("SELECT description FROM tenants")) == "Users of no other tenant"


async def test_a_cancelled_transaction_leaves_nothing(database: Database) -> None:
    written = asyncio.Event()

    async def half() -> None:
        async with database.write() as transaction:
            await transaction.execute(text("UPDATE tenants SET description = 'half done'"))
            written.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(half())
    await written.wait()
    task.cancel()
    await asyncio.wait([task])
    await users.add(database, "alice", by="root")
    async with database.read() as transaction:
        assert await transaction.scalar(text("SELECT description FROM tenants")) == "Users of no other tenant"


async def test_a_cancelled_function_leaves_nothing(database: Database) -> None:
    written, cancelled = threading.Event(), threading.Event()

    def half(connection: Connection) -> None:
        connection.execute(text("UPDATE tenants SET description = 'half done'"))
        written.set()
        assert cancelled.wait(10)

    task = asyncio.create_task(database.transact(half))
    await asyncio.to_thread(written.wait, 10)
    task.cancel()
    asyncio.get_running_loop().call_later(0.1, cancelled.set)
    with pytest.raises(asyncio.CancelledError):
        await task
    await users.add(database, "alice", by="root")
    async with database.read() as transaction:
        assert await transaction.scalar(text("SELECT description FROM tenants")) == "Users of no other tenant"


async def test_a_function_that_fails_leaves_nothing(database: Database) -> None:
    def half(connection: Connection) -> None:
        connection.execute(text("UPDATE tenants SET description = 'half done'"))
        connection.execute(text("INSERT INTO nowhere VALUES (1)"))

    with pytest.raises(StoreError):
        await database.transact(half)
    description = text("SELECT description FROM tenants")
    assert await database.transact(lambda connection: connection.scalar(description)) == "Users of no other tenant"


async def test_reading_goes_on_while_something_writes(database_url: str, database: Database) -> None:
    other = Database(database_url)
    async with other.write() as transaction:
        await transaction.execute(text("UPDATE tenants SET description = 'not yet'"))
        assert await users.find(database, "alice") is None
    await other.dispose()


async def test_connections_that_the_server_closed_are_replaced(postgres_url: str) -> None:
    database = Database(postgres_url)
    assert await users.find(database, "alice") is None
    assert await database.transact(lambda connection: connection.scalar(text("SELECT 1"))) == 1
    other = Database(postgres_url)
    async with other.write() as transaction:
        await transaction.execute(
            text("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()"
                 " AND datname = current_database()")
        )  # fmt: skip
    assert await users.find(database, "alice") is None
    assert await database.transact(lambda connection: connection.scalar(text("SELECT 1"))) == 1
    await database.dispose()
    await other.dispose()


async def test_nothing_is_left_open(sqlite_url: str) -> None:
    before = set(os.listdir("/proc/self/fd"))
    database = Database(sqlite_url)
    await users.find(database, "alice")
    await database.transact(lambda connection: connection.scalar(text("SELECT 1")))
    await database.dispose()
    assert set(os.listdir("/proc/self/fd")) <= before
