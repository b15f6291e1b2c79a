"""Namespaces for a probe: the calling process moves into them, and they end when it does."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from sandbox_ssh.sandbox import syscalls as sys
from sandbox_ssh.sandbox.holder import new_user_namespace
from sandbox_ssh.sandbox.host.finding import Needs
from sandbox_ssh.sandbox.idmap import Map

# Every host has it, and a tmpfs of our own lies over it before anything is written.
WORK = "/tmp"


def enter_user_namespace(also: int = 0) -> None:
    """A user namespace in which our own id is root, and the further namespaces of `also` owned by it."""
    uid, gid = os.geteuid(), os.getegid()
    sys.unshare(sys.CLONE_NEWUSER | also)
    Path("/proc/self/setgroups").write_text("deny")  # user_namespaces(7): required before gid_map
    Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
    Path("/proc/self/gid_map").write_text(f"0 {gid} 1")


def enter_uplink(needs: Needs) -> None:
    """The net namespace of an uplink: owned by a user namespace whose root is not the host's."""
    if needs.mode == "rootless":
        enter_user_namespace(sys.CLONE_NEWNET)
        return
    namespace = new_user_namespace(Map(((0, needs.first_id, 1),)), groups=True)
    sys.setns(namespace, sys.CLONE_NEWUSER)
    os.setgroups([])
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)
    sys.prctl(sys.PR_SET_PDEATHSIG, signal.SIGKILL)  # cleared by the change of ids (prctl(2))
    sys.unshare(sys.CLONE_NEWNET)


def mount_work() -> None:
    """A tmpfs at WORK that only this process sees, and the current directory."""
    sys.mount(None, "/", None, sys.MS_REC | sys.MS_PRIVATE)
    sys.mount("tmpfs", WORK, "tmpfs", sys.MS_NODEV, "mode=0755,size=1m")
    os.chdir(WORK)
