"""cgroup v2: is there a subtree that the server may divide among sandboxes?"""

from __future__ import annotations

import os
from pathlib import Path

from sandbox_ssh.sandbox.host.finding import Finding, Needs, as_root, good, weak


def delegation(needs: Needs) -> list[Finding]:
    """Never a FAIL: the holder and rlimits bind without it (docs/architecture.md)."""
    mount = _mount_point()
    directory = mount if mount is None or needs.mode == "service" else _own_subtree(mount)
    if directory is None or not _can_divide(directory):
        return weak(
            "cgroup",
            "no cgroup v2 tree that the server may divide",
            "Nothing bounds a sandbox's memory, and its CPU time is read from rusage. The other limits hold.",
            _remedy(needs),
        )
    controllers = (directory / "cgroup.controllers").read_text().split()
    found = f"{directory}: {' '.join(controllers) or 'no controllers'}"
    missing = [name for name in ("memory", "cpu", "pids") if name not in controllers]
    if "memory" in missing:
        return weak("cgroup", found, "CPU time is accounted, but nothing bounds a sandbox's memory.", _remedy(needs))
    if missing:
        return weak(
            "cgroup", found, f"Memory is bounded; the controllers {' and '.join(missing)} are missing.", _remedy(needs)
        )
    return good("cgroup", found, "Memory, CPU and processes of a sandbox can be bounded and accounted.")


def _remedy(needs: Needs) -> str:
    if needs.mode == "service":
        return (
            "Boot with `systemd.unified_cgroup_hierarchy=1` and start sandbox-ssh.service, which asks for delegation."
        )
    drop_in = "/etc/systemd/system/user@.service.d/delegate.conf"
    return (
        f"{as_root(f'mkdir -p {os.path.dirname(drop_in)}')} && printf '[Service]\\nDelegate=cpu memory pids\\n' | "
        f"{as_root(f'tee {drop_in}')} && {as_root('systemctl daemon-reload')}; then log in "
        "again and start the user unit sandbox-ssh-rootless.service"
    )


def _mount_point() -> Path | None:
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields, _, tail = line.partition(" - ")
        if tail.split()[0] == "cgroup2":
            return Path(fields.split()[4])
    return None


def _own_subtree(mount: Path) -> Path | None:
    """The unit's cgroup when it is ours, else that of the user's systemd, which delegates to the user unit."""
    line = next((line for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::")), "0::/")
    uid = os.geteuid()
    for path in (line[3:], f"/user.slice/user-{uid}.slice/user@{uid}.service"):
        directory = mount / path.lstrip("/")
        if _can_divide(directory):
            return directory
    return None


def _can_divide(directory: Path) -> bool:
    return os.access(directory, os.W_OK) and os.access(directory / "cgroup.subtree_control", os.W_OK)
