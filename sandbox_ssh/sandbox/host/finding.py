"""A check, what it finds, and the child process that it runs in."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Literal

from sandbox_ssh.sandbox import syscalls

TIMEOUT_SECONDS = 10.0
# Where the spawner looks for programs, whatever PATH it was started with.
PROGRAMS = "/usr/sbin:/usr/bin:/sbin:/bin"


class Status(StrEnum):
    OK = "OK"
    WARN = "WARN"
    """Sessions start, and something that people expect of them is missing or weaker."""
    FAIL = "FAIL"
    """Sessions cannot start."""


@dataclass(frozen=True, slots=True)
class Finding:
    check: str
    status: Status
    found: str
    meaning: str
    remedy: str | None = None
    """The command, or the one sentence where no command can do it. Always there unless `OK`."""


@dataclass(frozen=True, slots=True)
class Needs:
    """What the configured server asks of the host."""

    mode: Literal["service", "rootless"]
    sessions: int
    """How many sandboxes there should be room for."""
    terminals: int
    """PTYs of one sandbox."""
    first_id: int
    """Service mode: the first host id of the configured range."""
    id_blocks: int


Check = Callable[[Needs], list[Finding]]


def good(check: str, found: str, meaning: str) -> list[Finding]:
    return [Finding(check, Status.OK, found, meaning)]


def weak(check: str, found: str, meaning: str, remedy: str) -> list[Finding]:
    return [Finding(check, Status.WARN, found, meaning, remedy)]


def bad(check: str, found: str, meaning: str, remedy: str) -> list[Finding]:
    return [Finding(check, Status.FAIL, found, meaning, remedy)]


def as_root(command: str) -> str:
    return command if os.geteuid() == 0 else f"sudo {command}"


def install(package: str) -> str:
    return as_root(f"apt-get install -y {package}")


def set_sysctl(name: str, value: object) -> str:
    """A command that sets a sysctl now and at every boot."""
    file = "/etc/sysctl.d/60-sandbox-ssh.conf"
    return f"echo '{name} = {value}' | {as_root(f'tee -a {file}')} && {as_root(f'sysctl -p {file}')}"


def answer(name: str, check: Check, needs: Needs) -> list[Finding]:
    """Run a check in a child. One that hangs, crashes or raises is a FAIL of its name."""
    read, write = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        os.close(read)
        _work(check, needs, write)
    os.close(write)
    try:
        data = _read(read, time.monotonic() + TIMEOUT_SECONDS)
    finally:
        os.close(read)
        # Before waiting: the number of a group is its own for as long as its leader has not been waited for.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    if data is None:
        return _unanswered(name, f"no answer in {TIMEOUT_SECONDS:.0f} s")
    try:
        rows = json.loads(data)
    except ValueError:
        return _unanswered(name, "the probe died")
    if isinstance(rows, str):
        return _unanswered(name, rows)
    return [Finding(**{**row, "status": Status(row["status"])}) for row in rows]


def _unanswered(name: str, found: str) -> list[Finding]:
    return bad(
        name,
        found,
        "This could not be checked, so do not count on it.",
        "Run `sandbox-ssh doctor` again; if it stays, look at `dmesg`.",
    )


def _work(check: Check, needs: Needs, write: int) -> None:
    try:
        os.setsid()
        syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)
        null = os.open("/dev/null", os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        try:
            result: object = [asdict(finding) for finding in check(needs)]
        except Exception as error:  # whatever it is, the person reads it
            result = f"{type(error).__name__}: {error}"
        with os.fdopen(write, "w") as pipe:
            json.dump(result, pipe)
    finally:
        os._exit(0)


def _read(fd: int, deadline: float) -> bytes | None:
    """All that comes until the end of file, or None when the deadline comes first."""
    data = b""
    while select.select([fd], [], [], max(0.0, deadline - time.monotonic()))[0]:
        chunk = os.read(fd, 65536)
        if not chunk:
            return data
        data += chunk
    return None
