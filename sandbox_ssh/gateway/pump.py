"""Bytes between a channel and the descriptors of its process, both ways, with bounded memory.

asyncio's own pipe transports and asyncssh's `redirect` were tried and dropped: the one copies every byte through
a StreamReader, the other loses what is left in a pipe when the process exits first. Here each direction is one
object on one raw descriptor, and flow control is taken literally: a descriptor that must wait is not polled.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable

CHUNK = 64 * 1024
"""As much as a pipe holds (pipe(7)), and two packets of the 32 KiB that OpenSSH accepts."""

BURST = 4 * CHUNK
"""What one descriptor may move before the event loop looks at the others."""


class Outflow:
    """What a process writes, on its way to the client.

    `sink` gets the bytes, `ended` is called once when no more will come. The descriptor is owned, and closed.
    """

    def __init__(self, fd: int, sink: Callable[[bytes], None], ended: Callable[[], None]) -> None:
        self._fd = fd
        self._sink = sink
        self._ended = ended
        self._paused = False
        self._left: int | None = None
        self._loop = asyncio.get_running_loop()
        os.set_blocking(fd, False)
        self._loop.add_reader(fd, self._readable)

    @property
    def fd(self) -> int:
        return self._fd

    @property
    def open(self) -> bool:
        return self._fd >= 0

    def pause(self) -> None:
        if not self._paused:
            self._paused = True
            if self.open:
                self._loop.remove_reader(self._fd)

    def resume(self) -> None:
        if self._paused:
            self._paused = False
            if self.open:
                self._loop.add_reader(self._fd, self._readable)
                if self._left is not None:
                    self._loop.call_soon(self.finish)

    def finish(self) -> None:
        """End where the descriptor is empty instead of where it reports the end.

        For a terminal whose shell has exited: a background process may hold it open for ever, and write to it for
        ever. What the shell has written is there already, because read(2) on a PTY's master flushes the line
        discipline before it says EAGAIN (n_tty_read in the kernel), and is less than a burst: a terminal buffers
        64 KiB (tty_buffer.c), a pipe as much.
        """
        if self._left is None:
            self._left = BURST
        if self.open and not self._paused:
            self._readable()

    def close(self) -> None:
        if self.open:
            if not self._paused:
                self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1

    def _readable(self) -> None:
        moved = 0
        while self.open and not self._paused and moved < BURST:
            data, more = self._read()
            if data:
                moved += len(data)
                self._sink(data)
            if self._left is not None:
                self._left -= len(data)
                more = more and self._left > 0
            if not more:
                self.close()
                self._ended()
                return
            if not data:
                return

    def _read(self) -> tuple[bytes, bool]:
        """Read at most a chunk; say whether the descriptor may have more, now or later.

        A PTY gives 4 KiB a call at best: pieces are joined, so that they fill packets.
        """
        pieces: list[bytes] = []
        size = 0
        more = True
        while size < CHUNK:
            try:
                data = os.read(self._fd, CHUNK - size)
            except BlockingIOError:
                more = self._left is None
                break
            except OSError:  # EIO: the last process has closed the terminal (pty(7))
                data = b""
            if not data:
                more = False
                break
            size += len(data)
            pieces.append(data)
        return (pieces[0] if len(pieces) == 1 else b"".join(pieces)), more


class Inflow:
    """What the client sends, on its way to a process's standard input or terminal.

    `pause` and `resume` stop and restart the client: at most one packet waits here, and what asyncssh holds back
    is bounded by the channel's window. The descriptor is owned, and closed.
    """

    def __init__(self, fd: int, pause: Callable[[], None], resume: Callable[[], None]) -> None:
        self._fd = fd
        self._pause = pause
        self._resume = resume
        self._backlog = memoryview(b"")
        self._eof = False
        self._loop = asyncio.get_running_loop()
        os.set_blocking(fd, False)

    @property
    def waiting(self) -> bool:
        return len(self._backlog) > 0

    def feed(self, data: bytes) -> None:
        if self._fd < 0:
            return  # the process takes no more input; the client's bytes are dropped, as by a closed pipe
        assert not self._backlog
        self._backlog = memoryview(data)
        self._write()
        if self._backlog:
            self._pause()
            self._loop.add_writer(self._fd, self._writable)
        elif self._eof:
            self.close()

    def end(self) -> None:
        """The client has sent all: close when it is written."""
        self._eof = True
        if not self._backlog:
            self.close()

    def close(self) -> None:
        if self._fd < 0:
            return
        if self._backlog:
            self._loop.remove_writer(self._fd)
            self._backlog = memoryview(b"")
        os.close(self._fd)
        self._fd = -1

    def _writable(self) -> None:
        self._write()
        if not self._backlog:
            self._loop.remove_writer(self._fd)
            if self._eof:
                self.close()
            self._resume()

    def _write(self) -> None:
        with contextlib.suppress(BlockingIOError):
            try:
                while self._backlog:
                    self._backlog = self._backlog[os.write(self._fd, self._backlog) :]
            except BlockingIOError:
                raise
            except OSError:  # EPIPE, EIO: nobody reads any more
                self._backlog = memoryview(b"")
                self._eof = True
