"""The quotas: their names, units, defaults, and what makes a value of one sensible.

A quota is set for a user, a tenant, in the configuration (`[sandbox.quotas]`) or for the whole database (`--default`),
and counts in this order; what nobody set has the default of this table. A tenant's own value is two things: what its
users inherit, and a bound on all of them together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from sandbox_ssh import units
from sandbox_ssh.errors import QuotaError

UNLIMITED = -1
"""As a value: no bound but the host's."""

# What the kernel counts in bytes, microseconds and numbers fits 62 bits with room for a sum.
_MOST = 2**62
# A moment so far away is still one that a calendar has.
_YEARS = 10 * 365 * 86400

Unit = Literal["count", "bytes", "seconds", "cores"]


@dataclass(frozen=True, slots=True)
class Quota:
    unit: Unit
    default: int
    least: int
    """What one session needs."""
    meaning: str
    most: int = _MOST


# Cores are kept as thousandths, so that every value is a whole number.
_CORE = 1000
_NAMESPACE = "namespaces of the kind {}, the sessions' own included"

QUOTAS: dict[str, Quota] = {
    "sessions": Quota("count", 20, 1, "sessions at the same time"),
    **{
        f"{kind}_namespaces": Quota("count", 1024, least, _NAMESPACE.format(kind))
        for kind, least in (
            ("user", 1), ("mnt", 1), ("pid", 1), ("ipc", 1), ("uts", 1), ("net", 1), ("cgroup", 1), ("time", 0),
        )
    },
    "inotify_instances": Quota("count", 128, 0, "inotify instances (inotify(7))"),
    "inotify_watches": Quota("count", 65536, 0, "inotify watches"),
    "fanotify_groups": Quota("count", 128, 0, "fanotify groups (fanotify(7))"),
    "fanotify_marks": Quota("count", 65536, 0, "fanotify marks"),
    "processes": Quota("count", 1024, 8, "processes and threads"),
    "memory": Quota("bytes", 2 * 2**30, 16 * 2**20, "memory with files in it, where cgroup v2 is delegated"),
    "cpu": Quota("cores", UNLIMITED, 10, "CPU time, in cores, where cgroup v2 is delegated"),
    "cpu_weight": Quota("count", 100, 1, "share of a busy CPU, where cgroup v2 is delegated", most=10_000),
    "open_files": Quota("count", 16384, 64, "descriptors of one process"),
    "disk": Quota("bytes", 2**30, 4 * 2**20, "bytes in the files of one sandbox"),
    "inodes": Quota("count", 100_000, 4096, "files of one sandbox"),
    "ptys": Quota("count", 64, 1, "terminals of one sandbox", most=4096),
    "session_time": Quota("seconds", UNLIMITED, 1, "length of a session", most=_YEARS),
    "idle_time": Quota("seconds", UNLIMITED, 1, "time without a byte in or out that ends a session", most=_YEARS),
    "logins_per_hour": Quota("count", UNLIMITED, 1, "sessions begun within an hour"),
    "session_time_per_day": Quota("seconds", UNLIMITED, 1, "length of a day's sessions together (UTC)", most=_YEARS),
    "network_per_day": Quota("bytes", UNLIMITED, 1, "bytes of a day through the network, both ways (UTC)"),
    "locked_memory": Quota("bytes", 8 * 2**20, 0, "memory that one process has locked (mlock(2))"),
    "message_queues": Quota("bytes", 819_200, 0, "POSIX message queues (mq_overview(7))"),
    "pending_signals": Quota("count", 4096, 8, "queued signals (sigqueue(3))"),
}  # fmt: skip

NAMESPACES = tuple(key for key in QUOTAS if key.endswith("_namespaces"))
SYSCTLS = (*NAMESPACES, "inotify_instances", "inotify_watches", "fanotify_groups", "fanotify_marks")
"""Held by /proc/sys/user/max_* of a holder."""
RLIMITS = ("processes", "locked_memory", "message_queues", "pending_signals")
"""Held by the limits that a user namespace takes over from who makes it (kernel/ucount.c)."""
CGROUPS = ("processes", "memory", "cpu", "cpu_weight")
OF_A_HOLDER = tuple(dict.fromkeys((*SYSCTLS, *RLIMITS, *CGROUPS)))
"""What the kernel holds for all sandboxes of a user, or of a tenant, together."""
SUMMED = (
    "sessions",
    *(key for key in OF_A_HOLDER if key != "locked_memory"),
    "logins_per_hour",
    "session_time_per_day",
    "network_per_day",
)
"""What a tenant's value bounds for all of its users together; the rest is about one session or one process."""


def parse(key: str, text: object) -> int:
    """The value of `512M`, `2h`, `0.5`, `100` or `unlimited` for this quota. Raises `QuotaError`."""
    quota = get(key)
    if isinstance(text, str) and text.strip().lower() == "unlimited":
        if key == "cpu_weight":
            raise QuotaError("cpu_weight: a share is a number from 1 to 10000")
        return UNLIMITED
    if isinstance(text, (str, int, float)) and str(text).strip().startswith("-"):
        raise QuotaError(f"{key}: {text} is negative; no bound is written `unlimited`")
    try:
        value = _parse(quota.unit, text)
    except (ValueError, OverflowError):
        raise QuotaError(f"{key}: {text!r} is not {_FORMS[quota.unit]}, or `unlimited`") from None
    if value < quota.least:
        raise QuotaError(f"{key}: {render(key, value)} is less than a session needs, {render(key, quota.least)}")
    if value > quota.most:
        raise QuotaError(f"{key}: {text} is more than there can be, {render(key, quota.most)}")
    return value


_FORMS = {
    "count": "a whole number",
    "bytes": 'a size, such as "512M"',
    "seconds": 'a duration, such as "2h"',
    "cores": 'a number of cores, such as "0.5"',
}


def _parse(unit: Unit, text: object) -> int:
    if unit == "bytes":
        return units.parse_size(int(text) if isinstance(text, str) and text.strip().isdecimal() else text)
    if unit == "seconds":
        return round(units.parse_duration(text))
    if isinstance(text, bool):
        raise ValueError
    if unit == "cores":
        return round(float(str(text)) * _CORE)
    return int(str(text))


def get(key: str) -> Quota:
    """Raises `QuotaError` with what comes near, for a key that does not exist."""
    if key in QUOTAS:
        return QUOTAS[key]
    import difflib

    near = difflib.get_close_matches(key, QUOTAS, 1)
    raise QuotaError(f"there is no quota {key!r}" + (f"; did you mean {near[0]}?" if near else ""))


def render(key: str, value: int) -> str:
    """A value as a person reads it, and as `parse` takes it again but for rounding."""
    if value == UNLIMITED:
        return "unlimited"
    unit = QUOTAS[key].unit
    if unit == "bytes":
        return str(units.size(value))
    if unit == "seconds":
        return units.duration(value)
    if unit == "cores":
        return f"{value / _CORE:g}"
    return str(value)


def check_host(values: Mapping[str, int], host: Mapping[str, int]) -> None:
    """Raises `QuotaError` for a value that no host of this database could keep."""
    for key, value in values.items():
        most = host.get(key)
        if most is not None and value > most:
            raise QuotaError(f"{key}: {render(key, value)} is over the limit of the host, {render(key, most)}")


def bounded(values: Mapping[str, int]) -> dict[str, int]:
    """Without what is unlimited."""
    return {key: value for key, value in values.items() if value != UNLIMITED}


def kernel_limits(values: Mapping[str, int]) -> dict[str, int]:
    """Of effective quotas those that a holder keeps; without those that are unlimited."""
    return {key: value for key, value in bounded(values).items() if key in OF_A_HOLDER}
