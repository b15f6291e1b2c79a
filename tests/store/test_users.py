"""Users, keys, passwords and tenants."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from sqlalchemy import select

from sandbox_ssh.errors import AlreadyExistsError, NotFoundError, StoreError
from sandbox_ssh.store import nodes, sessions, tenants, users
from sandbox_ssh.store.database import Database
from sandbox_ssh.store.models import AuditEvent, Role
from sandbox_ssh.store.users import Key
from tests.rows import admit

KEY = Key("ssh-ed25519", "AAAAC3Nza", "SHA256:" + "a" * 43, "alice@laptop")
OTHER = Key("ssh-ed25519", "AAAAC3Nzb", "SHA256:" + "b" * 43, "")


async def events(database: Database) -> Sequence[AuditEvent]:
    async with database.read() as transaction:
        return (await transaction.scalars(select(AuditEvent).order_by(AuditEvent.id))).all()


async def test_a_user_is_found_with_the_tenant(database: Database) -> None:
    await tenants.add(database, "physics", by="root")
    added = await users.add(database, "alice", tenant="physics", role=Role.INSTRUCTOR, by="root")
    found = await users.find(database, "alice")
    assert found is not None
    assert (found.id, found.name, found.tenant.name, found.role) == (added.id, "alice", "physics", "instructor")
    assert found.created_at.utcoffset() is not None


@pytest.mark.parametrize("name", ["nobody", "ALICE", "alice ", "alice\0", "\udcff", "a" * 100_000, "' OR 1=1 --", ""])
async def test_no_other_name_finds_a_user(database: Database, name: str) -> None:
    await users.add(database, "alice", by="root")
    assert await users.find(database, name) is None


async def test_disabled_user_and_tenant_are_not_found(database: Database) -> None:
    await tenants.add(database, "physics", by="root")
    await users.add(database, "alice", tenant="physics", by="root")
    await users.change(database, "alice", enabled=False, by="root")
    assert await users.find(database, "alice") is None
    await users.change(database, "alice", enabled=True, by="root")
    assert await users.find(database, "alice") is not None
    await tenants.change(database, "physics", enabled=False, by="root")
    assert await users.find(database, "alice") is None


@pytest.mark.parametrize("name", ["", "Alice", "1st", "-rf", "a b", "a/b", "../x", "a" * 33, "é", "a\0", "a\n"])
async def test_names_that_cannot_be(database: Database, name: str) -> None:
    with pytest.raises(StoreError, match="cannot be the name"):
        await users.add(database, name, by="root")
    with pytest.raises(StoreError, match="cannot be the name"):
        await tenants.add(database, name, by="root")


async def test_a_name_is_given_once(database: Database) -> None:
    await tenants.add(database, "physics", by="root")
    await users.add(database, "alice", by="root")
    with pytest.raises(AlreadyExistsError, match="alice"):
        await users.add(database, "alice", tenant="physics", by="root")
    with pytest.raises(AlreadyExistsError, match="physics"):
        await tenants.add(database, "physics", by="root")


async def test_unknown_tenant_adds_nobody(database: Database) -> None:
    with pytest.raises(NotFoundError, match="there is no tenant chemistry: see `sandbox-ssh tenant list`"):
        await users.add(database, "alice", tenant="chemistry", by="root")
    assert await users.list_users(database) == []
    assert await events(database) == []


async def test_keys_belong_to_their_user(database: Database) -> None:
    alice = await users.add(database, "alice", keys=[KEY], by="root")
    bob = await users.add(database, "bob", by="root")
    assert await users.add_keys(database, "alice", [KEY, OTHER], by="root") == [OTHER]
    found = await users.key_of(database, alice.id, KEY.fingerprint)
    assert found is not None and (found.blob, found.comment) == (KEY.blob, KEY.comment)
    assert await users.key_of(database, bob.id, KEY.fingerprint) is None
    assert await users.key_of(database, 0, KEY.fingerprint) is None
    assert [key.fingerprint for key in (await users.get(database, "alice")).keys] == [
        KEY.fingerprint,
        OTHER.fingerprint,
    ]
    await users.remove_key(database, "alice", KEY.fingerprint, by="root")
    assert await users.key_of(database, alice.id, KEY.fingerprint) is None
    with pytest.raises(NotFoundError, match="SHA256"):
        await users.remove_key(database, "alice", KEY.fingerprint, by="root")


async def test_one_key_may_be_of_two_users(database: Database) -> None:
    alice = await users.add(database, "alice", keys=[KEY], by="root")
    bob = await users.add(database, "bob", keys=[KEY], by="root")
    await users.remove(database, "alice", by="root")
    assert await users.key_of(database, alice.id, KEY.fingerprint) is None
    assert await users.key_of(database, bob.id, KEY.fingerprint) is not None


@pytest.mark.parametrize("password", ["correct horse", "pässwörd", "\udcff\0", "x" * 10_000])
async def test_passwords(database: Database, password: str) -> None:
    await users.add(database, "alice", password=password, by="root")
    alice = await users.find(database, "alice")
    assert alice is not None
    assert alice.password_hash is not None and alice.password_hash.startswith("$argon2id$")
    assert await users.verify_password(database, alice, password)
    assert not await users.verify_password(database, alice, password + "x")
    assert not await users.verify_password(database, alice, "")
    await users.set_password(database, "alice", "another", by="root")
    alice = await users.find(database, "alice")
    assert not await users.verify_password(database, alice, password)
    assert await users.verify_password(database, alice, "another")


async def test_no_password_lets_in_who_has_none(database: Database) -> None:
    await users.add(database, "alice", by="root")
    alice = await users.find(database, "alice")
    for password in ("", "x"):
        assert not await users.verify_password(database, alice, password)
        assert not await users.verify_password(database, None, password)


async def test_a_broken_hash_lets_nobody_in(database: Database) -> None:
    alice = await users.add(database, "alice", by="root")
    alice.password_hash = "not a hash"
    assert not await users.verify_password(database, alice, "not a hash")


async def test_unknown_users_cost_the_same_hash() -> None:
    """Same parameters, same time."""
    assert users._NOBODYS_HASH.rsplit("$", 2)[0] == users._HASHER.hash(b"x").rsplit("$", 2)[0]


async def test_removed_user_leaves_the_records(database: Database) -> None:
    await nodes.register(database, "one", "rootless", "1")
    alice = await users.add(database, "alice", keys=[KEY], by="root")
    number = await admit(database, alice)
    with pytest.raises(StoreError, match=f"sandbox-ssh session kill {number}"):
        await users.remove(database, "alice", by="root")
    await sessions.recover(database, "one", None)
    await users.remove(database, "alice", by="root")
    session = await sessions.get(database, number)
    assert (session.user_name, session.user_id, session.tenant_name) == ("alice", None, "default")
    again = await users.add(database, "alice", by="root")
    assert again.id != alice.id, "a number in old records must not become somebody else's"


async def test_changes(database: Database) -> None:
    await tenants.add(database, "physics", description="Physics", by="root")
    await users.add(database, "alice", by="root")
    await users.change(database, "alice", tenant="physics", role=Role.ADMIN, by="carol")
    alice = await users.get(database, "alice")
    assert (alice.tenant.name, alice.role, alice.enabled) == ("physics", "admin", True)
    assert [user.name for user in await users.list_users(database, tenant="physics")] == ["alice"]
    assert await users.list_users(database, tenant="default") == []
    for attempt in (users.get(database, "bob"), users.change(database, "bob", enabled=True, by="x"),
                    users.remove(database, "bob", by="x"), users.set_password(database, "bob", "x", by="x"),
                    users.add_keys(database, "bob", [KEY], by="x")):  # fmt: skip
        with pytest.raises(NotFoundError, match="bob"):
            await attempt


async def test_tenants(database: Database) -> None:
    await tenants.add(database, "physics", description="Physics", by="root")
    await users.add(database, "alice", tenant="physics", by="root")
    assert [(tenant.name, count) for tenant, count in await tenants.list_tenants(database)] == [
        ("default", 0),
        ("physics", 1),
    ]
    with pytest.raises(StoreError, match="still has users"):
        await tenants.remove(database, "physics", by="root")
    await users.remove(database, "alice", by="root")
    await tenants.change(database, "physics", description="Physics 2", by="root")
    tenant, count = await tenants.get(database, "physics")
    assert (tenant.description, tenant.enabled, count) == ("Physics 2", True, 0)
    await tenants.remove(database, "physics", by="root")
    with pytest.raises(NotFoundError, match="physics"):
        await tenants.get(database, "physics")


async def test_every_change_is_an_audit_event(database: Database) -> None:
    await tenants.add(database, "physics", by="carol")
    await users.add(database, "alice", keys=[KEY], password="secret", by="carol")
    await users.change(database, "alice", enabled=False, by="carol")
    await users.set_password(database, "alice", "secret", by="carol")
    await users.add_keys(database, "alice", [KEY], by="carol")  # changes nothing
    await users.add_keys(database, "alice", [OTHER], by="carol")
    await users.remove_key(database, "alice", OTHER.fingerprint, by="carol")
    await users.remove(database, "alice", by="carol")
    await tenants.change(database, "physics", enabled=False, by="carol")
    await tenants.remove(database, "physics", by="carol")
    found = await events(database)
    assert [event.kind for event in found] == [
        "tenant-added", "user-added", "user-changed", "password-changed", "key-added", "key-removed", "user-removed",
        "tenant-changed", "tenant-removed",
    ]  # fmt: skip
    assert all(event.detail["by"] == "carol" for event in found)
    assert "secret" not in repr([event.detail for event in found])
