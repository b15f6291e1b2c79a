"""The spawner's start: from an exec'd Python to root of S with everything open that it will ever need.

    cd STATE_DIR; python -m sandbox_ssh.spawner FD

FD is a socket on which the supervisor sends one message: the settings, with the socket to listen on. The working
directory is how the state directory is found again: unlike a path it can be reached as another user, and unlike a
descriptor the kernel moves it along into a new mount namespace.

All imports happen here, above; none may follow once ids or roots have changed (CVE-2019-14271).
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import pwd
import resource
import shutil
import signal
import socket
import subprocess
import sys

from sandbox_ssh.errors import SandboxError
from sandbox_ssh.sandbox import cgroup, holder, idmap, limits, namespaces, netlink, rootfs, syscalls, uplink
from sandbox_ssh.sandbox.loop import Loop
from sandbox_ssh.spawner.server import Spawner


def main() -> None:
    with socket.socket(fileno=int(sys.argv[1])) as supervisor:
        data, fds, _, _ = socket.recv_fds(supervisor, 65536, 1, socket.MSG_CMSG_CLOEXEC)
        try:
            spawner = start(json.loads(data), socket.socket(fileno=fds[0]))
        except (OSError, SandboxError) as error:
            supervisor.send(f"E{error}".encode())
            sys.exit(1)
        supervisor.send(b"+")
    gc.collect()
    gc.freeze()  # a collection in a child would copy every page that the parent shares with it
    gc.disable()
    spawner.loop.run()


def start(settings: dict[str, int | str], listener: socket.socket) -> Spawner:
    os.umask(0o022)
    syscalls.prctl(syscalls.PR_SET_DUMPABLE, 0)
    syscalls.set_process_name("sandbox-spawner")  # a tenant sees it for the moment between a fork and an exec
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in (resource.RLIMIT_NOFILE, *limits.RLIMITS.values()):
        _, hard = resource.getrlimit(number)
        resource.setrlimit(number, (hard, hard))  # what namespaces below are made under, they keep
    with contextlib.suppress(ValueError):  # sudo sets it to 0, and raising it takes CAP_SYS_RESOURCE
        resource.setrlimit(resource.RLIMIT_CORE, (1, 1))  # what the sandboxes' processes start with
    messages = netlink.encode()
    init = os.open(_program("catatonit"), os.O_RDONLY | os.O_CLOEXEC)
    _program("nft"), _program("slirp4netns")
    gateway_uid = int(settings["gateway_uid"])
    locks = os.open(str(settings["id_locks"]), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    plan: idmap.Plan
    if settings["mode"] == "service":
        plan = idmap.Blocks(int(settings["id_first"]), int(settings["id_blocks"]), locks)
    else:
        plan = enter_user_namespace(locks)
        # As S sees the server's own user: its root where it is the only id, else nobody of S. What keeps others
        # from the socket then is its mode, 0600.
        gateway_uid = idmap.NOBODY if plan.groups else 0
    cgroups = cgroup.Cgroups()  # as root of S: in rootless mode there are none, for it may not divide its user's
    loop = Loop()
    self_pidfd = os.pidfd_open(os.getpid())
    # Before the mount namespace is ours alone: slirp4netns and nft see the host's files as they are.
    keeper_pid, keeper = uplink.start_keeper(plan, messages, int(settings["uplinks_ready"]), self_pidfd)
    loop.on_exit(keeper_pid, lambda *_: None)
    syscalls.unshare(syscalls.CLONE_NEWNS)
    # Private, not slave: no mount of the host's appears in a sandbox being built, none of ours at the host.
    syscalls.mount(None, "/", None, syscalls.MS_REC | syscalls.MS_PRIVATE)
    base = rootfs.Base("run/work", "images", settings["mode"] == "service")
    host = namespaces.Host(
        base, init, os.open("/proc", os.O_PATH | os.O_CLOEXEC), self_pidfd, messages.lo_up, messages.tap_up, plan.groups
    )
    return Spawner(loop, listener, host, plan, cgroups, keeper, gateway_uid)


def _program(name: str) -> str:
    path = shutil.which(name, path="/usr/sbin:/usr/bin:/sbin:/bin")
    if path is None:
        raise SandboxError(f"{name} is not installed: `apt-get install {'nftables' if name == 'nft' else name}`")
    return path


def enter_user_namespace(locks: int) -> idmap.Plan:
    """Rootless: become root of S, a user namespace of the ids that /etc/subuid and /etc/subgid give this user."""
    first_uid, uids = _range("/etc/subuid")
    first_gid, gids = _range("/etc/subgid")
    count = min(uids, gids)
    pid = str(os.getpid())
    plan: idmap.Plan
    if count >= 2 * idmap.SLICE + 1 and shutil.which("newuidmap") and shutil.which("newgidmap"):
        plan = idmap.Slices(first_uid, count, locks)
        _unshare_while([
            ["newuidmap", pid, "0", str(first_uid), str(count)],
            ["newgidmap", pid, "0", str(first_gid), str(count)],
        ])  # fmt: skip
    else:
        uid, gid = os.getuid(), os.getgid()
        _unshare_while([])
        for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
        plan = idmap.Single()
    holder.become_root(plan.groups)
    syscalls.prctl(syscalls.PR_SET_DUMPABLE, 0)
    return plan


def _unshare_while(commands: list[list[str]]) -> None:
    """Unshare the user namespace; a child that stays outside then runs what maps it, as newuidmap(1) must be."""
    ours, theirs = socket.socketpair()
    child = os.fork()
    if child == 0:
        try:
            theirs.recv(1)
            for command in commands:
                subprocess.run(command, check=True, capture_output=True, timeout=10)
            theirs.send(b"+")
        except (OSError, subprocess.SubprocessError) as error:
            text = getattr(error, "stderr", b"") or str(error).encode()
            theirs.send(b"E" + text[:512])
        finally:
            os._exit(0)
    syscalls.prctl(syscalls.PR_SET_DUMPABLE, 1)
    try:
        syscalls.unshare(syscalls.CLONE_NEWUSER)
    except OSError as error:
        raise SandboxError(
            f"user namespaces are not allowed here ({error.strerror}): run `sandbox-ssh doctor`"
        ) from error
    finally:
        ours.send(b"+")
        answer = ours.recv(600)
        os.waitpid(child, 0)
    if answer != b"+":
        raise SandboxError(f"the ids of /etc/subuid could not be mapped: {answer[1:].decode(errors='replace').strip()}")


def _range(path: str) -> tuple[int, int]:
    """The largest of this user's lines of subuid(5), as (first, count): a map's line must lie within one of them."""
    names = {str(os.getuid()), pwd.getpwuid(os.getuid()).pw_name}
    largest = (0, 0)
    with contextlib.suppress(FileNotFoundError), open(path) as file:
        for line in file:
            fields = line.strip().split(":")
            if len(fields) == 3 and fields[0] in names and fields[1].isdigit() and fields[2].isdigit():
                largest = max(largest, (int(fields[1]), int(fields[2])), key=lambda pair: pair[1])
    return largest


main()
