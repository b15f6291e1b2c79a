"""The pump on real pipes and terminals: nothing is lost, and nothing piles up."""

from __future__ import annotations

import asyncio
import os
import pty
import subprocess
from collections.abc import Callable

from sandbox_ssh.gateway.pump import BURST, CHUNK, Inflow, Outflow

SIZE = 8 * 1024 * 1024
ZEROS = ["head", "-c", str(SIZE), "/dev/zero"]


class Sink:
    """Where a process's output arrives; counts and may ask for a pause after each piece."""

    def __init__(self, on_data: Callable[[], None] | None = None) -> None:
        self.data = bytearray()
        self.began = asyncio.Event()
        self.ended = asyncio.Event()
        self._on_data = on_data

    def take(self, data: bytes) -> None:
        self.data += data
        self.began.set()
        if self._on_data is not None:
            self._on_data()


def start(command: list[str], output: int, stdin: int | None = None) -> subprocess.Popen[bytes]:
    """Start a process whose output nobody else holds."""
    process = subprocess.Popen(command, stdin=stdin, stdout=output, stderr=subprocess.DEVNULL)
    os.close(output)
    return process


async def test_all_output_of_a_process_that_exits_at_once_arrives() -> None:
    read, write = os.pipe()
    process = start(ZEROS, write)
    sink = Sink()
    outflow = Outflow(read, sink.take, sink.ended.set)
    await sink.ended.wait()
    assert len(sink.data) == SIZE and not outflow.open
    assert process.wait() == 0


async def test_a_paused_flow_leaves_the_bytes_where_they_are() -> None:
    read, write = os.pipe()
    process = start(ZEROS, write)
    sink = Sink(lambda: outflow.pause())
    outflow = Outflow(read, sink.take, sink.ended.set)
    await sink.began.wait()
    taken = len(sink.data)
    await asyncio.sleep(0.2)  # the pipe is full by now
    assert taken == len(sink.data) <= CHUNK
    while not sink.ended.is_set():
        outflow.resume()
        await asyncio.sleep(0)
    assert len(sink.data) == SIZE
    process.wait()


async def test_a_terminal_ends_when_its_last_process_has() -> None:
    master, slave = pty.openpty()
    process = start(["sh", "-c", "stty -opost; head -c 1000000 /dev/zero"], slave, stdin=slave)
    sink = Sink()
    Outflow(master, sink.take, sink.ended.set)
    await sink.ended.wait()
    assert len(sink.data) == 1000000
    process.wait()


async def test_a_terminal_that_is_held_open_ends_where_it_is_empty_after_finish() -> None:
    master, slave = pty.openpty()
    sink = Sink()
    outflow = Outflow(master, sink.take, sink.ended.set)
    outflow.pause()
    os.write(slave, b"last words")
    outflow.finish()
    outflow.resume()
    await sink.ended.wait()
    assert bytes(sink.data) == b"last words"
    os.close(slave)


async def test_a_terminal_that_is_written_to_for_ever_ends_after_finish() -> None:
    master, slave = pty.openpty()
    process = start(["yes"], slave, stdin=slave)
    sink = Sink()
    outflow = Outflow(master, sink.take, sink.ended.set)
    await sink.began.wait()
    before = len(sink.data)
    outflow.finish()
    await sink.ended.wait()
    assert len(sink.data) - before <= BURST + CHUNK
    process.kill()
    process.wait()


async def test_a_process_that_does_not_read_stops_the_client_and_loses_nothing() -> None:
    read, write = os.pipe()
    paused: list[bool] = []
    resumed = asyncio.Event()
    inflow = Inflow(write, lambda: paused.append(True), resumed.set)
    sent = 0
    while not paused:
        inflow.feed(bytes([sent % 251]) * CHUNK)
        sent += 1
    assert inflow.waiting
    inflow.end()
    got = bytearray()
    while data := await asyncio.to_thread(os.read, read, CHUNK):
        got += data
    assert bytes(got) == b"".join(bytes([n % 251]) * CHUNK for n in range(sent))
    await resumed.wait()
    os.close(read)


async def test_input_for_a_process_that_has_closed_it_is_dropped() -> None:
    read, write = os.pipe()
    os.close(read)
    inflow = Inflow(write, lambda: None, lambda: None)
    inflow.feed(b"nobody")
    inflow.feed(b"reads this")
    assert not inflow.waiting
    inflow.end()
