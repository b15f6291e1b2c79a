"""Logins with the real client, up to the point where a sandbox would be made."""

from __future__ import annotations

import os
import signal
import socket
import sqlite3
from pathlib import Path
from typing import Any

import asyncssh
import pytest

from tests.gateway.conftest import PASSWORD, Gateway

REFUSED = 254


def rows(gateway: Gateway, query: str) -> list[Any]:
    with sqlite3.connect(gateway.directory / "sandbox-ssh.db") as connection:
        return connection.execute(query).fetchall()


def failures(gateway: Gateway) -> list[Any]:
    return rows(gateway, "SELECT user_name, address, detail FROM audit_events WHERE kind = 'auth-failure' ORDER BY id")


@pytest.fixture
def other_key(tmp_path: Path) -> Path:
    path = tmp_path / "other"
    asyncssh.generate_private_key("ecdsa-sha2-nistp256").write_private_key(path)
    path.chmod(0o600)
    return path


def test_a_key_opens_a_session_that_says_why_it_has_no_sandbox(gateway: Gateway) -> None:
    client = gateway.with_key("anna", gateway.key)
    assert client.returncode == REFUSED
    assert client.stderr == (
        "sandbox-ssh: no sandbox could be made for you: the part of the server that makes sandboxes is not running\n"
    )
    gateway.stop()
    columns = "user_name, state, end_reason, auth_method, key_fingerprint, client_address"
    fingerprint = asyncssh.read_private_key(gateway.key).get_fingerprint("sha256")
    assert rows(gateway, f"SELECT {columns} FROM sessions") == [
        ("anna", "closed", "server-failure", "publickey", fingerprint, "127.0.0.1")
    ]
    assert failures(gateway) == []


def test_a_password_opens_a_session(gateway: Gateway) -> None:
    assert gateway.with_password("anna", PASSWORD).returncode == REFUSED
    gateway.stop()
    assert rows(gateway, "SELECT auth_method, key_fingerprint FROM sessions") == [("password", None)]


def test_unknown_and_disabled_users_are_answered_like_a_wrong_key(gateway: Gateway, other_key: Path) -> None:
    attempts = [("anna", other_key), ("nobody", gateway.key), ("off", gateway.key)]
    answers = {(client.returncode, client.stderr) for client in (gateway.with_key(*each) for each in attempts)}
    assert len({(status, words.partition("@")[2]) for status, words in answers}) == 1
    gateway.stop()
    assert [row[:2] for row in failures(gateway)] == [(name, "127.0.0.1") for name, _ in attempts]
    assert rows(gateway, "SELECT * FROM sessions") == []


def test_unknown_and_disabled_users_are_answered_like_a_wrong_password(gateway: Gateway) -> None:
    attempts = [("anna", "wrong"), ("nobody", PASSWORD), ("off", PASSWORD)]
    answers = {(client.returncode, client.stderr) for client in (gateway.with_password(*each) for each in attempts)}
    assert len(answers) == 1
    gateway.stop()
    assert [row[0] for row in failures(gateway)] == [name for name, _ in attempts for _ in range(3)]


def test_the_last_try_ends_the_connection(gateway: Gateway) -> None:
    client = gateway.with_password("anna", "wrong")
    assert client.returncode == 255
    assert len(failures(gateway)) == 3


def test_a_wrong_key_before_the_right_one_is_no_failure(gateway: Gateway, other_key: Path) -> None:
    client = gateway.ssh("anna", "-i", str(other_key), "-i", str(gateway.key), "-o", "BatchMode=yes")
    assert client.returncode == REFUSED
    gateway.stop()
    assert failures(gateway) == []


@pytest.mark.parametrize("cipher", ["chacha20-poly1305@openssh.com", "aes128-ctr", "aes256-gcm@openssh.com"])
def test_a_client_that_knows_one_cipher_gets_it(gateway: Gateway, cipher: str, other_key: Path) -> None:
    client = gateway.ssh("anna", "-c", cipher, "-i", str(other_key), "-o", "BatchMode=yes")
    assert "Permission denied" in client.stderr


async def test_the_server_prefers_its_own_first_cipher_where_the_client_is_near(gateway: Gateway) -> None:
    host, port = gateway.address
    wishes = ["chacha20-poly1305@openssh.com", "aes128-gcm@openssh.com"]
    async with asyncssh.connect(
        host, port, username="anna", client_keys=[str(gateway.key)], known_hosts=None, encryption_algs=wishes
    ) as connection:
        assert connection.get_extra_info("recv_cipher") == "aes128-gcm@openssh.com"


async def test_names_that_are_no_users_are_recorded_as_they_were_given(gateway: Gateway) -> None:
    host, port = gateway.address
    name = "x'; DROP TABLE users; --ü"
    with pytest.raises(asyncssh.PermissionDenied):
        await asyncssh.connect(host, port, username=name, client_keys=[str(gateway.key)], known_hosts=None)
    assert gateway.stop() == 0
    assert [row[0] for row in failures(gateway)] == [name]
    assert f'user="{name}"' in gateway.log.read_text()


def test_connections_beyond_max_startups_are_turned_away(gateway: Gateway) -> None:
    waiting = []
    for _ in range(5):
        connection = socket.create_connection(gateway.address)
        assert connection.recv(100).startswith(b"SSH-2.0-")
        waiting.append(connection)
    with socket.create_connection(gateway.address) as late:
        assert late.recv(100) == b"Exceeded MaxStartups\r\n"
    waiting.pop().close()
    assert gateway.with_password("anna", "wrong").returncode == 255  # there is room again
    for connection in waiting:
        connection.close()


def test_who_does_not_log_in_within_the_grace_time_is_disconnected(prepared: Gateway) -> None:
    prepared.config.write_text('[ssh]\nlogin_grace_time = "500ms"\n')
    prepared.start()
    with socket.create_connection(prepared.address) as connection:
        while connection.recv(4096):
            pass
    assert prepared.stop() == 0


def test_a_reload_with_an_error_keeps_the_configuration(gateway: Gateway, other_key: Path) -> None:
    gateway.config.write_text("[ssh]\nmax_auth_trys = 1\n")
    gateway.process.send_signal(signal.SIGHUP)
    while "was not reloaded" not in gateway.log.read_text():
        assert gateway.process.poll() is None
    assert "max_auth_tries" in gateway.log.read_text()
    gateway.with_password("anna", "wrong")
    assert len(failures(gateway)) == 3


def test_a_reload_counts_for_new_connections(gateway: Gateway) -> None:
    gateway.config.write_text("[ssh]\npassword_authentication = false\n")
    gateway.process.send_signal(signal.SIGHUP)
    while "was reloaded" not in gateway.log.read_text():
        assert gateway.process.poll() is None
    assert "Permission denied (publickey)" in gateway.with_password("anna", PASSWORD).stderr


def test_sessions_that_a_dead_worker_left_are_lost_when_the_next_one_starts(gateway: Gateway) -> None:
    gateway.stop()
    with sqlite3.connect(gateway.directory / "sandbox-ssh.db") as connection:
        connection.execute(
            "INSERT INTO sessions (tenant_name, user_name, node, worker, state, client_address, client_port,"
            " client_version, auth_method, image, started_at, bytes_in, bytes_out) SELECT 'default', 'anna', name, 0,"
            " 'running', '::1', 1, 'x', 'password', 'host', started_at, 0, 0 FROM nodes"
        )
    again = Gateway(gateway.directory)
    again.start()
    assert again.stop() == 0
    assert rows(gateway, "SELECT state, end_reason FROM sessions") == [("lost", "server-failure")]


def test_the_process_can_gain_no_privileges_and_is_not_dumpable(gateway: Gateway) -> None:
    status = Path(f"/proc/{gateway.process.pid}/status").read_text()
    assert "NoNewPrivs:\t1\n" in status
    if os.geteuid() != 0:  # of a process that is not dumpable, /proc belongs to root (proc(5))
        assert Path(f"/proc/{gateway.process.pid}/mem").stat().st_uid == 0


def test_a_server_without_a_database_says_so(prepared: Gateway) -> None:
    (prepared.directory / "sandbox-ssh.db").unlink()
    with pytest.raises(AssertionError, match=r"sandbox-ssh gateway: the database .* db upgrade"):
        prepared.start()
    assert prepared.process.wait() == 1
