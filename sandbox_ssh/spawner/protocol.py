"""What the gateway may say to the spawner, and what it hears back.

One AF_UNIX SOCK_SEQPACKET datagram is one JSON object, at most 64 KiB, with file descriptors beside it
(SCM_RIGHTS, unix(7)). The idea is OpenSSH's monitor (README.privsep, monitor.c): the whole protocol is a table
that a reviewer checks in a minute. A request that is not in the table, or whose fields do not have the form
given there, ends the connection that sent it, and with it every sandbox that connection made: a gateway that
speaks nonsense has been taken over or is broken, and neither deserves a second guess.

A request that is well-formed but cannot be granted (unknown sandbox, no ids left, a kernel limit) is answered
with an error, and nothing else happens.

    {"event": "hello"}                                            spawner -> gateway, once: it is there
    {"request": 1, "type": "create", "sandbox": "w0-7", ...}      gateway -> spawner
    {"reply": 1, "init_pid": 4711, "namespaces": {...}}           spawner -> gateway
    {"reply": 1, "error": "limit", "message": "..."}              spawner -> gateway
    {"event": "exited", "sandbox": "w0-7", "channel": 0, ...}     spawner -> gateway, unasked

Only the standard library is imported: both sides of the wall read this file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

from sandbox_ssh.errors import ProtocolError

MAX_MESSAGE = 64 * 1024
MAX_FDS = 3  # stdin, stdout, stderr; or one PTY master

# What `error` can say. Scripts and the gateway's messages depend on these words.
ERROR_CODES = frozenset({
    "exists",   # a sandbox or channel of that name is live
    "unknown",  # no such sandbox, channel or image
    "ended",    # the sandbox is gone or going
    "limit",    # a limit of the host or of the user is reached; the message says which
    "failed",   # a step failed; the message names it and the kernel's answer
})  # fmt: skip

SIGNALS = ("ABRT", "ALRM", "FPE", "HUP", "ILL", "INT", "KILL", "PIPE", "QUIT", "SEGV", "TERM", "USR1", "USR2")
"""The names of RFC 4254 section 6.10; nothing else can be sent to a tenant's process."""

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}", re.ASCII)
_HOSTNAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9-]{0,62})", re.ASCII)
_ENVIRONMENT_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}", re.ASCII)

Check = Callable[[Any], bool]


def _matches(pattern: re.Pattern[str]) -> Check:
    return lambda value: isinstance(value, str) and pattern.fullmatch(value) is not None


def _integer(low: int, high: int) -> Check:
    # bool is an int in Python and not one in this protocol.
    return lambda value: type(value) is int and low <= value <= high


def _optional(check: Check) -> Check:
    return lambda value: value is None or check(value)


def _one_of(*values: str) -> Check:
    return lambda value: isinstance(value, str) and value in values


def _text(limit: int) -> Check:
    return lambda value: isinstance(value, str) and len(value) <= limit and "\0" not in value


def _environment(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and len(value) <= 64
        and all(_ENVIRONMENT_NAME.fullmatch(k) and _text(4096)(v) for k, v in value.items())
    )


def _modes(value: Any) -> bool:
    """Terminal modes of RFC 4254 section 8: pairs of opcode and argument."""
    return (
        isinstance(value, list)
        and len(value) <= 160
        and all(
            isinstance(pair, list) and len(pair) == 2 and _integer(1, 159)(pair[0]) and _integer(0, 2**32 - 1)(pair[1])
            for pair in value
        )
    )


def _pty(value: Any) -> bool:
    size = _integer(0, 0xFFFF)  # struct winsize holds unsigned shorts (ioctl_tty(2))
    return (
        isinstance(value, dict)
        and value.keys() == {"columns", "rows", "width", "height", "modes"}
        and all(size(value[key]) for key in ("columns", "rows", "width", "height"))
        and _modes(value["modes"])
    )


_amount = _integer(-1, 2**62)  # -1: unlimited


def _limits(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() <= LIMITS
        and all(_integer(*_RANGES.get(key, (0, 2**62)))(number) for key, number in value.items())
    )


# What the kernel would not take of a cgroup, or no process could begin under.
_RANGES = {"processes": (1, 2**62), "memory": (1, 2**62), "cpu": (10, 2**62 // 10**5), "cpu_weight": (1, 10_000)}


LIMITS = frozenset({
    *(f"{kind}_namespaces" for kind in ("user", "mnt", "pid", "ipc", "uts", "net", "cgroup", "time")),
    "inotify_instances", "inotify_watches", "fanotify_groups", "fanotify_marks",
    "processes", "locked_memory", "message_queues", "pending_signals",
    "memory", "cpu", "cpu_weight",
})  # fmt: skip
"""What the kernel can hold for all sandboxes of a user or a tenant: bytes, counts, and thousandths of a core."""

_number = _integer(1, 2**62)
_notes = _text(8192)


@dataclass(frozen=True, slots=True)
class Create:
    """Make a sandbox. Reply: `init_pid` (in the spawner's pid namespace) and `namespaces` (kind -> inode)."""

    sandbox: str
    """A name that the gateway chooses, unique on its connection's node while the sandbox lives."""
    user: int
    """The user's number in the database: sandboxes of one number share a holder and its host ids."""
    user_limits: dict[str, int]
    """Of all the user's sandboxes together; what is not there is not limited."""
    tenant: int
    tenant_limits: dict[str, int]
    image: str
    hostname: str
    network: str
    """`uplink` or `none`."""
    disk: int
    """Bytes; -1 here and below: unlimited."""
    inodes: int
    ptys: int
    open_files: int
    notes: str
    """What `quota` shows inside, until a `note` says otherwise."""

    type: ClassVar[str] = "create"
    checks: ClassVar[dict[str, Check]] = {
        "sandbox": _matches(_NAME),
        "user": _number,
        "user_limits": _limits,
        "tenant": _number,
        "tenant_limits": _limits,
        "image": _matches(_NAME),
        "hostname": _matches(_HOSTNAME),
        "network": _one_of("uplink", "none"),
        "disk": _amount,
        "inodes": _amount,
        "ptys": _integer(-1, 4096),
        "open_files": _amount,
        "notes": _notes,
    }


@dataclass(frozen=True, slots=True)
class Spawn:
    """Start a channel's process in a sandbox.

    Reply: `pid`, and descriptors: the PTY's master, or the near ends of stdin, stdout and stderr, in this order.
    """

    sandbox: str
    channel: int
    """A number that the gateway chooses, unique in the sandbox for as long as the process lives."""
    command: str | None
    """What `sh -c` is to run; None starts a login shell."""
    environment: dict[str, str]
    pty: dict[str, Any] | None

    type: ClassVar[str] = "spawn"
    checks: ClassVar[dict[str, Check]] = {
        "sandbox": _matches(_NAME),
        "channel": _integer(0, 2**31 - 1),
        "command": _optional(_text(48 * 1024)),
        "environment": _environment,
        "pty": _optional(_pty),
    }


@dataclass(frozen=True, slots=True)
class Signal:
    """Send a signal to the process group of a channel's process. Reply: empty, also when it has just ended."""

    sandbox: str
    channel: int
    signal: str

    type: ClassVar[str] = "signal"
    checks: ClassVar[dict[str, Check]] = {
        "sandbox": _matches(_NAME),
        "channel": _integer(0, 2**31 - 1),
        "signal": _one_of(*SIGNALS),
    }


@dataclass(frozen=True, slots=True)
class Destroy:
    """Kill all that runs in a sandbox. Reply: empty, at once; the `ended` event says when it is gone."""

    sandbox: str

    type: ClassVar[str] = "destroy"
    checks: ClassVar[dict[str, Check]] = {"sandbox": _matches(_NAME)}


@dataclass(frozen=True, slots=True)
class Limit:
    """Change the limits of a user and a tenant with live sandboxes. Reply: empty, also when none are live."""

    user: int
    user_limits: dict[str, int]
    tenant: int
    tenant_limits: dict[str, int]

    type: ClassVar[str] = "limit"
    checks: ClassVar[dict[str, Check]] = {
        "user": _number,
        "user_limits": _limits,
        "tenant": _number,
        "tenant_limits": _limits,
    }


@dataclass(frozen=True, slots=True)
class Note:
    """Change what `quota` shows inside. Reply: empty."""

    sandbox: str
    text: str

    type: ClassVar[str] = "note"
    checks: ClassVar[dict[str, Check]] = {"sandbox": _matches(_NAME), "text": _notes}


@dataclass(frozen=True, slots=True)
class Measure:
    """What a sandbox uses. Reply: the fields of `sandbox.usage.Usage`, and `network_in` and `network_out` in bytes."""

    sandbox: str

    type: ClassVar[str] = "measure"
    checks: ClassVar[dict[str, Check]] = {"sandbox": _matches(_NAME)}


@dataclass(frozen=True, slots=True)
class Capacity:
    """Reply: `users`, for how many at once there are host ids, and `rlimits`, the spawner's own (`capacity`)."""

    type: ClassVar[str] = "capacity"
    checks: ClassVar[dict[str, Check]] = {}


Request = Create | Spawn | Signal | Destroy | Limit | Note | Measure | Capacity
REQUESTS: dict[str, type[Request]] = {
    kind.type: kind for kind in (Create, Spawn, Signal, Destroy, Limit, Note, Measure, Capacity)
}

_request_number = _integer(0, 2**53)


def encode_request(number: int, request: Request) -> bytes:
    return encode({"request": number, "type": request.type, **asdict(request)})


def decode_request(data: bytes) -> tuple[int, Request]:
    """Parse and check one datagram.

    Raises `ProtocolError` for whatever the table does not allow, and nothing else, whatever the bytes are.
    """
    message = decode(data)
    number = message.pop("request", None)
    if not _request_number(number):
        raise ProtocolError("a request without a valid number")
    name = message.pop("type", None)
    kind = REQUESTS.get(name) if isinstance(name, str) else None
    if kind is None:
        raise ProtocolError("a request of a type that does not exist")
    if message.keys() != {field.name for field in fields(kind)}:
        raise ProtocolError(f"a {name} request whose fields are not those of the protocol")
    for field, check in kind.checks.items():
        if not check(message[field]):
            raise ProtocolError(f"a {name} request whose {field!r} is not of the protocol's form")
    return number, kind(**message)


def encode(message: dict[str, Any]) -> bytes:
    data = json.dumps(message, separators=(",", ":")).encode("ascii")
    if len(data) > MAX_MESSAGE:
        raise ProtocolError(f"a message of {len(data)} bytes is over the limit of {MAX_MESSAGE}")
    return data


def decode(data: bytes) -> dict[str, Any]:
    if len(data) > MAX_MESSAGE:
        raise ProtocolError("a message over the size limit")
    try:
        message = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ProtocolError("a message that is not JSON") from error
    if not isinstance(message, dict):
        raise ProtocolError("a message that is not an object")
    return message
