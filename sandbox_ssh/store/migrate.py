"""Bringing a database to the schema that this program needs, with Alembic, in one transaction.

There is no alembic.ini: the settings are made here, so that a checkout and an installed wheel, which carries the
migrations inside the package, work alike. Only what migrates imports this module; a server asks
`Database.check_schema`, and needs no Alembic.
"""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, text

from sandbox_ssh.store import database
from sandbox_ssh.store.database import connect, current, dialect, make_sqlite, parse_url, require_schema, revision_of

__all__ = ["connect", "current", "head", "upgrade"]

# Any number that no other program on the same PostgreSQL server locks: "sbx-ssh" in ASCII.
_ADVISORY_LOCK = 0x7362782D737368


def head() -> str:
    """The newest revision that this program brings along."""
    revision = ScriptDirectory.from_config(configuration()).get_current_head()
    assert revision is not None
    return revision


def upgrade(url: str) -> str | None:
    """Bring the database to `head`, making it if it is a SQLite file that is not there; return what it was before.

    Two that do this at the same time wait for each other, and the second one finds nothing to do. Raises `StoreError`.
    """
    parsed = parse_url(url)
    if dialect(parsed) == "sqlite":
        make_sqlite(parsed.database or "")
    with connect(url, writes=True) as connection:
        if dialect(parsed) != "sqlite":
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _ADVISORY_LOCK})
        before = revision_of(connection)
        if before is not None and before > head():
            require_schema(parsed, before)
        command.upgrade(configuration(connection), "head")
    return before


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
