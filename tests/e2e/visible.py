"""Run a command in a mount namespace where an ordinary user can read this checkout: `visible.py COMMAND...`.

A CI machine may have put the checkout below a directory that only root enters; tests in rootless mode then need what
`sandbox_ssh.supervisor.show` does for a gateway worker.
"""

from __future__ import annotations

import os
import pwd
import sys
from pathlib import Path

import sandbox_ssh
from sandbox_ssh.supervisor import show

user = next(word.partition("=")[2] for word in sys.argv if word.startswith("--reuid="))
entry = pwd.getpwnam(user)
paths = {str(Path(sys.prefix).resolve()), str(Path(sys.base_prefix).resolve()), str(Path(sandbox_ssh.__file__).parent)}
show(sorted(paths, key=len), entry.pw_uid, entry.pw_gid)
os.execvp(sys.argv[1], sys.argv[1:])
