"""An event loop for processes that fork: descriptors, timers, dead children, and coroutines over them.

asyncio would do, but it starts threads on occasion (and no process with threads may fork here), costs every child
its 5 MB, and keeps signal and child state that a fork would share. This is what the spawner and the uplinks need
of it, and nothing more.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import os
import resource
import select
import signal
import time
from collections.abc import Callable, Coroutine, Generator
from typing import Any, Generic, TypeVar

T = TypeVar("T")
_EARLY = 30.0  # seconds that an end is remembered: pids are used again, though not so soon
OnExit = Callable[[int, resource.struct_rusage], None]


class Future(Generic[T]):
    """A value that is not there yet; one coroutine may await it."""

    def __init__(self) -> None:
        self.done = False
        self._value: T | None = None
        self._error: BaseException | None = None
        self._resume: Callable[[], None] | None = None

    def set(self, value: T) -> None:
        """Set the value; later calls change nothing."""
        self._finish(value, None)

    def fail(self, error: BaseException) -> None:
        self._finish(None, error)

    def _finish(self, value: T | None, error: BaseException | None) -> None:
        if self.done:
            return
        self.done, self._value, self._error = True, value, error
        if self._resume is not None:
            self._resume()

    def __await__(self) -> Generator[Future[Any], None, T]:
        if not self.done:
            yield self
        if self._error is not None:
            raise self._error
        return self._value  # type: ignore[return-value]  # set() gave it

    def on_done(self, resume: Callable[[], None]) -> None:
        self._resume = resume


class Loop:
    """Runs until `stop`. Callbacks and coroutines run one at a time, in this process's only thread."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._readers: dict[int, Callable[[], None]] = {}
        self._writers: dict[int, Callable[[], None]] = {}
        self._timers: list[tuple[float, int]] = []
        self._due: dict[int, Callable[[], None]] = {}  # what a timer calls; a cancelled one has nothing here
        self._numbers = itertools.count()
        self._children: dict[int, OnExit] = {}
        self._early: dict[int, tuple[float, int, resource.struct_rusage]] = {}
        self._stopped = False
        self._wake_read, self._wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        self.add_reader(self._wake_read, self._reap)

    def stop(self) -> None:
        self._stopped = True

    def run(self) -> None:
        while not self._stopped:
            for fd, events in self._epoll.poll(self._next_timer()):
                # Only the callbacks of this moment: one of them may have closed another's descriptor.
                if events & select.EPOLLOUT and fd in self._writers:
                    self._writers[fd]()
                if events & ~select.EPOLLOUT and fd in self._readers:
                    self._readers[fd]()
            self._run_timers()

    # --- descriptors

    def add_reader(self, fd: int, callback: Callable[[], None]) -> None:
        self._readers[fd] = callback
        self._register(fd)

    def remove_reader(self, fd: int) -> None:
        if self._readers.pop(fd, None) is not None:
            self._register(fd)

    def add_writer(self, fd: int, callback: Callable[[], None]) -> None:
        self._writers[fd] = callback
        self._register(fd)

    def remove_writer(self, fd: int) -> None:
        if self._writers.pop(fd, None) is not None:
            self._register(fd)

    def _register(self, fd: int) -> None:
        events = (select.EPOLLIN if fd in self._readers else 0) | (select.EPOLLOUT if fd in self._writers else 0)
        if not events:
            self._epoll.unregister(fd)
            return
        try:
            self._epoll.register(fd, events)
        except FileExistsError:
            self._epoll.modify(fd, events)

    async def readable(self, fd: int, timeout: float) -> None:
        """Wait until `fd` has something to read or has ended; raises `TimeoutError` after `timeout` seconds."""
        future: Future[None] = Future()
        timer = self.call_later(timeout, lambda: future.fail(TimeoutError()))
        self.add_reader(fd, lambda: future.set(None))
        try:
            await future
        finally:
            self.remove_reader(fd)
            self.cancel(timer)

    # --- timers

    def call_later(self, seconds: float, callback: Callable[[], None]) -> int:
        number = next(self._numbers)
        heapq.heappush(self._timers, (time.monotonic() + seconds, number))
        self._due[number] = callback
        return number

    def cancel(self, timer: int) -> None:
        self._due.pop(timer, None)

    async def sleep(self, seconds: float) -> None:
        future: Future[None] = Future()
        self.call_later(seconds, lambda: future.set(None))
        await future

    def _next_timer(self) -> float:
        while self._timers and self._timers[0][1] not in self._due:
            heapq.heappop(self._timers)
        if not self._timers:
            return -1
        return max(0.0, self._timers[0][0] - time.monotonic())

    def _run_timers(self) -> None:
        now = time.monotonic()
        while self._timers and self._timers[0][0] <= now:
            callback = self._due.pop(heapq.heappop(self._timers)[1], None)
            if callback is not None:
                callback()

    # --- children

    def on_exit(self, pid: int, callback: OnExit) -> None:
        """Call `callback` with the wait status and the resource usage of a child when it has died.

        A child that another process cloned for us (CLONE_PARENT) may have died before we learn its pid.
        """
        early = self._early.pop(pid, None)
        if early is not None and time.monotonic() - early[0] < _EARLY:
            callback(early[1], early[2])
        else:
            self._children[pid] = callback

    def _reap(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._wake_read, 512)
        while True:
            try:
                pid, status, usage = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            callback = self._children.pop(pid, None)
            if callback is not None:
                callback(status, usage)
            else:
                self._early[pid] = (time.monotonic(), status, usage)
                while len(self._early) > 256:
                    del self._early[next(iter(self._early))]

    # --- coroutines

    def start(self, task: Coroutine[Future[Any], None, None]) -> None:
        """Run a coroutine to its first wait, and on from there as its futures come. It must handle its errors."""
        try:
            future = task.send(None)
        except StopIteration:
            return
        future.on_done(lambda: self.start(task))
