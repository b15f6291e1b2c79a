"""System calls that Python 3.11 does not have, each a line: no policy, no wrapping beyond errno to OSError.

A failing call raises `OSError` whose filename says what was tried, so that a traceback is a sentence.
Flags keep their kernel names; see the man page of the function's name.
"""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import struct

CLONE_NEWTIME = 0x00000080
CLONE_PARENT = 0x00008000
CLONE_NEWNS = 0x00020000
CLONE_NEWCGROUP = 0x02000000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000
CLONE_INTO_CGROUP = 0x200000000

MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_REMOUNT = 32
MS_BIND = 4096
MS_REC = 16384
MS_PRIVATE = 1 << 18
MNT_DETACH = 2

OPEN_TREE_CLONE = 1
AT_RECURSIVE = 0x8000
MOVE_MOUNT_F_EMPTY_PATH = 0x4
MOUNT_ATTR_IDMAP = 0x00100000
MOUNT_ATTR_RDONLY = 0x1
MOUNT_ATTR_NOSUID = 0x2
MOUNT_ATTR_NODEV = 0x4
FSCONFIG_SET_FLAG = 0
FSCONFIG_SET_STRING = 1
FSCONFIG_CMD_CREATE = 6

PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_SET_NAME = 15
PR_CAPBSET_DROP = 24
PR_SET_SECUREBITS = 28
SECBIT_NO_SETUID_FIXUP = 4
PR_SET_CHILD_SUBREAPER = 36
PR_SET_NO_NEW_PRIVS = 38
PR_CAP_AMBIENT = 47
PR_CAP_AMBIENT_CLEAR_ALL = 4

CLOSE_RANGE_CLOEXEC = 4
KEYCTL_JOIN_SESSION_KEYRING = 1

AT_EMPTY_PATH = 0x1000
AT_FDCWD = -100

# Calls up to 423 have a number for each architecture; those from 424 on have one for all.
_NUMBERS = {
    "x86_64": {"clone": 56, "pivot_root": 155, "keyctl": 250},
    "aarch64": {"clone": 220, "pivot_root": 41, "keyctl": 219},
}
try:
    _NR = _NUMBERS[platform.machine()]
except KeyError:
    raise ImportError(
        f"sandbox-ssh knows the system calls of x86_64 and aarch64, not of {platform.machine()}"
    ) from None
_NR_OPEN_TREE, _NR_MOVE_MOUNT, _NR_FSOPEN, _NR_FSCONFIG, _NR_FSMOUNT = 428, 429, 430, 431, 432
_NR_CLONE3, _NR_CLOSE_RANGE, _NR_MOUNT_SETATTR = 435, 436, 442

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
# `clone` returns twice: a ctypes call that drops the GIL would have to take it again in a child where
# PyOS_AfterFork_Child has not run. PyDLL keeps it.
_libc_with_gil = ctypes.PyDLL(None, use_errno=True)
_libc_with_gil.syscall.restype = ctypes.c_long
_long = ctypes.c_long


def _check(result: int, *what: object) -> int:
    if result == -1:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error), " ".join(str(word) for word in what if word is not None))
    return result


def _bytes(text: str | bytes | None) -> bytes | None:
    return os.fsencode(text) if text is not None else None


def mount(source: str | None, target: str, kind: str | None, flags: int = 0, data: str | None = None) -> None:
    _check(
        _libc.mount(_bytes(source), _bytes(target), _bytes(kind), ctypes.c_ulong(flags), _bytes(data)),
        "mount", kind, source, "on", target, data,
    )  # fmt: skip


def umount(target: str, flags: int = 0) -> None:
    _check(_libc.umount2(_bytes(target), flags), "umount", target)


def unshare(flags: int) -> None:
    _check(_libc.unshare(flags), f"unshare {flags:#x}")


def setns(fd: int, flags: int) -> None:
    _check(_libc.setns(fd, flags), f"setns {flags:#x}")


def clone(flags: int) -> int:
    """fork(2) with clone's flags: returns 0 in the child. Only for a process with one thread."""
    return _check(
        _libc_with_gil.syscall(_long(_NR["clone"]), _long(flags), _long(0), _long(0), _long(0), _long(0)),
        f"clone {flags:#x}",
    )


def fork(cgroup: int | None) -> int:
    """fork(2), the child born in a cgroup: moving it there later waits for an RCU grace period of 5 to 25 ms.

    Only for a process with one thread. `cgroup` is a descriptor of the cgroup's directory (clone3(2)).
    """
    if cgroup is None:
        return os.fork()
    arguments = struct.pack("=11Q", CLONE_INTO_CGROUP, 0, 0, 0, signal.SIGCHLD, 0, 0, 0, 0, 0, cgroup)
    return _check(
        _libc_with_gil.syscall(_long(_NR_CLONE3), arguments, ctypes.c_size_t(len(arguments))), "clone3 into the cgroup"
    )


def pivot_root(new: str, old: str) -> None:
    _check(_libc.syscall(_long(_NR["pivot_root"]), _bytes(new), _bytes(old)), "pivot_root", new)


def prctl(option: int, argument: int = 0, third: int = 0) -> int:
    return _check(
        _libc.prctl(option, ctypes.c_ulong(argument), ctypes.c_ulong(third), ctypes.c_ulong(0), ctypes.c_ulong(0)),
        f"prctl {option}",
    )


def set_process_name(name: str) -> None:
    """What ps(1) shows: the name of the thread, and the command line, which anybody in a shared pid namespace reads.

    The command line lies in memory of ours, from arg_start to arg_end of /proc/self/stat (proc(5)).
    """
    _libc.prctl(PR_SET_NAME, ctypes.c_char_p(name.encode()[:15]), 0, 0, 0)
    with open("/proc/self/stat", "rb") as file:
        fields = file.read().rpartition(b")")[2].split()
    start, end = int(fields[45]), int(fields[46])
    ctypes.memmove(start, name.encode()[: end - start - 1].ljust(end - start, b"\0"), end - start)


def sethostname(name: str) -> None:
    data = name.encode()
    _check(_libc.sethostname(data, len(data)), "sethostname", name)


def close_range(first: int, last: int, flags: int = 0) -> None:
    _check(
        _libc.syscall(_long(_NR_CLOSE_RANGE), ctypes.c_uint(first), ctypes.c_uint(last), ctypes.c_uint(flags)),
        "close_range",
    )


def close_all_but(*kept: int) -> None:
    """Close what a fork has inherited, but for these. No object that holds one of the others may be collected later."""
    first = 0
    for fd in (*sorted(kept), 0x100000000):
        if fd > first:
            close_range(first, fd - 1)
        first = fd + 1


def join_new_session_keyring() -> None:
    _check(_libc.syscall(_long(_NR["keyctl"]), _long(KEYCTL_JOIN_SESSION_KEYRING), None), "keyctl join")


def open_tree(directory: int, path: str, flags: int) -> int:
    """A descriptor of a detached copy of a mount, with `OPEN_TREE_CLONE`."""
    at = AT_EMPTY_PATH if not path else 0
    return _check(
        _libc.syscall(
            _long(_NR_OPEN_TREE), ctypes.c_int(directory), _bytes(path), ctypes.c_uint(flags | at | os.O_CLOEXEC)
        ),
        "open_tree", path,
    )  # fmt: skip


def move_mount(tree: int, target: str) -> None:
    """Attach a detached mount at a path."""
    _check(
        _libc.syscall(
            _long(_NR_MOVE_MOUNT), ctypes.c_int(tree), b"", ctypes.c_int(AT_FDCWD), _bytes(target),
            ctypes.c_uint(MOVE_MOUNT_F_EMPTY_PATH),
        ),
        "move_mount to", target,
    )  # fmt: skip


def mount_setattr(tree: int, *, set_flags: int, userns: int = 0, recursive: bool = False) -> None:
    """struct mount_attr: attr_set, attr_clr, propagation, userns_fd, each 64 bits."""
    attributes = struct.pack("=QQQQ", set_flags, 0, 0, userns)
    flags = AT_EMPTY_PATH | (AT_RECURSIVE if recursive else 0)
    _check(
        _libc.syscall(
            _long(_NR_MOUNT_SETATTR), ctypes.c_int(tree), b"", ctypes.c_uint(flags), attributes,
            ctypes.c_size_t(len(attributes)),
        ),
        "mount_setattr",
    )  # fmt: skip


def fsmount(kind: str, attributes: int = 0, **options: str) -> int:
    """A descriptor of a new detached mount: fsopen, fsconfig for each option, fsmount."""
    context = _check(_libc.syscall(_long(_NR_FSOPEN), _bytes(kind), ctypes.c_uint(1)), "fsopen", kind)
    try:
        for key, value in options.items():
            _check(
                _libc.syscall(
                    _long(_NR_FSCONFIG), ctypes.c_int(context), ctypes.c_uint(FSCONFIG_SET_STRING), _bytes(key),
                    _bytes(value), ctypes.c_int(0),
                ),
                f"fsconfig {kind} {key}={value}",
            )  # fmt: skip
        _check(
            _libc.syscall(
                _long(_NR_FSCONFIG), ctypes.c_int(context), ctypes.c_uint(FSCONFIG_CMD_CREATE), None, None,
                ctypes.c_int(0),
            ),
            "fsconfig create", kind,
        )  # fmt: skip
        return _check(
            _libc.syscall(_long(_NR_FSMOUNT), ctypes.c_int(context), ctypes.c_uint(1), ctypes.c_uint(attributes)),
            "fsmount", kind,
        )  # fmt: skip
    finally:
        os.close(context)
