"""The least that an asyncssh server can do: log in by key, run the command, no sandbox and no record.

bare_asyncssh.py PORT PUBLIC_KEY_FILE
"""

from __future__ import annotations

import asyncio
import socket
import sys

import asyncssh

TCP_QUICKACK = 12


class Server(asyncssh.SSHServer):
    def connection_made(self, conn: asyncssh.SSHServerConnection) -> None:
        self._socket = conn.get_extra_info("socket")
        self._handle = asyncio.get_running_loop().call_soon(self._quickack)

    def _quickack(self) -> None:
        """Acknowledge at once while logging in: the kernel forgets the option with every acknowledgement (tcp(7))."""
        try:
            self._socket.setsockopt(socket.IPPROTO_TCP, TCP_QUICKACK, 1)
        except OSError:
            return
        self._handle = asyncio.get_running_loop().call_later(0.001, self._quickack)

    def auth_completed(self) -> None:
        self._handle.cancel()

    def connection_lost(self, exc: Exception | None) -> None:
        self._handle.cancel()


async def handle(process: asyncssh.SSHServerProcess[bytes]) -> None:
    child = await asyncio.create_subprocess_exec("/bin/sh", "-c", process.command or "exec sh")
    process.exit(await child.wait())


async def main() -> None:
    key = asyncssh.generate_private_key("ssh-ed25519")
    await asyncssh.listen(
        "127.0.0.1", int(sys.argv[1]), server_factory=Server, server_host_keys=[key],
        authorized_client_keys=sys.argv[2], process_factory=handle, encoding=None,
    )  # fmt: skip
    await asyncio.Event().wait()


asyncio.run(main())
