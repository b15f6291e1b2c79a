"""A gateway worker as its own process, with a real database and no spawner: all that comes before a shell."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import asyncssh
import pytest

from sandbox_ssh.store import migrate, users
from sandbox_ssh.store.database import Database

PASSWORD = "correct horse"
LIMITS = """
[ssh]
max_auth_tries = 3
max_startups = 5
login_grace_time = "20s"
[server]
shutdown_timeout = "1s"
"""


class Gateway:
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.url = f"sqlite:///{directory}/sandbox-ssh.db"
        self.key = directory / "id"
        self.config = directory / "sandbox-ssh.toml"
        self.config.write_text(LIMITS)
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.address: tuple[str, int] = self._listening.getsockname()
        self.log = directory / "gateway.log"

    def start(self) -> None:
        ready, tell = os.pipe()
        options = ["--config", self.config, "--state-dir", self.directory, "--database-url", self.url]
        inherited = [self._listening.fileno(), tell]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "sandbox_ssh.gateway", "--worker", "0", *map(str, options),
                 "--listen-fd", str(inherited[0]), "--ready-fd", str(inherited[1])],
                pass_fds=inherited, stderr=log,
            )  # fmt: skip
        os.close(tell)
        assert os.read(ready, 1), self.log.read_text()
        os.close(ready)

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        self._listening.close()
        return self.process.wait()

    def ssh(self, user: str, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run the real client; its words come without what it says about the host's key."""
        command = [
            "ssh", "-F", "none", "-o", "UserKnownHostsFile=/dev/null", "-o", "StrictHostKeyChecking=no",
            "-o", "LogLevel=ERROR", "-o", "IdentitiesOnly=yes", "-o", "NumberOfPasswordPrompts=10",
            "-p", str(self.address[1]), *arguments, f"{user}@127.0.0.1", "true",
        ]  # fmt: skip
        return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, **options)

    def with_password(self, user: str, password: str) -> subprocess.CompletedProcess[str]:
        answer = self.directory / "askpass"
        answer.write_text(f"#!/bin/sh\necho '{password}'\n")
        answer.chmod(0o700)
        environment = {**os.environ, "SSH_ASKPASS": str(answer), "SSH_ASKPASS_REQUIRE": "force"}
        return self.ssh(user, "-o", "PubkeyAuthentication=no", env=environment)

    def with_key(self, user: str, key: Path) -> subprocess.CompletedProcess[str]:
        return self.ssh(user, "-i", str(key), "-o", "BatchMode=yes")


@pytest.fixture
async def prepared(tmp_path: Path) -> Gateway:
    """A gateway that has not been started; its database has `anna`, with a key and a password, and `off`, disabled."""
    gateway = Gateway(tmp_path)
    (tmp_path / "host_keys").mkdir()
    asyncssh.generate_private_key("ssh-ed25519").write_private_key(tmp_path / "host_keys" / "ssh_host_ed25519_key")
    key = asyncssh.generate_private_key("ssh-ed25519")
    key.write_private_key(gateway.key)
    gateway.key.chmod(0o600)
    algorithm, blob = key.export_public_key().decode().split()[:2]
    public = users.Key(algorithm, blob, key.get_fingerprint("sha256"), "")
    migrate.upgrade(gateway.url)
    database = Database(gateway.url)
    for name in ("anna", "off"):
        await users.add(database, name, keys=[public], password=PASSWORD, by="test")
    await users.change(database, "off", enabled=False, by="test")
    await database.dispose()
    return gateway


@pytest.fixture
def gateway(prepared: Gateway) -> Iterator[Gateway]:
    prepared.start()
    yield prepared
    if prepared.process.poll() is None:
        assert prepared.stop() == 0
