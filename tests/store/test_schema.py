"""The schema: models and migrations say the same, and a program meets only the one that it knows."""

from __future__ import annotations

import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import inspect, text

from sandbox_ssh.errors import StoreError
from sandbox_ssh.store import migrate
from sandbox_ssh.store.database import Database, connect, current, insert_or
from sandbox_ssh.store.models import SCHEMA, Model, Node, Session


def test_models_and_migrations_are_the_same(database_url: str) -> None:
    with connect(database_url) as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        assert compare_metadata(context, Model.metadata) == []


def test_checks_of_models_and_migrations_are_the_same(database_url: str) -> None:
    """Alembic does not compare check constraints."""
    in_models = {
        (table.name, constraint.name)
        for table in Model.metadata.tables.values()
        for constraint in table.constraints
        if type(constraint).__name__ == "CheckConstraint"
    }
    with connect(database_url) as connection:
        inspector = inspect(connection)
        in_database = {
            (table, constraint["name"])
            for table in inspector.get_table_names()
            for constraint in inspector.get_check_constraints(table)
        }
    assert in_database == in_models


def test_models_belong_to_the_newest_migration() -> None:
    assert migrate.head() == SCHEMA


async def test_empty_database_is_made_and_known_as_such(empty_url: str) -> None:
    assert current(empty_url) is None
    assert migrate.upgrade(empty_url) is None
    assert current(empty_url) == SCHEMA
    assert migrate.upgrade(empty_url) == SCHEMA
    database = Database(empty_url)
    await database.check_schema()
    await database.dispose()


def test_two_upgrades_at_once_make_one_schema(empty_url: str) -> None:
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda _: migrate.upgrade(empty_url), range(4)))
    assert sorted(found, key=str) == [SCHEMA, SCHEMA, SCHEMA, None]
    with connect(empty_url) as connection:
        assert connection.scalar(text("SELECT count(*) FROM tenants")) == 1


async def test_failed_migration_changes_nothing(empty_url: str) -> None:
    with connect(empty_url, writes=True) as connection:
        connection.execute(text("CREATE TABLE channels (id INTEGER)"))  # in the way of the migration's own
    with pytest.raises(StoreError, match="channels"):
        migrate.upgrade(empty_url)
    with connect(empty_url) as connection:
        assert inspect(connection).get_table_names() == ["channels"]


def test_a_database_with_records_is_upgraded_and_downgraded(empty_url: str) -> None:
    with connect(empty_url, writes=True) as connection:
        command.upgrade(migrate.configuration(connection), "0001")
        connection.execute(
            text(
                "INSERT INTO nodes (name, mode, version, started_at) VALUES ('one', 'service', '1', CURRENT_TIMESTAMP)"
            )
        )
        for state, ended in (("closed", "CURRENT_TIMESTAMP"), ("running", "NULL")):
            connection.execute(
                text(
                    "INSERT INTO sessions (tenant_name, user_name, node, worker, state, client_address, client_port, "
                    "client_version, auth_method, image, started_at, ended_at, bytes_in, bytes_out) VALUES ('default', "
                    f"'ada', 'one', 0, '{state}', '192.0.2.1', 1, 'x', 'publickey', 'host', CURRENT_TIMESTAMP, {ended}, 7, 8)"
                )
            )
    assert migrate.upgrade(empty_url) == "0001"
    assert current(empty_url) == SCHEMA
    with connect(empty_url, writes=True) as connection:
        assert connection.scalar(text("SELECT count(*) FROM sessions WHERE seconds IS NULL AND bytes_in = 7")) == 2
        assert connection.scalar(text("SELECT count(*) FROM quotas")) == 1
        command.downgrade(migrate.configuration(connection), "0001")
        assert connection.scalar(text("SELECT count(*) FROM sessions")) == 2


def test_downgrade_leaves_nothing(database_url: str) -> None:
    with connect(database_url, writes=True) as connection:
        command.downgrade(migrate.configuration(connection), "base")
    with connect(database_url) as connection:
        assert inspect(connection).get_table_names() == ["alembic_version"]


@pytest.mark.parametrize(
    ("revision", "remedy"), [("0000", "sandbox-ssh db upgrade"), ("9999", "newer sandbox-ssh")], ids=["old", "newer"]
)
async def test_other_schema_is_refused_with_the_remedy(database_url: str, revision: str, remedy: str) -> None:
    with connect(database_url, writes=True) as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = :revision"), {"revision": revision})
    database = Database(database_url)
    with pytest.raises(StoreError, match=remedy):
        await database.check_schema()
    await database.dispose()


async def test_empty_database_is_refused_with_the_remedy(empty_url: str) -> None:
    database = Database(empty_url)
    with pytest.raises(StoreError, match="sandbox-ssh db upgrade"):
        await database.check_schema()
    await database.dispose()


def test_sqlite_file_is_private(sqlite_url: str) -> None:
    file = Path(sqlite_url.removeprefix("sqlite:///"))
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    "where",
    [
        "user_name = 'alice'",
        "tenant_name = 'physics'",
        "client_address = '192.0.2.1'",
        "node = 'one'",
        "state = 'running'",
        "started_at >= '2025-01-01'",
        "user_name = 'alice' AND started_at >= '2025-01-01'",
        "node = 'one' AND worker = 0 AND kill_requested_at IS NOT NULL AND ended_at IS NULL",
    ],
)
def test_filters_of_the_session_list_have_an_index(sqlite_url: str, where: str) -> None:
    with connect(sqlite_url) as connection:
        plan = connection.execute(text(f"EXPLAIN QUERY PLAN SELECT * FROM sessions WHERE {where} ORDER BY started_at"))
        steps = [str(row.detail) for row in plan]
    assert any("USING INDEX" in step for step in steps), steps
    assert not any(step.startswith("SCAN") for step in steps), steps


async def test_rows_are_numbered_beyond_32_bits(database: Database) -> None:
    async with database.write() as transaction:
        await transaction.execute(
            insert_or(transaction, Node).values(id=2**40, name="n", mode="service", version="1", started_at=_moment())
        )
        assert (await transaction.scalar(text("SELECT id FROM nodes"))) == 2**40
    assert Session.__table__.c.memory_peak_bytes.type.python_type is int


def _moment() -> object:
    from sandbox_ssh.store.columns import now

    return now()
