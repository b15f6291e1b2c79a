"""Who may come in: public keys and passwords against the users in the database.

What a client can learn by trying is kept small. An unknown user, a disabled user and a wrong key or password are
answered alike, after the same queries and the same hashing.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import asyncssh
import structlog

from sandbox_ssh.errors import StoreError
from sandbox_ssh.store import audit, users

if TYPE_CHECKING:
    from sandbox_ssh.gateway.worker import Worker
    from sandbox_ssh.store.models import User

NOBODY = 0
"""A user number that the database never gives out, to ask for the keys of."""

MAX_KEYS_TOLD = 8

log = structlog.get_logger()


class Authentication:
    """The attempts of one connection."""

    def __init__(self, worker: Worker, address: str) -> None:
        self.method = ""
        self.key_fingerprint: str | None = None
        self.user: User | None = None
        self._worker = worker
        self._address = address
        self._name: str | None = None
        self._lookup: asyncio.Future[User | None] | None = None
        self._failures = 0
        self._attempts = 0
        self._asked = False
        self._keys_tried: dict[str, None] = {}

    def begin(self, name: str) -> None:
        """Look a user up as soon as the client has said a name: it takes a round trip more to come with a key."""
        if name != self._name or self._lookup is None:
            self._name = name
            self.user = None
            self._lookup = asyncio.ensure_future(users.find(self._worker.database, name))
            self._lookup.add_done_callback(_seen)

    async def public_key(self, name: str, key: asyncssh.SSHKey) -> bool:
        """Whether a key belongs to a user; asyncssh verifies the signature after that."""
        fingerprint = key.get_fingerprint("sha256")
        if self.user is not None and (self._name, self.key_fingerprint) == (name, fingerprint):
            return True  # the client asked first whether the key will do, and now comes with the signature
        self._try("publickey")
        self.key_fingerprint = fingerprint
        try:
            user = await self._find(name)
            found = await users.key_of(self._worker.database, NOBODY if user is None else user.id, fingerprint)
        except StoreError as error:
            raise _unavailable(error) from error
        self.user = user if found is not None else None
        if len(self._keys_tried) < MAX_KEYS_TOLD:
            self._keys_tried[fingerprint] = None
        return self.user is not None

    async def password(self, name: str, password: str) -> bool:
        self._try("password")
        self.key_fingerprint = None
        try:
            user = await self._find(name)
            # A hash takes 20 ms of a core and 19 MiB: as many at once as there are cores.
            async with self._worker.hashing:
                right = await users.verify_password(self._worker.database, user, password)
            if right and user is not None:
                self.user = user
                return True
            self.user = None
            await self._record_failure("password")
        except StoreError as error:
            raise _unavailable(error) from error
        return False

    def failed(self) -> None:
        """The client has been told that an attempt failed.

        Raises `asyncssh.DisconnectError` at the last attempt that the configuration allows. The question for the
        methods (`none`, RFC 4252 section 5.2) is no attempt, and is free once.
        """
        if not self._attempts and not self._asked:
            self._asked = True
            return
        self._failures += 1
        if self._failures >= self._worker.config.ssh.max_auth_tries:
            raise asyncssh.DisconnectError(
                asyncssh.DISC_NO_MORE_AUTH_METHODS_AVAILABLE, "Too many authentication failures"
            )

    async def given_up(self) -> None:
        """The connection has ended without success: record the keys that were tried."""
        if not self._keys_tried:
            return
        try:
            await self._record_failure("publickey", keys=list(self._keys_tried))
        except StoreError as error:
            log.error("a failed authentication could not be recorded", error=str(error))

    def _try(self, method: str) -> None:
        self._attempts += 1
        self.method = method

    async def _find(self, name: str) -> User | None:
        self.begin(name)
        assert self._lookup is not None
        return await asyncio.shield(self._lookup)

    async def _record_failure(self, method: str, **detail: object) -> None:
        log.warning("authentication failed", user=self._name, address=self._address, method=method)
        await audit.record(
            self._worker.database,
            "auth-failure",
            node=self._worker.node,
            user=self._name,
            address=self._address,
            detail={"method": method, **detail},
        )


def _seen(lookup: asyncio.Future[User | None]) -> None:
    """A client that leaves after it has said a name does not wait for the answer, whatever it is."""
    if not lookup.cancelled():
        lookup.exception()


def _unavailable(error: StoreError) -> asyncssh.DisconnectError:
    log.error("nobody can log in: the database does not answer", error=str(error))
    return asyncssh.DisconnectError(
        asyncssh.DISC_SERVICE_NOT_AVAILABLE, "The server cannot look up users at the moment; try again later"
    )
