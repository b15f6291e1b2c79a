"""The parent of everything: binds the sockets, starts spawner and gateway workers, and starts them again.

    python -m sandbox_ssh.supervisor FD      FD: a memfd with the settings that `sandbox-ssh serve` worked out

It executes in place of `sandbox-ssh serve`, so that what stays resident is small: the standard library and no
configuration parser. It holds the listening sockets, so a connection that arrives while a worker is being started
again waits in the queue instead of being refused.

SIGTERM stops: workers first, which tell their sessions; then the spawner. SIGHUP goes to the workers.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from sandbox_ssh.errors import SandboxError
from sandbox_ssh.sandbox import cgroup, syscalls
from sandbox_ssh.sandbox.loop import Loop

START = 60.0
"""Seconds that a child gets to be ready."""

# A process that lives this long has started well: the next restart is immediate again.
_SETTLED = 10.0
_LONGEST_DELAY = 10.0


@dataclass(slots=True)
class Service:
    """A child process that is to run as long as we do."""

    name: str
    start: Callable[[], int]
    pid: int = 0
    started: float = 0.0
    failures: int = 0


@dataclass(frozen=True, slots=True)
class Settings:
    """What `sandbox-ssh serve` hands over; paths are absolute, times in seconds."""

    mode: str
    state_dir: str
    listen: list[str]
    workers: int
    gateway_uid: int
    gateway_gid: int
    gateway_arguments: list[str]
    """Options that a worker gets besides its number and descriptors."""
    shutdown_timeout: float
    visible: list[str]
    """What a gateway worker must be able to read: the program, its interpreter, the configuration, its state."""
    spawner: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)


class Supervisor:
    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.loop = Loop()
        self._stopping = False
        self._announced = False
        self._last_spawner = 0
        self._sockets = bind(settings.listen, settings.workers)
        self._directory = os.open(settings.state_dir, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self._spawner_listener = self._listen_for_gateways()
        self._spawner = Service("spawner", self._start_spawner)
        self._gateways = [
            Service(f"gateway {number}", lambda number=number: self._start_gateway(number))  # type: ignore[misc]
            for number in range(settings.workers)
        ]
        self._unready = {service.name for service in (self._spawner, *self._gateways)}
        syscalls.prctl(syscalls.PR_SET_CHILD_SUBREAPER, 1)  # what a killed child leaves behind is reaped here
        self._signals()

    def run(self) -> None:
        self._launch(self._spawner)
        for service in self._gateways:
            self._launch(service)
        self.loop.run()

    # --- signals

    def _signals(self) -> None:
        for number, handler in (
            (signal.SIGTERM, self._terminate),
            (signal.SIGINT, self._terminate),
            (signal.SIGHUP, self._reload),
        ):
            signal.signal(number, lambda *_, handler=handler: self.loop.call_later(0, handler))

    def _reload(self) -> None:
        notify("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
        for service in self._gateways:
            if service.pid:
                os.kill(service.pid, signal.SIGHUP)
        notify("READY=1")

    def _terminate(self) -> None:
        if self._stopping:
            return
        self._stopping = True
        notify("STOPPING=1")
        for service in self._gateways:
            if service.pid:
                os.kill(service.pid, signal.SIGTERM)
        # Workers close their sessions within the time-out, and their rows just after it.
        self.loop.call_later(self.settings.shutdown_timeout + 10, self._kill_gateways)
        self._stop_if_done()

    def _kill_gateways(self) -> None:
        for service in self._gateways:
            if service.pid:
                log(f"{service.name} did not end in time and is killed; the next start closes its sessions' records")
                os.kill(service.pid, signal.SIGKILL)

    def _stop_if_done(self) -> None:
        if any(service.pid for service in self._gateways):
            return
        if self._spawner.pid:
            os.kill(self._spawner.pid, signal.SIGKILL)  # its sandboxes end with it; it has nothing to say or to save
            return
        self.loop.start(self._leave_nothing())

    async def _leave_nothing(self) -> None:
        """The spawner is dead; its sandboxes are dying, and their cgroups can go when they have."""
        for _ in range(100):
            if cgroup.sweep(self._last_spawner):
                break
            await self.loop.sleep(0.02)
        self.loop.stop()

    # --- children

    def _launch(self, service: Service) -> None:
        if self._stopping:
            return
        service.started = time.monotonic()
        try:
            service.pid = service.start()
        except (OSError, SandboxError) as error:
            self._failed(service, str(error))
            return
        self.loop.on_exit(service.pid, lambda status, _: self._exited(service, status))

    def _exited(self, service: Service, status: int) -> None:
        if service is self._spawner:
            self._last_spawner = service.pid
        service.pid = 0
        if self._stopping:
            self._stop_if_done()
            return
        killed = os.WIFSIGNALED(status)
        how = f"was killed by signal {os.WTERMSIG(status)}" if killed else f"exited with {os.WEXITSTATUS(status)}"
        self._failed(service, how)

    def _failed(self, service: Service, how: str) -> None:
        settled = time.monotonic() - service.started > _SETTLED
        service.failures = 0 if settled else service.failures + 1
        if not self._announced and service.failures >= 3:
            log(f"{service.name} {how}; it does not start, so neither does the server (see the lines above)")
            self._stopping = True
            for other in (self._spawner, *self._gateways):
                if other.pid:
                    os.kill(other.pid, signal.SIGKILL)
            os._exit(1)
        delay = min(_LONGEST_DELAY, 0.05 * 2**service.failures)
        log(f"{service.name} {how}; it is started again in {delay:.1f} s")
        self.loop.call_later(delay, lambda: self._launch(service))

    def _listen_for_gateways(self) -> socket.socket:
        """The spawner's socket; it outlives the spawner, so that gateways find the next one at the same place."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        path = (
            f"/proc/self/fd/{self._directory}/run/spawner.sock"  # sun_path holds 108 bytes; a state_dir may be longer
        )
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        listener.bind(path)
        os.chmod(path, 0o600)
        os.chown(path, self.settings.gateway_uid, self.settings.gateway_gid)
        listener.listen(64)
        return listener

    def _start_spawner(self) -> int:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            try:
                os.fchdir(self._directory)
                _die_with(parent)
                _execute("sandbox_ssh.spawner", [str(theirs.fileno())], {"PATH": os.defpath}, [theirs.fileno()])
            finally:
                os._exit(1)
        theirs.close()
        socket.send_fds(ours, [json.dumps(self.settings.spawner).encode()], [self._spawner_listener.fileno()])
        self.loop.start(self._await_spawner(pid, ours))
        return pid

    async def _await_spawner(self, pid: int, channel: socket.socket) -> None:
        with channel:
            try:
                await self.loop.readable(channel.fileno(), START)
                answer = channel.recv(4096)
            except TimeoutError:
                answer = b"Eit was not ready in time"
        if answer == b"+":
            self._announce(self._spawner)
            return
        if answer:
            log(f"spawner did not start: {answer[1:].decode(errors='replace')}")
        if pid == self._spawner.pid:
            os.kill(pid, signal.SIGKILL)

    def _start_gateway(self, number: int) -> int:
        settings = self.settings
        ready, tell = os.pipe2(os.O_CLOEXEC)
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            try:
                if os.getuid() != settings.gateway_uid:
                    show(settings.visible, settings.gateway_uid, settings.gateway_gid)
                    os.setgroups([])
                    os.setresgid(settings.gateway_gid, settings.gateway_gid, settings.gateway_gid)
                    os.setresuid(settings.gateway_uid, settings.gateway_uid, settings.gateway_uid)
                syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)
                os.chdir("/")
                _die_with(parent)
                sockets = [listener.fileno() for listener in self._sockets[number]]
                arguments = ["--worker", str(number), "--ready-fd", str(tell), *settings.gateway_arguments]
                for fd in sockets:
                    arguments += ["--listen-fd", str(fd)]
                _execute("sandbox_ssh.gateway", arguments, settings.environment, [*sockets, tell])
            except OSError as error:
                log(f"gateway {number} cannot be started: {error}")
            finally:
                os._exit(1)
        os.close(tell)
        self.loop.start(self._await_gateway(self._gateways[number], pid, ready))
        return pid

    async def _await_gateway(self, service: Service, pid: int, ready: int) -> None:
        try:
            await self.loop.readable(ready, START)
            answer = os.read(ready, 1)
        except TimeoutError:
            log(f"{service.name} was not ready in time and is killed")
            if pid == service.pid:
                os.kill(pid, signal.SIGKILL)
            return
        finally:
            os.close(ready)
        if answer:
            self._announce(service)

    def _announce(self, service: Service) -> None:
        """Say that the server is up, once: when the spawner and all gateways have been ready."""
        self._unready.discard(service.name)
        if not self._unready and not self._announced:
            self._announced = True
            for listener in self._sockets[0]:
                print(f"listening on {format_address(listener.getsockname())}", flush=True)
            notify("READY=1")


def bind(addresses: list[str], workers: int) -> list[list[socket.socket]]:
    """For each worker a socket on every address; the kernel spreads connections over them (SO_REUSEPORT, socket(7))."""
    result: list[list[socket.socket]] = [[] for _ in range(workers)]
    for text in addresses:
        host, _, port = text.rpartition(":")
        host = host.strip("[]")
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        address: tuple[Any, ...] = (host, int(port))
        for sockets in result:
            listener = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if workers > 1:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            if family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            try:
                listener.bind(address)
            except OSError as error:
                hint = "; is another server there?" if error.errno == errno.EADDRINUSE else ""
                raise SandboxError(f"cannot listen on {text}: {error.strerror}{hint}") from error
            listener.listen(1024)
            address = listener.getsockname()  # port 0: the others take the one that the first was given
            sockets.append(listener)
    return result


def format_address(address: tuple[Any, ...]) -> str:
    host, port = address[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def show(paths: list[str], uid: int, gid: int) -> None:
    """Let an unprivileged user reach `paths` where a directory above them is closed, as /root is.

    In a mount namespace of its own: an empty, open directory over the closed one, and in it nothing but `paths`.
    Nothing is done where all of them can be reached.
    """
    closed = sorted({top for path in paths if (top := _closed_ancestor(path, uid, gid)) is not None}, key=len)
    if not closed:
        return
    syscalls.unshare(syscalls.CLONE_NEWNS)
    syscalls.mount(None, "/", None, syscalls.MS_REC | syscalls.MS_PRIVATE)
    for top in closed:
        inside = [path for path in paths if Path(path).is_relative_to(top)]
        trees = {
            path: syscalls.open_tree(syscalls.AT_FDCWD, path, syscalls.OPEN_TREE_CLONE | syscalls.AT_RECURSIVE)
            for path in inside
        }
        files = {path for path in inside if not os.path.isdir(path)}
        syscalls.mount("tmpfs", top, "tmpfs", syscalls.MS_NOSUID | syscalls.MS_NODEV, "mode=0755,size=1m")
        for path in sorted(trees, key=len):
            os.makedirs(os.path.dirname(path) if path in files else path, mode=0o755, exist_ok=True)
            if path in files and not os.path.exists(path):
                os.close(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o644))
            syscalls.move_mount(trees[path], path)
            os.close(trees[path])


def _closed_ancestor(path: str, uid: int, gid: int) -> str | None:
    """The topmost directory above `path` that this user may not search."""
    for parent in reversed(Path(path).parents):
        entry = parent.stat()
        shift = 6 if entry.st_uid == uid else 3 if entry.st_gid == gid else 0
        if not entry.st_mode >> shift & 1:
            return str(parent)
    return None


def _die_with(parent: int) -> None:
    syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _execute(module: str, arguments: list[str], environment: dict[str, str], fds: list[int]) -> NoReturn:
    for fd in fds:
        os.set_inheritable(fd, True)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    # -P: the working directory is not where modules come from.
    os.execve(sys.executable, [sys.executable, "-P", "-m", module, *arguments], environment)


def notify(*fields: str) -> None:
    """sd_notify(3), where systemd asks for it."""
    path = os.environ.get("NOTIFY_SOCKET")
    if not path:
        return
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.connect(f"\0{path[1:]}" if path.startswith("@") else path)
        channel.send("\n".join(fields).encode())


def log(text: str) -> None:
    print(f"sandbox-ssh: {text}", file=sys.stderr, flush=True)


def main() -> None:
    with os.fdopen(int(sys.argv[1])) as file:
        settings = Settings(**json.load(file))
    syscalls.set_process_name("sandbox-ssh")
    cgroup.move_aside()
    try:
        supervisor = Supervisor(settings)
    except (OSError, SandboxError) as error:
        log(f"the server cannot start: {error}")
        sys.exit(1)
    supervisor.run()


if __name__ == "__main__":
    main()
