"""Our side of an SSH channel against asyncssh's client, over TCP: what is sent faster than it is read."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import asyncssh
import pytest

from sandbox_ssh.gateway.stream import WINDOW, Stream
from sandbox_ssh.gateway.transport import Transport

SIZE = 8 * WINDOW


class Server(asyncssh.SSHServer):
    """Lets everybody in, and gives every channel to the test."""

    def __init__(self, process: asyncssh.SSHServerSession[bytes]) -> None:
        self._process = process

    def connection_made(self, conn: asyncssh.SSHServerConnection) -> None:
        self._connection = conn

    def begin_auth(self, username: str) -> bool:
        return False

    def session_requested(self) -> tuple[Stream, asyncssh.SSHServerSession[bytes]]:
        return Stream(self._connection), self._process


class Process(asyncssh.SSHServerSession[bytes]):
    """Takes a packet, and then none until it is told to go on."""

    def __init__(self) -> None:
        self.received = 0
        self.closed = asyncio.Event()
        self.paused = asyncio.Event()
        self.ended = asyncio.Event()

    def connection_made(self, chan: asyncssh.SSHServerChannel[bytes]) -> None:
        self.stream = chan

    def exec_requested(self, command: str) -> bool:
        return True

    def data_received(self, data: bytes, datatype: int | None) -> None:
        self.received += len(data)
        self.stream.pause_reading()
        self.paused.set()

    def reader_gone(self) -> None:
        pass

    def eof_received(self) -> bool:
        self.ended.set()
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed.set()


@pytest.fixture
def process() -> Process:
    return Process()


@pytest.fixture
async def client(process: Process) -> AsyncIterator[asyncssh.SSHClientChannel[bytes]]:
    options = asyncssh.SSHServerConnectionOptions(
        server_factory=lambda: Server(process), server_host_keys=[asyncssh.generate_private_key("ssh-ed25519")]
    )
    accept: Callable[[], asyncio.Protocol] = lambda: Transport(options)  # noqa: E731
    server = await asyncio.get_running_loop().create_server(accept, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with asyncssh.connect("127.0.0.1", port, username="x", known_hosts=None) as connection:
        chan, _ = await connection.create_session(asyncssh.SSHClientSession, "sink", encoding=None)
        yield chan
    server.close()


async def test_a_slow_reader_never_has_more_than_its_window_waiting(
    client: asyncssh.SSHClientChannel[bytes], process: Process
) -> None:
    client.write(bytes(SIZE))
    client.write_eof()
    while not process.ended.is_set():
        sent = SIZE - client.get_write_buffer_size()
        assert sent - process.received <= WINDOW
        process.stream.resume_reading()
        await asyncio.sleep(0)
    assert process.received == SIZE


async def test_a_close_does_not_wait_for_input_that_nobody_reads(
    client: asyncssh.SSHClientChannel[bytes], process: Process
) -> None:
    client.write(bytes(WINDOW))
    await process.paused.wait()
    client.abort()
    await process.closed.wait()
    assert process.received < WINDOW
