"""H: one user namespace for each user with live sandboxes, above all of them and never entered by their code.

The limits in /proc/sys/user are per user namespace, and a creation is charged to every namespace above it
(kernel/ucount.c, inc_ucount): whatever is written into H's files binds the sum of the user's sandboxes, however
they nest, and nobody below can reach H to raise it.
"""

from __future__ import annotations

import os
import signal
import socket
from dataclasses import dataclass

from sandbox_ssh.errors import SandboxError
from sandbox_ssh.sandbox import syscalls as sys
from sandbox_ssh.sandbox.idmap import Ids, Map, Plan


@dataclass(slots=True)
class Holder:
    """A user's holder; open while `sandboxes` is above 0."""

    user: int
    ids: Ids
    userns: int
    """Descriptor of H."""
    owner: int
    """Descriptor of a namespace whose map is T's for the image `host`: what files of that image are mapped by."""
    sandboxes: int = 0

    def close(self) -> None:
        os.close(self.userns)
        if self.owner != self.userns:
            os.close(self.owner)


def create(user: int, plan: Plan) -> Holder:
    """A holder for `user` with ids of its own. Raises `SandboxError`."""
    ids = plan.allocate()
    try:
        userns = new_user_namespace(ids.holder, plan.groups)
        try:
            owner = userns if ids.root == ids.holder.extents[0][1] else _owner_namespace(ids, plan)
        except BaseException:
            os.close(userns)
            raise
    except BaseException:
        plan.release(ids)
        raise
    return Holder(user, ids, userns, owner)


def _owner_namespace(ids: Ids, plan: Plan) -> int:
    """T's map seen from S: H's map is one run, so every extent of T's moves by the same distance."""
    shift = ids.holder.extents[0][1]
    composed = Map(tuple((inside, outside + shift, count) for inside, outside, count in ids.tenant.extents))
    return new_user_namespace(composed, plan.groups)


def new_user_namespace(map_: Map, groups: bool) -> int:
    """A descriptor of a new child user namespace of ours with this map.

    A child makes it and waits, for only its parent's side may write a map of more than one id.
    """
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        try:
            sys.prctl(sys.PR_SET_DUMPABLE, 1)  # else /proc/PID/uid_map is the host root's (proc(5))
            sys.unshare(sys.CLONE_NEWUSER)
            theirs.send(b"+")
            theirs.recv(1)
        except OSError as error:
            theirs.send(str(error).encode()[:512])
        finally:
            os._exit(0)
    theirs.close()
    try:
        answer = ours.recv(512)
        if answer != b"+":
            raise SandboxError(f"a user namespace could not be made: {answer.decode(errors='replace')}")
        write_maps(pid, map_, groups)
        return os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise SandboxError(f"a user namespace could not be mapped: {error}") from error
    finally:
        ours.close()
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def write_maps(pid: int, map_: Map, groups: bool, proc: int | None = None) -> None:
    """Write uid_map and gid_map of a process's new user namespace; `proc` is a descriptor of /proc."""
    prefix = "/proc/" if proc is None else ""
    if not groups:
        # Required before gid_map without privilege over the parent (CVE-2014-8989).
        _write(f"{prefix}{pid}/setgroups", b"deny", proc)
    _write(f"{prefix}{pid}/uid_map", map_.encode(), proc)
    _write(f"{prefix}{pid}/gid_map", map_.encode(), proc)


def _write(path: str, data: bytes, directory: int | None) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC, dir_fd=directory)
    try:
        os.write(fd, data)
    finally:
        os.close(fd)
