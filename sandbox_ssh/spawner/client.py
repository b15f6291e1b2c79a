"""The gateway's side of the socket to the spawner: requests with replies, events as callbacks."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sandbox_ssh.errors import ProtocolError, SpawnerError
from sandbox_ssh.spawner import protocol

# Creating a sandbox takes milliseconds; a spawner that is silent for this long has hung.
REPLY_TIMEOUT = 30.0

Message = dict[str, Any]


class SpawnerClient:
    """One connection to the spawner. Every sandbox made over it dies with it.

    `on_event` is called in the event loop with every event (`protocol`): `exited` and `ended`.
    `on_lost` is called once, when the connection has ended without `close`.
    """

    def __init__(self, on_event: Callable[[Message], None], on_lost: Callable[[], None]) -> None:
        self._on_event = on_event
        self._on_lost = on_lost
        self._socket: socket.socket | None = None
        self._waiting: dict[int, asyncio.Future[tuple[Message, list[int]]]] = {}
        self._outbox: list[bytes] = []
        self._number = 0

    @property
    def connected(self) -> bool:
        return self._socket is not None

    async def connect(self, path: Path) -> None:
        """Connect to the spawner's socket, which a state directory of any length holds (sun_path has 108 bytes).

        Returns when the spawner has said `hello`: the socket belongs to its parent, and takes connections while there
        is no spawner. Raises `OSError` as connect(2) does.
        """
        loop = asyncio.get_running_loop()
        directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            connection.connect(f"/proc/self/fd/{directory}/{path.name}")
            if not await loop.sock_recv(connection, protocol.MAX_MESSAGE):
                raise ConnectionResetError(errno.ECONNRESET, "the spawner has closed the connection")
        except BaseException:
            connection.close()
            raise
        finally:
            os.close(directory)
        self._socket = connection
        loop.add_reader(connection, self._readable)

    def close(self) -> None:
        """End the connection; the spawner destroys every sandbox that was made over it."""
        connection, self._socket = self._socket, None
        if connection is None:
            return
        loop = asyncio.get_running_loop()
        loop.remove_reader(connection)
        loop.remove_writer(connection)
        connection.close()
        self._outbox.clear()
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(SpawnerError("ended", "the connection to the spawner has ended"))
        self._waiting.clear()

    async def request(self, request: protocol.Request) -> tuple[Message, list[int]]:
        """Send a request and wait for its reply and descriptors, which the caller owns.

        Raises `SpawnerError` when the spawner refuses, is gone, or does not answer in time.
        """
        if self._socket is None:
            raise SpawnerError("ended", "the spawner is not running; its parent starts it again within seconds")
        self._number += 1
        number = self._number
        try:
            data = protocol.encode_request(number, request)
        except ProtocolError as error:
            raise SpawnerError("failed", f"the request cannot be sent: {error}") from error
        future: asyncio.Future[tuple[Message, list[int]]] = asyncio.get_running_loop().create_future()
        self._waiting[number] = future
        self._send(data)
        try:
            message, fds = await asyncio.wait_for(asyncio.shield(future), REPLY_TIMEOUT)
        except asyncio.CancelledError:
            # The reply may still bring descriptors: they are closed where it arrives.
            future.add_done_callback(_close_unclaimed)
            raise
        except TimeoutError as error:
            future.add_done_callback(_close_unclaimed)
            raise SpawnerError("failed", f"the spawner did not answer within {REPLY_TIMEOUT:.0f} s") from error
        if "error" in message:
            raise SpawnerError(str(message["error"]), str(message.get("message")))
        return message, fds

    def _send(self, data: bytes) -> None:
        assert self._socket is not None
        if not self._outbox:
            try:
                self._socket.send(data)
                return
            except BlockingIOError:
                asyncio.get_running_loop().add_writer(self._socket, self._writable)
            except OSError:
                self._lost()
                return
        self._outbox.append(data)

    def _writable(self) -> None:
        assert self._socket is not None
        try:
            while self._outbox:
                self._socket.send(self._outbox[0])
                self._outbox.pop(0)
        except BlockingIOError:
            return
        except OSError:
            self._lost()
            return
        asyncio.get_running_loop().remove_writer(self._socket)

    def _readable(self) -> None:
        while self._socket is not None:
            try:
                data, fds, flags, _ = socket.recv_fds(
                    self._socket, protocol.MAX_MESSAGE, protocol.MAX_FDS, socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno != errno.EINTR:
                    self._lost()
                continue
            if not data or flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
                _close(fds)
                self._lost()
                return
            self._receive(protocol.decode(data), fds)

    def _receive(self, message: Message, fds: list[int]) -> None:
        if "event" in message:
            _close(fds)
            self._on_event(message)
            return
        future = self._waiting.pop(message.get("reply", -1), None)
        if future is None or future.done():
            _close(fds)
        else:
            future.set_result((message, fds))

    def _lost(self) -> None:
        if self._socket is not None:
            self.close()
            self._on_lost()


def _close(fds: list[int]) -> None:
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)


def _close_unclaimed(future: asyncio.Future[tuple[Message, list[int]]]) -> None:
    if not future.cancelled() and future.exception() is None:
        _close(future.result()[1])
