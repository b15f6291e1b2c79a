"""A cgroup for each sandbox: what it used, and an end for all that runs in it (cgroups(7)).

    sandbox-ssh.<spawner's pid>/t<tenant>/u<user>/<sandbox>

What a tenant or a user may use is written at their level, so it binds the sum. Where no cgroup v2 tree may be written,
sandboxes have none: their usage is then what /proc and wait4(2) tell of their processes, nothing bounds their memory,
and `sandbox-ssh doctor` says so.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from dataclasses import dataclass
from pathlib import Path

from sandbox_ssh.sandbox.limits import Limits

_PERIOD = 100_000  # microseconds, cpu.max's default
_LATELY = 10.0  # seconds that CPU use is averaged over
_LITTLE = 0.1  # cores, for which nobody is called busy
_YIELD = 10  # a busy one's share is divided by it


@dataclass(frozen=True, slots=True)
class Leaf:
    """A sandbox's cgroup."""

    path: str
    """Below the spawner's subtree."""
    directory: int
    """Descriptor."""

    def read(self, name: str) -> str:
        """Raises `OSError` where the file is not there, for want of the controller or of a newer kernel."""
        return _read(self.directory, name)

    def adopt(self, pid: int) -> None:
        """Move a process here. Waits for an RCU grace period of 5 to 25 ms: for a child, not for the spawner."""
        _write_at(self.directory, "cgroup.procs", str(pid))

    def number(self, name: str, key: str = "") -> int:
        """A file's number, or the one beside `key`; 0 where there is none."""
        with contextlib.suppress(OSError, ValueError, KeyError):
            text = self.read(name)
            return int(dict(line.split() for line in text.splitlines())[key] if key else text)
        return 0


class Cgroups:
    """The subtree that sandboxes live in, or nothing where there is none to be had."""

    def __init__(self) -> None:
        self._root = _subtree(f"{_PREFIX}{os.getpid()}")
        self._leaves: list[str] = []
        self._controllers = frozenset(_read(self._root, "cgroup.subtree_control").split() if self._root else ())
        self._weights: dict[str, int] = {}
        """Of each tenant and user, the quota `cpu_weight`."""
        self._used: dict[str, tuple[int, float]] = {}
        """Microseconds of CPU at the last look, and cores lately."""
        self._busy: set[str] = set()

    @property
    def hold_anything(self) -> bool:
        return bool(self._controllers)

    @property
    def hold_memory(self) -> bool:
        return "memory" in self._controllers

    def create(self, tenant: int, tenant_limits: Limits, user: int, user_limits: Limits, sandbox: str) -> Leaf | None:
        """A new cgroup below the tenant's and the user's, with their limits in these. Raises `OSError`."""
        if self._root is None:
            return None
        path = f"t{tenant}/u{user}/{sandbox}"
        while path in self._leaves:
            path += "+"  # that of a first attempt is on its way out
        self._leaves.append(path)
        try:
            for parent, limits in ((f"t{tenant}", tenant_limits), (f"t{tenant}/u{user}", user_limits)):
                with contextlib.suppress(FileExistsError):
                    os.mkdir(parent, dir_fd=self._root)
                    if self._controllers:
                        enabled = " ".join(f"+{controller}" for controller in self._controllers)
                        _write_at(self._root, f"{parent}/cgroup.subtree_control", enabled)
                self._limit(parent, limits)
            with contextlib.suppress(FileExistsError):
                os.mkdir(path, dir_fd=self._root)
            if "memory" in self._controllers:
                # Half a sandbox is no sandbox: the session ends, and says why.
                _write_at(self._root, f"{path}/memory.oom.group", "1")
        except OSError:
            self._leaves.remove(path)
            self._remove_empty(path)
            raise
        return Leaf(path, os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self._root))

    def limit(self, tenant: int, tenant_limits: Limits, user: int, user_limits: Limits) -> None:
        """Change the limits of what is live; harmless where nothing is. Raises `OSError`."""
        if self._root is not None:
            with contextlib.suppress(FileNotFoundError):
                self._limit(f"t{tenant}", tenant_limits)
                self._limit(f"t{tenant}/u{user}", user_limits)

    def _limit(self, path: str, limits: Limits) -> None:
        values: dict[str, str] = {}
        if "pids" in self._controllers:
            # slirp4netns is the server's and not of the quota, which the holder keeps to the last process.
            servers = sum(leaf.startswith(f"{path}/") for leaf in self._leaves)
            values["pids.max"] = str(limits["processes"] + servers) if "processes" in limits else "max"
        if "memory" in self._controllers:
            values["memory.max"] = str(limits.get("memory", "max"))
            values["memory.swap.max"] = "0"
        if "cpu" in self._controllers:
            cpu = limits.get("cpu")
            values["cpu.max"] = f"{'max' if cpu is None else cpu * _PERIOD // 1000} {_PERIOD}"
            self._weights[path] = limits.get("cpu_weight", 100)
            values["cpu.weight"] = self._weight(path)
        assert self._root is not None
        for name, value in values.items():
            with contextlib.suppress(FileNotFoundError):  # memory.swap.max: a kernel without swap
                _write_at(self._root, f"{path}/{name}", value)

    def note(self, tenant: int, tenant_limits: Limits, user: int, user_limits: Limits) -> None:
        """Know the shares that a child is about to write with `limit`."""
        for path, limits in ((f"t{tenant}", tenant_limits), (f"t{tenant}/u{user}", user_limits)):
            if path in self._weights:
                self._weights[path] = limits.get("cpu_weight", 100)

    def _weight(self, path: str) -> str:
        weight = self._weights[path]
        return str(max(1, weight // _YIELD) if path in self._busy else weight)

    def balance(self, seconds: float) -> None:
        """Let tenants, and users of a tenant, who were busy lately yield to those who were not.

        Else whoever logs in beside a busy neighbour would wait half of the time. Among the busy, and among the others,
        `cpu_weight` counts as ever. To be called every few `seconds`.
        """
        siblings: dict[str, list[str]] = {}
        for path in list(self._weights):
            if self._look(path, seconds):
                siblings.setdefault(os.path.dirname(path), []).append(path)
        for paths in siblings.values():
            most = max(self._used[path][1] for path in paths)
            busy = {path for path in paths if self._used[path][1] > max(_LITTLE, most / 2)}
            for path in busy ^ self._busy.intersection(paths):
                self._busy ^= {path}
                with contextlib.suppress(OSError):  # it has just gone
                    assert self._root is not None
                    _write_at(self._root, f"{path}/cpu.weight", self._weight(path))

    def _look(self, path: str, seconds: float) -> bool:
        """Note what a tenant or user has used; False where it is gone."""
        assert self._root is not None
        try:
            used = int(_read(self._root, f"{path}/cpu.stat").split()[1])  # usage_usec
        except OSError:
            del self._weights[path]
            self._used.pop(path, None)
            self._busy.discard(path)
            return False
        before, lately = self._used.get(path, (used, 0.0))
        self._used[path] = used, lately + (seconds / _LATELY) * ((used - before) / 1e6 / seconds - lately)
        return True

    def remove(self, leaf: Leaf | None) -> bool:
        """Kill what is left and remove the cgroup, and those above it that are empty now.

        False while something in it still lives.
        """
        if self._root is None or leaf is None:
            return True
        try:
            os.rmdir(leaf.path, dir_fd=self._root)
        except FileNotFoundError:
            pass
        except OSError:
            with contextlib.suppress(OSError):
                _write_at(leaf.directory, "cgroup.kill", "1")  # Linux 5.14
            return False
        self._leaves.remove(leaf.path)
        self._remove_empty(leaf.path)
        return True

    def _remove_empty(self, path: str) -> None:
        """Remove a leaf, and those above it, as far as they are empty."""
        while path:
            with contextlib.suppress(OSError):  # others live there, or it is not there
                os.rmdir(path, dir_fd=self._root)
            path = path.rpartition("/")[0]


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
        with contextlib.suppress(OSError):  # the kernel without a controller, or the tree not ours to divide
            wanted = [c for c in _read(level, "cgroup.controllers").split() if c in ("cpu", "memory", "pids")]
            _write_at(level, "cgroup.subtree_control", " ".join(f"+{controller}" for controller in wanted))
    with contextlib.suppress(OSError):
        # Who lets people in goes before what those do who are in.
        _write_at(above, f"{_SERVER}/cpu.weight", "10000")
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
                for directory, _, _ in os.walk(tree, topdown=False):
                    os.rmdir(directory)
            finally:
                os.close(lock)
    return not (parent / f"{_PREFIX}{spawner}").exists()


def _read(directory: int, name: str) -> str:
    fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=directory)
    try:
        return os.read(fd, 65536).decode()
    finally:
        os.close(fd)


def _write_at(directory: int, name: str, text: str) -> None:
    fd = os.open(name, os.O_WRONLY | os.O_CLOEXEC, dir_fd=directory)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)
