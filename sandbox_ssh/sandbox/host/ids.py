"""Who the server is, and which other ids it may hand to sandboxes."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import stat
import subprocess
from pathlib import Path

from sandbox_ssh.sandbox import syscalls as sys
from sandbox_ssh.sandbox.host.finding import PROGRAMS, Finding, Needs, Status, as_root, bad, good, install, weak
from sandbox_ssh.sandbox.idmap import BLOCK, SLICE

_XATTR_CAPS = "security.capability"
# The spawner's own root, the root of holders, and a slice each for the uplinks and for one user.
_USABLE = 2 * SLICE + 1


def privileges(needs: Needs) -> list[Finding]:
    root = os.geteuid() == 0
    found = f"{needs.mode} mode, as {_user_name()}"
    if needs.mode == "service" and not root:
        return bad(
            "privileges",
            found,
            "Service mode's spawner is root; as an ordinary user only rootless mode works.",
            "sudo sandbox-ssh doctor --mode service, or sandbox-ssh doctor --mode rootless",
        )
    if needs.mode == "rootless" and root:
        return bad(
            "privileges",
            found,
            "Rootless mode is for an ordinary user; what follows was tried as root and can differ for others.",
            "runuser -u USER -- sandbox-ssh doctor --mode rootless",
        )
    return good("privileges", found, "The user that this mode is for.")


def ranges(needs: Needs) -> list[Finding]:
    if needs.mode == "service":
        return _service_range(needs)
    counts = {kind: subordinate(kind)[1] for kind in ("uid", "gid")}
    findings = _ranges_of_files(counts)
    if min(counts.values()) >= _USABLE:
        findings += _tools()
        if findings[-1].status == Status.OK:
            findings += _try_map()
    return findings


def _service_range(needs: Needs) -> list[Finding]:
    """The configured range must not be one that /etc/subuid has given to somebody."""
    last = needs.first_id + needs.id_blocks * BLOCK - 1
    found = f"{needs.first_id}-{last}, {needs.id_blocks} blocks of {BLOCK}"
    for kind in ("uid", "gid"):
        for owner, first, count in _lines(kind):
            if first <= last and needs.first_id < first + count:
                return weak(
                    "id-ranges",
                    f"{found}; /etc/sub{kind} gives {first}-{first + count - 1} to {owner}",
                    "Processes of that user's containers would share ids with sandboxes.",
                    "Set sandbox.id_first in the configuration to a range that /etc/subuid and /etc/subgid leave free.",
                )
    return good("id-ranges", found, f"Ids of their own for {needs.id_blocks - 1} users at once.")


def subordinate(kind: str) -> tuple[int, int]:
    """(first, count) of the largest range that /etc/subuid or /etc/subgid gives to this process's user (subuid(5)).

    The largest, for a line of a map must lie within one of them.
    """
    names = {str(os.geteuid()), _user_name()}
    ranges = [(first, count) for owner, first, count in _lines(kind) if owner in names]
    return max(ranges, key=lambda pair: pair[1], default=(0, 0))


SHARED = 2**31
"""As many users as one likes: they share one id."""


def users(count: int) -> int:
    """For how many users at once a range of `count` ids has ids of their own; without a range they share one."""
    return count // SLICE - 1 if count >= _USABLE else SHARED


def _lines(kind: str) -> list[tuple[str, int, int]]:
    try:
        text = Path(f"/etc/sub{kind}").read_text()
    except FileNotFoundError:
        return []
    fields = [line.split(":") for line in text.splitlines() if line.count(":") == 2 and not line.startswith("#")]
    return [(owner, int(first), int(count)) for owner, first, count in fields if first.isdigit() and count.isdigit()]


def _user_name() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())


def _ranges_of_files(counts: dict[str, int]) -> list[Finding]:
    found = f"{counts['uid']} uids in /etc/subuid, {counts['gid']} gids in /etc/subgid for {_user_name()}"
    add = as_root(f"usermod --add-subuids 1000000-1065535 --add-subgids 1000000-1065535 {_user_name()}")
    if min(counts.values()) < _USABLE:
        return weak(
            "id-ranges",
            found,
            "Single-id map: a sandbox has no user but root, so `su`, `apt-get` and many daemons fail; all sandboxes "
            "run as the server's own user.",
            add,
        )
    if min(counts.values()) < BLOCK:
        return weak(
            "id-ranges",
            found,
            f"Fewer than {BLOCK}: room for {min(counts.values()) // SLICE - 1} users at once, no high ids in images.",
            add,
        )
    return good("id-ranges", found, f"Ids of their own for {min(counts.values()) // SLICE - 1} users at once.")


def _tools() -> list[Finding]:
    for name in ("newuidmap", "newgidmap"):
        path = shutil.which(name, path=PROGRAMS)
        if path is None:
            return weak(
                "newuidmap",
                f"{name} is not installed",
                "Without it the ranges of /etc/subuid cannot be used: single-id map.",
                install("uidmap"),
            )
        if not _privileged(path):
            return weak(
                "newuidmap",
                f"{path} is neither setuid root nor has file capabilities",
                "It cannot map a range: single-id map.",
                as_root(f"chmod u+s {path}"),
            )
    return good(
        "newuidmap", f"{shutil.which('newuidmap', path=PROGRAMS)}", "May map the ranges of /etc/subuid and /etc/subgid."
    )


def _privileged(path: str) -> bool:
    status = os.stat(path)
    setuid = status.st_uid == 0 and bool(status.st_mode & stat.S_ISUID)
    return setuid or _XATTR_CAPS in os.listxattr(path)


def _try_map() -> list[Finding]:
    """A child with a new user namespace, and the two programs on it: as at the server's start."""
    ready_read, ready = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        try:
            sys.unshare(sys.CLONE_NEWUSER)
            os.write(ready, b"+")
            signal.pause()
        finally:
            os._exit(1)
    os.close(ready)
    try:
        os.read(ready_read, 1)
        for kind in ("uid", "gid"):
            first, count = subordinate(kind)
            program = f"new{kind}map"
            result = subprocess.run(
                [program, str(pid), "0", str(first), str(count)], capture_output=True, text=True, check=False
            )
            if result.returncode != 0:
                return weak(
                    "id-map",
                    f"{program} says: {result.stderr.strip()}",
                    "The ranges cannot be used: single-id map.",
                    install("--reinstall uidmap"),
                )
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return good("id-map", "a user namespace was mapped with newuidmap and newgidmap", "Ranges are usable.")
