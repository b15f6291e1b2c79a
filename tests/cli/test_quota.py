"""`sandbox-ssh quota` and `sandbox-ssh usage`."""

from __future__ import annotations

import csv
import io
from dataclasses import asdict

import pytest

from sandbox_ssh.capacity import Capacity
from sandbox_ssh.quotas import QUOTAS
from sandbox_ssh.store import nodes, usage, users
from sandbox_ssh.store.columns import now
from sandbox_ssh.store.database import Database
from sandbox_ssh.store.usage import Sample
from tests import rows
from tests.cli.conftest import Command
from tests.rows import do


async def live_session(database: Database) -> int:
    await nodes.register(database, "one", "service", "1")
    user = await users.find(database, "ada")
    assert user is not None
    number = await rows.admit(database, user)
    use = {"processes": 12, "memory": 3 * 2**20, "net_namespaces": 2}
    await usage.sample(database, "one", [Sample(number, cpu_seconds=90, bytes_in=2048, network_out=2**20, use=use)])
    return number


def test_set_show_unset(on: Command) -> None:
    on("user", "add", "ada")
    done = on("quota", "set", "--user", "ada", "sessions=3", "memory=512M", "session_time=2h", "cpu=0.5")
    assert (done.status, done.out) == (0, "")
    assert "memory of user ada is 512M" in done.err and "cpu of user ada is 0.5" in done.err
    shown = on("quota", "show", "--user", "ada", "--json").json
    assert list(shown) == list(QUOTAS)
    assert shown["memory"] == {"value": 512 * 2**20, "source": "user", "in_use": 0, "tenant": None}
    assert shown["network_per_day"]["value"] is None, "unlimited"
    assert (shown["session_time"]["value"], shown["cpu"]["value"]) == (7200, 500)
    assert on("quota", "unset", "--user", "ada", "memory").status == 0
    assert on("quota", "show", "--user", "ada", "--json").json["memory"]["source"] == "built-in"


def test_a_table_for_people(on: Command, database_url: str) -> None:
    on("user", "add", "ada")
    on("quota", "set", "--tenant", "default", "processes=100", "session_time=90m")
    do(database_url, live_session)
    lines = {line.split()[0]: line.split() for line in on("quota", "show", "--user", "ada").out.splitlines() if line}
    assert lines["QUOTA"][:4] == ["QUOTA", "VALUE", "FROM", "IN"]
    assert lines["processes"][:5] == ["processes", "100", "tenant", "12", "100"]
    assert lines["memory"][:4] == ["memory", "2G", "built-in", "3M"]
    assert lines["net_namespaces"][3] == "2"
    assert lines["session_time"][1:4] == ["1h", "30m", "tenant"]
    of_tenant = on("quota", "show", "--tenant", "default", "--json").json
    assert (of_tenant["sessions"]["in_use"], of_tenant["network_per_day"]["in_use"]) == (1, 2**20)
    assert on("quota", "show", "--default", "--json").json["processes"]["source"] == "built-in"


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (("set", "--user", "ada", "memroy=1G"), 2, "did you mean memory?"),
        (("set", "--user", "ada", "memory"), 2, "'memory' is not KEY=VALUE"),
        (("set", "--user", "ada", "processes=-3"), 2, "processes: -3 is negative"),
        (("set", "--user", "ada", "processes=1"), 2, "less than a session needs, 8"),
        (("set", "--user", "ada", "memory=lots"), 2, "is not a size"),
        (("set", "--user", "ada", "memory=8G"), 1, "memory: 8G is over the limit of the host, 4G"),
        (("set", "--user", "bob", "processes=20"), 1, "there is no user bob"),
        (("set", "--tenant", "chemistry", "processes=20"), 1, "there is no tenant chemistry"),
        (("set", "processes=20"), 2, "say whose quotas"),
        (("set", "--default", "--user", "ada", "processes=20"), 2, "say whose quotas"),
        (("set", "--default"), 2, "KEY=VALUE"),
        (("unset", "--user", "ada", "memroy"), 2, "did you mean memory?"),
        (("show",), 2, "say whose quotas"),
        (("show", "--user", "bob"), 1, "there is no user bob"),
    ],
)
def test_mistakes(command: Command, sqlite_url: str, arguments: tuple[str, ...], status: int, words: str) -> None:
    async def prepare(database: Database) -> None:
        await users.add(database, "ada", by="root")
        await nodes.register(database, "one", "service", "1")
        await nodes.set_capacity(
            database, "one", asdict(Capacity(10, "memory", 10, 2, "memory", {"memory": 4 * 2**30}))
        )

    do(sqlite_url, prepare)
    done = command("--database-url", sqlite_url, "quota", *arguments)
    assert done.status == status, done
    assert words in done.sentence


def test_nothing_is_set_where_one_of_several_is_wrong(on: Command) -> None:
    on("user", "add", "ada")
    assert on("quota", "set", "--user", "ada", "sessions=3", "processes=1").status == 2
    assert on("quota", "show", "--user", "ada", "--json").json["sessions"]["source"] == "built-in"


def test_usage_as_table_json_and_csv(on: Command, database_url: str) -> None:
    on("user", "add", "ada")
    number = do(database_url, live_session)
    do(database_url, lambda database: rows.close(database, number, cpu_seconds=91, bytes_in=2048, network_out=2**20))
    today = now().date().isoformat()
    (row,) = on("usage", "--json").json
    assert (row["day"], row["user"], row["sessions"], row["cpu_seconds"], row["network_out"]) == (
        today, "ada", 1, 91.0, 2**20
    )  # fmt: skip
    (line,) = csv.DictReader(io.StringIO(on("usage", "--by", "tenant", "--csv").out))
    assert (line["tenant"], line["bytes_in"], float(line["cpu_seconds"])) == ("default", "2048", 91.0)
    head, body = on("usage", "--by", "user", "--user", "ada", "--since", today).out.splitlines()[:2]
    assert head.split()[0] == "USER" and body.split()[:2] == ["ada", "1"]
    assert "1m 31s" in body and "2K" in body
    assert on("usage", "--until", "2020-01-01", "--json").json == []
    assert on("usage", "--since", "soon").status == 2
    assert on("usage", "--json", "--csv").status == 2
