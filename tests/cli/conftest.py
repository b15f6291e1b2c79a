"""The command as it is called, in this process: arguments in; exit status, stdout and stderr out."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from sandbox_ssh.__main__ import main


@dataclass
class Result:
    status: int
    out: str
    err: str

    @property
    def sentence(self) -> str:
        """What stderr says, without the frame and the line breaks that fit it to a terminal."""
        return " ".join(self.err.replace("│", " ").split())

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Command = Callable[..., Result]


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("SANDBOX_SSH_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("SANDBOX_SSH_CONFIG", "")  # none, also where this host has one
    monkeypatch.setenv("SANDBOX_SSH_SERVER__MODE", "rootless")  # root, too, makes files of its own
    monkeypatch.delenv("SUDO_USER", raising=False)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    def run(*arguments: object, stdin: bytes = b"") -> Result:
        monkeypatch.setattr(sys, "argv", ["sandbox-ssh", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        capfd.readouterr()
        status = 0
        try:
            main()
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 0
        return Result(status, *capfd.readouterr())

    return run


@pytest.fixture
def on(command: Command, database_url: str) -> Command:
    """The command with a migrated database: each test that asks for this runs on SQLite and PostgreSQL."""

    def run(*arguments: object, stdin: bytes = b"") -> Result:
        return command("--database-url", database_url, *arguments, stdin=stdin)

    return run


@pytest.fixture
def key(tmp_path: Path) -> Path:
    """A public key that OpenSSH made."""
    file = tmp_path / "id_ed25519"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "alice@laptop", "-f", file], check=True)
    return file.with_suffix(".pub")
