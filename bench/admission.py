"""What one admission costs: a transaction in a database that has a year's sessions in it, on SQLite and PostgreSQL."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import psycopg
from sqlalchemy import text

from sandbox_ssh.capacity import Capacity
from sandbox_ssh.quotas import NAMESPACES
from sandbox_ssh.store import admission, migrate, nodes, sessions, users
from sandbox_ssh.store.columns import now
from sandbox_ssh.store.database import Database, connect
from sandbox_ssh.store.usage import Sample

DAY = 24 * 3600
YEAR = 365 * DAY
TENANTS, USERS, NODES = 20, 1000, ("one", "two")
LIMITED, LIVE = 500, 300
"""Users with quotas of their own, who log in here; and sessions that are there all the time, half on each node."""
PAGE = 8192
"""Of PostgreSQL."""
WARM = 20
"""Admissions before those that count."""

Times = dict[str, list[float]]
"""Milliseconds of each admission, by the database's name; of each write to the disk, by `disk`."""

# SQL of the two has other words for times, and no others here.
AGO = {
    "SQLite": "strftime('%Y-%m-%d %H:%M:%f000', 'now', '-' || ({}) || ' seconds')",
    "PostgreSQL": "(now() - ({}) * interval '1 second')",
}
DAY_OF = {"SQLite": "substr({}, 1, 10)", "PostgreSQL": "CAST({} AT TIME ZONE 'UTC' AS date)"}


async def measure(past: int, admissions: int) -> Times:
    """Admissions on both databases in turns, each of another user, and ended again outside of the timing.

    And before, what the disk takes for as much as PostgreSQL has it write with each of them.
    """
    times: Times = {"SQLite": [], "PostgreSQL": []}
    # Not /tmp, which may be in memory: there, durable is cheap.
    with tempfile.TemporaryDirectory(prefix="sandbox-ssh-bench-", dir="/var/tmp") as name:
        directory = Path(name)
        async with contextlib.AsyncExitStack() as stack:
            urls = {
                "SQLite": f"sqlite:///{directory}/bench.db",
                "PostgreSQL": stack.enter_context(postgresql(directory)),
            }
            databases = {kind: await stack.enter_async_context(_filled(kind, url, past)) for kind, url in urls.items()}
            times["disk"] = _sync(directory / "synced", WARM + admissions)
            for turn in range(WARM + admissions):
                for kind, database in databases.items():
                    times[kind].append(await _admit(database, turn))
    return {kind: values[WARM:] for kind, values in times.items()}


def _sync(name: Path, count: int) -> list[float]:
    times = []
    with name.open("wb", buffering=0) as file:
        file.write(bytes(PAGE * count))  # as PostgreSQL's log: of its size beforehand
        os.fsync(file.fileno())
        for turn in range(count):
            os.pwrite(file.fileno(), os.urandom(PAGE), turn * PAGE)
            started = time.perf_counter()
            os.fdatasync(file.fileno())
            times.append(1e3 * (time.perf_counter() - started))
    return times


async def _admit(database: Database, turn: int) -> float:
    user = await users.find(database, f"user{turn % LIMITED + 1}")
    assert user is not None
    login = admission.Login(
        user, NODES[turn % 2], 0, "192.0.2.1", 50000, "SSH-2.0-OpenSSH_9.2", "publickey", "SHA256:x", "host"
    )
    started = time.perf_counter()
    admitted = await admission.admit(database, login, {})
    took = 1e3 * (time.perf_counter() - started)
    await sessions.close(
        database, admitted.number, reason="exit", exit_status=0, used=Sample(admitted.number), ended=now()
    )
    return took


@contextlib.asynccontextmanager
async def _filled(kind: str, url: str, past: int) -> AsyncIterator[Database]:
    migrate.upgrade(url)
    database = Database(url)
    try:
        for node in NODES:
            await nodes.register(database, node, "service", "0.1")
            await nodes.set_capacity(database, node, _capacity())
        _fill(kind, url, past)
        for node in NODES:
            await nodes.count_nested(database, node)
        yield database
    finally:
        await database.dispose()


def _capacity() -> dict[str, object]:
    """Of a host with more room than is asked for here: nobody is to be refused."""
    limits = dict.fromkeys(NAMESPACES, 100_000)
    return dataclasses.asdict(Capacity(5_000, "user.max_user_namespaces", USERS, USERS, "processes", limits))


def _fill(kind: str, url: str, past: int) -> None:
    """With what autovacuum would have done with rows that came over a year."""
    with connect(url, writes=True) as connection:
        # Else SQLite reads the pages of its indexes again and again; and PostgreSQL looks up each foreign key.
        faster = "PRAGMA cache_size=-500000" if kind == "SQLite" else "SET LOCAL session_replication_role = replica"
        connection.execute(text(faster))
        for statement in _statements(kind, past):
            connection.execute(text(statement))
    if kind == "PostgreSQL":
        with psycopg.connect(url, autocommit=True) as cluster:
            cluster.execute("VACUUM ANALYZE")
            cluster.execute("CHECKPOINT")


def _statements(kind: str, past: int) -> Iterator[str]:
    """Tenants and users, their quotas, usage of a month, past sessions from the oldest on, and live ones."""
    made, owner = AGO[kind].format(0), f"{USERS} - n % {USERS}"
    yield _insert(
        "tenants", TENANTS,
        {"id": "100 + n", "name": "'tenant' || n", "description": "''", "enabled": "true", "created_at": made},
    )  # fmt: skip
    yield _insert(
        "users", USERS,
        {
            "id": "n", "name": "'user' || n", "tenant_id": _tenant("n"), "role": "'user'", "enabled": "true",
            "created_at": made,
        },
    )  # fmt: skip
    quotas = {"logins_per_hour": "100000", "session_time_per_day": str(1000 * DAY), "network_per_day": str(10**15)}
    quotas |= {"sessions": "1000", "changed_at": made, "revision": "0"}
    yield _insert("quotas", TENANTS, {"tenant_id": "100 + n", **quotas})
    yield _insert("quotas", LIMITED, {"user_id": "n", **quotas})
    sums = ("sessions", "refused", "seconds", "cpu_seconds", "memory_peak_bytes", "bytes_in", "bytes_out")
    yield _insert(
        "usage", 30 * USERS,
        {
            **_names(owner), "day": DAY_OF[kind].format(AGO[kind].format(f"(n - 1) / {USERS} * {DAY}")),
            **dict.fromkeys((*sums, "network_in", "network_out"), "1000"),
        },
    )  # fmt: skip
    every = YEAR / past
    ended = {
        "state": "'closed'", "started_at": AGO[kind].format(f"60 + ({past} - n) * {every}"),
        "ended_at": AGO[kind].format(f"({past} - n) * {every}"), "end_reason": "'exit'", "exit_status": "0",
        "seconds": "60", "cpu_seconds": "1.5",
        "memory_peak_bytes": "10000000", "network_in": "5000", "network_out": "5000",
    }  # fmt: skip
    # 7919 is a prime: the users come in no order that an index could have gone by.
    yield _insert("sessions", past, {**_session(f"{USERS} - n % {USERS} * 7919 % {USERS}"), **ended})
    use = "'" + '{"processes": 3, "disk": 100000, "inodes": 50, "pid_namespaces": 1}' + "'"
    live = {"state": "'running'", "started_at": AGO[kind].format("n * 20"), "use": use}
    yield _insert("sessions", LIVE, {**_session("n"), **live})


def _insert(table: str, count: int, values: dict[str, str]) -> str:
    """Rows of expressions of `n`, from 1 to `count`."""
    return (
        f"INSERT INTO {table} ({', '.join(values)}) "
        f"WITH RECURSIVE numbers (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < {count}) "
        f"SELECT {', '.join(values.values())} FROM numbers"
    )


def _tenant(user: str) -> str:
    return f"101 + ({user}) % {TENANTS}"


def _names(user: str) -> dict[str, str]:
    tenant = _tenant(user)
    return {
        "user_id": user, "user_name": f"'user' || ({user})",
        "tenant_id": tenant, "tenant_name": f"'tenant' || ({tenant} - 100)",
    }  # fmt: skip


def _session(user: str) -> dict[str, str]:
    return {
        **_names(user), "node": "CASE n % 2 WHEN 0 THEN 'one' ELSE 'two' END", "worker": "0",
        "client_address": "'192.0.2.' || n % 250", "client_port": "50000", "client_version": "'SSH-2.0-OpenSSH_9.2'",
        "auth_method": "'publickey'", "key_fingerprint": "'SHA256:x'", "image": "'host'",
        "bytes_in": "5000", "bytes_out": "5000",
    }  # fmt: skip


@contextlib.contextmanager
def postgresql(directory: Path) -> Iterator[str]:
    """The URL of a database in a cluster that is made here and removed after: durable, as it is by default."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    initdb = shutil.which("initdb") or (str(found[-1]) if found else None)
    if initdb is None:
        sys.exit("PostgreSQL is not installed: apt-get install postgresql")
    owner = pwd.getpwnam("postgres")  # initdb refuses root
    directory.chmod(0o755)
    cluster = directory / "postgresql"
    cluster.mkdir()
    shutil.chown(cluster, owner.pw_uid, owner.pw_gid)
    subprocess.run(
        [initdb, "--auth=trust", "--username=postgres", "--encoding=UTF8", cluster / "data"],
        user=owner.pw_uid, group=owner.pw_gid, cwd=cluster, check=True, capture_output=True,
    )  # fmt: skip
    program = Path(initdb).resolve().parent / "postgres"
    with (cluster / "log").open("w") as log:
        server = subprocess.Popen(
            [program, "-D", cluster / "data", "-c", "listen_addresses=", "-c", f"unix_socket_directories={cluster}"],
            user=owner.pw_uid, group=owner.pw_gid, cwd=cluster, stdout=log, stderr=log,
        )  # fmt: skip
    url = f"postgresql://postgres@/postgres?host={cluster}"
    try:
        _wait_until_ready(url, server, cluster / "log")
        yield url
    finally:
        server.send_signal(signal.SIGINT)  # "fast shutdown", postgres(1)
        server.wait(60)


def _wait_until_ready(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 30
    while True:
        try:
            psycopg.connect(url).close()
        except psycopg.OperationalError:
            if server.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"PostgreSQL did not start:\n{log.read_text()}")
            time.sleep(0.05)
        else:
            return
