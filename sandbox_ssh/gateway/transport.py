"""The SSH connection as asyncssh implements it, and what this server changes about it on the wire.

Nothing here knows users or sandboxes. What each change buys is said where it is made. What is touched of asyncssh and
named with an underscore is in this module and in `stream`, and nowhere else.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from typing import TYPE_CHECKING, Any, Protocol, cast

import asyncssh

if TYPE_CHECKING:
    from asyncssh.packet import SSHPacketLogger

MSG_IGNORE = 2  # RFC 4253 section 12
MSG_KEXINIT = 20
MSG_CHANNEL_DATA = 94  # RFC 4254 section 9
MSG_CHANNEL_EXTENDED_DATA = 95

MAX_GREETING = 64 * 1024

FLUSH_AT = 256 * 1024
"""Packets of one turn of the event loop are joined up to this size."""

HIGH_WATER = 512 * 1024
"""Bytes that may wait for the socket before the channels of a connection stop reading from their processes."""

NEAR = 0.002
"""Seconds of round trip up to which the server waits for the client's KEXINIT before it sends its own."""

PATIENCE = 0.05
"""Seconds that it waits at most."""

LINGER = 5.0
"""Seconds that a closed connection gets to take its last bytes."""


class Wire(asyncio.Transport):
    """The socket, as asyncssh sees it.

    asyncssh writes every packet with a system call of its own. Here all packets of one turn of the event loop
    go out together. And asyncssh ends a connection with `abort`, which drops what the socket has not taken yet:
    a client would lose the sentence that says why. Here it is sent first.
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        super().__init__()
        self._transport = transport
        self._loop = asyncio.get_running_loop()
        self._pending: list[bytes] = []
        self._size = 0
        self.writes = 0
        transport.set_write_buffer_limits(high=HIGH_WATER)

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._transport.get_extra_info(name, default)

    def write(self, data: bytes | bytearray | memoryview[Any]) -> None:
        if not self._pending:
            self._loop.call_soon(self._flush)
        self._pending.append(bytes(data))
        self._size += len(data)
        self.writes += 1
        if self._size >= FLUSH_AT:
            self._flush()

    def abort(self) -> None:
        self._flush()
        self._transport.close()
        if self._transport.get_write_buffer_size():
            self._loop.call_later(LINGER, self._transport.abort)

    def _flush(self) -> None:
        if self._pending:
            data = self._pending[0] if len(self._pending) == 1 else b"".join(self._pending)
            self._pending.clear()
            self._size = 0
            self._transport.write(data)


class Watcher(Protocol):
    """Who is told what asyncssh does not tell its `SSHServer`."""

    def auth_failed(self) -> None: ...
    def flow(self, flowing: bool) -> None: ...


class Transport(asyncssh.SSHServerConnection):
    """A server's side of one SSH connection.

    Its watcher hears when data can no longer go out and when it can again. A channel's own window does not bound
    memory: a client may grant 4 GiB of it and then stop reading from the socket, or start a key exchange and
    never finish it, during which asyncssh keeps what is to be sent.
    """

    def __init__(self, options: asyncssh.SSHServerConnectionOptions) -> None:
        super().__init__(asyncio.get_running_loop(), options)
        self._watcher: Watcher | None = None
        self._greeting: bytearray | None = None
        self._socket: socket.socket | None = None
        self._wire: Wire | None = None
        self._deferred = 0
        self._full = False
        self._flowing = True

    def watch(self, watcher: Watcher) -> None:
        self._watcher = watcher

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._socket = transport.get_extra_info("socket")
        self._wire = Wire(cast(asyncio.Transport, transport))
        super().connection_made(self._wire)

        if _round_trip(self._socket) < NEAR:
            self._greeting = bytearray()

    def data_received(self, data: bytes, datatype: int | None = None) -> None:
        # The client's Nagle algorithm holds back a small packet until the one before is acknowledged, and the
        # kernel delays that acknowledgement by 40 ms. TCP_QUICKACK is not permanent (tcp(7)), hence each time,
        # until the login is over: an interactive session is better off with its acknowledgements on its echoes.
        if self._socket is not None:
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        if self._greeting is None:
            super().data_received(data, datatype)
        else:
            self._listen_first(data)

    def _listen_first(self, data: bytes) -> None:
        """Hold the client's greeting until it is complete, and offer the cipher that suits this server best.

        The cipher is the first on the client's list that the server has (RFC 4253 section 7.1), so a server can
        prefer one only by not offering what the client likes better. OpenSSH's client likes chacha20-poly1305
        best, which moves 500 MB/s here where AES-GCM moves 800. To leave it out for everybody would shut out who
        has nothing else or was told to use it; to leave it out by the client's version would shut out the latter.
        Its KEXINIT says which ciphers it has, and comes unasked, but a round trip later than ours could go. Where
        that is nothing, on the networks that can carry such speeds, we wait for it; elsewhere the client chooses.
        """
        assert self._greeting is not None
        if not self._greeting:
            asyncio.get_running_loop().call_later(PATIENCE, self._stop_listening)
        self._greeting += data
        offered = ciphers_offered(self._greeting)
        if offered is None and len(self._greeting) < MAX_GREETING:
            return
        best = next((cipher for cipher in self._enc_algs if cipher in (offered or ())), None)
        if best is not None:
            self._enc_algs = [best]
        self._stop_listening()

    def _stop_listening(self) -> None:
        greeting, self._greeting = self._greeting, None
        if greeting:
            super().data_received(bytes(greeting))

    def connection_lost(self, exc: Exception | None = None) -> None:
        self._greeting = None
        super().connection_lost(exc)

    def login_done(self) -> None:
        self._socket = None

    def pause_writing(self) -> None:
        self._full = True
        self._tell()

    def resume_writing(self) -> None:
        self._full = False
        self._tell()

    def _tell(self) -> None:
        flowing = not self._full and self._deferred < HIGH_WATER
        if flowing != self._flowing:
            self._flowing = flowing
            if self._watcher is not None:
                self._watcher.flow(flowing)

    def send_packet(self, pkttype: int, *args: bytes, handler: SSHPacketLogger | None = None) -> None:
        """Send a packet, without the empty IGNORE message that asyncssh puts before each one.

        That message is an answer to an attack on chained ciphers (RFC 4251 section 9.3.1). The ciphers offered
        here are AEAD or counter modes, which do not chain, so it doubles the packets for nothing.
        """
        if pkttype == MSG_IGNORE:
            return
        if pkttype not in (MSG_CHANNEL_DATA, MSG_CHANNEL_EXTENDED_DATA) or self._wire is None:
            super().send_packet(pkttype, *args, handler=handler)
            return
        writes = self._wire.writes
        super().send_packet(pkttype, *args)
        if self._wire.writes == writes:  # kept until the key exchange is over
            self._deferred += len(args[0])
            self._tell()
        elif self._deferred:
            self._deferred = 0
            self._tell()

    def log_sent_packet(self, pkttype: int, pktid: int | None, packet: object, note: str = "") -> None:
        """Data packets are not described for a debug log that is never written."""

    def send_userauth_failure(self, partial_success: bool) -> None:
        if self._watcher is not None:
            self._watcher.auth_failed()
        super().send_userauth_failure(partial_success)

    async def reload_config(self) -> None:
        """Nothing to reload: no option depends on the user's name (asyncssh would parse them all again)."""


def ciphers_offered(greeting: bytes | bytearray) -> list[bytes] | None:
    """The ciphers that a client has for both directions, from its version line and KEXINIT (RFC 4253 section 7.1).

    None where that is not what the bytes hold, or not all of it yet; what is wrong with them asyncssh will say.
    """
    line = greeting.find(b"\n") + 1
    size = int.from_bytes(greeting[line : line + 4], "big")
    packet = bytes(greeting[line + 4 : line + 4 + size])
    if not line or len(packet) < max(size, 2) or packet[1] != MSG_KEXINIT:
        return None
    lists = []
    position = 2 + 16  # padding length, message number; cookie
    for _ in range(4):  # key exchange, host key, cipher to the server, cipher to the client
        length = int.from_bytes(packet[position : position + 4], "big")
        lists.append(packet[position + 4 : position + 4 + length].split(b","))
        position += 4 + length
    return [cipher for cipher in lists[2] if cipher in lists[3]]


def _round_trip(sock: socket.socket | None) -> float:
    """Seconds that the handshake of a TCP connection took there and back, by the kernel (tcp(7), linux/tcp.h)."""
    if sock is None:
        return NEAR
    # struct tcp_info: 8 bytes, then 32-bit numbers of which tcpi_rtt, in microseconds, is the sixteenth.
    rtt: int = struct.unpack_from("I", sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 72), 68)[0]
    return rtt / 1e6
