"""A program for a sandbox: `python3 attacks.py NAME` has one kind of appetite, and no refusal ends it."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import sys
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

_libc = ctypes.CDLL(None)
_NEWUSER, _ALL_BUT_PID = 0x10000000, 0x5E020000  # CLONE_NEW*, unshare(2)


def until_refused(take: Callable[[], T]) -> list[T]:
    taken = []
    with contextlib.suppress(OSError, MemoryError):
        while True:
            taken.append(take())
    return taken


def _call(function: str, *arguments: int | bytes) -> int:
    result: int = getattr(_libc, function)(*arguments)
    if result < 0:
        raise OSError
    return result


def disk() -> None:
    with open("/tmp/disk", "wb", buffering=0) as file:
        until_refused(lambda: file.write(bytes(2**20)))


def inodes() -> None:
    numbers = itertools.count()
    os.makedirs("/tmp/inodes", exist_ok=True)
    until_refused(lambda: os.close(os.open(f"/tmp/inodes/{next(numbers)}", os.O_CREAT | os.O_WRONLY)))
    for name in os.listdir("/tmp/inodes"):
        os.unlink(f"/tmp/inodes/{name}")


def descriptors() -> None:
    taken = until_refused(lambda: os.open("/dev/ptmx", os.O_RDWR))
    taken += until_refused(lambda: os.open("/dev/null", os.O_RDONLY))
    for fd in taken:
        os.close(fd)


def inotify() -> None:
    instances = until_refused(lambda: _call("inotify_init"))
    for fd in instances:
        directories = os.walk("/usr/lib")
        until_refused(lambda fd=fd, all_=directories: _call("inotify_add_watch", fd, next(all_)[0].encode(), 0xFFF))  # type: ignore[misc]
    for fd in instances:
        os.close(fd)


def namespaces() -> None:
    until_refused(lambda: _call("unshare", _NEWUSER))
    until_refused(lambda: _call("unshare", _ALL_BUT_PID))


def memory() -> None:
    time.sleep(float(sys.argv[2]))
    until_refused(lambda: b"x" * 2**20)


def processes() -> None:
    """Each of which wants to have more, and takes all the CPU there is."""
    until_refused(os.fork)


if __name__ == "__main__":
    while True:
        with contextlib.suppress(OSError, StopIteration):
            globals()[sys.argv[1]]()
