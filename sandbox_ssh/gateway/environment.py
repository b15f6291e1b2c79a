"""Which of a client's environment variables reach its processes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

# The spawner's protocol allows more of each; these bounds keep a whole `spawn` request within one message.
MAX_VARIABLES = 48
MAX_BYTES = 8 * 1024

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}", re.ASCII)


def accepted(offered: Mapping[str, str], patterns: Sequence[str]) -> dict[str, str]:
    """The variables that `patterns` allow, as AcceptEnv does (sshd_config(5)): `*` and `?`, case matters.

    A variable that cannot be passed (a strange name, a NUL, over the bounds) is left out without a word, as the
    client has no way to hear about it: env requests are sent without asking for a reply.
    """
    passed: dict[str, str] = {}
    size = 0
    for name, value in offered.items():
        if _NAME.fullmatch(name) is None or "\0" in value:
            continue
        if not any(fnmatchcase(name, pattern) for pattern in patterns):
            continue
        size += len(name) + len(value)
        if len(passed) == MAX_VARIABLES or size > MAX_BYTES:
            break
        passed[name] = value
    return passed
