"""What this host offers to sandboxes, found out by trying: the part of `sandbox-ssh doctor` that is about the kernel.

A setting tells what should work; only the call itself tells what does (a module that is not there, an AppArmor
profile, a container around us). So most checks do what the spawner will do, in a child with a time-out, inside
namespaces that die with it: nothing is left behind, and a hung or crashed probe is a finding like any other.
"""

from __future__ import annotations

from collections.abc import Iterator

from sandbox_ssh.sandbox.host import cgroups, files, ids, kernel, limits, network, programs
from sandbox_ssh.sandbox.host.finding import Check, Finding, Needs, Status, answer

__all__ = ["CHECKS", "Check", "Finding", "Needs", "Status", "answer", "inspect"]

# In the order in which a person mends a host: what cannot be had without a new kernel first.
CHECKS: dict[str, Check] = {
    "privileges": ids.privileges,
    "kernel": kernel.version,
    "user-namespaces": kernel.user_namespaces,
    "namespace-limits": limits.namespaces,
    "overlayfs": files.overlay,
    "tmpfs-xattrs": files.tmpfs_xattrs,
    "idmapped-mounts": files.idmapped_mounts,
    "id-ranges": ids.ranges,
    "tun": network.tun,
    "slirp4netns": programs.slirp4netns,
    "init": programs.static_init,
    "seccomp": programs.libseccomp,
    "nftables": network.nftables,
    "bridge": network.bridge,
    "ping": network.ping,
    "cgroup": cgroups.delegation,
    "terminals": limits.terminals,
    "processes": limits.processes,
    "open-files": limits.open_files,
    "core-dumps": kernel.core_dumps,
}


def inspect(needs: Needs) -> Iterator[Finding]:
    """The findings of every check that concerns `needs.mode`, as they come."""
    for name, check in CHECKS.items():
        yield from answer(name, check, needs)
