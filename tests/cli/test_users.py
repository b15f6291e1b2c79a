"""`sandbox-ssh user` and `sandbox-ssh tenant`."""

from __future__ import annotations

import asyncio
import subprocess
from pathlib import Path
from typing import Any

import pytest

from sandbox_ssh.cli import user as user_commands
from sandbox_ssh.store import users
from sandbox_ssh.store.database import Database
from sandbox_ssh.store.models import Role
from tests.cli.conftest import Command


def fingerprint(key: Path) -> str:
    listed = subprocess.run(["ssh-keygen", "-l", "-f", key], capture_output=True, text=True, check=True).stdout
    return listed.split()[1]


def verify(database_url: str, name: str, password: str) -> bool:
    async def work() -> bool:
        database = Database(database_url)
        try:
            return await users.verify_password(database, await users.find(database, name), password)
        finally:
            await database.dispose()

    return asyncio.run(work())


def test_roles_are_those_of_the_store() -> None:
    assert list(user_commands.ROLES) == list(Role)


def test_add_and_show(on: Command, key: Path) -> None:
    assert on("tenant", "add", "physics").status == 0
    added = on("user", "add", "alice", "--tenant", "physics", "--role", "instructor", "--key", key)
    assert (added.status, added.out, added.err) == (0, "", "added user alice of tenant physics\n")
    shown = on("user", "show", "alice", "--json").json
    assert {name: shown[name] for name in ("name", "tenant", "role", "enabled", "password")} == {
        "name": "alice",
        "tenant": "physics",
        "role": "instructor",
        "enabled": True,
        "password": False,
    }
    assert shown["created_at"].endswith("Z")
    kind, blob, comment = key.read_text().split()
    assert [(k["algorithm"], k["blob"], k["comment"], k["fingerprint"]) for k in shown["keys"]] == [
        (kind, blob, comment, fingerprint(key))
    ]
    assert on("user", "list", "--json").json == [shown]
    assert on("user", "list", "--tenant", "default", "--json").json == []
    assert fingerprint(key) in on("user", "show", "alice").out
    assert on("user", "list").out.splitlines()[1].split()[:3] == ["alice", "physics", "instructor"]


@pytest.mark.parametrize("line", [b"correct horse\n", b"correct horse", b"correct horse\r\nsecond line\n"])
def test_password_from_stdin(on: Command, database_url: str, line: bytes) -> None:
    assert on("user", "add", "alice", "--password-stdin", stdin=line).status == 0
    assert verify(database_url, "alice", "correct horse")
    assert on("user", "show", "alice", "--json").json["password"] is True
    assert on("user", "passwd", "alice", "--password-stdin", stdin="pä ss".encode()).status == 0
    assert verify(database_url, "alice", "pä ss")


def test_a_password_is_kept_as_a_client_will_send_it(on: Command, database_url: str) -> None:
    """As asyncssh brings it to one form: an accent typed in two characters, a no-break space."""
    assert on("user", "add", "alice", "--password-stdin", stdin="e\u0301\u00a0x".encode()).status == 0
    assert verify(database_url, "alice", "\u00e9 x")


@pytest.mark.parametrize(("line", "why"), [(b"\xff\n", "no UTF-8"), (b"a\x07b\n", "cannot be used over SSH")])
def test_a_password_that_could_never_be_typed_is_refused(on: Command, line: bytes, why: str) -> None:
    refused = on("user", "add", "alice", "--password-stdin", stdin=line)
    assert refused.status == 1 and why in refused.err and "Traceback" not in refused.err
    assert on("user", "list", "--json").json == []


def test_empty_password_is_none(on: Command) -> None:
    refused = on("user", "add", "alice", "--password-stdin", stdin=b"\n")
    assert refused.status == 1 and "empty password" in refused.err
    assert on("user", "list", "--json").json == []


def test_password_needs_a_terminal_or_stdin(on: Command) -> None:
    on("user", "add", "alice")
    refused = on("user", "passwd", "alice")
    assert refused.status == 2 and "--password-stdin" in refused.err


def test_keys(on: Command, key: Path, tmp_path: Path) -> None:
    assert "user key add alice" in on("user", "add", "alice").err, "who cannot log in yet is told how"
    several = b"# mine\n\n" + key.read_bytes() + key.read_bytes()
    assert on("user", "key", "add", "alice", "-", stdin=several).err == f"added ssh-ed25519 {fingerprint(key)}\n"
    assert "already there" in on("user", "key", "add", "alice", key).err
    rfc4716 = subprocess.run(["ssh-keygen", "-e", "-f", key], capture_output=True, check=True).stdout
    assert "already there" in on("user", "key", "add", "alice", "-", stdin=rfc4716).err
    rsa = tmp_path / "rsa"
    subprocess.run(["ssh-keygen", "-q", "-t", "rsa", "-N", "", "-f", rsa], check=True)
    assert on("user", "key", "add", "alice", key, f"{rsa}.pub").status == 0
    listed = on("user", "key", "list", "alice", "--json").json
    assert [k["fingerprint"] for k in listed] == [fingerprint(key), fingerprint(rsa)]
    assert fingerprint(rsa) in on("user", "key", "list", "alice").out, "a pipe gets whole lines"
    assert on("user", "key", "remove", "alice", fingerprint(rsa)).status == 0
    again = on("user", "key", "remove", "alice", fingerprint(rsa))
    assert again.status == 1 and "user key list alice" in again.err


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "holds no public key"),
        (b"# nothing\n", "holds no public key"),
        (b"hello\n", "line 1 is not a public key"),
        (b"ssh-ed25519 AAAA\n", "line 1 is not a public key"),
        (b'command="date" ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIDBp97G25doKsE5eGkUzr6prZJNNATNAk9HnUZrgNH2k\n',
         "line 1 is not a public key"),
        (b"\xff\xfe\x00", "line 1 is not a public key"),
        (b"---- BEGIN SSH2 PUBLIC KEY ----\nnonsense\n", "is not a public key"),
    ],
)  # fmt: skip
def test_files_that_hold_no_key(
    command: Command, sqlite_url: str, tmp_path: Path, content: bytes, sentence: str
) -> None:
    file = tmp_path / "file"
    file.write_bytes(content)
    refused = command("--database-url", sqlite_url, "user", "add", "alice", "--key", file)
    assert refused.status == 1 and str(file) in refused.err and sentence in refused.err
    assert refused.err.count("\n") == 1
    assert command("--database-url", sqlite_url, "user", "list", "--json").json == []


def test_a_private_key_is_refused(command: Command, sqlite_url: str, key: Path) -> None:
    refused = command("--database-url", sqlite_url, "user", "add", "alice", "--key", key.with_suffix(""))
    assert refused.status == 1 and f"{key}" in refused.err and "private" in refused.err


def test_set_and_remove(on: Command) -> None:
    on("user", "add", "alice")
    assert on("user", "set", "alice", "--disable", "--role", "admin").status == 0
    shown = on("user", "show", "alice", "--json").json
    assert (shown["enabled"], shown["role"]) == (False, "admin")
    assert on("user", "set", "alice", "--enable").status == 0
    assert on("user", "show", "alice", "--json").json["enabled"] is True
    assert on("user", "remove", "alice").status == 0
    assert on("user", "show", "alice").status == 1


def test_tenants(on: Command) -> None:
    assert on("tenant", "add", "physics", "--description", "Second year").status == 0
    on("user", "add", "alice", "--tenant", "physics")
    shown = on("tenant", "show", "physics", "--json").json
    assert (shown["name"], shown["description"], shown["enabled"], shown["users"]) == (
        "physics",
        "Second year",
        True,
        1,
    )
    assert [tenant["name"] for tenant in on("tenant", "list", "--json").json] == ["default", "physics"]
    assert on("tenant", "list").out.splitlines()[2].split()[:3] == ["physics", "yes", "1"]
    assert on("tenant", "set", "physics", "--disable", "--description", "").status == 0
    assert "enabled" in on("tenant", "show", "physics").out
    assert on("tenant", "remove", "physics").status == 1
    on("user", "remove", "alice")
    assert on("tenant", "remove", "physics").status == 0


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (("user", "add"), 2, "NAME"),
        (("user", "add", "Alice"), 1, "cannot be the name"),
        (("user", "add", "--", "-rf"), 1, "cannot be the name"),
        (("user", "add", "\udcff\x1b[2J"), 1, "cannot be the name"),
        (
            ("user", "add", "bob", "--tenant", "none"),
            1,
            "there is no tenant none: see `sandbox-ssh tenant list`, or make it with `tenant add`",
        ),
        (("user", "add", "bob", "--role", "king"), 2, "user, instructor, admin"),
        (("user", "add", "bob", "--key", "/nowhere"), 1, "/nowhere cannot be read: No such file"),
        (("user", "add", "bob", "--key", "/"), 1, "/ cannot be read: Is a directory"),
        (("user", "set", "bob"), 2, "nothing to change"),
        (("user", "set", "bob", "--disable"), 1, "no user bob"),
        (("user", "key", "add", "bob"), 2, "FILE"),
        (("user", "remove", "bob"), 1, "no user bob"),
        (("user", "rm", "bob"), 2, "No such command"),
        (("tenant", "set", "default"), 2, "nothing to change"),
        (("tenant", "remove", "none"), 1, "no tenant none"),
        (("usr",), 2, "Did you mean 'user'"),
        (("--unknown",), 2, "--unknown"),
    ],
)
def test_mistakes(command: Command, sqlite_url: str, arguments: tuple[Any, ...], status: int, words: str) -> None:
    result = command("--database-url", sqlite_url, *arguments)
    assert result.status == status
    assert words in result.sentence and result.out == ""
    assert "Traceback" not in result.err and "\x1b" not in result.err
