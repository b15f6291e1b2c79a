"""What is measured: servers that run a command for an SSH client, each in a directory and on a port of its own."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

BWRAP = """\
#!/bin/sh
exec bwrap --unshare-all --die-with-parent --ro-bind /usr /usr --symlink usr/bin /bin --symlink usr/sbin /sbin \\
    --symlink usr/lib /lib --symlink usr/lib64 /lib64 --proc /proc --dev /dev --tmpfs /tmp \\
    --tmpfs /root --chdir /root --hostname sandbox --uid 0 --gid 0 /bin/sh -c "${SSH_ORIGINAL_COMMAND:-exec sh}"
"""


class Target:
    """A server that is started and stopped here, and how to log in to it."""

    name = ""

    def __init__(self, directory: Path) -> None:
        self.directory = directory / self.name.replace(" ", "-").replace("+", "-")
        self.directory.mkdir()
        self.directory.chmod(0o755)
        self.key = directory / "key"
        self.port = free_port()
        self.user = "root"
        self.process: subprocess.Popen[str] | None = None

    def command(self) -> list[str]:
        raise NotImplementedError

    def start(self) -> None:
        with (self.directory / "log").open("w") as log:
            self.process = subprocess.Popen(self.command(), stdout=log, stderr=log, text=True)
        known = self.directory / "known_hosts"
        for _ in range(300):
            scan = subprocess.run(
                ["ssh-keyscan", "-t", "ed25519", "-p", str(self.port), "127.0.0.1"], capture_output=True, check=False
            )
            if scan.stdout:
                known.write_bytes(scan.stdout)
                return
            if self.process.poll() is not None:
                break
            time.sleep(0.1)
        sys.exit(f"{self.name} did not start:\n{(self.directory / 'log').read_text()}")

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait(60)

    def ssh(self, *words: str, options: tuple[str, ...] = ()) -> list[str]:
        return [
            "ssh", "-F", "none", "-p", str(self.port), "-i", str(self.key), "-o", "IdentitiesOnly=yes", "-o",
            f"UserKnownHostsFile={self.directory / 'known_hosts'}", "-o", "BatchMode=yes", "-o", "LogLevel=ERROR",
            *options, f"{self.user}@127.0.0.1", *words,
        ]  # fmt: skip


class Sshd(Target):
    name = "sshd"
    forced = ""

    def command(self) -> list[str]:
        Path("/run/sshd").mkdir(exist_ok=True)
        keys = self.directory / "authorized_keys"
        shutil.copy(f"{self.key}.pub", keys)
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.directory / "host"], check=True)
        config = self.directory / "config"
        config.write_text(
            f"Port {self.port}\nListenAddress 127.0.0.1\nHostKey {self.directory / 'host'}\nAuthorizedKeysFile {keys}\n"
            f"StrictModes no\nUsePAM no\nPidFile none\nPermitRootLogin yes\nMaxStartups 500\n"
            f"LogLevel ERROR\n{self.forced}"
        )
        return ["/usr/sbin/sshd", "-D", "-e", "-f", str(config)]


class SshdBwrap(Sshd):
    name = "sshd+bwrap"

    def command(self) -> list[str]:
        script = self.directory / "enter"
        script.write_text(BWRAP)
        script.chmod(0o755)
        self.forced = f"ForceCommand {script}\n"
        return super().command()


class BareAsyncssh(Target):
    name = "bare asyncssh"

    def command(self) -> list[str]:
        program = Path(__file__).parent / "bare_asyncssh.py"
        return [sys.executable, str(program), str(self.port), f"{self.key}.pub"]


class SandboxSSH(Target):
    name = "sandbox-ssh"

    def command(self) -> list[str]:
        self.user = "ada"
        self.state = self.directory / "state"
        base = [sys.executable, "-P", "-m", "sandbox_ssh"]
        subprocess.run(
            [*base, "user", "add", "ada", "--key", f"{self.key}.pub", "--state-dir", str(self.state)],
            check=True, capture_output=True,
        )  # fmt: skip
        return [*base, "serve", "--listen", f"127.0.0.1:{self.port}", "--state-dir", str(self.state)]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextlib.contextmanager
def running(kinds: list[type[Target]], directory: Path) -> Iterator[list[Target]]:
    """Targets, all started; all stopped at the end, whatever happens."""
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", directory / "key"], check=True)
    directory.chmod(0o755)
    made = [kind(directory) for kind in kinds]
    try:
        for target in made:
            target.start()
        yield made
    finally:
        for target in made:
            target.stop()


def tree(pid: int) -> set[int]:
    """A process and all below it."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def pss(pid: int) -> int:
    """Proportional set size of a process tree, in KiB (proc(5), smaps_rollup)."""
    total = 0
    for member in tree(pid):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{member}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1])
    return total


def clean_environment() -> dict[str, str]:
    return {"PATH": os.environ["PATH"], "HOME": "/nonexistent"}
