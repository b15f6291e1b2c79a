"""H: one user namespace for each user with live sandboxes, above all of them and never entered by their code;
and G: one for each tenant, above the holders of its users.

The limits in /proc/sys/user are per user namespace, and a creation is charged to every namespace above it
(kernel/ucount.c, inc_ucount): whatever is written into H's files binds the sum of the user's sandboxes, however
they nest, and nobody below can reach H to raise it. G binds the sum of the tenant's users in the same way.

    S ── G (tenant) ── H (user) ── T (sandbox)
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field

from sandbox_ssh.errors import SandboxError
from sandbox_ssh.sandbox import limits as limits_
from sandbox_ssh.sandbox import syscalls as sys
from sandbox_ssh.sandbox.idmap import Ids, Map, Plan
from sandbox_ssh.sandbox.limits import Limits

_IDLE_TENANTS = 64
"""Holders of tenants with no live user that are kept: making one is a fifth of a login. Those of users are not."""


@dataclass(slots=True)
class Tenant:
    """A tenant's holder."""

    number: int
    userns: int
    """Descriptor of G."""
    limits: Limits
    users: int = 0


@dataclass(slots=True)
class Holder:
    """A user's holder; open while `sandboxes` is above 0."""

    user: int
    tenant: Tenant
    ids: Ids
    userns: int
    """Descriptor of H."""
    owner: int
    """Descriptor of a namespace whose map is T's for the image `host`: what files of that image are mapped by."""
    limits: Limits = field(default_factory=dict)
    sandboxes: int = 0

    def close(self) -> None:
        os.close(self.userns)
        if self.owner != self.userns:
            os.close(self.owner)


class Holders:
    """The holders of all users with live sandboxes, and of their tenants."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._users: dict[tuple[int, int], Holder] = {}
        self._tenants: dict[int, Tenant] = {}

    def hold(self, user: int, tenant: int, user_limits: Limits, tenant_limits: Limits, *, fresh: bool) -> Holder:
        """The user's holder for one more sandbox, with these limits in it where they are `fresh` or it is new.

        Raises `SandboxError` or `OSError`.
        """
        held = self._users.get((tenant, user))
        if held is None:
            try:
                held = self._new_user(user, self._tenant(tenant, tenant_limits, fresh), user_limits)
            finally:
                self._forget_idle()  # of a tenant whose user could not be held, too
            self._users[tenant, user] = held
        elif fresh:
            self.limit(user, tenant, user_limits, tenant_limits)
        held.sandboxes += 1
        return held

    def let_go(self, held: Holder) -> None:
        held.sandboxes -= 1
        if held.sandboxes:
            return
        del self._users[held.tenant.number, held.user]
        held.close()
        self._plan.release(held.ids)
        held.tenant.users -= 1
        if held.tenant.users:
            if "user_namespaces" in held.tenant.limits:
                # Where that fails, for want of a process perhaps, G has one to spare until it is written again.
                with contextlib.suppress(OSError, SandboxError):
                    self._rewrite_tenant(held.tenant, held.tenant.limits)
            return
        self._tenants[held.tenant.number] = self._tenants.pop(held.tenant.number)  # the last to have been in use
        self._forget_idle()

    def _forget_idle(self) -> None:
        idle = [tenant for tenant in self._tenants.values() if not tenant.users]
        for tenant in idle[: max(0, len(idle) - _IDLE_TENANTS)]:
            os.close(self._tenants.pop(tenant.number).userns)

    def limit(self, user: int, tenant: int, user_limits: Limits, tenant_limits: Limits) -> None:
        """Change the limits of what is live; harmless where nothing is. Raises `SandboxError`.

        Sysctls bind at once, for what is created from then on. Of rlimits, a namespace keeps those that it was made
        under: they count for the next sandbox (a user's) and the next holder (a tenant's).
        """
        above = self._tenants.get(tenant)
        if above is not None:
            self._limit_tenant(above, tenant_limits)
        held = self._users.get((tenant, user))
        if held is not None and held.limits != user_limits:
            self._inside(held.userns, lambda: limits_.write_sysctls(user_limits, new=False))
            held.limits = user_limits  # not before: what failed is tried again

    def _limit_tenant(self, tenant: Tenant, limits: Limits) -> None:
        if tenant.limits != limits:
            self._rewrite_tenant(tenant, limits)
            tenant.limits = limits

    def _rewrite_tenant(self, tenant: Tenant, limits: Limits) -> None:
        self._inside(tenant.userns, lambda: limits_.write_sysctls(limits, new=False, overhead=tenant.users))

    def _tenant(self, number: int, limits: Limits, fresh: bool) -> Tenant:
        found = self._tenants.get(number)
        if found is None:
            userns = new_user_namespace(self._plan.tenant, self._plan.groups, self._plan.creator(number))
            found = self._tenants[number] = Tenant(number, userns, {})
            fresh = True
        if fresh:
            self._limit_tenant(found, limits)
        return found

    def _new_user(self, user: int, above: Tenant, limits: Limits) -> Holder:
        ids = self._plan.allocate()
        opened: list[int] = []
        try:
            opened.append(self._below(above, ids.holder, limits))
            if ids.root != ids.holder.extents[0][1]:
                opened.append(_owner_namespace(ids, self._plan))
        except BaseException:
            for fd in opened:
                os.close(fd)
            self._plan.release(ids)
            raise
        above.users += 1
        return Holder(user, above, ids, opened[0], opened[-1], limits)

    def _below(self, above: Tenant, map_: Map, limits: Limits) -> int:
        """A descriptor of a new H in G, with its limits written.

        Only a process in G may map it, and only one in H may write its limits: a child joins G, and its child is the
        first of H.
        """

        def make(channel: socket.socket) -> None:
            sys.setns(above.userns, sys.CLONE_NEWUSER)
            become_root(self._plan.groups)
            if "user_namespaces" in above.limits:
                limits_.write_sysctls(above.limits, new=False, overhead=above.users + 1)
            limits_.set_rlimits(above.limits)  # what binds the sum of the tenant's users
            sys.prctl(sys.PR_SET_DUMPABLE, 1)  # else /proc/PID/uid_map of the child is not ours (proc(5))
            mapped, tell = os.pipe2(os.O_CLOEXEC)
            pid = sys.clone(sys.CLONE_NEWUSER | signal.SIGCHLD)
            if pid == 0:
                os.close(tell)
                status = 1
                try:
                    if os.read(mapped, 1) == b"+":
                        become_root(self._plan.groups)
                        limits_.write_sysctls(limits, new=True)
                        status = 0
                finally:
                    os._exit(status)
            userns = os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
            write_maps(pid, map_, self._plan.groups)
            os.write(tell, b"+")
            if os.waitpid(pid, 0)[1]:
                raise SandboxError("the limits of the holder could not be written")
            socket.send_fds(channel, [b"+"], [userns])

        (fd,) = _by_a_child(make, "a user's holder could not be made")
        return fd

    def _inside(self, userns: int, work: Callable[[], None]) -> None:
        def do(channel: socket.socket) -> None:
            sys.setns(userns, sys.CLONE_NEWUSER)
            become_root(self._plan.groups)
            work()
            channel.send(b"+")

        _by_a_child(do, "limits could not be changed")


def _by_a_child(work: Callable[[socket.socket], None], what: str) -> list[int]:
    """Have a child do something for which there is no way back, and take the descriptors that it sends with its `+`.

    Raises `OSError` for what the kernel refused the child, or `SandboxError`.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = os.fork()
    if pid == 0:
        try:
            ours.close()
            work(theirs)
        except OSError as error:
            theirs.send(f"E{error.errno} {error.filename}".encode(errors="replace")[:512])
        except BaseException:
            theirs.send(f"!{traceback.format_exc(limit=3)}".encode(errors="replace")[:2048])
        finally:
            os._exit(0)
    theirs.close()
    with ours:
        answer, fds, _, _ = socket.recv_fds(ours, 4096, 1, socket.MSG_CMSG_CLOEXEC)
    os.waitpid(pid, 0)
    if answer == b"+":
        return fds
    if answer.startswith(b"E"):
        number, _, name = answer[1:].decode(errors="replace").partition(" ")
        raise OSError(int(number), os.strerror(int(number)), f"{what}: {name}")
    raise SandboxError(f"{what}: {answer[1:].decode(errors='replace') or 'its maker died'}")


def _owner_namespace(ids: Ids, plan: Plan) -> int:
    """T's map seen from S: H's map is one run, so every extent of T's moves by the same distance."""
    shift = ids.holder.extents[0][1]
    composed = Map(tuple((inside, outside + shift, count) for inside, outside, count in ids.tenant.extents))
    return new_user_namespace(composed, plan.groups)


def new_user_namespace(map_: Map, groups: bool, creator: int = 0) -> int:
    """A descriptor of a new child user namespace of ours with this map, charged to `creator`, an id of ours.

    A child makes it and waits, for only its parent's side may write a map of more than one id.
    """
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        try:
            if creator:
                # With our capabilities: hosts may forbid user namespaces to whoever has none.
                sys.prctl(sys.PR_SET_SECUREBITS, sys.SECBIT_NO_SETUID_FIXUP)
                os.setresuid(creator, creator, creator)
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


def become_root(groups: bool) -> None:
    """Root of the user namespace that was just entered, with no group of the one that was left."""
    if groups:
        os.setgroups([])  # CVE-2018-7169, CVE-2022-2989
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)


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
