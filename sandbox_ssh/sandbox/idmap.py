"""Which host ids a tenant's user and group ids are: maps for user namespaces (user_namespaces(7)).

Names as in docs/architecture.md: S is the server's own user namespace, G the holder of one tenant below it, H that of
one user below G, T the tenant's below H. Ids here are S's ids, and G's are the same but for its root: in service mode
S is the host's initial namespace.

Three plans, one interface. Tenants must not share ids with each other, with the server, or with the host's root:
then a file, a signal or a ptrace that crosses a boundary by mistake still meets a stranger's id.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from dataclasses import dataclass
from typing import Protocol

from sandbox_ssh.errors import SandboxError

BLOCK = 65536
SLICE = 4096
_MOST_SLICES = 1025  # of one server: a descriptor for each
NOBODY = 65534


@dataclass(frozen=True, slots=True)
class Map:
    """Lines of uid_map and gid_map: (first id inside, first id in the parent, how many)."""

    extents: tuple[tuple[int, int, int], ...]

    def encode(self) -> bytes:
        return "".join(f"{inside} {outside} {count}\n" for inside, outside, count in self.extents).encode()


@dataclass(frozen=True, slots=True)
class Ids:
    """The ids of one user's sandboxes."""

    number: int
    """Which block or slice this is, to give it back."""
    holder: Map
    """H's map, in ids of G."""
    tenant: Map
    """T's map for the image `host`, in ids of H."""
    tenant_unpacked: Map
    """T's map for an image that was unpacked into the server's ids, in ids of H."""
    root: int
    """T's root in ids of S, with the image `host`."""
    root_unpacked: int


class Plan(Protocol):
    groups: bool
    """Whether setgroups(2) works: it does not under a map that an unprivileged process wrote."""
    uplink: Map
    """The map of the namespace that slirp4netns runs in, in ids of S."""
    tenant: Map
    """G's map, in ids of S: the ids of all users, each as itself, and a root that is no user's and no uplink's."""

    users: int
    """How many users can have ids of their own at once."""

    def creator(self, tenant: int) -> int:
        """The id of S that makes the holder of a tenant: what is below is charged to it in S (kernel/ucount.c).

        With one of its own, a tenant that has all of the host's inotify instances has its own, and not the root's.
        """

    def allocate(self) -> Ids:
        """Ids that nobody else has. Raises `SandboxError` when none are left."""

    def release(self, ids: Ids) -> None: ...


class _Numbers:
    """The lowest free number first, so that ids stay small and a leak shows.

    Several servers on a host have the same numbers at hand, and what is one's must not be another's: a number is
    taken by a lock on a file of `directory`, named by the number's first id. It ends with the process that has it.
    """

    def __init__(self, numbers: range, first: int, size: int, directory: int, remedy: str) -> None:
        self.all = numbers
        self._first = first
        self._size = size
        self._directory = directory
        self._remedy = remedy
        self._files: dict[int, int] = {}
        self._taken: set[int] = set()

    def take(self) -> int:
        for number in self.all:
            if number not in self._taken:
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(self.file(number), fcntl.LOCK_EX | fcntl.LOCK_NB)
                    self._taken.add(number)
                    return number
        raise SandboxError(f"no host ids are left for another user's sandboxes; {self._remedy}")

    def give(self, number: int) -> None:
        self._taken.remove(number)
        fcntl.flock(self._files[number], fcntl.LOCK_UN)

    def file(self, number: int) -> int:
        if number not in self._files:
            name = str(self._first + number * self._size)
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            self._files[number] = os.open(name, flags, 0o600, dir_fd=self._directory)
        return self._files[number]


class Blocks:
    """Service mode: 65,536 host ids for each user with live sandboxes, and a block for the uplinks."""

    groups = True

    def __init__(self, first: int, blocks: int, locks: int) -> None:
        self._first = first
        self._numbers = _Numbers(range(blocks), first, BLOCK, locks, "raise sandbox.id_blocks in the configuration")
        self.users = blocks - 1
        base = first + self._numbers.take() * BLOCK
        root = base + BLOCK - 1
        self.uplink = Map(((0, base, BLOCK - 1),))
        self._spare = base + 1  # of the uplinks' block, which needs its root only
        after = first + blocks * BLOCK
        runs = ((0, root, 1), (first, first, root - first), (root + 1, root + 1, after - root - 1))
        self.tenant = Map(tuple(run for run in runs if run[2]))

    def creator(self, tenant: int) -> int:
        return self._spare + tenant % (BLOCK - 2)

    def allocate(self) -> Ids:
        number = self._numbers.take()
        base = self._first + number * BLOCK
        whole = Map(((0, 0, BLOCK),))
        return Ids(number, Map(((0, base, BLOCK),)), whole, whole, base, base)

    def release(self, ids: Ids) -> None:
        self._numbers.give(ids.number)


class Slices:
    """Rootless with a range in /etc/subuid: S holds `count` ids, of which 0 is the spawner's and 1 is H's root.

    A sandbox of the image `host` gets a slice of its own. An image unpacked by an ordinary user has files of one
    range only, which all sandboxes of such images then share (`sandbox-ssh doctor` says so).
    """

    groups = True

    def __init__(self, first: int, count: int, locks: int) -> None:
        """`first`: which host id S's second one is, to tell this range from another one."""
        self._holder = Map(((0, 1, count - 1),))
        self._unpacked = Map(((0, 0, min(BLOCK, count - 1)),))
        # The slice with H's root is for uplinks, also of another server of the same user, and never a tenant's.
        self._numbers = _Numbers(
            range(1, min(_MOST_SLICES, (count - 1) // SLICE)), first, SLICE, locks,
            "give the server's user more ids in /etc/subuid and /etc/subgid (see `doctor`)",
        )  # fmt: skip
        for number in self._numbers.all:
            self._numbers.file(number)  # while the caller still is the user: root of S owns no file of the user's
        self.users = len(self._numbers.all)
        self.uplink = Map(((0, 1, SLICE - 1),))
        self.tenant = Map(((0, 0, count),))

    def creator(self, tenant: int) -> int:
        return 0  # all of S is charged to the one user that the host knows

    def allocate(self) -> Ids:
        number = self._numbers.take()
        first = number * SLICE  # in ids of H
        # Without `nobody` in the map, `su nobody` and many daemons fail with EINVAL.
        tenant = Map(((0, first, SLICE - 1), (NOBODY, first + SLICE - 1, 1)))
        return Ids(number, self._holder, tenant, self._unpacked, first + 1, 1)

    def release(self, ids: Ids) -> None:
        self._numbers.give(ids.number)


class Single:
    """Rootless with no range: every tenant's root is the server's own user, and there is no other id.

    What then keeps tenants from the server are the pid and mount namespaces and that no process of the server in
    them is dumpable; `sandbox-ssh doctor` warns.
    """

    groups = False
    users = 2**31  # they share the one id
    uplink = tenant = Map(((0, 0, 1),))

    def creator(self, tenant: int) -> int:
        return 0

    def allocate(self) -> Ids:
        only = Map(((0, 0, 1),))
        return Ids(0, only, only, only, 0, 0)

    def release(self, ids: Ids) -> None:
        pass
