"""The limits of a user namespace: sysctls of its own, and the rlimits that it keeps from who made it.

/proc/sys/user/max_* show and change the limits of the *reader's* user namespace (kernel/ucount.c, set_lookup), so
they are written by a process in it. RLIMIT_NPROC, _MEMLOCK, _MSGQUEUE and _SIGPENDING are kept in the namespace when
it is made (kernel/user_namespace.c, create_user_ns): what is created below it is charged to it, however it is spread
over ids and nested namespaces (Linux 5.14).
"""

from __future__ import annotations

import os
import resource
from collections.abc import Mapping

NAMESPACES = ("user", "mnt", "pid", "ipc", "uts", "net", "cgroup", "time")
SYSCTLS = (
    *(f"{kind}_namespaces" for kind in NAMESPACES),
    "inotify_instances", "inotify_watches", "fanotify_groups", "fanotify_marks",
)  # fmt: skip
_RLIMITS = {
    "processes": resource.RLIMIT_NPROC,
    "locked_memory": resource.RLIMIT_MEMLOCK,
    "message_queues": resource.RLIMIT_MSGQUEUE,
    "pending_signals": resource.RLIMIT_SIGPENDING,
}
OTHERS = ("memory", "cpu", "cpu_weight")
"""What a cgroup alone can hold."""
KEYS = (*SYSCTLS, *_RLIMITS, *OTHERS)
_UNLIMITED = 2**31 - 1  # what a new user namespace has (kernel/user_namespace.c, create_user_ns)

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
    for key, number in _RLIMITS.items():
        value = limits.get(key)
        hard = resource.getrlimit(number)[1]
        if value is None:
            value = hard
        elif hard != resource.RLIM_INFINITY:
            value = min(value, hard)  # raising it takes CAP_SYS_RESOURCE over the host
        resource.setrlimit(number, (value, value))
