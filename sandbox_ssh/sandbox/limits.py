"""The limits of a user namespace: sysctls of its own, and the rlimits that it keeps from who made it.

/proc/sys/user/max_* show and change the limits of the *reader's* user namespace (kernel/ucount.c, set_lookup), so
they are written by a process in it. RLIMIT_NPROC, _MEMLOCK, _MSGQUEUE and _SIGPENDING are kept in the namespace when
it is made (kernel/user_namespace.c, create_user_ns): what is created below it is charged to it, however it is spread
over ids and nested namespaces (Linux 5.14). But what mlock(2) locks is a process's own (mm/mlock.c).
"""

from __future__ import annotations

import os
import resource
from collections.abc import Mapping
from dataclasses import dataclass

NAMESPACES = ("user", "mnt", "pid", "ipc", "uts", "net", "cgroup", "time")
SYSCTLS = (
    *(f"{kind}_namespaces" for kind in NAMESPACES),
    "inotify_instances", "inotify_watches", "fanotify_groups", "fanotify_marks",
)  # fmt: skip
RLIMITS = {
    "processes": resource.RLIMIT_NPROC,
    "locked_memory": resource.RLIMIT_MEMLOCK,
    "message_queues": resource.RLIMIT_MSGQUEUE,
    "pending_signals": resource.RLIMIT_SIGPENDING,
}
OTHERS = ("memory", "cpu", "cpu_weight")
"""What a cgroup alone can hold."""
KEYS = (*SYSCTLS, *RLIMITS, *OTHERS)
_UNLIMITED = 2**31 - 1  # what a new user namespace has (kernel/user_namespace.c, create_user_ns)

_OPEN_FILES = 1024  # the soft limit: programs that use select(2) rely on it

Limits = Mapping[str, int]
"""Quota -> value; what is not there is not limited."""


def write_sysctls(limits: Limits, *, new: bool, overhead: int = 0) -> None:
    """Write the calling process's user namespace's limits; `overhead` user namespaces come on top, for holders.

    A new namespace has no limits; an older one may have some that are gone. Raises `OSError`.
    """
    for key in SYSCTLS:
        value = limits.get(key)
        if value is None:
            if new:
                continue
            value = _UNLIMITED
        if key == "user_namespaces":
            value += overhead
        _write(f"/proc/sys/user/max_{key}", min(value, _UNLIMITED))


def _write(path: str, value: int) -> None:
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    except FileNotFoundError:  # a kernel without this kind (CONFIG_FANOTIFY, time namespaces)
        return
    try:
        os.write(fd, b"%d" % value)
    finally:
        os.close(fd)


def set_rlimits(limits: Limits) -> None:
    """Set this process's rlimits, for itself and for the user namespaces that it makes."""
    for key, number in RLIMITS.items():
        value = limits.get(key)
        hard = resource.getrlimit(number)[1]
        if value is None:
            value = hard
        elif hard != resource.RLIM_INFINITY:
            value = min(value, hard)  # raising it takes CAP_SYS_RESOURCE over the host
        resource.setrlimit(number, (value, value))


@dataclass(frozen=True, slots=True)
class Bounds:
    """What each process of a sandbox may have for itself, besides what is of all together."""

    limits: Limits
    open_files: int
    """The hard limit; -1: the host's."""
    memory_held: bool
    """Whether a cgroup holds the quota of memory."""

    def set(self) -> None:
        """Hold this process to them: a channel's, and PID 1, which its tenant may trace. Just before execve(2)."""
        set_rlimits(self.limits)
        # 1 and not 0: that stops a core_pattern's `|program` on the host, too (fs/coredump.c, do_coredump).
        core = min(1, resource.getrlimit(resource.RLIMIT_CORE)[1])
        resource.setrlimit(resource.RLIMIT_CORE, (core, core))
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        if self.open_files >= 0:
            hard = min(hard, self.open_files)
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(_OPEN_FILES, hard), hard))
        if not self.memory_held and "memory" in self.limits:
            # The most that there is without a cgroup: private memory of one process (getrlimit(2)).
            resource.setrlimit(resource.RLIMIT_DATA, (self.limits["memory"],) * 2)
