"""What a sandbox uses at this moment, and has used so far.

Nothing of it is asked of the tenant: the cgroup, the file systems and the procfs are reached by descriptors that were
opened before the tenant's first instruction.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, field

from sandbox_ssh.sandbox.cgroup import Leaf
from sandbox_ssh.sandbox.limits import NAMESPACES

_TICK = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(slots=True)
class Usage:
    """`cpu_seconds` and `memory_peak_bytes` of all its life, the rest of now."""

    cpu_seconds: float = 0.0
    memory_peak_bytes: int = 0
    memory_bytes: int = 0
    processes: int = 0
    disk_bytes: int = 0
    inodes: int = 0
    ptys: int = 0
    namespaces: dict[str, int] = field(default_factory=dict)
    """Kind -> how many the sandbox's processes are in; one that only a descriptor or a mount holds is not seen."""


def processes(proc: int) -> int:
    return len(_pids(proc))


def measure(leaf: Leaf | None, proc: int, disk: int, pts: int, servers: int) -> Usage:
    """Measure a live sandbox; `proc` and `disk` are descriptors of its procfs and of the file system it writes to.

    `servers`: how many processes of the server's are in its cgroup.
    """
    used = Usage()
    _files(used, disk)
    used.ptys = _entries(pts) - 1  # ptmx
    used.namespaces = _namespaces(proc)
    if leaf is None:
        _processes(used, proc)
        return used
    used.cpu_seconds = leaf.number("cpu.stat", "usage_usec") / 1e6
    used.memory_peak_bytes = leaf.number("memory.peak")  # Linux 5.19
    used.memory_bytes = leaf.number("memory.current")
    used.processes = max(0, leaf.number("pids.current") - servers) or processes(proc)
    if not used.memory_bytes:
        used.memory_bytes = _memory(proc)
    return used


def _files(used: Usage, disk: int) -> None:
    with contextlib.suppress(OSError):
        found = os.fstatvfs(disk)
        used.disk_bytes = (found.f_blocks - found.f_bfree) * found.f_frsize
        used.inodes = found.f_files - found.f_ffree


def _entries(directory: int) -> int:
    with contextlib.suppress(OSError):
        fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=directory)
        try:
            return len(os.listdir(fd))
        finally:
            os.close(fd)
    return 1


def _pids(proc: int) -> list[str]:
    with contextlib.suppress(OSError):
        return [name for name in os.listdir(proc) if name.isdecimal()]
    return []


def _namespaces(proc: int) -> dict[str, int]:
    """Those of the server's own are not counted: a sandbox has no time namespace until its tenant makes one."""
    pids = _pids(proc)
    found: dict[str, set[str]] = {}
    for kind in NAMESPACES:
        for pid in pids:
            with contextlib.suppress(OSError):  # it has ended
                found.setdefault(kind, set()).add(os.readlink(f"{pid}/ns/{kind}", dir_fd=proc))
    # A kernel without a kind of namespaces has found none of it.
    return {kind: len(names - {os.readlink(f"/proc/self/ns/{kind}")}) for kind, names in found.items()}


def _memory(proc: int) -> int:
    """What processes have for themselves: resident and not shared (proc(5), /proc/PID/statm)."""
    total = 0
    for pid in _pids(proc):
        fields = _read(proc, f"{pid}/statm").split()
        if len(fields) > 2:
            total += (int(fields[1]) - int(fields[2])) * _PAGE
    return total


def _processes(used: Usage, proc: int) -> None:
    """Of living processes: their own time and that of the children they have waited for (proc(5), /proc/PID/stat)."""
    pids = _pids(proc)
    used.processes = len(pids)
    ticks = 0
    for pid in pids:
        fields = _read(proc, f"{pid}/stat").rpartition(b")")[2].split()
        if len(fields) > 14:
            ticks += sum(map(int, fields[11:15]))
    used.cpu_seconds = ticks / _TICK
    used.memory_bytes = _memory(proc) + used.disk_bytes


def _read(proc: int, name: str) -> bytes:
    try:
        fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=proc)
    except OSError:  # it has ended
        return b""
    try:
        return os.read(fd, 4096)
    except OSError:
        return b""
    finally:
        os.close(fd)
