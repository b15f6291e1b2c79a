"""A channel's process: a child of the spawner that joins a sandbox and becomes the tenant's shell or command.

The spawner forks it straight into the sandbox's pid namespace and stays its parent, so an exit status needs no
process that waits. Until it executes the tenant's program it is a copy of the spawner in the tenant's sight:
non-dumpable (the spawner is), with nothing imported after it has joined, and reading no file of the tenant's
before it has given up every right that the tenant does not have.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import struct
import termios
from dataclasses import dataclass
from typing import Any

from sandbox_ssh.errors import SandboxError
from sandbox_ssh.sandbox import syscalls as sys
from sandbox_ssh.sandbox.holder import become_root
from sandbox_ssh.sandbox.limits import Bounds
from sandbox_ssh.sandbox.namespaces import ALL_NAMESPACES, reset_signals

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_TIOCSPTLCK, _TIOCGPTPEER = 0x40045431, 0x5441  # ioctl_tty(2); the same on x86_64 and aarch64
_O_TTY = os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC

# RFC 4254 section 8: opcodes of the terminal modes, and what they are in termios(3).
_CHARACTERS = {
    1: "VINTR", 2: "VQUIT", 3: "VERASE", 4: "VKILL", 5: "VEOF", 6: "VEOL", 7: "VEOL2", 8: "VSTART", 9: "VSTOP",
    10: "VSUSP", 12: "VREPRINT", 13: "VWERASE", 14: "VLNEXT", 18: "VDISCARD",
}  # fmt: skip
_FLAGS = {
    30: (0, "IGNPAR"), 31: (0, "PARMRK"), 32: (0, "INPCK"), 33: (0, "ISTRIP"), 34: (0, "INLCR"), 35: (0, "IGNCR"),
    36: (0, "ICRNL"), 37: (0, "IUCLC"), 38: (0, "IXON"), 39: (0, "IXANY"), 40: (0, "IXOFF"), 41: (0, "IMAXBEL"),
    42: (0, "IUTF8"), 50: (3, "ISIG"), 51: (3, "ICANON"), 52: (3, "XCASE"), 53: (3, "ECHO"), 54: (3, "ECHOE"),
    55: (3, "ECHOK"), 56: (3, "ECHONL"), 57: (3, "NOFLSH"), 58: (3, "TOSTOP"), 59: (3, "IEXTEN"),
    60: (3, "ECHOCTL"), 61: (3, "ECHOKE"), 62: (3, "PENDIN"), 70: (1, "OPOST"), 71: (1, "OLCUC"), 72: (1, "ONLCR"),
    73: (1, "OCRNL"), 74: (1, "ONOCR"), 75: (1, "ONLRET"), 90: (2, "CS7"), 91: (2, "CS8"), 92: (2, "PARENB"),
    93: (2, "PARODD"),
}  # fmt: skip
# Of which Python's termios does not name these (asm-generic/termbits.h).
_UNNAMED = {"IUTF8": 0o40000, "IUCLC": 0o1000, "OLCUC": 0o2, "XCASE": 0o4}
_INPUT_SPEED, _OUTPUT_SPEED = 128, 129


@dataclass(frozen=True, slots=True)
class Target:
    """The sandbox that a process joins."""

    init: int
    """PID 1's pidfd: the name of all its namespaces at once (setns(2))."""
    pts: int
    root: int
    """The tenant's root in ids of S."""
    groups: bool
    """Whether the tenant has other ids than root's."""
    cgroup: int | None
    bounds: Bounds


class Streams:
    """Both ends of a process's stdin, stdout and stderr: the gateway's, and those that become 0, 1 and 2."""

    def __init__(self, target: Target, pty: dict[str, Any] | None) -> None:
        self.near: list[int] = []
        self.far: list[int] = []
        self.tty = pty is not None
        try:
            if pty is not None:
                self._open_pty(target, pty)
            else:
                for reading in (True, False, False):
                    read, write = os.pipe2(os.O_CLOEXEC)
                    self.near.append(write if reading else read)
                    self.far.append(read if reading else write)
            for fd in self.far:
                # So that the tenant's own `/dev/stdout` and `tty` can be opened by the tenant.
                os.fchown(fd, target.root, target.root + 5 if pty is not None and target.groups else target.root)
        except OSError as error:
            self.close()
            if pty is not None and error.errno == 28:  # ENOSPC: devpts' `max=` is reached
                raise SandboxError(
                    "no PTY is left in this sandbox: close a terminal, or ask for more `ptys`"
                ) from error
            raise

    def _open_pty(self, target: Target, pty: dict[str, Any]) -> None:
        master = os.open("ptmx", _O_TTY, dir_fd=target.pts)
        self.near.append(master)
        fcntl.ioctl(master, _TIOCSPTLCK, struct.pack("i", 0))
        slave = fcntl.ioctl(master, _TIOCGPTPEER, _O_TTY)
        self.far = [slave, slave, slave]
        fcntl.ioctl(
            master, termios.TIOCSWINSZ, struct.pack("HHHH", pty["rows"], pty["columns"], pty["width"], pty["height"])
        )
        set_modes(slave, pty["modes"])

    def close_far(self) -> None:
        for fd in set(self.far):
            os.close(fd)
        self.far = []

    def close(self) -> None:
        self.close_far()
        for fd in self.near:
            os.close(fd)
        self.near = []


def set_modes(tty: int, modes: list[list[int]]) -> None:
    """Apply a client's terminal modes; what this system does not know is passed over, as RFC 4254 asks."""
    attributes = termios.tcgetattr(tty)
    for opcode, argument in modes:
        if opcode in _CHARACTERS:
            index = getattr(termios, _CHARACTERS[opcode], None)
            if index is not None:
                # 255 is "none", which POSIX writes as 0.
                attributes[6][index] = bytes([0 if argument >= 255 else argument])
        elif opcode in _FLAGS:
            word, name = _FLAGS[opcode]
            flag = _UNNAMED[name] if name in _UNNAMED else int(getattr(termios, name, 0))
            attributes[word] = attributes[word] & ~flag | (flag if argument else 0)
        elif opcode in (_INPUT_SPEED, _OUTPUT_SPEED):
            speed = getattr(termios, f"B{argument}", None)
            if speed is not None:
                attributes[4 if opcode == _INPUT_SPEED else 5] = speed
    termios.tcsetattr(tty, termios.TCSANOW, attributes)


def start(target: Target, streams: Streams, command: str | None, environment: dict[str, str]) -> tuple[int, int]:
    """Start the process. Returns the pid of a helper that is gone at once, and a descriptor that reads its own
    pid as four bytes, then an error's text, then EOF once it has executed.

    Joining a pid namespace counts for children only, and there is no way back for an unprivileged spawner. So a
    helper joins, and clones the process as its own sibling: the spawner is its parent and hears its end.
    """
    report, tell = os.pipe2(os.O_CLOEXEC)
    try:
        helper = sys.fork(target.cgroup)
    except BaseException:
        os.close(report)
        os.close(tell)
        raise
    if helper:
        os.close(tell)
        return helper, report
    try:
        sys.setns(target.init, ALL_NAMESPACES)
        pid = sys.clone(sys.CLONE_PARENT | signal.SIGCHLD)
        if pid:
            os.write(tell, pid.to_bytes(4, "little"))
            os._exit(0)
        _become(target, streams, command, environment)
    except BaseException as error:
        os.write(tell, str(error).encode(errors="replace")[:1024])
    finally:
        os._exit(255)


def _become(target: Target, streams: Streams, command: str | None, environment: dict[str, str]) -> None:
    become_root(target.groups)
    os.setsid()
    if streams.tty:
        fcntl.ioctl(streams.far[0], termios.TIOCSCTTY, 0)
    # dup2 leaves a descriptor without close-on-exec, unless it is the same one.
    streams.far = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3) for fd in streams.far]
    for number, fd in enumerate(streams.far):
        os.dup2(fd, number)
    reset_signals()
    os.umask(0o022)
    target.bounds.set()
    home, shell = _account()
    environment = {
        **environment,
        "HOME": home,
        "USER": "root",
        "LOGNAME": "root",
        "SHELL": shell,
        "PATH": _PATH,
    }
    if streams.tty:
        with contextlib.suppress(OSError):
            environment["SSH_TTY"] = os.ttyname(0)
    try:
        os.chdir(home)
    except OSError:
        os.chdir("/")
    name = os.path.basename(shell)
    arguments = [f"-{name}"] if command is None else [name, "-c", command]
    # surrogateescape: a command is bytes to the client and to the shell.
    words = [argument.encode("utf-8", "surrogateescape") for argument in arguments]
    values = {key: value.encode("utf-8", "surrogateescape") for key, value in environment.items()}
    sys.close_range(3, 0xFFFFFFFF, sys.CLOSE_RANGE_CLOEXEC)
    try:
        os.execve(shell, words, values)
    except OSError as error:
        raise SandboxError(f"the image has no shell that can be run: {shell}: {error.strerror}") from error


def _account() -> tuple[str, str]:
    """Home and shell of root in the image's own /etc/passwd, or what every image has."""
    home, shell = "/root", "/bin/sh"
    try:
        fd = os.open("/etc/passwd", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        text = os.read(fd, 65536)
        os.close(fd)
    except OSError:
        text = b""
    for line in text.split(b"\n"):
        fields = line.split(b":")
        if len(fields) == 7 and fields[0] == b"root":
            home = fields[5].decode("utf-8", "surrogateescape") or home
            shell = fields[6].decode("utf-8", "surrogateescape") or shell
            break
    return home, shell if os.access(shell, os.X_OK) else "/bin/sh"


def send_signal(pid: int, name: str) -> None:
    """To the process group that the channel's process leads; it has not been waited for, so the number is its own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.Signals[f"SIG{name}"])
