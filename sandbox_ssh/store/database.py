"""The connection to SQLite or PostgreSQL: units of work, and errors that an administrator can act on.

SQLite lets one write at a time; a second one polls for its turn with growing pauses (sqlite3_busy_timeout), which is
slow and unfair when many clients log in at once. So the writers of one process queue for a lock first, and only
processes (gateway workers, the command line) meet at the file.

A driver for asyncio changes threads (aiosqlite, four times a statement) or turns the event loop (psycopg) for every
answer, which costs more than the answer. `Database.transact` is for the transaction that a login waits for: it is done
in one go, in another thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import pwd
import select
import sqlite3
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import Connection, Engine, create_engine, event, inspect, text
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import (
    ArgumentError,
    DBAPIError,
    DisconnectionError,
    IntegrityError,
    OperationalError,
    ProgrammingError,
    SQLAlchemyError,
)
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

from sandbox_ssh.errors import StoreError
from sandbox_ssh.store.models import SCHEMA, Model

DRIVERS = {"sqlite": "sqlite+aiosqlite", "postgresql": "postgresql+psycopg", "postgres": "postgresql+psycopg"}

BUSY_TIMEOUT = 10.0
"""Seconds that a write waits for other processes' writes."""

CONNECT_TIMEOUT = 5
"""Seconds, in which a PostgreSQL that is there has answered."""

UPGRADE = "run `sandbox-ssh db upgrade`"

T = TypeVar("T")


class Database:
    """One database. Use it from one event loop; `dispose` at the end."""

    def __init__(self, url: str) -> None:
        """Nothing is opened yet. Raises `StoreError` when `url` is none that this program knows."""
        self._url = parse_url(url)
        self._engine = create_async_engine(self._url.set(drivername=DRIVERS[dialect(self._url)]), **options(self._url))
        if dialect(self._url) == "sqlite":
            prepare_sqlite(self._engine.sync_engine)
        # One is enough: logins of a node wait for each other's locks anyway.
        self._thread = ThreadPoolExecutor(1, "transact")
        self._blocking = blocking_engine(self._url, writes=True, pool_pre_ping=False)
        if dialect(self._url) != "sqlite":
            prepare_postgresql(self._blocking)
        self._read = async_sessionmaker(self._engine, expire_on_commit=False)
        self._write = async_sessionmaker(self._engine.execution_options(writes=True), expire_on_commit=False)
        self._writing: contextlib.AbstractAsyncContextManager[Any] = (
            asyncio.Lock() if dialect(self._url) == "sqlite" else contextlib.nullcontext()
        )

    @contextlib.asynccontextmanager
    async def read(self) -> AsyncIterator[AsyncSession]:
        """For SELECTs; two of them may see different moments.

        Raises `StoreError` when the database does not answer.
        """
        with translated(self._url):
            async with self._read.begin() as session:
                yield session

    @contextlib.asynccontextmanager
    async def write(self) -> AsyncIterator[AsyncSession]:
        """A transaction that nothing else writes beside (SQLite: BEGIN IMMEDIATE), committed at the end.

        Raises `StoreError` when the database does not answer or does not take it.
        """
        with translated(self._url):
            async with self._writing, self._write.begin() as session:
                yield session

    async def transact(self, work: Callable[[Connection], T]) -> T:
        """`write`, as a function that runs in another thread; rolled back, too, when nobody waits for it any more.

        Raises `StoreError` when the database does not answer or does not take it.
        """
        abandoned = threading.Event()

        def run() -> T:
            with self._blocking.begin() as connection:
                result = work(connection)
                if abandoned.is_set():
                    raise StoreError("nobody waits for this transaction any more")
                return result

        with translated(self._url):
            async with self._writing:
                done = asyncio.get_running_loop().run_in_executor(self._thread, run)
                try:
                    return await asyncio.shield(done)
                except asyncio.CancelledError:
                    abandoned.set()
                    await asyncio.wait([done])
                    done.exception()  # has been seen
                    raise

    async def check_schema(self) -> None:
        """Raises `StoreError` with the remedy when the database is out of reach or of another schema."""
        async with self.read() as session:
            revision = await session.scalar(text("SELECT version_num FROM alembic_version"))
        require_schema(self._url, revision)

    async def dispose(self) -> None:
        await self._engine.dispose()
        await asyncio.get_running_loop().run_in_executor(self._thread, self._blocking.dispose)
        self._thread.shutdown()


def parse_url(url: str) -> URL:
    """Raises `StoreError`, which does not repeat the text: there may be a password in it."""
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):  # ValueError: a port that is no number
        raise StoreError("the database's URL cannot be read: write sqlite:////path/file.db or postgresql://…") from None
    if parsed.drivername.partition("+")[0] not in DRIVERS:
        raise StoreError(f"{parsed.drivername} is no database for this server: use sqlite or postgresql")
    return parsed


def dialect(url: URL) -> str:
    return url.drivername.partition("+")[0]


def describe(url: URL) -> str:
    """For messages: the path of a file, the URL of a server without its password."""
    return url.database or "" if dialect(url) == "sqlite" else url.render_as_string(hide_password=True)


def options(url: URL) -> dict[str, Any]:
    if dialect(url) == "sqlite":
        return {"connect_args": {"timeout": BUSY_TIMEOUT}}
    arguments = {
        "connect_timeout": CONNECT_TIMEOUT,
        "application_name": "sandbox-ssh",
        # Logins wait for each other's row locks: one that hangs, or a node that has lost its power, must not keep all
        # others waiting for the two hours after which TCP asks for a sign of life (libpq, 34.1.2).
        "options": "-c lock_timeout=5s -c idle_in_transaction_session_timeout=15s",
        "keepalives_idle": 10,
        "keepalives_interval": 5,
        "keepalives_count": 3,
        "tcp_user_timeout": 20_000,
    }
    # pool_pre_ping: after a restart of PostgreSQL the next login is not the one that finds out.
    return {
        "connect_args": {key: value for key, value in arguments.items() if key not in url.query},
        "pool_pre_ping": True,
        "pool_size": 10,
        "max_overflow": 0,
        "pool_timeout": BUSY_TIMEOUT,
    }


def prepare_sqlite(engine: Engine) -> None:
    """Take transactions into our own hands: Python's module would begin them at the first write, too late."""

    @event.listens_for(engine, "connect")
    def connected(connection: Any, _: Any) -> None:
        try:
            connection.isolation_level = None
            cursor = connection.cursor()
            # With a write-ahead log, NORMAL means that a commit waits for no disk; after a power cut the database is
            # whole and lacks at most the last moments, in which the sandboxes have died as well.
            for pragma in ("synchronous=NORMAL", "foreign_keys=ON"):
                cursor.execute(f"PRAGMA {pragma}")
            cursor.close()
        except BaseException:
            connection.close()  # the pool forgets a connection that fails here, and with it aiosqlite's thread
            raise

    @event.listens_for(engine, "begin")
    def begun(connection: Any) -> None:
        # Reading needs none: each SELECT is a transaction of its own, and a login waits for three calls less.
        if connection.get_execution_options().get("writes"):
            connection.exec_driver_sql("BEGIN IMMEDIATE")


def prepare_postgresql(engine: Engine) -> None:
    """For few statements, often, that find rows by keys."""

    @event.listens_for(engine, "connect")
    def connected(connection: Any, _: Any) -> None:
        # A plan that is kept is as good as one made for the values, which takes longer than the statement.
        connection.execute("SET plan_cache_mode = force_generic_plan")
        connection.commit()

    @event.listens_for(engine, "checkout")
    def checked_out(_: Any, record: Any, __: Any) -> None:
        # What pool_pre_ping is for, without asking: an idle connection has nothing to read but that it has ended.
        driver = record.driver_connection
        if driver.closed or _readable(driver.fileno()):
            raise DisconnectionError("the server has ended this connection")


def _readable(descriptor: int) -> bool:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(0))


@contextlib.contextmanager
def translated(url: URL) -> Any:
    """Turn errors of SQLAlchemy's and the driver's into one sentence."""
    try:
        yield
    except IntegrityError as error:
        raise StoreError(f"the database {describe(url)} refused a change: {_reason(error)}") from error
    except (OperationalError, ProgrammingError) as error:
        if _lacks_tables(error):
            raise StoreError(f"the database {describe(url)} is empty or of an old schema: {UPGRADE}") from error
        raise StoreError(f"the database {describe(url)} cannot be used: {_reason(error)}") from error
    except (SQLAlchemyError, OSError) as error:
        raise StoreError(f"the database {describe(url)} cannot be used: {_reason(error)}") from error


def require_schema(url: URL, revision: str | None) -> None:
    if revision == SCHEMA:
        return
    if revision is not None and revision > SCHEMA:
        raise StoreError(
            f"the database {describe(url)} was made by a newer sandbox-ssh (schema {revision}, "
            f"this one knows {SCHEMA}): install that version"
        )
    raise StoreError(f"the database {describe(url)} has schema {revision}, this program needs {SCHEMA}: {UPGRADE}")


def absent(url: str) -> StoreError:
    """What is said of a database that nobody has made yet."""
    return StoreError(
        f"there is no database {describe(parse_url(url))}: `sandbox-ssh serve` or `db upgrade` makes it, "
        f"and --state-dir or --database-url name another"
    )


def _lacks_tables(error: DBAPIError) -> bool:
    # 42P01 is PostgreSQL's undefined_table; SQLite has no code of its own for it.
    return getattr(error.orig, "sqlstate", None) == "42P01" or "no such table" in str(error.orig)


def _user() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())


def _reason(error: Exception) -> str:
    original = getattr(error, "orig", None) or error
    if isinstance(original, sqlite3.OperationalError) and "unable to open" in str(original):
        return f"user {_user()} may not open it, or it is not there"
    lines = str(original).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(original).__name__


# What a command does before there is an event loop, or where there is none.

SYNC_DRIVERS = {**DRIVERS, "sqlite": "sqlite+pysqlite"}


def blocking_engine(url: URL, *, writes: bool, **changed: Any) -> Engine:
    settings = {**options(url), **changed, "execution_options": {"writes": writes}}
    engine = create_engine(url.set(drivername=SYNC_DRIVERS[dialect(url)]), **settings)
    if dialect(url) == "sqlite":
        prepare_sqlite(engine)
    return engine


@contextlib.contextmanager
def connect(url: str, *, writes: bool = False) -> Iterator[Connection]:
    """One transaction. Raises `StoreError`."""
    parsed = parse_url(url)
    engine = blocking_engine(parsed, writes=writes)
    try:
        with translated(parsed), engine.begin() as connection:
            yield connection
    finally:
        engine.dispose()


def current(url: str) -> str | None:
    """The schema's revision; None for a database that is empty, or a file that is not there. Raises `StoreError`."""
    parsed = parse_url(url)
    if dialect(parsed) == "sqlite" and not Path(parsed.database or "").exists():
        return None
    with connect(url) as connection:
        return revision_of(connection)


def revision_of(connection: Connection) -> str | None:
    if not inspect(connection).has_table("alembic_version"):
        return None
    revision: str | None = connection.scalar(text("SELECT version_num FROM alembic_version"))
    return revision


def make_sqlite(file: str) -> None:
    """Make the file, if it is not there, with a write-ahead log: readers and a writer at once, from now on.

    SQLite itself would make a file that all may read, and this one holds password hashes. Its -wal and -shm take over
    the mode.
    """
    try:
        os.close(os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))
    except FileExistsError:
        pass
    except OSError as error:
        raise StoreError(
            f"the database {file} cannot be made by user {_user()} ({error.strerror}): "
            f"give that user a directory to hold it, not {Path(file).parent}"
        ) from error
    deadline = time.monotonic() + BUSY_TIMEOUT
    with contextlib.closing(sqlite3.connect(file)) as connection:
        while True:
            try:
                connection.execute("PRAGMA journal_mode=WAL")
                return
            except sqlite3.OperationalError as error:
                # Two that make the same file: for this change SQLite does not wait by itself.
                if time.monotonic() > deadline:
                    raise StoreError(f"the database {file} cannot be used: {error}") from error
                time.sleep(0.01)
            except sqlite3.DatabaseError as error:
                raise StoreError(f"the database {file} cannot be used: {error}") from error


def dialect_of(transaction: AsyncSession | Connection) -> str:
    return (transaction if isinstance(transaction, Connection) else transaction.get_bind()).dialect.name


def insert_or(transaction: AsyncSession | Connection, model: type[Model]) -> sqlite.Insert | postgresql.Insert:
    """An INSERT that can say what to do on a conflict: the same words on both databases, but not in standard SQL."""
    if dialect_of(transaction) == "sqlite":
        return sqlite.insert(model)
    return postgresql.insert(model)
