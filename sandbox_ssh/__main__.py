"""The `sandbox-ssh` command, also `python -m sandbox_ssh`."""

from __future__ import annotations

import os
import sys

from sandbox_ssh.cli import app, output
from sandbox_ssh.errors import SandboxSSHError


def main() -> None:
    """Exit with 0 when the command did its work, 1 when it failed, 2 when it was used wrongly."""
    for stream in (sys.stdout, sys.stderr):
        # A name that the terminal's encoding does not have is no reason to fail.
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        app(prog_name="sandbox-ssh")
        sys.stdout.flush()
    except SandboxSSHError as error:
        output.message(f"sandbox-ssh: {error}")
        sys.exit(1)
    except OSError as error:
        # What is expected of files and sockets has become a sentence of our own; what is left is a full disk and the
        # like. What could not be written is not tried again at the end (bpo-11380).
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        output.message(f"sandbox-ssh: {error.strerror}: {error.filename or 'standard output'}")
        sys.exit(1)


if __name__ == "__main__":
    main()
