"""One SSH connection from accept to close: authentication first, then a session."""

from __future__ import annotations

import ipaddress
from typing import TYPE_CHECKING, Any

import asyncssh

from sandbox_ssh.gateway.auth import Authentication
from sandbox_ssh.gateway.session import Login, Session
from sandbox_ssh.gateway.stream import Stream
from sandbox_ssh.gateway.transport import Transport

if TYPE_CHECKING:
    from sandbox_ssh.gateway.channel import Channel
    from sandbox_ssh.gateway.worker import Worker


class Connection(asyncssh.SSHServer):
    """What asyncssh asks of its server. What is not overridden here is refused: forwarding, agent, X11, tunnels."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._transport: Transport | None = None
        self._authentication: Authentication | None = None
        self._session: Session | None = None

    def connection_made(self, conn: asyncssh.SSHServerConnection) -> None:
        assert isinstance(conn, Transport)
        self._transport = conn
        self._authentication = Authentication(self._worker, _address(conn.get_extra_info("peername")))
        conn.watch(self)
        self._worker.startups.add(conn)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._session is not None:
            self._session.connection_lost(exc)
        elif self._transport is not None and self._authentication is not None:
            self._worker.startups.discard(self._transport)
            self._worker.spawn_task(self._authentication.given_up())

    # Authentication.

    def begin_auth(self, username: str) -> bool:
        assert self._authentication is not None
        self._authentication.begin(username)
        return True

    def public_key_auth_supported(self) -> bool:
        return True

    def password_auth_supported(self) -> bool:
        return self._worker.config.ssh.password_authentication

    async def validate_public_key(self, username: str, key: asyncssh.SSHKey) -> bool:
        assert self._authentication is not None
        return await self._authentication.public_key(username, key)

    async def validate_password(self, username: str, password: str) -> bool:
        assert self._authentication is not None
        return await self._authentication.password(username, password)

    def auth_failed(self) -> None:
        assert self._authentication is not None
        self._authentication.failed()

    def auth_completed(self) -> None:
        """Admit the user at once: the sandbox is being made while the client still opens its first channel."""
        transport, authentication = self._transport, self._authentication
        assert transport is not None and authentication is not None and authentication.user is not None
        self._worker.startups.discard(transport)
        peer, local = transport.get_extra_info("peername"), transport.get_extra_info("sockname")
        login = Login(
            user=authentication.user,
            address=_address(peer),
            port=peer[1],
            local_address=_address(local),
            local_port=local[1],
            client_version=transport.get_extra_info("client_version").removeprefix("SSH-2.0-"),
            method=authentication.method,
            key_fingerprint=authentication.key_fingerprint,
        )
        self._session = Session(self._worker, transport, login)
        self._worker.session_began(self._session)

    # The session.

    def session_requested(self) -> tuple[Stream, Channel] | bool:
        assert self._transport is not None and self._session is not None
        self._transport.login_done()
        channel = self._session.open_channel()
        return channel is not None and (Stream(self._transport), channel)

    def flow(self, flowing: bool) -> None:
        if self._session is not None:
            self._session.flow(flowing)


def _address(name: tuple[Any, ...]) -> str:
    """The address of a socket's name; IPv4 as such where it came over a socket that serves both (ipv6(7))."""
    address = ipaddress.ip_address(name[0])
    return str(getattr(address, "ipv4_mapped", None) or address)
