"""The spawner: the one process with privileges. It makes sandboxes, starts processes in them, and ends them.

It has one thread, parses no SSH, knows no SQL, opens no socket to anywhere, and reads nothing from the network but
the messages of `protocol`, which it checks as if the gateway had been taken over: a name is a name, an id is a
number, a path is never given. What one connection made, no other can touch, and it ends with the connection.

When this process dies, the kernel kills every sandbox (PR_SET_PDEATHSIG on each PID 1) and the uplinks' keeper.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import signal
import socket
import sys as _sys
import traceback
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import asdict, dataclass, field
from typing import Any

from sandbox_ssh import capacity
from sandbox_ssh.errors import ProtocolError, SandboxError
from sandbox_ssh.sandbox import cgroup, namespaces, process
from sandbox_ssh.sandbox.holder import Holder, Holders
from sandbox_ssh.sandbox.idmap import Plan
from sandbox_ssh.sandbox.limits import Bounds
from sandbox_ssh.sandbox.loop import Future, Loop
from sandbox_ssh.sandbox.namespaces import NAMESPACES
from sandbox_ssh.sandbox.rootfs import HOST_IMAGE, Layout, write_notes
from sandbox_ssh.sandbox.uplink import UplinkClient
from sandbox_ssh.sandbox.usage import Usage, measure, processes
from sandbox_ssh.spawner import protocol
from sandbox_ssh.spawner.protocol import Capacity, Create, Destroy, Limit, Measure, Note, Request, Signal, Spawn

CREATE_TIMEOUT = 20.0
BALANCE_INTERVAL = 1.0  # seconds between two looks at who is busy
MAX_CHANNELS = 64  # of one sandbox at a time
MAX_SANDBOXES = 4096  # of one connection: no host carries more, and a gateway that was taken over is to stop somewhere
MAX_CONNECTIONS = 256  # of gateways: there are as many as workers
FEW = 64  # processes of a sandbox that are looked at here; more by a child, for there is one thread for everybody
MAX_UNSENT = 1000  # messages that a connection has not read: then it is hung or hostile
# The kernel frees namespaces some time after their last process: at a limit, the one before may still be counted.
AGAIN = (0.02, 0.05, 0.1, 0.2, 0.4)

Message = dict[str, Any]


@dataclass(slots=True)
class Sandbox:
    name: str
    connection: Connection
    holder: Holder
    image: str
    network: bool
    cgroup: cgroup.Leaf | None
    open_files: int
    builder: int = 0
    channel: socket.socket | None = None
    """To the builder and to PID 1, until that has executed."""
    init: int = 0
    """PID 1's pid, here; 0 before it exists and after it has died."""
    pidfd: int = -1
    pts: int = -1
    disk: int = -1
    notes: int = -1
    proc: int = -1
    state: str = "starting"  # -> running -> ending
    reason: str = "destroyed"
    channels: dict[int, int] = field(default_factory=dict)
    """Channel number -> pid."""
    cpu_seconds: float = 0.0
    """Of processes that have been waited for."""
    memory_peak: int = 0
    network_in: int = 0
    network_out: int = 0
    servers: int = 0
    """Processes of the server's in its cgroup."""
    last: Usage = field(default_factory=Usage)
    leaving: bool = False
    told: bool = True
    """Whether its end is to be told of: not, where the request for it was answered with an error."""
    gone: Future[None] = field(default_factory=Future)

    def add(self, usage: resource.struct_rusage) -> None:
        self.cpu_seconds += usage.ru_utime + usage.ru_stime
        self.memory_peak = max(self.memory_peak, usage.ru_maxrss * 1024)

    def add_network(self, counted: tuple[int, int]) -> None:
        self.network_in = max(self.network_in, counted[0])
        self.network_out = max(self.network_out, counted[1])

    def cause(self, seen: str) -> str:
        """What ended it, where something has died: the OOM killer takes the whole cgroup, one after the other."""
        killed = self.cgroup is not None and self.cgroup.number("memory.events", "oom_kill")
        return "out-of-memory" if killed else seen

    def look(self) -> Usage:
        return measure(self.cgroup, self.proc, self.disk, self.pts, self.servers)

    def measure(self, used: Usage) -> Message:
        """What it uses, for one who has looked; once its PID 1 is gone, what it has used in all."""
        if self.cgroup is None:
            # Time is of the living, and of those whose parent is the spawner; a child's goes to who waits for it.
            used.cpu_seconds += self.cpu_seconds
            used.memory_peak_bytes = max(self.memory_peak, used.memory_bytes)
        used.cpu_seconds = max(used.cpu_seconds, self.last.cpu_seconds)
        used.memory_peak_bytes = max(used.memory_peak_bytes or self.memory_peak, self.last.memory_peak_bytes)
        self.last = used
        return {**asdict(used), "network_in": self.network_in, "network_out": self.network_out}

    def close(self) -> None:
        for fd in (self.pidfd, self.pts, self.disk, self.notes, self.proc):
            if fd >= 0:
                os.close(fd)
        self.pidfd = self.pts = self.disk = self.notes = self.proc = -1


class Refusal(Exception):
    """Becomes an error reply."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class Connection:
    """One gateway worker: what it asks, and the sandboxes that are its own."""

    def __init__(self, spawner: Spawner, channel: socket.socket) -> None:
        self._spawner = spawner
        self._loop = spawner.loop
        self._channel = channel
        self._unsent: deque[bytes] = deque()
        self.sandboxes: dict[str, Sandbox] = {}
        self.open = True
        spawner.connections.add(self)
        channel.setblocking(False)
        self._loop.add_reader(channel.fileno(), self._readable)

    def close(self) -> None:
        if not self.open:
            return
        self.open = False
        self._spawner.connections.discard(self)
        self._loop.remove_reader(self._channel.fileno())
        self._loop.remove_writer(self._channel.fileno())
        self._channel.close()
        for sandbox in list(self.sandboxes.values()):
            self._spawner.end(sandbox, "destroyed")

    def _readable(self) -> None:
        try:
            # A gateway has no descriptor to give: what it sends all the same is closed unseen.
            data, fds, flags, _ = socket.recv_fds(
                self._channel, protocol.MAX_MESSAGE + 1, protocol.MAX_FDS, socket.MSG_CMSG_CLOEXEC
            )
            for fd in fds:
                os.close(fd)
        except BlockingIOError:
            return
        except OSError:
            self.close()
            return
        if not data:
            self.close()
            return
        try:
            if fds or flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
                raise ProtocolError("a message that is too long or carries descriptors")
            number, request = protocol.decode_request(data)
        except ProtocolError as error:
            # Not answered to the letter: the text may quote nothing of a hostile message but its type's name.
            _log(f"a gateway's connection is closed, for it sent {error}")
            self.send({"reply": -1, "error": "failed", "message": f"refused: {error}"})
            self.close()
            return
        self._loop.start(self._answer(number, request))

    async def _answer(self, number: int, request: Request) -> None:
        fds: list[int] = []
        try:
            reply, streams = await self._spawner.handle(self, request)
            if streams is not None:
                fds = streams.near
        except Refusal as refusal:
            reply, streams = {"error": refusal.code, "message": str(refusal)}, None
        except (OSError, SandboxError) as error:
            reply, streams = {"error": _code(error), "message": _sentence(error)}, None
        except Exception as error:  # one that nobody thought of must not be the end of all sandboxes
            _log(f"a request {request.type} failed: {traceback.format_exc()}")
            reply, streams = {"error": "failed", "message": f"{type(error).__name__}; see the server's log"}, None
        self.send({"reply": number, **reply}, fds)
        if streams is not None:
            streams.close()

    def send(self, message: Message, fds: list[int] | None = None) -> None:
        if not self.open:
            return
        data = protocol.encode(message)
        try:
            if fds:
                # Descriptors are never queued: their reply is small, and a gateway reads or is dropped.
                socket.send_fds(self._channel, [data], fds)
                return
            if not self._unsent:
                self._channel.send(data)
                return
        except BlockingIOError:
            if fds:
                _log("a gateway's connection is closed, for it does not read its replies")
                self._loop.call_later(0, self.close)
                return
        except OSError:
            self._loop.call_later(0, self.close)
            return
        self._unsent.append(data)
        self._loop.add_writer(self._channel.fileno(), self._writable)
        if len(self._unsent) > MAX_UNSENT:
            _log("a gateway's connection is closed, for it does not read its events")
            self._loop.call_later(0, self.close)

    def _writable(self) -> None:
        try:
            while self._unsent:
                self._channel.send(self._unsent[0])
                self._unsent.popleft()
        except BlockingIOError:
            return
        except OSError:
            self._loop.call_later(0, self.close)
        if self.open:
            self._loop.remove_writer(self._channel.fileno())


class Spawner:
    def __init__(
        self, loop: Loop, listener: socket.socket, host: namespaces.Host, plan: Plan, cgroups: cgroup.Cgroups,
        keeper: socket.socket, gateway_uid: int,
    ) -> None:  # fmt: skip
        self.loop = loop
        self._listener = listener
        self._host = host
        self._plan = plan
        self._holders = Holders(plan)
        self._cgroups = cgroups
        self._gateway_uid = gateway_uid
        self._names: dict[str, Sandbox] = {}
        self.connections: set[Connection] = set()
        self._uplinks = UplinkClient(loop, keeper, self._uplink_died, self._keeper_lost)
        listener.setblocking(False)
        loop.add_reader(listener.fileno(), self._accept)
        self._balance()

    def _balance(self) -> None:
        self._cgroups.balance(BALANCE_INTERVAL)
        self.loop.call_later(BALANCE_INTERVAL, self._balance)

    def _accept(self) -> None:
        try:
            channel, _ = self._listener.accept()
        except BlockingIOError:
            return
        except OSError as error:  # out of descriptors, say: it stays readable
            _log(f"a gateway's connection is not accepted for a second: {error.strerror}")
            self.loop.remove_reader(self._listener.fileno())
            self.loop.call_later(1.0, lambda: self.loop.add_reader(self._listener.fileno(), self._accept))
            return
        credentials = channel.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        uid = int.from_bytes(credentials[4:8], "little")
        if uid not in (self._gateway_uid, os.getuid()) or len(self.connections) >= MAX_CONNECTIONS:
            _log(f"a connection of uid {uid} is refused: {MAX_CONNECTIONS} of uid {self._gateway_uid} are accepted")
            channel.close()
            return
        Connection(self, channel).send({"event": "hello"})

    def _keeper_lost(self) -> None:
        _log("the keeper of uplinks has died; the spawner ends, and its parent starts both again")
        os._exit(1)

    def _uplink_died(self, name: str) -> None:
        sandbox = self._names.get(name)
        if sandbox is not None:
            self.end(sandbox, sandbox.cause("uplink-died"))

    # --- requests

    async def handle(self, connection: Connection, request: Request) -> tuple[Message, process.Streams | None]:
        match request:
            case Create():
                return await self._create(connection, request), None
            case Spawn():
                return await self._spawn(connection, request)
            case Signal():
                sandbox = self._own(connection, request.sandbox)
                if pid := sandbox.channels.get(request.channel):
                    process.send_signal(pid, request.signal)
                return {}, None
            case Destroy():
                self.end(self._own(connection, request.sandbox), "destroyed")
                return {}, None
            case Limit():
                await self._limit(request)
                return {}, None
            case Note():
                sandbox = self._own(connection, request.sandbox)
                if sandbox.notes >= 0:
                    write_notes(sandbox.notes, request.text)
                return {}, None
            case Measure():
                return await self._measure(self._own(connection, request.sandbox)), None
            case Capacity():
                return {"users": self._plan.users, "rlimits": capacity.own_rlimits()}, None

    def _own(self, connection: Connection, name: str) -> Sandbox:
        sandbox = connection.sandboxes.get(name)
        if sandbox is None:
            raise Refusal("unknown", f"there is no sandbox {name} of this connection")
        return sandbox

    async def _create(self, connection: Connection, request: Create) -> Message:
        if request.sandbox in self._names:
            raise Refusal("exists", f"a sandbox {request.sandbox} is live")
        if len(connection.sandboxes) >= MAX_SANDBOXES:
            raise Refusal("limit", f"a gateway has at most {MAX_SANDBOXES} sandboxes at a time")
        if request.image != HOST_IMAGE and not self._host.base.has_image(request.image):
            raise Refusal("unknown", f"there is no image {request.image}: see `sandbox-ssh image list`")
        sandbox = await self._again(lambda fresh: self._make(connection, request, fresh))
        inodes = {kind: os.stat(f"/proc/{sandbox.init}/ns/{kind}").st_ino for kind in NAMESPACES}
        if sandbox.state != "starting":
            raise Refusal("ended", "the sandbox ended while it was being made")
        sandbox.state = "running"
        return {"init_pid": sandbox.init, "namespaces": inodes}

    async def _again(self, make: Callable[[bool], Coroutine[Any, Any, Sandbox]]) -> Sandbox:
        """Try once more, for a moment, what a limit forbids. The request's own limits are fresh the first time only."""
        for number, pause in enumerate(AGAIN):
            try:
                return await make(number == 0)
            except OSError as error:
                # The clone that makes all of a sandbox's namespaces; a file system that is full stays so.
                if error.errno != errno.ENOSPC or not str(error.filename).startswith(("clone", "unshare")):
                    raise
            await self.loop.sleep(pause)
        return await make(False)

    async def _make(self, connection: Connection, request: Create, fresh: bool) -> Sandbox:
        if request.sandbox in self._names or not connection.open:  # also: the one before has not gone yet
            raise Refusal("exists", f"a sandbox {request.sandbox} is live")
        held = self._hold(request, fresh)
        try:
            leaf = self._cgroups.create(request.tenant, held.tenant.limits, request.user, held.limits, request.sandbox)
        except OSError:
            self._holders.let_go(held)
            raise
        sandbox = Sandbox(
            request.sandbox, connection, held, request.image, request.network == "uplink", leaf, request.open_files
        )
        self._names[sandbox.name] = connection.sandboxes[sandbox.name] = sandbox
        timer = self.loop.call_later(CREATE_TIMEOUT, lambda: self.end(sandbox, "destroyed"))
        try:
            await self._start(sandbox, request)
        except BaseException:
            sandbox.told = False
            self.end(sandbox, "destroyed")
            await sandbox.gone
            raise
        finally:
            self.loop.cancel(timer)
        return sandbox

    async def _start(self, sandbox: Sandbox, request: Create) -> None:
        layout = Layout(request.image, request.hostname, request.disk, request.inodes, request.ptys, request.notes)
        sandbox.builder, channel = namespaces.start(
            self._host, layout, sandbox.holder, self._bounds(sandbox), network=sandbox.network,
            cgroup=sandbox.cgroup.directory if sandbox.cgroup else None,
        )  # fmt: skip
        sandbox.channel = channel
        self.loop.on_exit(sandbox.builder, lambda status, usage: self._builder_exited(sandbox, status, usage))
        with channel:
            text, fds = await self._hear(channel)
            if not text.startswith("P"):
                raise _failure(text)
            sandbox.pts, sandbox.disk, sandbox.notes, netns = fds
            try:
                self._adopt_init(sandbox, int(text[1:]))
                if sandbox.network:
                    slirp = await self._uplinks.attach(sandbox.name, netns)
                    self.loop.start(self._adopt_slirp(sandbox, slirp))
            finally:
                os.close(netns)
            channel.send(b"+")
            text, fds = await self._hear(channel)
            if text != "M":
                raise _failure(text)
            (sandbox.proc,) = fds
            text, _ = await self._hear(channel)
            if text:
                raise _failure(text)

    def _bounds(self, sandbox: Sandbox) -> Bounds:
        return Bounds(sandbox.holder.limits, sandbox.open_files, self._cgroups.hold_memory)

    async def _measure(self, sandbox: Sandbox) -> Message:
        if sandbox.network and sandbox.state == "running":
            sandbox.add_network(await self._uplinks.count(sandbox.name))
        if sandbox.proc < 0 or processes(sandbox.proc) <= FEW:
            return sandbox.measure(sandbox.look())
        text = await self._in_child(lambda: json.dumps(asdict(sandbox.look())).encode())
        return sandbox.measure(Usage(**json.loads(text)) if text else sandbox.last)

    async def _limit(self, request: Limit) -> None:
        self._holders.limit(request.user, request.tenant, request.user_limits, request.tenant_limits)
        if self._cgroups.hold_anything:
            self._cgroups.note(request.tenant, request.tenant_limits, request.user, request.user_limits)

            def write() -> bytes:
                self._cgroups.limit(request.tenant, request.tenant_limits, request.user, request.user_limits)
                return b"+"

            # Whoever lowers memory.max reclaims, and waits for the OOM killer (mm/memcontrol.c, memory_max_write).
            if not await self._in_child(write):
                raise SandboxError("the limits of a cgroup could not be changed")

    async def _adopt_slirp(self, sandbox: Sandbox, pid: int) -> None:
        """What the network costs is the sandbox's: its processor time, and memory for its connections."""
        leaf = sandbox.cgroup
        if leaf is not None and self._cgroups.hold_anything:

            def move() -> bytes:
                leaf.adopt(pid)
                return b"+"

            sandbox.servers = len(await self._in_child(move))

    async def _in_child(self, work: Callable[[], bytes]) -> bytes:
        """Have a child do what takes long or waits; its answer of at most 64 KiB, empty where it failed."""
        read, write = os.pipe2(os.O_CLOEXEC)
        try:
            pid = os.fork()
            if pid == 0:
                try:
                    os.write(write, work())
                finally:
                    os._exit(0)
        finally:
            os.close(write)
        self.loop.on_exit(pid, lambda *_: None)
        try:
            await self.loop.readable(read, CREATE_TIMEOUT)
            return os.read(read, 65536)
        except TimeoutError:
            return b""
        finally:
            os.close(read)

    def _adopt_init(self, sandbox: Sandbox, pid: int) -> None:
        sandbox.init = pid
        self.loop.on_exit(pid, lambda _, usage: self._init_exited(sandbox, usage))
        if sandbox.init and sandbox.state == "starting":
            sandbox.pidfd = os.pidfd_open(pid)
            return
        if sandbox.init:
            os.kill(pid, signal.SIGKILL)
        raise Refusal("ended", "the sandbox ended while it was being made")

    async def _hear(self, channel: socket.socket) -> tuple[str, list[int]]:
        """One message of the builder or of PID 1; empty when it has executed, or died, which its exit tells."""
        await self.loop.readable(channel.fileno(), CREATE_TIMEOUT)
        data, fds, _, _ = socket.recv_fds(channel, 4096, 4, socket.MSG_CMSG_CLOEXEC)
        return data.decode(errors="replace"), fds

    async def _spawn(self, connection: Connection, request: Spawn) -> tuple[Message, process.Streams]:
        sandbox = self._own(connection, request.sandbox)
        if sandbox.state != "running":
            raise Refusal("ended", "the sandbox has ended")
        if request.channel in sandbox.channels:
            raise Refusal("exists", f"channel {request.channel} is live")
        if len(sandbox.channels) >= MAX_CHANNELS:
            raise Refusal("limit", f"a sandbox runs at most {MAX_CHANNELS} channels at a time; close one")
        ids = sandbox.holder.ids
        target = process.Target(
            sandbox.pidfd, sandbox.pts, ids.root if sandbox.image == HOST_IMAGE else ids.root_unpacked,
            self._host.groups, sandbox.cgroup.directory if sandbox.cgroup else None, self._bounds(sandbox),
        )  # fmt: skip
        streams = process.Streams(target, request.pty)
        try:
            sandbox.channels[request.channel] = 0
            pid = await self._start_process(sandbox, request, target, streams)
        except BaseException:
            sandbox.channels.pop(request.channel, None)
            streams.close()
            raise
        return {"pid": pid}, streams

    async def _start_process(
        self, sandbox: Sandbox, request: Spawn, target: process.Target, streams: process.Streams
    ) -> int:
        helper, report = process.start(target, streams, request.command, request.environment)
        self.loop.on_exit(helper, lambda _, usage: sandbox.add(usage))
        streams.close_far()
        try:
            await self.loop.readable(report, CREATE_TIMEOUT)
            head = os.read(report, 4)
            if len(head) < 4:
                raise Refusal("ended", "the sandbox has ended")
            pid = int.from_bytes(head, "little")
            # Its end must be told after the reply that names it, whichever comes first.
            replied: Future[None] = Future()
            self.loop.on_exit(
                pid,
                lambda status, usage: self.loop.start(self._exited(sandbox, request.channel, status, usage, replied)),
            )
            sandbox.channels[request.channel] = pid
            await self.loop.readable(report, CREATE_TIMEOUT)
            text = os.read(report, 2048).decode(errors="replace")
        finally:
            os.close(report)
        if text:
            raise Refusal("failed", text)
        self.loop.call_later(0, lambda: replied.set(None))
        return pid

    # --- ends

    async def _exited(
        self, sandbox: Sandbox, channel: int, status: int, usage: resource.struct_rusage, replied: Future[None]
    ) -> None:
        sandbox.add(usage)
        sandbox.channels.pop(channel, None)
        await replied
        killed = os.WIFSIGNALED(status)
        sandbox.connection.send({
            "event": "exited",
            "sandbox": sandbox.name,
            "channel": channel,
            "status": None if killed else os.WEXITSTATUS(status),
            "signal": signal.Signals(os.WTERMSIG(status)).name[3:] if killed else None,
            "core": killed and os.WCOREDUMP(status),
        })  # fmt: skip

    def end(self, sandbox: Sandbox, reason: str) -> None:
        """Kill a sandbox; what remains to be done follows when its PID 1 has been waited for."""
        if sandbox.state == "ending":
            return
        sandbox.state, sandbox.reason = "ending", reason
        for pid in (sandbox.builder, sandbox.init):
            if pid:
                os.kill(pid, signal.SIGKILL)
        if not sandbox.init and not sandbox.builder:
            self.loop.start(self._gone(sandbox))

    def _builder_exited(self, sandbox: Sandbox, status: int, usage: resource.struct_rusage) -> None:
        sandbox.builder = 0
        sandbox.add(usage)
        if status and sandbox.channel is not None:
            # It may have died between making PID 1 and telling of it: two that would wait for each other's word.
            with contextlib.suppress(OSError):
                sandbox.channel.shutdown(socket.SHUT_RDWR)
        if sandbox.state == "ending" and not sandbox.init:
            self.loop.start(self._gone(sandbox))

    def _init_exited(self, sandbox: Sandbox, usage: resource.struct_rusage) -> None:
        """The kernel has killed and freed everything in the pid namespace before its PID 1 could be waited for."""
        sandbox.init = 0
        sandbox.add(usage)
        if sandbox.state != "ending":
            sandbox.state, sandbox.reason = "ending", sandbox.cause("init-died")
        if not sandbox.builder:
            self.loop.start(self._gone(sandbox))

    async def _gone(self, sandbox: Sandbox) -> None:
        if self._names.get(sandbox.name) is not sandbox or sandbox.leaving:
            return  # its builder was killed, and what it said of PID 1 was read after that
        sandbox.leaving = True
        if sandbox.network:
            sandbox.add_network(await self._uplinks.release(sandbox.name))
        used = sandbox.measure(sandbox.look())
        sandbox.close()
        self.loop.start(self._remove_cgroup(sandbox.cgroup))
        self._holders.let_go(sandbox.holder)
        del self._names[sandbox.name]
        sandbox.connection.sandboxes.pop(sandbox.name, None)
        if sandbox.told:
            sandbox.connection.send({"event": "ended", "sandbox": sandbox.name, "reason": sandbox.reason, **used})
        sandbox.gone.set(None)

    async def _remove_cgroup(self, leaf: cgroup.Leaf | None) -> None:
        for _ in range(50):
            if self._cgroups.remove(leaf):
                break
            await self.loop.sleep(0.05)
        if leaf is not None:
            os.close(leaf.directory)

    def _hold(self, request: Create, fresh: bool) -> Holder:
        try:
            return self._holders.hold(
                request.user, request.tenant, request.user_limits, request.tenant_limits, fresh=fresh
            )
        except SandboxError as error:
            raise Refusal("limit", str(error)) from error


def _failure(text: str) -> OSError | SandboxError:
    """What builder or PID 1 said, `E<errno> <text>`, as the error that it was."""
    number, _, what = text[1:].partition(" ")
    if text.startswith("E") and number.isdecimal() and int(number):
        return OSError(int(number), os.strerror(int(number)), what)
    return SandboxError(f"the sandbox could not be made: {what or text or 'its builder died'}")


def _code(error: Exception) -> str:
    return (
        "limit"
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EMFILE, errno.EAGAIN, errno.EUSERS)
        else "failed"
    )


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno == errno.ENOSPC and not str(error.filename).startswith("clone"):
        return f"no room for the sandbox's own files ({error.filename}): its quotas `disk` and `inodes` are too small"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EUSERS):
        return (
            f"a limit on namespaces is reached ({error.filename}): your user's or your tenant's quota, see `quota` in "
            "a session, or the host's, which its administrator sees with `sandbox-ssh doctor`"
        )
    if isinstance(error, OSError) and error.errno == errno.EAGAIN:
        return f"a limit on processes is reached ({error.filename}): your user's or your tenant's quota, or the host's"
    if isinstance(error, TimeoutError):
        return f"the sandbox was not ready within {CREATE_TIMEOUT:.0f} s"
    return str(error)


def _log(text: str) -> None:
    print(f"sandbox-ssh[spawner]: {text}", file=_sys.stderr, flush=True)
