"""An SSH channel as asyncssh implements it, and what this server makes up for.

Like `transport`, this is about bytes and messages alone; `channel` is about processes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TYPE_CHECKING, Protocol, cast

import asyncssh

if TYPE_CHECKING:
    from asyncssh.packet import SSHPacket

WINDOW = 2 * 1024 * 1024
"""Bytes that a client may send on a channel before its process has read them: the bound of their memory."""

MAX_PACKET = 128 * 1024
"""OpenSSH's client fills packets of this size where it may, which costs us fewer of them; RFC 4253 asks for 32 KiB."""

MAX_VARIABLE = 8 * 1024
MAX_VARIABLES = 1000
"""What a client may send of its environment; with a larger variable or more of them all are forgotten."""

# RFC 4254 section 9, and how an `env` request (6.4) goes on after its type and channel.
MSG_CHANNEL_WINDOW_ADJUST = 93
MSG_CHANNEL_CLOSE = 97
MSG_CHANNEL_REQUEST = 98
ENV = b"\0\0\0\3env"


class Reader(Protocol):
    """Who is at this end of a stream."""

    def data_received(self, data: bytes, datatype: int | None) -> None: ...
    def reader_gone(self) -> None: ...


class Stream(asyncssh.SSHServerChannel[bytes]):
    def __init__(self, connection: asyncssh.SSHServerConnection) -> None:
        super().__init__(
            connection,
            asyncio.get_running_loop(),
            allow_pty=True,
            line_editor=False,
            line_echo=False,
            line_history=0,
            max_line_length=0,
            encoding=None,
            errors="strict",
            window=WINDOW,
            max_pktsize=MAX_PACKET,
        )
        self._consumed = 0

    def process_packet(self, pkttype: int, pktid: int, packet: SSHPacket) -> bool | Awaitable[None]:
        result = super().process_packet(pkttype, pktid, packet)
        if pkttype == MSG_CHANNEL_CLOSE:
            # asyncssh would wait until the process has read its input, which may be never.
            self.abort()
        elif pkttype == MSG_CHANNEL_REQUEST:
            # Variables would be collected without a bound.
            payload = packet.get_full_payload()
            if payload[5:12] == ENV and (len(payload) > MAX_VARIABLE or len(self._env) > MAX_VARIABLES):
                self._env.clear()
        return result

    def _process_exec_request(self, packet: SSHPacket) -> bool:
        """A command is bytes (RFC 4254 section 6.5); asyncssh refuses what is no UTF-8."""
        command = packet.get_string()
        packet.check_end()
        return self._start_session(command=command.decode("utf-8", "surrogateescape"))

    def drop_unsent(self) -> None:
        """Forget what waits for a window that the client may never open again, and would hold up the close."""
        self._send_buf.clear()
        self._send_buf_len = 0
        self._pause_resume_writing()

    def _deliver_data(self, data: bytes, datatype: int | None) -> None:
        """Hand data to the process, and give its room in the window back to the client.

        asyncssh's own gives back the whole window, with what is still buffered because reading is paused. Fed
        faster than its process reads, a channel grew by a megabyte for every packet that was read (2.24).
        """
        if self._session is not None:
            cast(Reader, self._session).data_received(data, datatype)
        self._consumed += len(data)
        if self._consumed >= WINDOW // 2:
            self._recv_window += self._consumed
            self.send_packet(MSG_CHANNEL_WINDOW_ADJUST, self._consumed.to_bytes(4, "big"))
            self._consumed = 0

    def _process_eow_at_openssh_dot_com_request(self, _packet: SSHPacket) -> bool:
        """The client's standard output is closed (OpenSSH's PROTOCOL, section 2.1).

        asyncssh finds the method for a request by its name. The client opens its window no further, so what waits
        for that goes nowhere.
        """
        self.drop_unsent()
        if self._session is not None:
            cast(Reader, self._session).reader_gone()
        return True

    def log_sent_packet(self, pkttype: int, pktid: int | None, packet: object, note: str = "") -> None:
        """Packets are not described for a debug log that is never written."""

    def log_received_packet(self, pkttype: int, pktid: int | None, packet: object, note: str = "") -> None:
        """Nor these."""
