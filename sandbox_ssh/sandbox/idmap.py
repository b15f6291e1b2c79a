"""Which host ids a tenant's user and group ids are: maps for user namespaces (user_namespaces(7)).

Names as in docs/architecture.md: S is the server's own user namespace, H the holder of one user below it, T the
tenant's below H. Ids here are S's ids: in service mode S is the host's initial namespace.

Three plans, one interface. Tenants must not share ids with each other, with the server, or with the host's root:
then a file, a signal or a ptrace that crosses a boundary by mistake still meets a stranger's id.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from sandbox_ssh.errors import SandboxError

BLOCK = 65536
SLICE = 4096
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
    """H's map, in ids of S."""
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

    def allocate(self) -> Ids:
        """Ids that nobody else has. Raises `SandboxError` when none are left."""

    def release(self, ids: Ids) -> None: ...


class _Numbers:
    """The lowest free number first, so that ids stay small and a leak shows."""

    def __init__(self, count: int, remedy: str) -> None:
        self._free = list(range(count - 1, -1, -1))
        self._remedy = remedy

    def take(self) -> int:
        if not self._free:
            raise SandboxError(f"no host ids are left for another user's sandboxes; {self._remedy}")
        return self._free.pop()

    def give(self, number: int) -> None:
        self._free.append(number)
        self._free.sort(reverse=True)


class Blocks:
    """Service mode: 65,536 host ids for each user with live sandboxes, the first block for the uplinks."""

    groups = True

    def __init__(self, first: int, blocks: int) -> None:
        self._first = first
        self._numbers = _Numbers(blocks - 1, "raise sandbox.id_blocks in the configuration")
        self.uplink = Map(((0, first, BLOCK),))

    def allocate(self) -> Ids:
        number = self._numbers.take()
        base = self._first + (number + 1) * BLOCK
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

    def __init__(self, count: int) -> None:
        self._holder = Map(((0, 1, count - 1),))
        self._unpacked = Map(((0, 0, min(BLOCK, count - 1)),))
        self._numbers = _Numbers(
            (count - 1) // SLICE - 1, "give the server's user more ids in /etc/subuid and /etc/subgid (see `doctor`)"
        )
        self.uplink = Map(((0, 1, SLICE - 1),))

    def allocate(self) -> Ids:
        number = self._numbers.take()
        first = (number + 1) * SLICE  # in ids of H
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
    uplink = Map(((0, 0, 1),))

    def allocate(self) -> Ids:
        only = Map(((0, 0, 1),))
        return Ids(0, only, only, only, 0, 0)

    def release(self, ids: Ids) -> None:
        pass
