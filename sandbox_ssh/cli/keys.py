"""Reading public keys from files. The store knows no SSH, so what it is to hold is worked out here."""

from __future__ import annotations

import base64
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import asyncssh

from sandbox_ssh.errors import ConfigError
from sandbox_ssh.store.users import Key

_MAX_BYTES = 1024 * 1024


def read(files: Sequence[Path]) -> list[Key]:
    """The keys in these files, each once; `-` is standard input.

    Raises `ConfigError` naming the file, and the line, that holds no public key.
    """
    found = {key.fingerprint: key for file in files for key in _read(file)}
    return list(found.values())


def _read(file: Path) -> Iterator[Key]:
    name = "standard input" if str(file) == "-" else str(file)
    try:
        with sys.stdin.buffer if str(file) == "-" else file.open("rb") as stream:
            data = stream.read(_MAX_BYTES)
    except OSError as error:
        raise ConfigError(f"{name} cannot be read: {error.strerror}") from error
    if b"PRIVATE KEY-----" in data:
        raise ConfigError(f"{name} holds a private key: give the public one, which is usually {name}.pub")
    if data.startswith(b"----"):  # RFC 4716, or PEM: one key over several lines
        yield _parse(data, name)
        return
    count = 0
    for number, line in enumerate(data.splitlines(), 1):
        if line.strip() and not line.lstrip().startswith(b"#"):
            yield _parse(line, f"{name}, line {number}")
            count += 1
    if count == 0:
        raise ConfigError(f"{name} holds no public key")


def _parse(data: bytes, where: str) -> Key:
    try:
        key = asyncssh.import_public_key(data)
    except asyncssh.KeyImportError as error:
        # Options of authorized_keys (sshd(8)) are refused too: `from=` and `command=` would not be kept.
        raise ConfigError(f"{where} is not a public key: write `TYPE BASE64 COMMENT`, without options") from error
    return Key(
        algorithm=key.get_algorithm(),
        blob=base64.b64encode(key.public_data).decode("ascii"),
        fingerprint=key.get_fingerprint("sha256"),
        comment=(key.get_comment_bytes() or b"").decode("utf-8", "replace"),
    )
