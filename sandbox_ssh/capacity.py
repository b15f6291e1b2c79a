"""How many sessions this host can carry, and the most that a quota could ask of it.

The numbers are the host's: they are read by a process in the host's own user namespace, for /proc/sys/user shows the
limits of whoever looks. Every sandbox charges what is counted here to the server's user, besides its tenant's limits.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

# What one sandbox charges to the server's own user, and so to /proc/sys/user/max_* of the host
# (kernel/ucount.c: a creation counts in every user namespace above it). Its own of each kind; besides
#   user: its user's holder and its tenant's, and the namespace that its files' owners are mapped by
#   mnt:  the one it is built in, and slirp4netns's
#   net:  the uplink's
# A student's nested namespaces come on top, as far as quotas allow.
NAMESPACES = {
    "user_namespaces": 4,
    "mnt_namespaces": 3,
    "net_namespaces": 2,
    "pid_namespaces": 1,
    "ipc_namespaces": 1,
    "uts_namespaces": 1,
    "cgroup_namespaces": 1,
}
# Namespaces are freed some time after their last process (measured: ten of them lag behind), and a few uplinks are
# kept ready.
SPARE_NAMESPACES = 32
PROCESSES, SPARE_PROCESSES = 16, 512
FILES, SPARE_FILES = 16, 512
# An idle shell with its PID 1, slirp4netns and the kernel's share was measured at 4 MB; and something must run in it.
MEMORY, SPARE_MEMORY = 8 * 2**20, 256 * 2**20


@dataclass(frozen=True, slots=True)
class Capacity:
    sandboxes: int
    """At the same time, all tenants together."""
    bound: str
    """What bounds them, as its administrator names it."""
    users: int
    """With sandboxes at the same time: each needs ids of their own."""
    limits: Mapping[str, int]
    """Quota -> the most that this host could keep."""


def read(users: int, open_files: int) -> Capacity:
    """Read the host's limits; the spawner knows for how many `users` there are ids, and its own `open_files`."""
    limits = {path.name.removeprefix("max_"): _number(path) for path in Path("/proc/sys/user").glob("max_*")}
    kernel = {
        name: _number(Path("/proc/sys/kernel", name)) for name in ("threads-max", "pid_max", "pty/max", "pty/reserve")
    }
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    tasks = min(kernel["threads-max"], kernel["pid_max"])
    room = {
        **{
            f"user.max_{kind}": (limits[kind] - SPARE_NAMESPACES) // cost
            for kind, cost in NAMESPACES.items()
            if kind in limits
        },
        "kernel.threads-max" if tasks == kernel["threads-max"] else "kernel.pid_max": (tasks - SPARE_PROCESSES)
        // PROCESSES,
        "kernel.pty.max": kernel["pty/max"] - kernel["pty/reserve"],
        "the hard limit of open files": (open_files - SPARE_FILES) // FILES,
        "memory": (memory - SPARE_MEMORY) // MEMORY,
    }
    bound = min(room, key=lambda name: room[name])
    most = {
        **limits,
        "processes": tasks,
        "memory": memory,
        "disk": memory,
        "cpu": (os.cpu_count() or 1) * 1000,
        "ptys": kernel["pty/max"],
        "open_files": open_files,
    }
    return Capacity(max(0, room[bound]), bound, users, most)


def _number(path: Path) -> int:
    return int(path.read_text())
