"""One SSH channel of type `session`: what the client asks of it, and the process at its other end.

The order at the end is OpenSSH's: all output first, then the exit status, then the close. A shell on a terminal
is over when it has exited and the terminal is empty, whoever else holds the terminal open; a command on pipes is
over when it has exited and every holder of its output has closed it.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import struct
import termios
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import asyncssh

from sandbox_ssh.errors import SpawnerError
from sandbox_ssh.gateway.environment import accepted
from sandbox_ssh.gateway.pump import Inflow, Outflow
from sandbox_ssh.gateway.stream import Stream
from sandbox_ssh.spawner import protocol

if TYPE_CHECKING:
    from sandbox_ssh.gateway.session import Session

REFUSED = 254
"""The exit status of a channel whose sandbox could not be made, or that cannot be had (documented)."""

OVER_QUOTA = 253
"""The exit status of a channel whose session a quota or the host's capacity did not let in (documented)."""

KILLED_PAUSE = 0.1
"""Seconds between a process's death by KILL and the end of its channel.

When a sandbox's first process dies, the kernel kills all others before anybody is told (pid_namespaces(7)). The
pause lets the spawner say so, and the client hear why.
"""

MAX_COMMAND = 32 * 1024
"""Characters of a command: with its environment it must fit one message to the spawner."""


class Refusal(Exception):
    """Why a session or channel cannot be had; its text is the sentence for the client."""

    def __init__(self, sentence: str, status: int = REFUSED) -> None:
        super().__init__(sentence)
        self.status = status


class Channel(asyncssh.SSHServerSession[bytes]):
    def __init__(self, session: Session, number: int) -> None:
        self.number = number
        self._session = session
        self._chan: Stream | None = None
        self._kind = ""
        self._command: str | None = None
        self._pty: dict[str, Any] | None = None
        self._terminal = ""
        self._outflows: list[Outflow] = []
        self._inflow: Inflow | None = None
        self._early = b""
        self._early_eof = False
        self._window_full = False
        self._opened = False
        self._spawned = False
        self._exit: Mapping[str, Any] | None = None
        self._deaf = False
        self._last_words = False
        self._over = False

    # What asyncssh calls, in the order of a channel's life.

    def connection_made(self, chan: asyncssh.SSHServerChannel[bytes]) -> None:
        assert isinstance(chan, Stream)
        self._chan = chan

    def pty_requested(
        self, term_type: str | None, term_size: tuple[int, int, int, int], term_modes: Mapping[int, int]
    ) -> bool:
        columns, rows, width, height = _clamped(term_size)
        self._terminal = term_type or ""
        self._pty = {
            "columns": columns,
            "rows": rows,
            "width": width,
            "height": height,
            "modes": [[opcode, value] for opcode, value in term_modes.items() if 1 <= opcode <= 159],
        }
        return True

    def shell_requested(self) -> bool:
        self._kind = "shell"
        return True

    def exec_requested(self, command: str) -> bool:
        self._kind = "exec"
        self._command = command
        return True

    def session_started(self) -> None:
        self._session.spawn_task(self._start())

    def data_received(self, data: bytes, datatype: int | None) -> None:
        self._session.bytes_in += len(data)
        if self._inflow is not None:
            self._inflow.feed(data)
        elif not self._over:
            self._early = data  # the only piece: no more is delivered while reading is paused
            self._pause_reading()

    def eof_received(self) -> bool:
        if self._inflow is None:
            self._early_eof = True
        elif self._pty is None:
            self._inflow.end()
        return True  # keep our direction open: the process may have more to say

    @property
    def terminal(self) -> bool:
        return self._pty is not None

    def terminal_size_changed(self, width: int, height: int, pixwidth: int, pixheight: int) -> None:
        if self._pty is None:
            return
        columns, rows, x, y = _clamped((width, height, pixwidth, pixheight))
        self._pty.update(columns=columns, rows=rows, width=x, height=y)
        self._resize()

    def signal_received(self, signal: str) -> None:
        if signal in protocol.SIGNALS:
            self._signal(signal)

    def break_received(self, msec: int) -> bool:
        return self._pty is not None  # a PTY has no line to hold low: accepted, as OpenSSH does, and no more

    def reader_gone(self) -> None:
        """The client's standard output is closed, and so is the process's. What it says on the other may go on."""
        if self._pty is None and self._outflows:
            self._deaf = True
            self._outflows[0].close()
            self._drained()

    def pause_writing(self) -> None:
        self._window_full = True
        self.flow()

    def resume_writing(self) -> None:
        self._window_full = False
        self.flow()

    def connection_lost(self, exc: Exception | None) -> None:
        """The channel is closed, by whichever side: the process loses its terminal or its pipes."""
        self._chan = None
        if self._spawned and self._exit is None and self._pty is None:
            self._signal("HUP")  # on a terminal the kernel sends it, when the master is closed
        self._close_descriptors()
        self._end(None, None)
        self._session.channel_gone(self, exc)

    # The process.

    async def _start(self) -> None:
        try:
            await self._session.made()
            fds = await self._spawn()
            try:
                await self._session.recorded()
            except Refusal:
                _close_all(fds)
                raise
        except Refusal as refusal:
            self.refuse(str(refusal), refusal.status)
            return
        self._connect(fds)
        if self._pty is not None:
            self._session.greet()

    async def _spawn(self) -> list[int]:
        assert self._chan is not None
        if self._command is not None and (len(self._command) > MAX_COMMAND or "\0" in self._command):
            raise Refusal(f"a command may have {MAX_COMMAND} characters, and none that is NUL")
        environment = accepted(self._chan.get_environment(), self._session.accept_env)
        environment |= self._session.environment
        if self._pty is not None and 0 < len(self._terminal) <= 64:
            environment["TERM"] = self._terminal
        self._opened = True
        self._session.channel_opened(self, self._kind, self._command, pty=self._pty is not None)
        try:
            fds = await self._session.spawn(self.number, self._command, environment, self._pty)
        except SpawnerError as error:
            raise Refusal(f"the command could not be started: {error}") from error
        self._spawned = True
        return fds

    def _connect(self, fds: list[int]) -> None:
        if self._chan is None:  # the client has gone meanwhile
            _close_all(fds)
            if self._pty is None:
                self._signal("HUP")
            return
        if self._pty is not None:
            self._inflow = Inflow(os.dup(fds[0]), self._pause_reading, self._resume_reading)
            self._outflows = [Outflow(fds[0], self._write, self._drained)]
            self._resize()  # the window may have changed while the shell was being started
        else:
            self._inflow = Inflow(fds[0], self._pause_reading, self._resume_reading)
            self._outflows = [
                Outflow(fds[1], self._write, self._drained),
                Outflow(fds[2], self._write_stderr, self._drained),
            ]
        self.flow()
        self._feed_early(self._inflow)
        if self._exit is not None:
            self.exited(self._exit)

    def _feed_early(self, inflow: Inflow) -> None:
        """Deliver what the client sent before there was a process to take it."""
        early, self._early = self._early, b""
        if early:
            inflow.feed(early)
            if not inflow.waiting:
                self._resume_reading()
        if self._early_eof and self._pty is None:
            inflow.end()

    def _resize(self) -> None:
        if self._pty is None or not self._outflows or not self._outflows[0].open:
            return
        # struct winsize has the rows first (ioctl_tty(2)), SSH the columns (RFC 4254 section 6.7).
        size = struct.pack("HHHH", *(self._pty[key] for key in ("rows", "columns", "width", "height")))
        with contextlib.suppress(OSError):
            fcntl.ioctl(self._outflows[0].fd, termios.TIOCSWINSZ, size)

    def exited(self, event: Mapping[str, Any]) -> None:
        """The process has ended, and says how; its output may not have been read yet."""
        self._exit = event
        if self._inflow is not None:
            self._inflow.close()
        if self._pty is not None or self._deaf:
            for outflow in self._outflows:
                outflow.finish()
        if self._deaf:
            for outflow in self._outflows:
                outflow.close()  # what the window had no room for; it may never have again
        self._drained()

    def _drained(self) -> None:
        if self._over or self._chan is None or not self._outflows or any(flow.open for flow in self._outflows):
            return
        if self._exit is None:
            # No EOF before the exit status: a client whose own input has ended answers it with a close, and nothing
            # can be said on a closed channel (RFC 4254 section 5.3). OpenSSH's mux client then exits with 255.
            return
        if self._exit["signal"] == "KILL" and not self._last_words:
            self._last_words = True
            asyncio.get_running_loop().call_later(KILLED_PAUSE, self._drained)
            return
        status, signal = self._exit["status"], self._exit["signal"]
        self._over = True
        self._end(status, signal)
        if self._deaf:
            self._chan.drop_unsent()
        if signal is None:
            self._chan.exit(status)
        else:
            # Names that RFC 4254 section 6.10 does not have carry a domain.
            name = signal if signal in protocol.SIGNALS else f"{signal}@sandbox-ssh"
            self._chan.exit_with_signal(name, bool(self._exit["core"]))

    # Words to the person at the other end, and forced ends.

    def notice(self, sentence: str) -> None:
        """Show a line on the client's terminal, or on its standard error."""
        if self._chan is None or not self._kind:
            return
        with contextlib.suppress(OSError):
            if self._pty is not None:
                self._chan.write(f"\r\nsandbox-ssh: {sentence}\r\n".encode())
            else:
                self._chan.write_stderr(f"sandbox-ssh: {sentence}\n".encode())

    def refuse(self, sentence: str, status: int) -> None:
        self.notice(sentence)
        chan, self._over = self._chan, True
        self._end(status, None)
        if chan is not None:
            chan.exit(status)

    def kill(self) -> None:
        """Close a channel whose sandbox is gone."""
        chan, self._over = self._chan, True
        self._close_descriptors()
        self._end(None, "KILL")
        if chan is not None:
            chan.exit_with_signal("KILL")

    def flow(self) -> None:
        """Let the process write, or make it wait, by the channel's window and the connection's socket."""
        for outflow in self._outflows:
            if self._window_full or not self._session.flowing:
                outflow.pause()
            else:
                outflow.resume()

    def _write(self, data: bytes) -> None:
        if self._chan is not None and not self._chan.is_closing():
            self._session.bytes_out += len(data)
            self._chan.write(data)

    def _write_stderr(self, data: bytes) -> None:
        if self._chan is not None and not self._chan.is_closing():
            self._session.bytes_out += len(data)
            self._chan.write_stderr(data)

    def _pause_reading(self) -> None:
        if self._chan is not None:
            self._chan.pause_reading()

    def _resume_reading(self) -> None:
        if self._chan is not None:
            self._chan.resume_reading()

    def _signal(self, signal: str) -> None:
        if self._spawned and self._exit is None:
            self._session.spawn_task(self._session.signal(self.number, signal))

    def _close_descriptors(self) -> None:
        if self._inflow is not None:
            self._inflow.close()
        for outflow in self._outflows:
            outflow.close()
        self._early = b""

    def _end(self, status: int | None, signal: str | None) -> None:
        if self._opened:
            self._opened = False
            self._session.channel_closed(self, status, signal)


def _clamped(size: tuple[int, int, int, int]) -> list[int]:
    return [min(value, 0xFFFF) for value in size]  # struct winsize holds unsigned shorts


def _close_all(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)
