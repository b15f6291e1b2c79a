"""What the database says of a session, and what an administrator does with it."""

from __future__ import annotations

import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.e2e.conftest import Server, end, make_server, wait_until

pytestmark = pytest.mark.host

FIELDS = {
    "id", "tenant", "user", "node", "state", "end_reason", "client_address", "client_version", "auth_method",
    "key_fingerprint", "image", "started_at", "ended_at", "exit_status", "bytes_in", "bytes_out", "cpu_seconds",
    "memory_peak_bytes", "namespaces", "init_pid", "channels",
}  # fmt: skip


def closed(server: Server) -> dict:  # type: ignore[type-arg]
    row = server.latest()
    wait_until(lambda: server.latest()["state"] == "closed", f"row {row['id']} to be closed")
    return server.latest()


def test_a_session_is_a_row_with_everything_in_it(server: Server) -> None:
    command = (
        "head -c 1000 >/dev/null; head -c 5000 /dev/zero; i=0; while [ $i -lt 200000 ]; do i=$((i+1)); done; exit 3"
    )
    assert server.ssh(command, input=bytes(1000)).returncode == 3
    row = closed(server)
    assert row.keys() >= FIELDS
    assert (row["user"], row["tenant"], row["image"], row["exit_status"]) == ("ada", "default", "host", 3)
    assert (row["bytes_in"], row["bytes_out"]) == (1000, 5000)
    assert row["client_version"].startswith("SSH-2.0-OpenSSH") or row["client_version"].startswith("OpenSSH")
    assert row["client_address"] == "127.0.0.1"
    fingerprint = subprocess.run(
        ["ssh-keygen", "-lf", server.key], capture_output=True, text=True, check=True
    ).stdout.split()[1]
    assert (row["auth_method"], row["key_fingerprint"]) == ("publickey", fingerprint)
    assert row["cpu_seconds"] > 0 and row["memory_peak_bytes"] > 0
    assert row["namespaces"].keys() >= {"user", "mnt", "pid", "ipc", "uts", "net"}
    assert row["started_at"].endswith("Z") and row["ended_at"] >= row["started_at"]
    (channel,) = row["channels"]
    assert (channel["command"], channel["pty"], channel["exit_status"]) == (command, False, 3)


def test_pid_1_in_the_row_is_the_hosts(server: Server) -> None:
    client = server.popen("echo ready; read x")
    assert client.stdout is not None
    client.stdout.readline()
    row = wait_until(lambda: server.sessions("--state", "running"), "the session")[-1]
    for kind, inode in row["namespaces"].items():
        assert os.readlink(f"/proc/{row['init_pid']}/ns/{kind}") == f"{kind}:[{inode}]"
    end(client, signal.SIGTERM)
    closed(server)


def test_hostile_text_is_harmless_in_a_table(server: Server) -> None:
    server.ssh("printf '\\033]0;x\\007' # \x1b[2J\x1b]52;c;eA==\x07 ' OR 1=1 --")
    closed(server)
    table = server.cli("session", "show", str(server.latest()["id"])).stdout
    assert "\x1b" not in table and "\x07" not in table
    assert "OR 1=1" in server.latest()["channels"][0]["command"]


def test_session_kill_ends_it_and_says_so(server: Server) -> None:
    client = server.popen("echo ready; sleep 1000")
    assert client.stdout is not None
    client.stdout.readline()
    row = server.latest()
    server.cli("session", "kill", str(row["id"]))
    _, err = client.communicate(timeout=20)
    assert b"ended by" in err and client.returncode != 0
    assert closed(server)["end_reason"] == "killed"
    assert "has ended" in server.cli("session", "kill", str(row["id"])).stderr
    assert server.cli("session", "kill", "999999", check=False).returncode == 1


def test_password_authentication(server: Server) -> None:
    server.cli("user", "add", "grace", "--password-stdin", input="correct horse\n")
    script = """
import asyncio, asyncssh, sys
async def main():
    for password in ('wrong', 'correct horse'):
        try:
            async with asyncssh.connect(sys.argv[1], int(sys.argv[2]), username='grace', password=password, client_keys=None, known_hosts=None) as c:
                print((await c.run('id -u')).stdout.strip())
        except asyncssh.PermissionDenied: print('denied')
asyncio.run(main())
"""
    done = subprocess.run(
        [sys.executable, "-c", script, server.host, str(server.port)], capture_output=True, text=True, timeout=60
    )
    assert done.stdout.split() == ["denied", "0"], done.stderr
    assert closed(server)["auth_method"] == "password"


def test_who_may_not_get_in(server: Server) -> None:
    before = len(server.sessions())
    assert server.ssh("true", user="nobody-here").returncode == 255
    server.cli("user", "add", "eve")
    assert server.ssh("true", user="eve").returncode == 255, "a user without this key"
    server.cli("user", "key", "add", "eve", server.directory / "key.pub")
    assert server.ssh("true", user="eve").returncode == 0
    server.cli("user", "set", "eve", "--disable")
    assert server.ssh("true", user="eve").returncode == 255
    assert len(server.sessions()) == before + 1


def test_no_record_no_shell(own_server: Server) -> None:
    """A database that takes nothing more refuses logins in one sentence, and the server goes on when it is back."""
    own_server.start()
    own_server.run("true")
    database = own_server.state / "sandbox-ssh.db"
    connection = sqlite3.connect(database, isolation_level=None)
    connection.execute("BEGIN EXCLUSIVE")
    started = time.monotonic()
    done = own_server.ssh("echo shell", timeout=100)
    assert b"shell" not in done.stdout and done.returncode != 0, time.monotonic() - started
    connection.execute("ROLLBACK")
    connection.close()
    wait_until(lambda: own_server.ssh("true").returncode == 0, "a login to work again")


def test_two_servers_side_by_side(service: Server, own_server: Server) -> None:
    """At the same time: the kernel gives the number of a namespace that has ended to the next."""
    own_server.start()
    command = "readlink /proc/self/ns/pid; cat"
    with own_server.popen(command) as mine, service.popen(command) as theirs:
        assert mine.stdout is not None and theirs.stdout is not None
        assert mine.stdout.readline() != theirs.stdout.readline()
        owners = {
            re.search(r"^Uid:\s+(\d+)", Path(f"/proc/{server.latest()['init_pid']}/status").read_text(), re.M)[1]  # type: ignore[index]
            for server in (service, own_server)
        }
        assert len(owners) == 2 and not {"0", "65534"} & owners, "each has host ids of its own"
    assert own_server.ssh("true", user="grace").returncode == 255, "users of the one are not the other's"
    assert len(own_server.sessions()) == 1


def test_postgresql_two_workers_ipv6_and_a_long_path(postgres_url: str) -> None:
    """What a larger installation has, at once; a path longer than a socket's may be (unix(7), sun_path)."""
    with make_server("service") as server:
        server.state = server.directory / ("state of " + "x" * 120) / "sandbox ssh"
        server.state.parent.mkdir(mode=0o755)
        server.config.update({
            "SANDBOX_SSH_DATABASE_URL": postgres_url,
            "SANDBOX_SSH_SERVER__WORKERS": "2",
        })  # fmt: skip
        server.add_user()
        server.start("[::1]:0")
        assert len(server.pids("sandbox-gateway")) == 2
        clients = [server.popen("cat; echo $SSH_CLIENT") for _ in range(12)]
        rows = wait_until(
            lambda: len(rows := server.sessions("--state", "running")) == 12 and rows, "12 sessions to run"
        )
        assert {row["worker"] for row in rows} == {0, 1}, "the kernel spreads connections over the workers"
        assert {row["client_address"] for row in rows} == {"::1"}
        for row in rows[:2]:
            assert server.cli("session", "kill", str(row["id"])).returncode == 0
        outputs = [client.communicate(b"", timeout=30)[0].decode() for client in clients]
        assert sorted(client.returncode for client in clients)[-2:] != [0, 0]
        assert sum(output.startswith("::1 ") for output in outputs) == 10
        wait_until(lambda: not server.sessions("--state", "running"), "every row to be closed")
        assert sorted(row["end_reason"] for row in server.sessions()) == ["exit"] * 10 + ["killed"] * 2


def test_a_sandbox_without_network_has_loopback_only(own_server: Server) -> None:
    own_server.config["SANDBOX_SSH_SANDBOX__NETWORK"] = "none"
    own_server.start()
    assert own_server.run("ls /sys/class/net; ip -4 -o addr show lo").split()[:4] == ["lo", "1:", "lo", "inet"]
