"""A cgroup for each sandbox: what it used, and an end for all that runs in it (cgroups(7)).

Where no cgroup v2 tree may be written, sandboxes have none: their usage is then what wait4(2) tells of their
processes, and `sandbox-ssh doctor` says so.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Usage:
    cpu_seconds: float
    memory_peak_bytes: int


class Cgroups:
    """The subtree that sandboxes live in, or nothing where there is none to be had."""

    def __init__(self) -> None:
        self._root = _subtree(f"{_PREFIX}{os.getpid()}")

    @property
    def available(self) -> bool:
        return self._root is not None

    def create(self, sandbox: str) -> int | None:
        """A descriptor of a new cgroup's directory."""
        if self._root is None:
            return None
        with contextlib.suppress(FileExistsError):
            os.mkdir(sandbox, dir_fd=self._root)
        return os.open(sandbox, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self._root)

    def remove(self, sandbox: str, cgroup: int | None) -> bool:
        """Kill what is left and remove the cgroup; False while something in it still lives."""
        if self._root is None or cgroup is None:
            return True
        try:
            os.rmdir(sandbox, dir_fd=self._root)
        except FileNotFoundError:
            return True
        except OSError:
            with contextlib.suppress(OSError):
                _write(cgroup, "cgroup.kill", "1")  # Linux 5.14
            return False
        return True


def usage(cgroup: int | None) -> Usage | None:
    """CPU time of all that ever ran in a cgroup, and the most memory at once where it has a memory controller."""
    if cgroup is None:
        return None
    try:
        fields = dict(line.split() for line in _read(cgroup, "cpu.stat").splitlines())
        cpu = int(fields["usage_usec"]) / 1e6
    except (OSError, ValueError, KeyError):
        return None
    peak = 0
    with contextlib.suppress(OSError, ValueError):
        peak = int(_read(cgroup, "memory.peak"))  # Linux 5.19
    return Usage(cpu, peak)


_SERVER = "server"  # the leaf that the server's own processes move to
_PREFIX = "sandbox-ssh."  # and the spawner's pid: the subtree of its sandboxes


def _own() -> Path:
    """The directory of the cgroup that this process is in; raises `OSError` or `StopIteration` without cgroup v2."""
    mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    own = next(line[3:] for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
    point = next(fields[4] for fields in map(str.split, mounts) if fields[fields.index("-") + 1] == "cgroup2")
    return Path(point + own)


def move_aside() -> None:
    """Leave a delegated cgroup to the sandboxes: where controllers are, processes live in leaves only (cgroups(7))."""
    with contextlib.suppress(OSError, StopIteration):
        own = _own()
        # The root of the tree has no such rule and is not ours; elsewhere, a cgroup that we may write is delegated.
        if (own / "cgroup.events").exists() and own.name != _SERVER and os.access(own, os.W_OK):
            (own / _SERVER).mkdir(exist_ok=True)
            (own / _SERVER / "cgroup.procs").write_text("0")


def _subtree(name: str) -> int | None:
    try:
        own = _own()
        parent = own.parent if own.name == _SERVER else own
        sweep()
        (parent / name).mkdir(exist_ok=True)
        directory = os.open(parent / name, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
        above = os.open(parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except (OSError, StopIteration):
        return None
    for level in (above, directory):
        with contextlib.suppress(OSError):
            wanted = [c for c in _read(level, "cgroup.controllers").split() if c in ("cpu", "memory", "pids")]
            _write(level, "cgroup.subtree_control", " ".join(f"+{controller}" for controller in wanted))
    os.close(above)
    return directory


def sweep(spawner: int = 0) -> bool:
    """Remove what dead spawners left; whether nothing is left of the one whose pid this was."""
    try:
        own = _own()
    except (OSError, StopIteration):
        return True
    parent = own.parent if own.name == _SERVER else own
    for tree in parent.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):  # in use, or dying still
            lock = os.open(tree, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                # Its spawner holds this lock as long as it lives, in whichever pid namespace that is.
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                for directory in (*tree.glob("*/"), tree):
                    directory.rmdir()
            finally:
                os.close(lock)
    return not (parent / f"{_PREFIX}{spawner}").exists()


def _read(directory: int, name: str) -> str:
    fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=directory)
    try:
        return os.read(fd, 65536).decode()
    finally:
        os.close(fd)


def _write(directory: int, name: str, text: str) -> None:
    fd = os.open(name, os.O_WRONLY | os.O_CLOEXEC, dir_fd=directory)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)
