"""What a gateway process gives up before it listens to the network."""

from __future__ import annotations

import ctypes
import os
import resource

# linux/prctl.h
PR_SET_DUMPABLE = 4
PR_SET_NAME = 15
PR_SET_NO_NEW_PRIVS = 38


def harden() -> None:
    """No privileges by exec, no core file, no ptrace or /proc/PID/mem by others of the same user (prctl(2)).

    The gateway holds host keys and what people type.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_NAME, b"sandbox-gateway", 0, 0, 0)  # what ps and top call it
    for option, value in ((PR_SET_NO_NEW_PRIVS, 1), (PR_SET_DUMPABLE, 0)):
        if libc.prctl(option, value, 0, 0, 0) != 0:
            error = ctypes.get_errno()
            raise OSError(error, f"prctl({option}, {value}): {os.strerror(error)}")


def raise_descriptor_limit() -> None:
    """A session takes two to five descriptors; the soft limit is 1024 for select(2)'s sake, which nobody uses here."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
