"""The kernel itself: its version, who may make user namespaces, what it does with a core dump."""

from __future__ import annotations

import os
from pathlib import Path

from sandbox_ssh.sandbox import syscalls as sys
from sandbox_ssh.sandbox.host import scratch
from sandbox_ssh.sandbox.host.finding import Finding, Needs, bad, good, install, set_sysctl, weak

# 5.14: RLIMIT_NPROC and its like are counted per user namespace. 5.19: overlayfs over idmapped mounts.
_OLDEST = {"rootless": (5, 14), "service": (5, 19)}
_CAPS_PROCESSES = (6, 14)


def version(needs: Needs) -> list[Finding]:
    release = os.uname().release
    major, minor = (int("".join(filter(str.isdigit, part))) for part in release.split("-")[0].split(".")[:2])
    oldest = _OLDEST[needs.mode]
    if (major, minor) < oldest:
        return bad(
            "kernel",
            release,
            f"{needs.mode.capitalize()} mode needs {oldest[0]}.{oldest[1]} or later: limits would not bind, or images "
            "could not be mounted.",
            f"{install('linux-image-amd64')}, then reboot (Ubuntu: linux-generic-hwe-24.04)",
        )
    if (major, minor) < _CAPS_PROCESSES:
        return good("kernel", release, "New enough; processes are bounded by RLIMIT_NPROC (6.14 adds pid_max to that).")
    return good("kernel", release, "Everything that sandboxes use is in it.")


def user_namespaces(needs: Needs) -> list[Finding]:
    """Three switches forbid them, each in its own way; then the real thing, whatever the switches say."""
    refused = _refused_by_setting(needs)
    if refused:
        return refused
    try:
        scratch.enter_user_namespace(sys.CLONE_NEWNS)
        scratch.mount_work()
    except OSError as error:
        return bad(
            "user-namespaces",
            str(error),
            "A user namespace cannot be made or used here: seccomp, a security module or a container around this "
            "host forbids it.",
            "In a container, allow unshare(2) and mount(2) (Docker: `--security-opt seccomp=unconfined "
            "--security-opt apparmor=unconfined`), or run sandbox-ssh on the host.",
        )
    return good("user-namespaces", "allowed", "Sandboxes can have root of their own.")


def _refused_by_setting(needs: Needs) -> list[Finding]:
    name = "user-namespaces"
    if _sysctl("user.max_user_namespaces") == "0":
        return bad(
            name,
            "user.max_user_namespaces = 0",
            "Nobody may make a user namespace, and every sandbox is one.",
            set_sysctl("user.max_user_namespaces", 65536),
        )
    if _sysctl("kernel.unprivileged_userns_clone") == "0":
        remedy = set_sysctl("kernel.unprivileged_userns_clone", 1)
        found = "kernel.unprivileged_userns_clone = 0"
        if needs.mode == "rootless":
            return bad(name, found, "Only root may make user namespaces.", remedy)
        return weak(name, found, "Sandboxes start, but `unshare -U` inside them may be refused.", remedy)
    if _sysctl("kernel.apparmor_restrict_unprivileged_userns") == "1" and not _confined_by_profile():
        remedy = set_sysctl("kernel.apparmor_restrict_unprivileged_userns", 0)
        found = "kernel.apparmor_restrict_unprivileged_userns = 1"
        if needs.mode == "rootless":
            return bad(name, found, "AppArmor takes every right from an ordinary user's user namespace.", remedy)
        return weak(name, found, "Sandboxes start, but `unshare -U` inside them may be left without rights.", remedy)
    return []


def _confined_by_profile() -> bool:
    """An AppArmor profile of its own, which may then grant `userns`; the trial tells whether it does."""
    try:
        label = Path("/proc/self/attr/apparmor/current").read_text().strip()
    except OSError:
        return False
    return not label.startswith("unconfined")


def _sysctl(name: str) -> str | None:
    try:
        return Path("/proc/sys", name.replace(".", "/")).read_text().strip()
    except FileNotFoundError:
        return None


def core_dumps(needs: Needs) -> list[Finding]:
    pattern = Path("/proc/sys/kernel/core_pattern").read_text().strip()
    if pattern.startswith("|"):
        return weak(
            "core-dumps",
            f"kernel.core_pattern = {pattern}",
            "A program of the host's root reads the memory of whatever crashes in a sandbox (CVE-2025-4598, "
            "CVE-2025-5054).",
            set_sysctl("kernel.core_pattern", "core"),
        )
    return good(
        "core-dumps", f"kernel.core_pattern = {pattern}", "No program of the host's handles crashes of tenants."
    )
