"""Whose files the state directory and the database are, and acting as that user.

A root shell that opened the gateway's SQLite database as root would leave files that the gateway cannot write, or
follow a symbolic link that a gateway in the wrong hands had put in the place of one. So root takes on the rights of
the database's owner before it opens it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import pwd
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from sandbox_ssh.errors import ConfigError

if TYPE_CHECKING:
    from sandbox_ssh.config import Config

_CAPABILITY_VERSION_3 = 0x20080522
_CAP_DAC_READ_SEARCH = 2


class Owner(NamedTuple):
    uid: int
    gid: int


def gateway_user(config: Config) -> Owner | None:
    """The system user that the gateway runs as; None without root, in rootless mode, or where there is none yet."""
    if os.geteuid() != 0 or config.mode != "service":
        return None
    with contextlib.suppress(KeyError):
        entry = pwd.getpwnam(config.server.user)
        return Owner(entry.pw_uid, entry.pw_gid)
    return None


def prepare_state_dir(config: Config) -> None:
    """Make the state directory, or take over an empty one.

    Under root it stays root's, sticky and open to the gateway's group: the gateway can make its database there, and
    cannot put anything of its own in place of what root made.
    """
    directory = config.server.state_dir
    owner = gateway_user(config)
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if owner is not None and directory.stat().st_uid == 0 and not any(directory.iterdir()):
            os.chown(directory, 0, owner.gid)
            # Others may pass through it: slirp4netns and the tenants' ids need the way to what lies below.
            directory.chmod(stat.S_ISVTX | 0o771)
    except OSError as error:
        raise ConfigError(
            f"the state directory {directory} cannot be used ({error.strerror}): name another with --state-dir"
        ) from error


def sqlite_file(url: str) -> Path | None:
    scheme, _, path = url.partition(":///")
    return Path(path.partition("?")[0]) if scheme.startswith("sqlite") and path else None


def database_owner(config: Config) -> Owner | None:
    """The user to open the database as; None where that is the one who runs this.

    With PostgreSQL it matters too: "peer" authentication goes by the user of the process.
    """
    if os.geteuid() != 0:
        return None
    file = sqlite_file(config.database.url)
    for path in (file, file.parent) if file else ():
        with contextlib.suppress(FileNotFoundError):
            entry = path.stat()
            if entry.st_uid != 0:
                return Owner(entry.st_uid, entry.st_gid)
    if file is not None and file.exists():
        return None
    return gateway_user(config)


@contextlib.contextmanager
def acting_as(owner: Owner | None) -> Iterator[None]:
    """Have the rights of another user for a while; the real user id stays root's, so that there is a way back."""
    if owner is None:
        yield
        return
    groups, gid, umask = os.getgroups(), os.getegid(), os.umask(0o077)
    os.setgroups([owner.gid])
    os.setegid(owner.gid)
    os.seteuid(owner.uid)
    try:
        _pass_closed_directories()
        yield
    finally:
        os.seteuid(0)
        os.setegid(gid)
        os.setgroups(groups)
        os.umask(umask)


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Data(ctypes.Structure):
    _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32))


def _pass_closed_directories() -> None:
    """Keep CAP_DAC_READ_SEARCH of root's rights, and no other: it reads, but creates and changes nothing.

    seteuid(2) away from 0 clears the effective set and leaves the permitted one (capabilities(7)). Without this, a
    state directory or a checkout below /root, which nobody else can enter, would be out of reach.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    header, data = _Header(_CAPABILITY_VERSION_3, 0), (_Data * 2)()
    if libc.capget(ctypes.byref(header), data) == 0:
        data[0].effective = data[0].permitted & 1 << _CAP_DAC_READ_SEARCH
        data[1].effective = 0
        libc.capset(ctypes.byref(header), data)
