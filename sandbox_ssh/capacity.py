"""How many sessions this host can carry, and the most that a quota could ask of it.

The numbers are the host's: they are read by a process in the host's own user namespace, for /proc/sys/user shows the
limits of whoever looks. Every sandbox charges what is counted here to the server's user, besides its tenant's limits.
"""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

# What one sandbox charges to the server's own user, and so to /proc/sys/user/max_* of the host
# (kernel/ucount.c: a creation counts in every user namespace above it). Its own of each kind; besides
#   user: its user's holder and its tenant's, and the namespace that its files' owners are mapped by
#   mnt:  the one it is built in, and slirp4netns's
#   net:  the uplink's
# A student's nested namespaces come on top, as far as quotas allow: `Capacity.nested_left` is about them.
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

_KERNEL = Path("/proc/sys/kernel")


@dataclass(frozen=True, slots=True)
class Capacity:
    sandboxes: int
    """At the same time, all tenants together."""
    bound: str
    """What bounds them, as its administrator names it."""
    users: int
    """With sandboxes at the same time: each needs ids of their own."""
    full: int
    """How many users fit that each use all that their quotas allow: with more, the host is overbooked."""
    full_bound: str
    """The quota that decides that."""
    limits: Mapping[str, int]
    """Quota -> the most that this host could keep."""


RLIMITS = {
    "open_files": resource.RLIMIT_NOFILE,
    "locked_memory": resource.RLIMIT_MEMLOCK,
    "message_queues": resource.RLIMIT_MSGQUEUE,
    "pending_signals": resource.RLIMIT_SIGPENDING,
}
"""What a process hands down to those that it starts: hard limits, by the quota's name."""


def read(users: int, rlimits: Mapping[str, int], quotas: Mapping[str, int]) -> Capacity:
    """Read the host's limits.

    The spawner knows for how many `users` there are ids, and its own `rlimits`; `quotas` are those of a user for whom
    nobody has set others, without what is unlimited.
    """
    limits = {path.name.removeprefix("max_"): _number(path) for path in Path("/proc/sys/user").glob("max_*")}
    tasks, tasks_bound = _tasks()
    memory = min([os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), *_cgroup_bounds("memory.max")])
    terminals = _number(_KERNEL / "pty/max") - _number(_KERNEL / "pty/reserve")
    room = {
        **{
            f"user.max_{kind}": (limits[kind] - SPARE_NAMESPACES) // cost
            for kind, cost in NAMESPACES.items()
            if kind in limits
        },
        tasks_bound: (tasks - SPARE_PROCESSES) // PROCESSES,
        "kernel.pty.max": terminals,
        "the hard limit of open files": (rlimits["open_files"] - SPARE_FILES) // FILES,
        "memory": (memory - SPARE_MEMORY) // MEMORY,
    }
    bound = min(room, key=lambda name: room[name])
    most = {
        **limits,
        "sessions": max(0, room[bound]),
        "processes": tasks,
        "memory": memory,
        "disk": memory,
        "cpu": (os.cpu_count() or 1) * 1000,
        "ptys": terminals,
        **rlimits,
    }
    shared = most.keys() - {"sessions", *RLIMITS}
    each = {key: most[key] // value for key, value in quotas.items() if key in shared and value}
    full_bound = min(each, key=lambda key: each[key], default="")
    return Capacity(max(0, room[bound]), bound, users, each.get(full_bound, 2**31), full_bound, most)


def own_rlimits() -> dict[str, int]:
    """This process's, without those that are none."""
    hard = {name: resource.getrlimit(number)[1] for name, number in RLIMITS.items()}
    if hard["open_files"] == resource.RLIM_INFINITY:
        hard["open_files"] = _number(Path("/proc/sys/fs/nr_open"))
    return {name: value for name, value in hard.items() if value != resource.RLIM_INFINITY}


def nested_left(limits: Mapping[str, int], sandboxes: int, nested: Mapping[str, int]) -> str | None:
    """What is used up on a host with these limits of `Capacity`, by sandboxes and by what tenants have nested in them.

    None where there is room for one more sandbox.
    """
    for kind, cost in NAMESPACES.items():
        used = (sandboxes + 1) * cost + nested.get(kind, 0) + SPARE_NAMESPACES
        if kind in limits and used > limits[kind]:
            return f"user.max_{kind} ({limits[kind]})"
    return None


def shortage() -> str | None:
    """What this host has too little of for one more sandbox at this moment, whoever uses it; None where it has all."""
    tasks, tasks_bound = _tasks()
    running = int(Path("/proc/loadavg").read_text().split()[3].partition("/")[2])  # proc(5): scheduling entities
    if running + PROCESSES > tasks:
        return f"{running} processes and threads of {tasks_bound} ({tasks})"
    available = next(
        int(line.split()[1]) * 1024
        for line in Path("/proc/meminfo").read_text().splitlines()
        if line.startswith("MemAvailable:")
    )
    if available < MEMORY + SPARE_MEMORY // 4:
        return f"all but {available // 2**20}M of memory"
    return None


def _tasks() -> tuple[int, str]:
    """The most processes and threads that the host can have, and the sysctl that says so."""
    found = {f"kernel.{name}": _number(_KERNEL / name) for name in ("threads-max", "pid_max")}
    found["pids.max of the server's cgroup"] = min(_cgroup_bounds("pids.max"), default=2**31)
    name = min(found, key=lambda name: found[name])
    return found[name], name


def _cgroup_bounds(name: str) -> list[int]:
    """What bounds this process with all others of a service or a container: numbers of its cgroup and those above."""
    own = next((line[4:] for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::/")), "")
    directory, found = Path("/sys/fs/cgroup", own), []
    while directory != Path("/sys/fs"):
        with contextlib.suppress(OSError, ValueError):  # not there: the root of the tree, or a controller is off; `max`
            found.append(int((directory / name).read_text()))
        directory = directory.parent
    return found


def _number(path: Path) -> int:
    return int(path.read_text())
