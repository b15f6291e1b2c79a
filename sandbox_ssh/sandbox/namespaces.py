"""Starting a sandbox: one process builds it, the next becomes its PID 1.

    spawner --fork--> builder --clone--> PID 1 (a sibling of the builder: the spawner is its parent)

The builder is root of S. It makes the root file system, enters H, and clones PID 1 straight into all of the
tenant's namespaces at once: user first, so that it owns the others (clone(2)), its mount namespace a copy of the
builder's in which every mount is locked. Only a process in H may map T, so the builder does that, and is done.

PID 1 mounts what belongs to its namespaces, waits for the spawner's word that the uplink is there, and becomes a
static init, executed by descriptor. Nothing of the spawner's memory is left in the sandbox.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import traceback
from dataclasses import dataclass

from sandbox_ssh.sandbox import syscalls as sys
from sandbox_ssh.sandbox.holder import Holder, become_root, write_maps
from sandbox_ssh.sandbox.limits import Bounds, set_rlimits
from sandbox_ssh.sandbox.rootfs import HOST_IMAGE, Base, Layout

NAMESPACES = {
    "user": sys.CLONE_NEWUSER,
    "mnt": sys.CLONE_NEWNS,
    "pid": sys.CLONE_NEWPID,
    "ipc": sys.CLONE_NEWIPC,
    "uts": sys.CLONE_NEWUTS,
    "net": sys.CLONE_NEWNET,
    "cgroup": sys.CLONE_NEWCGROUP,
}
ALL_NAMESPACES = sum(NAMESPACES.values())
_SPECIAL = sys.MS_NOSUID | sys.MS_NODEV | sys.MS_NOEXEC


@dataclass(frozen=True, slots=True)
class Host:
    """Descriptors that the spawner opens at its start, when paths are still its own."""

    base: Base
    init: int
    """The static init's program."""
    proc: int
    """/proc of the spawner's pid namespace."""
    self_pidfd: int
    """Readable once the spawner has died."""
    lo_up: bytes
    """Netlink messages that PID 1 sends: loopback up."""
    tap_up: bytes
    """Loopback and tap0 up, with the tutorial's address and route."""
    groups: bool


def start(
    host: Host, layout: Layout, holder: Holder, bounds: Bounds, *, network: bool, cgroup: int | None
) -> tuple[int, socket.socket]:
    """Fork the builder. Returns its pid and the socket on which sandbox and spawner speak:

    builder:  `P<pid>` when PID 1 exists and its namespaces are mapped, with descriptors (`Parts`)
    spawner:  `+` when it knows PID 1 and the network is attached
    PID 1:    `M` with a descriptor of its procfs, and closes its end by executing init
    both:     `E<errno> <text>` for an error before that
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    # Born in its cgroup: what is built is charged to the user too.
    pid = sys.fork(cgroup)
    if pid:
        theirs.close()
        return pid, ours
    try:
        ours.close()
        _build(host, layout, holder, bounds, theirs, network)
    except BaseException as error:
        _report(theirs, error)
    finally:
        os._exit(1)


def _report(channel: socket.socket, error: BaseException) -> None:
    if isinstance(error, OSError):
        text = f"E{error.errno} {error.filename or error.strerror}"
    else:
        text = f"E0 {traceback.format_exc(limit=3)}"
    with contextlib.suppress(OSError):
        channel.send(text.encode(errors="replace")[:2048])


def _build(host: Host, layout: Layout, holder: Holder, bounds: Bounds, channel: socket.socket, network: bool) -> None:
    built = host.base.build(layout, holder)
    sys.setns(holder.userns, sys.CLONE_NEWUSER)
    become_root(host.groups)
    set_rlimits(holder.limits)  # T keeps those of its maker, for all in it and below
    # PID 1's /proc/PID/uid_map must be openable by this process: see `holder.new_user_namespace`. No code of a
    # tenant runs yet, and none ever sees this pid namespace.
    sys.prctl(sys.PR_SET_DUMPABLE, 1)
    mapped, ready = os.pipe2(os.O_CLOEXEC)
    pid = sys.clone(ALL_NAMESPACES | sys.CLONE_PARENT | signal.SIGCHLD)
    if pid == 0:
        try:
            os.close(ready)
            if os.read(mapped, 1) == b"+":
                _become_init(host, layout, bounds, channel, network)
        except BaseException as error:
            _report(channel, error)
        finally:
            os._exit(1)
    # N by descriptor, while PID 1 still waits and is dumpable: by its pid it could be mistaken once it has died.
    netns = os.open(f"{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC, dir_fd=host.proc)
    tenant = holder.ids.tenant if layout.image == HOST_IMAGE else holder.ids.tenant_unpacked
    try:
        write_maps(pid, tenant, host.groups, host.proc)
    except OSError:
        os.kill(pid, signal.SIGKILL)
        raise
    os.write(ready, b"+")
    socket.send_fds(channel, [f"P{pid}".encode()], [built.pts, built.disk, built.notes, netns])
    os._exit(0)


def _become_init(host: Host, layout: Layout, bounds: Bounds, channel: socket.socket, network: bool) -> None:
    become_root(host.groups)
    # From here on: a change of ids would forget it (prctl(2), PR_SET_PDEATHSIG). Two that wait for the spawner's word
    # at once hold each other's sockets open, so its death alone would not end the waiting.
    die_with_spawner(host.self_pidfd)
    sys.prctl(sys.PR_SET_DUMPABLE, 0)
    sys.join_new_session_keyring()  # else the server's keyring is the tenant's (keyrings(7))
    # Two, one over the other: a descriptor of the lower one is the spawner's, and would keep the tenant from unmounting
    # the only one (EBUSY). open_tree(2) would need one more mount namespace of the tenant's quota, and to unmount the
    # lower one takes 2 ms.
    sys.mount("proc", "/proc", "proc", _SPECIAL)
    proc = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    sys.mount("proc", "/proc", "proc", _SPECIAL)
    sys.mount("sysfs", "/sys", "sysfs", _SPECIAL)
    sys.mount("mqueue", "/dev/mqueue", "mqueue", _SPECIAL)
    sys.sethostname(layout.hostname)
    # Without the word of a spawner that knows this process there must be no sandbox: the builder may have died unheard.
    if channel.recv(1) != b"+":
        return
    _netlink(host.tap_up if network else host.lo_up)
    socket.send_fds(channel, [b"M"], [proc])
    reset_signals()
    os.setsid()
    null = os.open("/dev/null", os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    sys.close_range(3, 0xFFFFFFFF, sys.CLOSE_RANGE_CLOEXEC)
    bounds.set()
    os.execve(host.init, ["init", "-P"], {})


def die_with_spawner(self_pidfd: int) -> None:
    """SIGKILL for this process when the spawner dies; exits at once if it has died already."""
    sys.prctl(sys.PR_SET_PDEATHSIG, signal.SIGKILL)
    poll = select.poll()
    poll.register(self_pidfd, select.POLLIN)
    if poll.poll(0):
        os._exit(1)


def reset_signals() -> None:
    """Python ignores SIGPIPE and SIGXFSZ, and an ignored signal stays ignored across execve(2)."""
    for number in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])


def _netlink(messages: bytes) -> None:
    """Send rtnetlink(7) messages and read an acknowledgement for each; raises `OSError` for the first refusal."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE) as link:
        netlink_request(link, messages, "configuring lo and tap0")


def netlink_request(link: socket.socket, messages: bytes, what: str) -> None:
    """One send of messages that each ask for an acknowledgement (NLM_F_ACK), and the answers to all of them."""
    wanted, offset = 0, 0
    while offset < len(messages):
        offset += int.from_bytes(messages[offset : offset + 4], "little")
        wanted += 1
    link.send(messages)
    while wanted:
        answer, position = link.recv(65536), 0
        while position < len(answer):
            length = int.from_bytes(answer[position : position + 4], "little")
            kind = int.from_bytes(answer[position + 4 : position + 6], "little")
            if kind == 2:  # NLMSG_ERROR; 0 is an acknowledgement
                error = -int.from_bytes(answer[position + 16 : position + 20], "little", signed=True)
                if error:
                    raise OSError(error, os.strerror(error), what)
                wanted -= 1
            position += max(16, (length + 3) & ~3)
