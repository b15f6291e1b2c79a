"""A real server, real clients, real namespaces: what every end-to-end test starts from."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOTLESS_USER = "sandbox-ssh-test"
SINGLE_USER = "sandbox-ssh-one"  # no line in /etc/subuid: the tutorial's single-id map
DEADLINE = 20.0


def wait_until(condition: Callable[[], Any], what: str, seconds: float = DEADLINE) -> Any:
    """The first true value of `condition`; fails the test, saying what it waited for."""
    end = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > end:
            pytest.fail(f"waited {seconds:.0f} s for: {what}")
        time.sleep(0.02)


def processes() -> dict[int, tuple[int, str]]:
    """pid -> (parent's pid, name) of every process that is not a kernel thread."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                name, _, rest = (entry / "stat").read_text().rpartition(")")
                parent = int(rest.split()[1])
                if parent != 2 and int(entry.name) != 2:
                    found[int(entry.name)] = (parent, name.partition("(")[2])
    return found


def descendants(pid: int) -> set[int]:
    table = processes()
    result = {pid} if pid in table else set()
    while more := {child for child, (parent, _) in table.items() if parent in result} - result:
        result |= more
    return result


class Server:
    """`sandbox-ssh serve` on a free port, and the commands to use it with."""

    def __init__(
        self, directory: Path, mode: str, user: str | None, prefix: tuple[str, ...], client: tuple[str, ...]
    ) -> None:
        self.client = client
        self.mode = mode
        self.user = user
        self.directory = directory
        self.state = directory / "state"
        self.config: dict[str, str] = {}
        self.prefix = prefix
        self.process: subprocess.Popen[str] | None = None
        self.host, self.port = "127.0.0.1", 0
        self.key = directory / "key"
        self.log = directory / "log"
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.key], check=True)

    # --- the server

    def as_user(self, *command: str | Path) -> list[str]:
        words = [str(word) for word in command]
        if self.user is None:
            return [*self.prefix, *words]
        return [*self.prefix, "setpriv", f"--reuid={self.user}", f"--regid={self.user}", "--clear-groups", *words]

    @property
    def environment(self) -> dict[str, str]:
        home = pwd.getpwnam(self.user).pw_dir if self.user else os.environ.get("HOME", "/")
        return {
            "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": home,
            "SANDBOX_SSH_STATE_DIR": str(self.state),
            "SANDBOX_SSH_SERVER__MODE": self.mode,
            **self.config,
        }

    def start(self, listen: str = "127.0.0.1:0") -> Server:
        command = self.as_user(sys.executable, "-P", "-m", "sandbox_ssh", "serve", "--listen", listen)
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=log, env=self.environment, text=True, start_new_session=True
            )
        assert self.process.stdout is not None
        line = self.process.stdout.readline().strip()
        if not line.startswith("listening on "):
            pytest.fail(f"the server did not start: {line!r}\n{self.log.read_text()}")
        self.host, _, port = line.removeprefix("listening on ").rpartition(":")
        self.host, self.port = self.host.strip("[]"), int(port)
        return self

    def stop(self) -> None:
        if self.process is None:
            return
        tree = descendants(self.process.pid)
        self.process.terminate()
        try:
            self.process.wait(30)
        finally:
            if self.process.poll() is None:
                self.process.kill()
                self.process.wait()
            self.process = None
        wait_until(lambda: not tree & processes().keys(), f"the server's processes {tree} to end")

    def pids(self, name: str) -> list[int]:
        assert self.process is not None
        table = processes()
        return [pid for pid in descendants(self.process.pid) if table.get(pid, (0, ""))[1] == name]

    def descriptors(self) -> dict[int, int]:
        """How many descriptors each process of the server has, sandboxes and uplinks left out."""
        assert self.process is not None
        lasting = [
            self.process.pid,
            *self.pids("sandbox-spawner"),
            *self.pids("sandbox-uplink"),
            *self.pids("sandbox-gateway"),
        ]
        return {pid: len(os.listdir(f"/proc/{pid}/fd")) for pid in lasting}

    # --- its commands

    def cli(
        self, *arguments: str | Path, check: bool = True, input: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        command = self.as_user(sys.executable, "-P", "-m", "sandbox_ssh", *arguments)
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=120, input=input)
        if check and done.returncode:
            pytest.fail(f"sandbox-ssh {' '.join(map(str, arguments))}: {done.returncode}\n{done.stderr}")
        return done

    def json(self, *arguments: str | Path) -> Any:
        return json.loads(self.cli(*arguments, "--json").stdout)

    def add_user(self, name: str = "ada") -> None:
        public = self.directory / "key.pub"
        self.cli("user", "add", name, "--key", public)

    def sessions(self, *filters: str) -> list[dict[str, Any]]:
        result: list[dict[str, Any]] = self.json("session", "list", *filters)
        return result

    def latest(self) -> dict[str, Any]:
        return max(self.sessions(), key=lambda row: row["id"])

    # --- its clients

    def ssh_command(self, *words: str, user: str = "ada", options: tuple[str, ...] = ()) -> list[str]:
        known = self.directory / "known_hosts"
        return [
            *self.client, "ssh", "-F", "none", "-p", str(self.port), "-i", str(self.key), "-o", "IdentitiesOnly=yes",
            "-o", f"UserKnownHostsFile={known}", "-o", "StrictHostKeyChecking=accept-new", "-o", "BatchMode=yes",
            "-o", "LogLevel=ERROR", *options, f"{user}@{self.host}", *words,
        ]  # fmt: skip

    def ssh(
        self, *words: str, input: bytes = b"", timeout: float = 60, user: str = "ada", options: tuple[str, ...] = ()
    ) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            self.ssh_command(*words, user=user, options=options), input=input, capture_output=True, timeout=timeout,
            env={"PATH": os.environ["PATH"], "HOME": str(self.directory), "LANG": "C.UTF-8", "TERM": "xterm-256color"},
        )  # fmt: skip

    def run(self, script: str, **options: Any) -> str:
        """The output of a shell script in a sandbox; it must succeed."""
        done = self.ssh(script, **options)
        if done.returncode:
            pytest.fail(
                f"{script!r}: exit {done.returncode}\n{done.stdout.decode()}\n{done.stderr.decode()}\n{self.log.read_text()}"
            )
        return done.stdout.decode()

    def popen(
        self, *words: str, options: tuple[str, ...] = (), user: str = "ada", **kwargs: Any
    ) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            self.ssh_command(*words, options=options, user=user), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, **kwargs,
        )  # fmt: skip


def ordinary_user(name: str, ranges: bool) -> str:
    """A user that `script/test` makes; skips where it could not."""
    try:
        pwd.getpwnam(name)
    except KeyError:
        pytest.skip(f"no user {name}: run ./script/test as root, which makes it")
    has = any(line.startswith(f"{name}:") for line in Path("/etc/subuid").read_text().splitlines())
    if has != ranges:
        pytest.skip(f"user {name} {'needs' if ranges else 'must not have'} a range in /etc/subuid")
    return name


@pytest.fixture(scope="session")
def visible() -> tuple[str, ...]:
    """A command that lets an ordinary user read this checkout where a closed directory is above it."""
    return (sys.executable, "-P", str(Path(__file__).parent / "visible.py"))


@contextlib.contextmanager
def make_server(mode: str, prefix: tuple[str, ...] = (), client: tuple[str, ...] = ()) -> Iterator[Server]:
    """A server in a directory of its own; `service`, `rootless` or `single`; commands to run server and client with."""
    if os.getuid() != 0:
        pytest.skip("end-to-end tests start servers as root and as other users: run ./script/test as root")
    user = {"rootless": ROOTLESS_USER, "single": SINGLE_USER}.get(mode)
    if user:
        ordinary_user(user, ranges=mode == "rootless")
    directory = Path(tempfile.mkdtemp(prefix="sandbox-ssh-"))
    directory.chmod(0o755)
    server = Server(directory, "service" if mode == "service" else "rootless", user, prefix, client)
    if user:
        (directory / "state").mkdir(mode=0o700)
        shutil.chown(directory / "state", user, user)
    try:
        yield server
    finally:
        server.stop()
        shutil.rmtree(directory)


@pytest.fixture(scope="module", params=["service", "rootless", "single"])
def server(request: pytest.FixtureRequest, visible: tuple[str, ...]) -> Iterator[Server]:
    """A running server of each kind with a user `ada`, shared by a module's tests."""
    with make_server(request.param, () if request.param == "service" else visible) as made:
        made.add_user()
        yield made.start()


@pytest.fixture(scope="module")
def service() -> Iterator[Server]:
    """A running server in service mode with a user `ada`."""
    with make_server("service") as made:
        made.add_user()
        yield made.start()


@pytest.fixture
def own_server() -> Iterator[Server]:
    """A server of this test's own, in service mode, not yet started, with a user `ada`."""
    with make_server("service") as made:
        made.add_user()
        yield made


def end(process: subprocess.Popen[Any], number: int = signal.SIGKILL) -> None:
    process.send_signal(number)
    process.wait()
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream is not None:
            stream.close()


def _abandoned(cgroup: str) -> bool:
    """A spawner's cgroup is locked as long as it lives."""
    try:
        fd = os.open(cgroup, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(fd)
    return True


@pytest.fixture(scope="session", autouse=True)
def nothing_is_left() -> Iterator[None]:
    """After the last server has stopped there is no process, mount or cgroup that was not there before."""

    def mounts() -> set[str]:
        return {
            line.split(" - ")[1] + line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()
        }

    def cgroups() -> set[str]:
        return {str(path) for path in Path("/sys/fs/cgroup").glob("**/sandbox-ssh.*")}

    before, mounted, grouped = processes(), mounts(), cgroups()
    yield
    own = descendants(os.getpid())
    names = ("slirp4netns", "sandbox-spawner", "sandbox-uplink", "sandbox-gateway", "sandbox-ssh", "init", "catatonit")

    def left() -> list[tuple[int, str]]:
        table = processes()
        return [(pid, table[pid][1]) for pid in table.keys() - before.keys() - own if table[pid][1] in names]

    wait_until(lambda: not left(), f"no process of a server to be left: {left()}")
    assert mounts() == mounted
    wait_until(
        lambda: not [path for path in cgroups() - grouped if _abandoned(path)],
        f"no cgroup of a server to be left: {cgroups()}",
    )
