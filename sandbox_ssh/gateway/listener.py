"""Accepting connections: the listening sockets, asyncssh's options, and how many may be at the door at once."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import asyncssh
import structlog

from sandbox_ssh.errors import ConfigError
from sandbox_ssh.gateway.connection import Connection
from sandbox_ssh.gateway.transport import Transport

if TYPE_CHECKING:
    from sandbox_ssh.config import Config
    from sandbox_ssh.gateway.worker import Worker

VERSION = "OpenSSH_like sandbox-ssh"
"""What the server calls itself (RFC 4253 section 4.2), with no version number for scanners.

The name starts with OpenSSH because its client says `eow@openssh.com` to its own kind alone (its PROTOCOL, 2.1;
compat.c): without it, `ssh host journalctl -f | head` never ends, as nobody tells us that the reader has gone.
"""

BACKLOG = 1024

log = structlog.get_logger()


def host_keys(paths: Sequence[Path]) -> list[asyncssh.SSHKey]:
    """Load the server's private keys.

    Raises `ConfigError` naming the file that cannot be used.
    """
    keys = []
    for path in paths:
        try:
            keys.append(asyncssh.read_private_key(path))
        except (OSError, asyncssh.KeyImportError) as error:
            raise ConfigError(f"the host key {path} cannot be loaded: {error}") from error
    return keys


def options(worker: Worker, config: Config, keys: Sequence[asyncssh.SSHKey]) -> asyncssh.SSHServerConnectionOptions:
    """asyncssh's options.

    Raises `ConfigError` when asyncssh does not know a value, as of a cipher.
    """
    ssh = config.ssh
    chaining = [cipher for cipher in ssh.ciphers if "cbc" in cipher]
    if chaining:
        raise ConfigError(f"ssh.ciphers: {chaining[0]} is a CBC mode, which this server does not offer; leave it out")
    try:
        return asyncssh.SSHServerConnectionOptions(
            server_factory=lambda: Connection(worker),
            server_version=VERSION,
            server_host_keys=keys,
            encryption_algs=list(ssh.ciphers),
            login_timeout=ssh.login_grace_time,
            keepalive_interval=ssh.client_alive_interval,
            keepalive_count_max=ssh.client_alive_count_max,
            password_auth=ssh.password_authentication,
            kbdint_auth=False,
            host_based_auth=False,
            gss_host=None,
            agent_forwarding=False,
            x11_forwarding=False,
        )
    except ValueError as error:
        raise ConfigError(f"the section [ssh] of the configuration cannot be used: {error}") from error


class _TurnedAway(asyncio.Protocol):
    """A connection beyond `max_startups`, which is told so in sshd's words before the protocol starts."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        transport.write(b"Exceeded MaxStartups\r\n")
        transport.close()


async def listen(worker: Worker, listening: socket.socket) -> asyncio.Server:
    """Serve SSH on a socket that listens already."""

    def accept() -> asyncio.Protocol:
        if len(worker.startups) >= worker.config.ssh.max_startups:
            log.warning("a connection was turned away: ssh.max_startups is reached", max=len(worker.startups))
            return _TurnedAway()
        return Transport(worker.options)

    return await asyncio.get_running_loop().create_server(accept, sock=listening, backlog=BACKLOG)
