"""Tenants. Every user is in exactly one; the tenant `default` is there from the start."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import func, select
from sqlalchemy.exc import IntegrityError

from sandbox_ssh.errors import AlreadyExistsError, StoreError
from sandbox_ssh.store import audit
from sandbox_ssh.store.database import Database
from sandbox_ssh.store.models import DEFAULT_TENANT, Tenant, User
from sandbox_ssh.store.users import check_name, get_tenant


async def add(database: Database, name: str, *, description: str = "", by: str) -> Tenant:
    """Raises `AlreadyExistsError`, or `StoreError` for a name that cannot be one."""
    check_name("tenant", name)
    async with database.write() as transaction:
        tenant = Tenant(name=name, description=description)
        transaction.add(tenant)
        try:
            await transaction.flush()
        except IntegrityError as error:
            raise AlreadyExistsError(f"there is a tenant {name} already") from error
        await audit.note(transaction, "tenant-added", tenant=name, detail={"by": by})
        return tenant


async def get(database: Database, name: str) -> tuple[Tenant, int]:
    """A tenant, and how many users it has. Raises `NotFoundError`."""
    async with database.read() as transaction:
        tenant = await get_tenant(transaction, name)
        count = select(func.count()).select_from(User).where(User.tenant_id == tenant.id)
        return tenant, await transaction.scalar(count) or 0


async def list_tenants(database: Database) -> Sequence[tuple[Tenant, int]]:
    """All tenants, each with the number of its users."""
    query = select(Tenant, func.count(User.id)).outerjoin(User).group_by(Tenant.id).order_by(Tenant.name)
    async with database.read() as transaction:
        return [(tenant, count) for tenant, count in await transaction.execute(query)]


async def change(
    database: Database, name: str, *, description: str | None = None, enabled: bool | None = None, by: str
) -> Tenant:
    """Change what is not None. Raises `NotFoundError`."""
    async with database.write() as transaction:
        tenant = await get_tenant(transaction, name)
        detail: dict[str, object] = {"by": by}
        if description is not None:
            detail["description"] = [tenant.description, description]
            tenant.description = description
        if enabled is not None:
            detail["enabled"] = [tenant.enabled, enabled]
            tenant.enabled = enabled
        await audit.note(transaction, "tenant-changed", tenant=name, detail=detail)
        return tenant


async def remove(database: Database, name: str, *, by: str) -> None:
    """Raises `NotFoundError`, and `StoreError` for a tenant that has users, and for the one that always is."""
    if name == DEFAULT_TENANT:
        raise StoreError(f"the tenant {name} stays: users belong to it unless another is named")
    async with database.write() as transaction:
        tenant = await get_tenant(transaction, name)
        await transaction.delete(tenant)
        try:
            await transaction.flush()
        except IntegrityError as error:
            raise StoreError(
                f"tenant {name} still has users: remove them, or move them with `sandbox-ssh user set NAME --tenant …`"
            ) from error
        await audit.note(transaction, "tenant-removed", tenant=name, detail={"by": by})
