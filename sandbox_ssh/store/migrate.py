"""Bringing a database to the schema that this program needs, with Alembic, in one transaction.

There is no alembic.ini: the settings are made here, so that a checkout and an installed wheel, which carries the
migrations inside the package, work alike. Only what migrates imports this module; a server asks
`Database.check_schema`, and needs no Alembic.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, create_engine, text

from sandbox_ssh.errors import StoreError
from sandbox_ssh.store import database
from sandbox_ssh.store.database import dialect, parse_url, prepare_sqlite, require_schema, translated

SYNC_DRIVERS = {"sqlite": "sqlite+pysqlite", "postgresql": "postgresql+psycopg", "postgres": "postgresql+psycopg"}

# Any number that no other program on the same PostgreSQL server locks: "sbx-ssh" in ASCII.
_ADVISORY_LOCK = 0x7362782D737368


def head() -> str:
    """The newest revision that this program brings along."""
    revision = ScriptDirectory.from_config(configuration()).get_current_head()
    assert revision is not None
    return revision


def current(url: str) -> str | None:
    """The revision of the database; None for one that is empty. Raises `StoreError`."""
    path = parse_url(url).database
    if dialect(parse_url(url)) == "sqlite" and not (path and Path(path).exists()):
        return None
    with connect(url) as connection:
        return MigrationContext.configure(connection).get_current_revision()


def is_empty(url: str) -> bool:
    return current(url) is None


def upgrade(url: str) -> str | None:
    """Bring the database to `head`, making it if it is a SQLite file that is not there; return what it was before.

    Two that do this at the same time wait for each other, and the second one finds nothing to do. Raises `StoreError`.
    """
    _make_private(url)
    with connect(url, writes=True) as connection:
        if dialect(parse_url(url)) != "sqlite":
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _ADVISORY_LOCK})
        before = MigrationContext.configure(connection).get_current_revision()
        if before is not None and before > head():
            require_schema(parse_url(url), before)
        command.upgrade(configuration(connection), "head")
    return before


def prepare(url: str) -> None:
    """Make and migrate an empty database; leave one of this schema alone.

    Raises `StoreError` with the remedy for one of another schema: an administrator decides when it changes.
    """
    revision = current(url)
    if revision is None:
        upgrade(url)
    else:
        require_schema(parse_url(url), revision)


def configuration(connection: Connection | None = None) -> Config:
    config = Config()
    # Alembic reads % as the start of a variable.
    config.set_main_option("script_location", str(location()).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    return config


def location() -> Path:
    """`migrations/`: in the package when it was installed from a wheel, beside it in a checkout."""
    package = Path(database.__file__).parents[1]
    packaged = package / "migrations"
    return packaged if packaged.is_dir() else package.parent / "migrations"


@contextlib.contextmanager
def connect(url: str, *, writes: bool = False) -> Iterator[Connection]:
    """A transaction. Raises `StoreError` in place of the driver's errors."""
    parsed = parse_url(url)
    engine = create_engine(
        parsed.set(drivername=SYNC_DRIVERS[dialect(parsed)]),
        **database.options(parsed),
        execution_options={"writes": writes},
    )
    if dialect(parsed) == "sqlite":
        prepare_sqlite(engine)
    try:
        with translated(parsed), engine.begin() as connection:
            yield connection
    finally:
        engine.dispose()


def _make_private(url: str) -> None:
    """SQLite makes a file that all may read; it holds password hashes. Its -wal and -shm take over the mode."""
    parsed = parse_url(url)
    if dialect(parsed) != "sqlite" or not parsed.database:
        return
    try:
        os.close(os.open(parsed.database, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))
    except FileExistsError:
        return
    except OSError as error:
        raise StoreError(f"the database {parsed.database} cannot be made: {error.strerror}") from error
