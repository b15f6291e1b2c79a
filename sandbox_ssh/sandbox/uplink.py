"""Uplinks: a sandbox's way out, in a net namespace that its tenant has no right over.

    host net namespace     slirp4netns (root of U: an ordinary id of the host)
                                |
    E, owned by U              tap0 -- br0 -- veth0     nft `table bridge`, policy drop
                                               |
    N, owned by the tenant                    tap0       10.0.2.100/24, gateway 10.0.2.2, DNS 10.0.2.3

Why not slirp4netns in the tenant's own namespace, as its manual shows: libslirp never checks where a guest's packet
goes (socket.c, sotranslate_out), so a tenant who is root there reaches the host's 127.0.0.1 by a raw frame or by
`route_localnet`, whatever `--disable-host-loopback` says. Here the filter sits between them, a layer below IP.

U is one user namespace for all uplinks: slirp4netns needs root in a namespace for its own sandbox, and must not be
the host's, for that sandbox still shows /run. It has no file, no capability on the host, and no tenant's id.

An uplink serves one sandbox and is thrown away: connections of the one before could still deliver. A few are kept
ready, for building one takes longer than the rest of a login.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import socket
from dataclasses import dataclass
from typing import Any

from sandbox_ssh.errors import SandboxError
from sandbox_ssh.sandbox import netlink, syscalls
from sandbox_ssh.sandbox.holder import become_root, new_user_namespace
from sandbox_ssh.sandbox.idmap import Plan
from sandbox_ssh.sandbox.loop import Future, Loop
from sandbox_ssh.sandbox.namespaces import die_with_spawner, netlink_request

# Never the way out, whatever the host's own addresses are: this network, private use, shared, loopback, link-local
# and cloud metadata, IETF protocol assignments, documentation, 6to4 relays, benchmarking, multicast, reserved,
# broadcast (RFC 6890, RFC 8190).
NEVER = (
    "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24",
    "192.168.0.0/16", "198.18.0.0/15", "224.0.0.0/3",
)  # fmt: skip

# Priority -200, NF_BR_PRI_FILTER_BRIDGED: where br_netfilter is loaded, as on every Docker host, it takes a packet at
# priority 0, and the bridge's own chains of that priority or lower that come after it are never asked
# (net/bridge/br_netfilter_hooks.c, br_nf_hook_thresh). At 0 the filter was bypassed in one uplink of four, by a race.
_FILTER = f"""
table bridge egress {{
    set never {{
        type ipv4_addr; flags interval; auto-merge
        elements = {{ %s }}
    }}
    chain out {{
        ether saddr != {netlink.MAC} counter drop
        arp saddr ip {netlink.ADDRESS} accept
        ether type != ip counter drop
        ip saddr != {netlink.ADDRESS} counter drop
        ip daddr {netlink.RESOLVER} meta l4proto {{ tcp, udp }} th dport 53 accept
        ip daddr @never counter drop
        accept
    }}
    chain forward {{
        type filter hook forward priority -200; policy drop
        iifname "tap0" oifname "veth0" accept
        iifname "veth0" oifname "tap0" jump out
    }}
    chain input {{
        type filter hook input priority -200; policy drop
    }}
    chain output {{
        type filter hook output priority -200; policy drop
    }}
}}
"""
_READY_TIMEOUT = 10.0
_COUNTED_WITHIN = 2.0
_OPEN_FILES = 4096  # connections of one sandbox, roughly: slirp4netns holds a socket for each


@dataclass(slots=True)
class Uplink:
    slirp: int
    """slirp4netns's pid."""
    leave: int
    """Write end of a pipe: slirp4netns exits when it is closed."""
    link: socket.socket
    """Netlink in E, opened by root of S: it may also act on N."""
    sandbox: str | None = None
    """Whose it is, once it is somebody's."""


class Keeper:
    """The process that builds and holds uplinks, beside the spawner: one talks to it as `UplinkClient` does."""

    def __init__(self, loop: Loop, channel: socket.socket, plan: Plan, messages: netlink.Messages, ready: int) -> None:
        self._loop = loop
        self._channel = channel
        self._groups = plan.groups
        self._messages = messages
        self._wanted = ready
        self._userns = new_user_namespace(plan.uplink, plan.groups)
        self._ready: list[Uplink] = []
        self._building = 0
        self._failures = 0
        self._paused = False
        self._waiting: list[Future[Uplink]] = []
        self._attaching: set[str] = set()
        self._used: dict[str, Uplink] = {}
        loop.add_reader(channel.fileno(), self._request)
        self._refill()

    def _request(self) -> None:
        try:
            data, fds, _, _ = socket.recv_fds(self._channel, 4096, 1, socket.MSG_CMSG_CLOEXEC)
        except ConnectionResetError:
            data = b""
        if not data:
            self._loop.stop()  # the spawner has gone; slirp4netns follows when our descriptors close
            return
        message = json.loads(data)
        if message["type"] == "attach":
            self._loop.start(self._attach(message["sandbox"], fds[0]))
        elif message["type"] == "count":
            self._say(type="counted", sandbox=message["sandbox"], **self._count(message["sandbox"]))
        else:
            counted = self._count(message["sandbox"])
            self._release(message["sandbox"])
            self._say(type="released", sandbox=message["sandbox"], **counted)

    def _count(self, sandbox: str) -> dict[str, int]:
        """Bytes that have crossed the sandbox's tap: zeros where it has none, or none any more."""
        uplink = self._used.get(sandbox)
        if uplink is not None:
            with contextlib.suppress(OSError):
                uplink.link.send(self._messages.tap_counters)
                received, sent = netlink.parse_counters(uplink.link.recv(65536))
                return {"received": received, "sent": sent}
        return {"received": 0, "sent": 0}

    def _say(self, **message: Any) -> None:
        with contextlib.suppress(OSError):
            self._channel.send(json.dumps(message).encode())

    async def _attach(self, sandbox: str, netns: int) -> None:
        self._attaching.add(sandbox)
        try:
            uplink = await self._take()
            if sandbox not in self._attaching:  # it has ended meanwhile
                self._ready.append(uplink)
                return
            uplink.sandbox = sandbox
            self._used[sandbox] = uplink
            netlink_request(uplink.link, self._messages.veth_to(netns), "creating the veth pair")
            self._say(type="attached", sandbox=sandbox, slirp=uplink.slirp)
        except (OSError, SandboxError) as error:
            self._release(sandbox)
            self._say(type="failed", sandbox=sandbox, message=str(error))
        finally:
            os.close(netns)
            self._attaching.discard(sandbox)
            self._refill()

    async def _take(self) -> Uplink:
        if self._ready:
            return self._ready.pop(0)
        future: Future[Uplink] = Future()
        self._waiting.append(future)
        if self._building < len(self._waiting):
            self._building += 1
            self._loop.start(self._build())
        return await future

    def _release(self, sandbox: str) -> None:
        self._attaching.discard(sandbox)
        uplink = self._used.pop(sandbox, None)
        if uplink is not None:
            self._discard(uplink)

    @staticmethod
    def _discard(uplink: Uplink) -> None:
        with contextlib.suppress(OSError):
            os.close(uplink.leave)
        uplink.leave = -1
        uplink.link.close()

    def _refill(self) -> None:
        while (
            not self._paused
            and len(self._ready) + self._building - len(self._waiting) < self._wanted
            and self._building < 2
        ):
            self._building += 1
            self._loop.start(self._build())

    def _resume(self) -> None:
        self._paused = False
        self._refill()

    async def _build(self) -> None:
        try:
            uplink = await self._make()
            self._failures = 0
        except (OSError, SandboxError) as error:
            self._building -= 1
            self._failures += 1
            if self._waiting:
                self._waiting.pop(0).fail(SandboxError(f"the network of the sandbox could not be made: {error}"))
            # A cause that passes (memory, say) must not be met with a busy loop; who waits still tries at once.
            self._paused = True
            self._loop.call_later(min(30.0, 0.1 * 2 ** min(self._failures, 10)), self._resume)
            return
        self._building -= 1
        if self._waiting:
            self._waiting.pop(0).set(uplink)
        else:
            self._ready.append(uplink)
        self._refill()

    async def _make(self) -> Uplink:
        filter_pid, e = self._start_filter()
        link: socket.socket | None = None
        try:
            filtered: Future[int] = Future()
            self._loop.on_exit(filter_pid, lambda status, _: filtered.set(status))
            self._loop.call_later(_READY_TIMEOUT, lambda: _kill_unless(filtered, filter_pid))
            link = self._netlink_in(e)
            slirp, ready, leave, complaints = self._start_slirp(e)
        except BaseException:
            if link is not None:
                link.close()
            raise
        finally:
            os.close(e)
        uplink = Uplink(slirp, leave, link)
        self._loop.on_exit(slirp, lambda status, _: self._slirp_died(uplink))
        try:
            await self._loop.readable(ready, _READY_TIMEOUT)
            if os.read(ready, 1) != b"1":
                text = os.read(complaints, 2048).decode(errors="replace").split("\n")
                raise SandboxError(f"slirp4netns did not start: {'; '.join(filter(None, text)) or 'it said nothing'}")
            if await filtered != 0:
                raise SandboxError(
                    "nft refused the filter of the uplink: is the kernel's bridge family there (doctor)?"
                )
            # The bridge comes last: no frame crosses it before its filter is there.
            netlink_request(link, self._messages.bridge, "creating the bridge")
            netlink_request(link, self._messages.attach_tap, "attaching slirp4netns's tap to the bridge")
        except TimeoutError as error:
            self._discard(uplink)
            raise SandboxError(f"slirp4netns was not ready within {_READY_TIMEOUT:.0f} s") from error
        except BaseException:
            self._discard(uplink)
            raise
        finally:
            os.close(ready)
            os.close(complaints)
        return uplink

    def _start_filter(self) -> tuple[int, int]:
        """A child that makes E, and becomes nft in it. Returns its pid and a descriptor of E."""
        rules = os.memfd_create("egress.nft")
        os.write(rules, (_FILTER % ", ".join((*NEVER, *_own_addresses()))).encode())
        os.lseek(rules, 0, os.SEEK_SET)
        ours, theirs = socket.socketpair()
        pid = os.fork()
        if pid == 0:
            try:
                ours.close()  # so that `theirs` ends when the keeper dies
                self._enter_uplink_namespace()
                syscalls.prctl(syscalls.PR_SET_DUMPABLE, 1)  # for /proc/PID/ns/net; it holds no secret
                syscalls.unshare(syscalls.CLONE_NEWNET)
                theirs.send(b"+")
                if theirs.recv(1) == b"+":
                    _execute("nft", ["-f", "-"], stdin=rules)
            finally:
                os._exit(1)
        os.close(rules)
        theirs.close()
        with ours:
            if ours.recv(1) != b"+":
                raise SandboxError("the net namespace of the uplink could not be made")
            e = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
            ours.send(b"+")
        return pid, e

    def _netlink_in(self, e: int) -> socket.socket:
        """A netlink socket in E, opened by root of S: the kernel asks for the opener's rights over N too.

        By a child, for rootless there is no way back into the host's net namespace.
        """
        ours, theirs = socket.socketpair()
        pid = os.fork()
        if pid == 0:
            try:
                syscalls.setns(e, syscalls.CLONE_NEWNET)
                made = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
                socket.send_fds(theirs, [b"+"], [made.fileno()])
            finally:
                os._exit(0)
        theirs.close()
        with ours:
            _, fds, _, _ = socket.recv_fds(ours, 1, 1, socket.MSG_CMSG_CLOEXEC)
        os.waitpid(pid, 0)
        if not fds:
            raise SandboxError("the net namespace of the uplink could not be entered")
        link = socket.socket(fileno=fds[0])
        link.settimeout(5)
        return link

    def _start_slirp(self, e: int) -> tuple[int, int, int, int]:
        ready_read, ready_write = os.pipe2(os.O_CLOEXEC)
        exit_read, exit_write = os.pipe2(os.O_CLOEXEC)
        # After the start nobody reads what it says, and the inherited disposition ignores SIGPIPE: a tenant's
        # traffic cannot make it fill a file or a log.
        complain_read, complain_write = os.pipe2(os.O_CLOEXEC)
        pid = os.fork()
        if pid == 0:
            try:
                self._enter_uplink_namespace()
                resource.setrlimit(resource.RLIMIT_NOFILE, (_OPEN_FILES, _OPEN_FILES))
                resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
                for fd in (e, ready_write, exit_read):
                    os.set_inheritable(fd, True)
                arguments = [
                    f"--mtu={netlink.MTU}", "--disable-host-loopback", "--enable-sandbox", "--enable-seccomp",
                    f"--ready-fd={ready_write}", f"--exit-fd={exit_read}", "--netns-type=path",
                    f"/proc/self/fd/{e}", "tap0",
                ]  # fmt: skip
                _execute("slirp4netns", arguments, stderr=complain_write)
            finally:
                os._exit(1)
        for fd in (ready_write, exit_read, complain_write):
            os.close(fd)
        return pid, ready_read, exit_write, complain_read

    def _enter_uplink_namespace(self) -> None:
        syscalls.setns(self._userns, syscalls.CLONE_NEWUSER)
        become_root(self._groups)

    def _slirp_died(self, uplink: Uplink) -> None:
        if uplink.leave == -1:
            return
        self._discard(uplink)
        if uplink in self._ready:
            self._ready.remove(uplink)
            self._loop.call_later(1.0, self._refill)
        elif uplink.sandbox is not None:
            self._used.pop(uplink.sandbox, None)
            self._say(type="died", sandbox=uplink.sandbox)


def _kill_unless(done: Future[int], pid: int) -> None:
    if not done.done:
        os.kill(pid, signal.SIGKILL)


def _execute(program: str, arguments: list[str], *, stdin: int | None = None, stderr: int | None = None) -> None:
    null = os.open("/dev/null", os.O_RDWR)
    for number, fd in ((0, stdin), (1, None), (2, stderr)):
        os.dup2(null if fd is None else fd, number)
    os.execvpe(program, [program, *arguments], {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C"})


def _own_addresses() -> list[str]:
    """Every IPv4 address of the host, from the kernel's table of local routes (proc(5), /proc/net/fib_trie)."""
    found: set[str] = set()
    address = ""
    with open("/proc/net/fib_trie") as table:
        for line in table:
            _, mark, text = line.partition("|-- ")
            if mark:
                address = text.strip()
            elif "/32 host LOCAL" in line:
                found.add(address)
    return sorted(found)


def start_keeper(plan: Plan, messages: netlink.Messages, ready: int, spawner_pidfd: int) -> tuple[int, socket.socket]:
    """Fork the keeper; returns its pid and the socket to it."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = os.fork()
    if pid:
        theirs.close()
        return pid, ours
    try:
        # Else what others wait for the spawner to close would stay open as long as the keeper, or a child of it.
        syscalls.close_all_but(0, 1, 2, theirs.fileno(), spawner_pidfd)
        die_with_spawner(spawner_pidfd)
        syscalls.set_process_name("sandbox-uplink")
        loop = Loop()
        Keeper(loop, theirs, plan, messages, ready)
        loop.run()
        os._exit(0)
    except BaseException as error:
        print(f"sandbox-ssh: the keeper of uplinks failed: {error}", flush=True)
    finally:
        os._exit(1)


class UplinkClient:
    """The spawner's side of the keeper."""

    def __init__(self, loop: Loop, channel: socket.socket, on_died: Any, on_lost: Any) -> None:
        self._loop = loop
        self._channel = channel
        self._waiting: dict[str, Future[int]] = {}
        self._counting: dict[str, Future[tuple[int, int]]] = {}
        self._on_died = on_died
        self._on_lost = on_lost
        loop.add_reader(channel.fileno(), self._receive)

    def attach(self, sandbox: str, netns: int) -> Future[int]:
        """Give a net namespace a tap0 with an uplink; slirp4netns's pid, or fails with `SandboxError`."""
        future: Future[int] = Future()
        self._waiting[sandbox] = future
        self._send([netns], type="attach", sandbox=sandbox)
        return future

    async def count(self, sandbox: str) -> tuple[int, int]:
        """Bytes that have come in and gone out through the sandbox's tap."""
        return await self._counted(sandbox, "count")

    async def release(self, sandbox: str) -> tuple[int, int]:
        """Throw the sandbox's uplink away, or forget that one was asked for; what it has counted."""
        future = self._waiting.pop(sandbox, None)
        if future is not None:
            future.fail(SandboxError("the sandbox has ended"))
        return await self._counted(sandbox, "release")

    async def _counted(self, sandbox: str, what: str) -> tuple[int, int]:
        # Replies come in the order of the questions; who asks for the same at once is answered by the first.
        before = self._counting.get(sandbox)
        future: Future[tuple[int, int]] = Future()
        self._counting[sandbox] = future
        if before is not None:
            before.set((0, 0))
        timer = self._loop.call_later(_COUNTED_WITHIN, lambda: future.set((0, 0)))
        self._send([], type=what, sandbox=sandbox)
        try:
            return await future
        finally:
            self._loop.cancel(timer)
            if self._counting.get(sandbox) is future:
                del self._counting[sandbox]

    def _send(self, fds: list[int], **message: Any) -> None:
        try:
            socket.send_fds(self._channel, [json.dumps(message).encode()], fds)
        except OSError:
            self._on_lost()

    def _receive(self) -> None:
        try:
            data = self._channel.recv(4096)
        except ConnectionResetError:
            data = b""
        if not data:
            self._on_lost()
            return
        message = json.loads(data)
        if message["type"] == "died":
            self._on_died(message["sandbox"])
            return
        if message["type"] in ("counted", "released"):
            counted = self._counting.get(message["sandbox"])
            if counted is not None:
                counted.set((message["received"], message["sent"]))
            return
        future = self._waiting.pop(message["sandbox"], None)
        if future is None:
            return
        if message["type"] == "attached":
            future.set(message["slirp"])
        else:
            future.fail(SandboxError(message["message"]))
