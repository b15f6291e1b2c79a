"""Databases for tests: a SQLite file, and a PostgreSQL that is made for the test run and thrown away after it."""

from __future__ import annotations

import itertools
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import psycopg
import pytest

from sandbox_ssh.store import migrate
from sandbox_ssh.store.database import Database

_TEMPLATE = "migrated"
_READY_WITHIN = 30.0
_numbers = itertools.count(1)


class PostgreSQL:
    """A running cluster that only its socket leads to."""

    def __init__(self, sockets: Path) -> None:
        self._sockets = sockets

    def url(self, database: str) -> str:
        return f"postgresql://postgres@/{database}?host={self._sockets}"

    def create(self, template: str = "template1") -> str:
        """A fresh database; returns its URL."""
        name = f"test_{next(_numbers)}"
        self._do(f"CREATE DATABASE {name} TEMPLATE {template}")
        return self.url(name)

    def drop(self, url: str) -> None:
        self._do(f"DROP DATABASE {url.rpartition('/test_')[2].partition('?')[0].join(('test_', ''))} WITH (FORCE)")

    def make_template(self) -> None:
        self._do(f"CREATE DATABASE {_TEMPLATE}")
        migrate.upgrade(self.url(_TEMPLATE))

    def _do(self, statement: str) -> None:
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            connection.execute(statement.encode())


@pytest.fixture(scope="session")
def postgresql() -> Iterator[PostgreSQL]:
    programs = _programs()
    # initdb refuses root, and Debian's package makes this user.
    owner = pwd.getpwnam("postgres") if os.geteuid() == 0 else pwd.getpwuid(os.geteuid())
    directory = Path(tempfile.mkdtemp(prefix="sandbox-ssh-pg-", dir="/tmp"))  # a socket's path holds 108 bytes
    directory.chmod(0o755)
    os.chown(directory, owner.pw_uid, owner.pw_gid)
    user = owner.pw_uid if os.geteuid() == 0 else None
    data = directory / "data"
    subprocess.run(
        [programs / "initdb", "--auth=trust", "--username=postgres", "--no-sync", "--encoding=UTF8", data],
        user=user, check=True, capture_output=True, cwd=directory,
    )  # fmt: skip
    settings = ["listen_addresses=", f"unix_socket_directories={directory}", "fsync=off"]
    server = subprocess.Popen(
        [programs / "postgres", "-D", data, *(word for setting in settings for word in ("-c", setting))],
        user=user, cwd=directory, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        cluster = PostgreSQL(directory)
        _wait_until_ready(cluster, server)
        cluster.make_template()
        yield cluster
    finally:
        server.send_signal(signal.SIGINT)  # "fast shutdown", postgres(1)
        server.communicate(timeout=_READY_WITHIN)
        shutil.rmtree(directory)


def _programs() -> Path:
    """PostgreSQL's own directory: Debian keeps `initdb` and `postgres` out of PATH, one directory a version."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    initdb = shutil.which("initdb") or (found[-1] if found else None)
    if initdb is None:
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    return Path(initdb).resolve().parent


def _wait_until_ready(cluster: PostgreSQL, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _READY_WITHIN
    while True:
        try:
            psycopg.connect(cluster.url("postgres")).close()
        except psycopg.OperationalError:
            if server.poll() is not None or time.monotonic() > deadline:
                server.kill()
                pytest.fail(f"PostgreSQL does not start: {server.communicate()[1].decode(errors='replace')}")
            time.sleep(0.05)
        else:
            return


@pytest.fixture
def postgres_url(postgresql: PostgreSQL) -> Iterator[str]:
    """A PostgreSQL database of the newest schema, of this test alone."""
    url = postgresql.create(_TEMPLATE)
    yield url
    postgresql.drop(url)


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    """A SQLite database of the newest schema, of this test alone."""
    url = f"sqlite:///{tmp_path}/test.db"
    migrate.upgrade(url)
    return url


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest) -> str:
    """A test that asks for this runs on both."""
    url: str = request.getfixturevalue("sqlite_url" if request.param == "sqlite" else "postgres_url")
    return url


@pytest.fixture(params=["sqlite", "postgresql"])
def empty_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A database with nothing in it: SQLite's file is not even there."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/empty.db"
        return
    cluster: PostgreSQL = request.getfixturevalue("postgresql")
    url = cluster.create()
    yield url
    cluster.drop(url)


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    database = Database(database_url)
    yield database
    await database.dispose()
