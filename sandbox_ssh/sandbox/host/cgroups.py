"""cgroup v2: is there a subtree that the server may divide among sandboxes?"""

from __future__ import annotations

import os
from pathlib import Path

from sandbox_ssh.sandbox.host.finding import Finding, Needs, good, weak

_REMEDY = "Boot with `systemd.unified_cgroup_hierarchy=1` and start sandbox-ssh.service, which asks for delegation."
# What the quotas `memory`, `cpu` and `cpu_weight` then are.
_UNHELD = (
    "Without a memory controller the quota `memory` binds each process by itself (RLIMIT_DATA), and neither their sum "
    "nor shared memory and files; nothing shares processors by user."
)


def delegation(needs: Needs) -> list[Finding]:
    """Never a FAIL: the holder and rlimits bind without it (docs/architecture.md)."""
    if needs.mode == "rootless":
        return weak(
            "cgroup",
            "not used in rootless mode",
            f"What makes sandboxes is not your host id, and may not divide a cgroup delegated to you. {_UNHELD}",
            "Run the server as root (service mode) where sandboxes must not use all of the memory.",
        )
    directory = _mount_point()
    if directory is None or not _can_divide(directory):
        return weak(
            "cgroup",
            "no cgroup v2 tree that the server may divide",
            f"{_UNHELD} The other quotas hold.",
            _REMEDY,
        )
    controllers = (directory / "cgroup.controllers").read_text().split()
    found = f"{directory}: {' '.join(controllers) or 'no controllers'}"
    missing = [name for name in ("memory", "cpu", "pids") if name not in controllers]
    if "memory" in missing:
        return weak("cgroup", found, _UNHELD, _REMEDY)
    if missing:
        return weak(
            "cgroup", found, f"Memory is bounded; the controllers {' and '.join(missing)} are missing.", _REMEDY
        )
    return good("cgroup", found, "Memory, CPU and processes of a sandbox can be bounded and accounted.")


def _mount_point() -> Path | None:
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields, _, tail = line.partition(" - ")
        if tail.split()[0] == "cgroup2":
            return Path(fields.split()[4])
    return None


def _can_divide(directory: Path) -> bool:
    return os.access(directory, os.W_OK) and os.access(directory / "cgroup.subtree_control", os.W_OK)
