"""What the documents show is what happens: their transcripts are run, command by command."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from tests.e2e.conftest import Server, end

pytestmark = pytest.mark.host

LIMITS = Path(__file__).parents[2] / "docs" / "limits.md"


def transcript() -> list[tuple[str, str, list[str]]]:
    """(who, command, the lines that it prints) of the worked example."""
    section = LIMITS.read_text().partition("## See it work")[2].partition("\n## ")[0]
    steps: list[tuple[str, str, list[str]]] = []
    for line in "\n".join(re.findall(r"```console\n(.*?)```", section, re.S)).splitlines():
        if match := re.match(r"(admin|first|second)# (.*)", line):
            steps.append((match[1], match[2], []))
        elif line:
            steps[-1][2].append(line)
    return steps


def run(shell: subprocess.Popen[bytes], command: str) -> list[str]:
    assert shell.stdin is not None and shell.stdout is not None
    shell.stdin.write(f"{{ {command}; }} 2>&1; echo; echo end\n".encode())
    shell.stdin.flush()
    lines = []
    for line in iter(shell.stdout.readline, b"end\n"):
        assert line, "the session has ended"
        lines.append(line.decode().rstrip())
    return [line for line in lines if line]


def test_the_worked_example_of_the_limits(server: Server) -> None:
    steps = transcript()
    assert len(steps) >= 8
    server.cli("user", "add", "demo", "--key", server.directory / "key.pub")
    shells: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for who, command, printed in steps:
            if who == "admin":
                lines = server.cli(*shlex.split(command)[1:]).stderr.splitlines()
            else:
                if not shells:  # both sessions, once the first command has set the quota
                    shells = {name: server.popen("exec sh", user="demo") for name in ("first", "second")}
                    run(shells["second"], "true")
                lines = run(shells[who], command)
            assert lines == printed, command
    finally:
        for shell in shells.values():
            end(shell)
