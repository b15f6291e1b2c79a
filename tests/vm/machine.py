"""A virtual machine with systemd and cgroup v2, emulated: nothing of the host but the CPU is needed.

Instructions are translated (-accel tcg), so all of it is about ten times slower than the host. What is measured here is
compared with what was measured here.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.vm import image

_BOOT_SECONDS = 120.0
_SLOWER_BY = 10  # nice(1)
# AVX, which glibc uses where it is, is slower than SSE where both are emulated.
_CPU = "Nehalem"

# Commands of `sandbox-ssh` one after the other, each in a process of its own that has its modules already: they take
# five seconds to load here.
_CLI = """
import importlib, json, os, sys, tempfile
for name in (
    "cli.doctor", "cli.quota", "cli.session", "cli.tenant", "cli.user", "config",
    "store.admission", "store.quotas", "store.sessions", "store.tenants", "store.usage", "store.users", "__main__",
):
    importlib.import_module(f"sandbox_ssh.{name}")
print("ready", flush=True)
for line in sys.stdin:
    request = json.loads(line)
    streams = [tempfile.TemporaryFile() for _ in range(3)]
    streams[0].write(request["input"].encode())
    streams[0].seek(0)
    pid = os.fork()
    if pid == 0:
        for number, stream in enumerate(streams):
            os.dup2(stream.fileno(), number)
        sys.stdin = open(0, closefd=False)
        sys.argv = ["sandbox-ssh", *request["arguments"]]
        sandbox_ssh = sys.modules["sandbox_ssh.__main__"]
        status = 0
        try:
            sandbox_ssh.main()
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            import traceback
            traceback.print_exc()
            status = 70
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    for stream in streams:
        stream.seek(0)
    print(json.dumps([status, streams[1].read().decode(), streams[2].read().decode()]), flush=True)
"""


@dataclass(frozen=True, slots=True)
class Done:
    """A command's end."""

    status: int
    stdout: str
    stderr: str


class Machine:
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.console = directory / "console"
        self._key = directory / "key"
        self._control = directory / "control"
        self._ssh_port, self._port = _free_ports(2)
        self._stack = contextlib.ExitStack()
        self._pid = 0
        self._cli: subprocess.Popen[str] | None = None
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self._key], check=True)

    @contextlib.contextmanager
    def running(self) -> Iterator[Machine]:
        disk, kernel, initrd = image.make(self.directory, self.public_key)
        command = [
            "setpriv", "--pdeathsig", "KILL",
            "qemu-system-x86_64", "-accel", "tcg,thread=multi", "-cpu", _CPU, "-smp", "2", "-m", "2048",
            "-name", "vm,debug-threads=on", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
            "-kernel", kernel, "-initrd", initrd,
            "-append", "console=ttyS0 root=/dev/vda rw panic=-1 mitigations=off loglevel=4",
            "-drive", f"file={disk},format=raw,if=virtio,cache=unsafe",
            "-device", "virtio-rng-pci", "-serial", f"file:{self.console}",
            "-netdev", "user,id=net,net=192.0.2.0/24,restrict=on,"
            f"hostfwd=tcp:127.0.0.1:{self._ssh_port}-:22,hostfwd=tcp:127.0.0.1:{self._port}-:2222",
            "-device", "virtio-net-pci,netdev=net",
        ]  # fmt: skip
        with self._stack as stack:
            machine = stack.enter_context(_process([str(word) for word in command]))
            stack.enter_context(self._connected(machine))
            self._pid = machine.pid
            _yield_to_clients(machine.pid)
            yield self

    @contextlib.contextmanager
    def _connected(self, machine: subprocess.Popen[str]) -> Iterator[None]:
        """One connection for all that the tests do as root: each would cost a second."""
        end = time.monotonic() + _BOOT_SECONDS
        while True:
            command = ["setpriv", "--pdeathsig", "KILL", *self._as_root("-N", "-M", "-o", "ConnectTimeout=5")]
            with _process(command) as master:
                while not self._control.exists() and master.poll() is None and time.monotonic() < end:
                    time.sleep(0.1)
                if self._control.exists():
                    yield
                    return
                assert master.stdout is not None
                said = master.stdout.read() if master.poll() is not None else "nothing"
            if machine.poll() is not None or time.monotonic() > end:
                assert machine.stdout is not None
                said += machine.stdout.read() if machine.poll() is not None else ""
                pytest.fail(f"the machine does not let ssh in: {said}\n{self.last_of_console()}")
            time.sleep(0.2)

    def cpu_seconds(self) -> float:
        """What the machine has had of the host's CPUs (proc(5), /proc/PID/stat)."""
        fields = Path(f"/proc/{self._pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    @property
    def public_key(self) -> str:
        return self._key.with_suffix(".pub").read_text()

    def last_of_console(self) -> str:
        return self.console.read_text(errors="replace")[-4000:] if self.console.exists() else "no console"

    # --- as its administrator

    def _as_root(self, *words: str) -> list[str]:
        return [*self._ssh(self._ssh_port), "-o", f"ControlPath={self._control}", *words, "root@127.0.0.1"]

    def try_(self, script: str, input: str = "", timeout: float = 120) -> Done:
        """Run a shell script as root."""
        done = subprocess.run(
            [*self._as_root(), script], input=input, capture_output=True, text=True, timeout=timeout
        )  # fmt: skip
        return Done(done.returncode, done.stdout, done.stderr)

    def run(self, script: str, input: str = "", timeout: float = 120) -> str:
        """The output of a shell script as root; it must succeed."""
        done = self.try_(script, input, timeout)
        if done.status:
            pytest.fail(f"{script!r}: exit {done.status}\n{done.stdout}\n{done.stderr}\n{self.last_of_console()}")
        return done.stdout

    def try_cli(self, *arguments: str, input: str = "") -> Done:
        """`sandbox-ssh` as root."""
        if self._cli is None:
            python = f"/{image.INSTALLED}/.venv/bin/python"
            command = [*self._as_root(), f"exec {python} -P -c {shlex.quote(_CLI)}"]
            self._cli = self._stack.enter_context(_process(command))
            assert self._cli.stdout is not None
            said = self._cli.stdout.readline()
            assert said == "ready\n", said + self._cli.stdout.read()
        assert self._cli.stdin is not None and self._cli.stdout is not None
        print(json.dumps({"arguments": arguments, "input": input}), file=self._cli.stdin, flush=True)
        return Done(*json.loads(self._cli.stdout.readline()))

    def cli(self, *arguments: str, input: str = "") -> str:
        done = self.try_cli(*arguments, input=input)
        if done.status:
            pytest.fail(f"sandbox-ssh {' '.join(arguments)}: {done.status}\n{done.stderr}")
        return done.stdout

    def json(self, *arguments: str) -> Any:
        return json.loads(self.cli(*arguments, "--json"))

    def add_user(self, name: str, *quotas: str, tenant: str = "default") -> None:
        """A user whom the tests' key lets in."""
        self.cli("user", "add", name, "--tenant", tenant, "--key", "-", input=self.public_key)
        if quotas:
            self.cli("quota", "set", "--user", name, *quotas)

    # --- as its users

    def _ssh(self, port: int) -> list[str]:
        return [
            "ssh", "-F", "none", "-p", str(port), "-i", str(self._key), "-o", "IdentitiesOnly=yes",
            "-o", f"UserKnownHostsFile={self.directory}/known_hosts.{port}", "-o", "StrictHostKeyChecking=accept-new",
            "-o", "BatchMode=yes", "-o", "LogLevel=ERROR",
        ]  # fmt: skip

    def ssh(self, user: str, *words: str, timeout: float = 60) -> Done:
        done = subprocess.run(
            [*self._ssh(self._port), f"{user}@127.0.0.1", *words],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout,
        )  # fmt: skip
        return Done(done.returncode, done.stdout, done.stderr)

    @contextlib.contextmanager
    def client(self, user: str, *words: str, options: tuple[str, ...] = ()) -> Iterator[subprocess.Popen[str]]:
        """A client that is still there while the test goes on."""
        command = ["setpriv", "--pdeathsig", "KILL", *self._ssh(self._port), *options, f"{user}@127.0.0.1", *words]
        with _process(command, stderr=subprocess.PIPE) as process:
            yield process


@contextlib.contextmanager
def _process(command: list[str], stderr: int = subprocess.STDOUT) -> Iterator[subprocess.Popen[str]]:
    """A process that does not outlive this block."""
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True
    ) as process:  # fmt: skip
        try:
            yield process
        finally:
            process.kill()


def _free_ports(number: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(number)]
        return [one.getsockname()[1] for one in sockets]


def _yield_to_clients(pid: int) -> None:
    """A server's clients run on CPUs of their own. Here they share the machine's, which may not hold them up."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        if (task / "comm").read_text().startswith("CPU "):
            os.setpriority(os.PRIO_PROCESS, int(task.name), _SLOWER_BY)


@contextlib.contextmanager
def boot() -> Iterator[Machine]:
    """A machine that is gone afterwards, with its disk."""
    image.require()
    with (
        tempfile.TemporaryDirectory(prefix="sandbox-ssh-vm-", dir="/var/tmp") as directory,
        Machine(Path(directory)).running() as machine,
    ):
        yield machine
