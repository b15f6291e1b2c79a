"""Users, their public keys and their passwords.

`find`, `key_of` and `verify_password` are on the way of every login; the rest is for administrators, and every change
writes its audit event in the same transaction. `by` says who made the change.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from typing import NamedTuple

import argon2
from sqlalchemy import delete, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import selectinload

from sandbox_ssh.errors import AlreadyExistsError, NotFoundError, StoreError
from sandbox_ssh.store import audit
from sandbox_ssh.store.database import Database, insert_or
from sandbox_ssh.store.models import DEFAULT_TENANT, LIVE, PublicKey, Role, Session, Tenant, User

# What useradd(8) takes, and dots: no name needs quoting in a shell, a path, or a URL.
_NAME = re.compile(r"[a-z_][a-z0-9_.-]{0,31}", re.ASCII)

# The smaller of OWASP's two settings for argon2id: 19 MiB and about 20 ms. RFC 9106's second choice takes 64 MiB,
# which as many clients at once as there are cores would make the server's largest piece of memory by far.
_HASHER = argon2.PasswordHasher(time_cost=2, memory_cost=19 * 1024, parallelism=1)

# The hash of a password that nobody knows, so that an unknown user takes as long as a wrong password.
_NOBODYS_HASH = "$argon2id$v=19$m=19456,t=2,p=1$eVj24fA3cTyxWv0IGhFF1Q$wATSkHRBz9ylhrTW0VHPCMcHgtMV6eCCKy2ZjmcZz8g"


class Key(NamedTuple):
    """A public key to be added, in the words of `PublicKey`."""

    algorithm: str
    blob: str
    fingerprint: str
    comment: str


async def find(database: Database, name: str) -> User | None:
    """The user who may log in by this name, with the tenant; None also where either of them is disabled."""
    async with database.read() as transaction:
        return await transaction.scalar(
            select(User).join(User.tenant).where(User.name == name, User.enabled, Tenant.enabled)
        )


async def key_of(database: Database, user_id: int, fingerprint: str) -> PublicKey | None:
    """The user's key of this fingerprint (`SHA256:…`), if it is one of theirs."""
    async with database.read() as transaction:
        return await transaction.scalar(
            select(PublicKey).where(PublicKey.user_id == user_id, PublicKey.fingerprint == fingerprint)
        )


async def verify_password(database: Database, user: User | None, password: str) -> bool:
    """Whether this is the user's password, in the same time for no user, a user without one, and a wrong one."""
    stored = user.password_hash if user is not None else None
    matches = await asyncio.to_thread(_matches, stored or _NOBODYS_HASH, password)
    return matches and stored is not None


def _matches(stored: str, password: str) -> bool:
    try:
        return _HASHER.verify(stored, _encode(password))
    except (argon2.exceptions.VerificationError, argon2.exceptions.InvalidHashError):
        return False


def _encode(password: str) -> bytes:
    return password.encode("utf-8", "surrogatepass")


# For administrators.


async def get(database: Database, name: str) -> User:
    """A user with their keys. Raises `NotFoundError`."""
    async with database.read() as transaction:
        user = await _get(transaction, name)
        await transaction.refresh(user, ["keys"])
        return user


async def list_users(database: Database, *, tenant: str | None = None) -> Sequence[User]:
    """Users with their keys."""
    query = select(User).join(User.tenant).order_by(User.name).options(selectinload(User.keys))
    if tenant is not None:
        query = query.where(Tenant.name == tenant)
    async with database.read() as transaction:
        return (await transaction.scalars(query)).all()


async def add(
    database: Database,
    name: str,
    *,
    tenant: str = DEFAULT_TENANT,
    role: Role = Role.USER,
    keys: Sequence[Key] = (),
    password: str | None = None,
    by: str,
) -> User:
    """Raises `AlreadyExistsError`, `NotFoundError` for the tenant, or `StoreError` for a name that cannot be one."""
    check_name("user", name)
    stored = None if password is None else await asyncio.to_thread(_HASHER.hash, _encode(password))
    async with database.write() as transaction:
        user = User(name=name, tenant=await get_tenant(transaction, tenant), role=role, password_hash=stored)
        transaction.add(user)
        try:
            await transaction.flush()
        except IntegrityError as error:
            raise AlreadyExistsError(f"there is a user {name} already") from error
        await _add_keys(transaction, user, keys)
        detail = {"by": by, "role": role, "keys": [key.fingerprint for key in keys], "password": stored is not None}
        await audit.note(transaction, "user-added", user=name, tenant=tenant, detail=detail)
        return user


async def change(
    database: Database,
    name: str,
    *,
    tenant: str | None = None,
    role: Role | None = None,
    enabled: bool | None = None,
    by: str,
) -> User:
    """Change what is not None.

    Raises `NotFoundError` for the user or the tenant, `StoreError` for a move while there are live sessions: they are
    held by the limits of the tenant that they began in, and more could begin in the other.
    """
    async with database.write() as transaction:
        user = await _get(transaction, name)
        detail: dict[str, object] = {"by": by}
        if tenant is not None:
            await _require_no_sessions(transaction, user)
            detail["tenant"] = [user.tenant.name, tenant]
            user.tenant = await get_tenant(transaction, tenant)
        if role is not None:
            detail["role"] = [user.role, role]
            user.role = role
        if enabled is not None:
            detail["enabled"] = [user.enabled, enabled]
            user.enabled = enabled
        await audit.note(transaction, "user-changed", user=name, tenant=user.tenant.name, detail=detail)
        return user


async def set_password(database: Database, name: str, password: str, *, by: str) -> None:
    """Raises `NotFoundError`."""
    stored = await asyncio.to_thread(_HASHER.hash, _encode(password))
    async with database.write() as transaction:
        user = await _get(transaction, name)
        user.password_hash = stored
        await audit.note(transaction, "password-changed", user=name, tenant=user.tenant.name, detail={"by": by})


async def remove(database: Database, name: str, *, by: str) -> None:
    """Remove a user and their keys; records of their sessions stay.

    Raises `NotFoundError`, and `StoreError` while they have live sessions.
    """
    async with database.write() as transaction:
        user = await _get(transaction, name)
        await _require_no_sessions(transaction, user)
        await transaction.delete(user)
        await audit.note(transaction, "user-removed", user=name, tenant=user.tenant.name, detail={"by": by})


async def add_keys(database: Database, name: str, keys: Sequence[Key], *, by: str) -> Sequence[Key]:
    """Add keys; return those that the user did not have yet. Raises `NotFoundError`."""
    async with database.write() as transaction:
        user = await _get(transaction, name)
        new = await _add_keys(transaction, user, keys)
        if new:
            detail = {"by": by, "keys": [key.fingerprint for key in new]}
            await audit.note(transaction, "key-added", user=name, tenant=user.tenant.name, detail=detail)
        return new


async def remove_key(database: Database, name: str, fingerprint: str, *, by: str) -> None:
    """Raises `NotFoundError` for the user or the key."""
    async with database.write() as transaction:
        user = await _get(transaction, name)
        removed = await transaction.scalar(
            delete(PublicKey)
            .where(PublicKey.user_id == user.id, PublicKey.fingerprint == fingerprint)
            .returning(PublicKey.id)
        )
        if removed is None:
            raise NotFoundError(f"{name} has no key {fingerprint}: see `sandbox-ssh user key list {name}`")
        detail = {"by": by, "keys": [fingerprint]}
        await audit.note(transaction, "key-removed", user=name, tenant=user.tenant.name, detail=detail)


def check_name(what: str, name: str) -> None:
    if _NAME.fullmatch(name) is None:
        raise StoreError(
            f"{name!r} cannot be the name of a {what}: use up to 32 of a-z, 0-9, '.', '_' and '-', "
            "with a letter or '_' at the start"
        )


async def get_tenant(transaction: AsyncSession, name: str) -> Tenant:
    tenant = await transaction.scalar(select(Tenant).where(Tenant.name == name))
    if tenant is None:
        raise NotFoundError(f"there is no tenant {name}: see `sandbox-ssh tenant list`, or make it with `tenant add`")
    return tenant


async def _get(transaction: AsyncSession, name: str) -> User:
    user = await transaction.scalar(select(User).where(User.name == name))
    if user is None:
        raise NotFoundError(f"there is no user {name}: see `sandbox-ssh user list`")
    return user


async def _add_keys(transaction: AsyncSession, user: User, keys: Sequence[Key]) -> Sequence[Key]:
    new = []
    for key in keys:
        added = await transaction.scalar(
            insert_or(transaction, PublicKey)
            .values(user_id=user.id, **key._asdict())
            .on_conflict_do_nothing(index_elements=["user_id", "fingerprint"])
            .returning(PublicKey.id)
        )
        if added is not None:
            new.append(key)
    return new


async def _require_no_sessions(transaction: AsyncSession, user: User) -> None:
    query = select(Session.id).where(Session.user_id == user.id, Session.state.in_(LIVE))
    live = (await transaction.scalars(query)).all()
    if live:
        numbers = " ".join(map(str, live))
        raise StoreError(f"{user.name} has live sessions: end them with `sandbox-ssh session kill {numbers}` first")
