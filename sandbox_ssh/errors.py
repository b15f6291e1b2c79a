"""Errors that people see. Their text is one sentence that an administrator can act on."""

from __future__ import annotations


class SandboxSSHError(Exception):
    """Base of every error this project raises on purpose; `str()` is fit for a terminal."""


class ConfigError(SandboxSSHError):
    """A configuration file, an option or an environment variable makes no sense."""


class StoreError(SandboxSSHError):
    """The database refused, is out of reach, or holds another schema than this program needs."""


class NotFoundError(StoreError):
    """A user, tenant, key, session or image that was named does not exist."""


class AlreadyExistsError(StoreError):
    """A user, tenant, key or image of that name exists."""


class QuotaError(SandboxSSHError):
    """A quota that does not exist, or a value that makes no sense for it."""


class RefusedError(SandboxSSHError):
    """A quota, or what the host can carry, does not let a session in; the text is for the one who logs in.

    `key` is the quota's name, or `capacity`.
    """

    def __init__(self, key: str, message: str) -> None:
        super().__init__(message)
        self.key = key


class ProtocolError(SandboxSSHError):
    """A message between gateway and spawner that its table does not allow."""


class SpawnerError(SandboxSSHError):
    """The spawner refused a request or could not carry it out.

    `code` is one of `spawner.protocol.ERROR_CODES`, for programs; the text is for people.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class SandboxError(SandboxSSHError):
    """A step of making a sandbox failed; the text names the step and the kernel's answer."""
