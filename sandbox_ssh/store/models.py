"""The tables.

Records outlive what they are about: a session keeps its user's and tenant's names as they were, and its row stays
when the user is removed. Migrations are in `migrations/`; a test holds that both say the same.
"""

from __future__ import annotations

from datetime import date, datetime
from enum import StrEnum
from typing import Any

from sqlalchemy import BigInteger, CheckConstraint, Date, ForeignKey, Index, MetaData, UniqueConstraint, text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from sandbox_ssh.quotas import QUOTAS
from sandbox_ssh.store.columns import BigId, CleanText, Document, Timestamp, now

SCHEMA = "0002"
"""The revision that these models belong to, so that a server can check it without loading Alembic."""

DEFAULT_TENANT = "default"


class Role(StrEnum):
    USER = "user"
    INSTRUCTOR = "instructor"
    ADMIN = "admin"


class State(StrEnum):
    """Of a session: starting -> running -> closing -> closed; or refused; or lost, when its node died."""

    STARTING = "starting"
    RUNNING = "running"
    CLOSING = "closing"
    CLOSED = "closed"
    REFUSED = "refused"
    LOST = "lost"


LIVE = (State.STARTING, State.RUNNING, State.CLOSING)


def _one_of(column: str, values: type[StrEnum]) -> CheckConstraint:
    listed = ", ".join(f"'{value}'" for value in values)
    return CheckConstraint(f"{column} IN ({listed})", name=column)


class Model(DeclarativeBase):
    # Every constraint has a name, so that a migration can change it.
    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {
        str: CleanText(),
        int: BigId,
        datetime: Timestamp(),
        date: Date(),
        dict[str, Any]: Document(),
        dict[str, int]: Document(),
    }

    id: Mapped[int] = mapped_column(primary_key=True)


class Tenant(Model):
    __tablename__ = "tenants"
    __table_args__ = ({"sqlite_autoincrement": True},)  # the number of a removed tenant is nobody else's

    name: Mapped[str] = mapped_column(unique=True)
    description: Mapped[str] = mapped_column(default="")
    enabled: Mapped[bool] = mapped_column(default=True)
    created_at: Mapped[datetime] = mapped_column(default=now)


class User(Model):
    __tablename__ = "users"
    __table_args__ = (_one_of("role", Role), {"sqlite_autoincrement": True})

    name: Mapped[str] = mapped_column(unique=True)
    tenant_id: Mapped[int] = mapped_column(ForeignKey("tenants.id", ondelete="RESTRICT"), index=True)
    role: Mapped[str] = mapped_column(default=Role.USER)
    enabled: Mapped[bool] = mapped_column(default=True)
    password_hash: Mapped[str | None]
    created_at: Mapped[datetime] = mapped_column(default=now)

    tenant: Mapped[Tenant] = relationship(lazy="joined", innerjoin=True)
    # passive_deletes: the database removes the keys with the user (ON DELETE CASCADE).
    keys: Mapped[list[PublicKey]] = relationship(lazy="raise", order_by="PublicKey.id", passive_deletes="all")


class PublicKey(Model):
    __tablename__ = "public_keys"
    __table_args__ = (UniqueConstraint("user_id", "fingerprint"),)

    user_id: Mapped[int] = mapped_column(ForeignKey("users.id", ondelete="CASCADE"))
    algorithm: Mapped[str]
    blob: Mapped[str] = mapped_column(CleanText(65536))
    """The key in base64, as in authorized_keys (sshd(8))."""
    fingerprint: Mapped[str]
    """`SHA256:` and 43 characters, as `ssh-keygen -l` prints it."""
    comment: Mapped[str] = mapped_column(default="")
    added_at: Mapped[datetime] = mapped_column(default=now)


class Node(Model):
    __tablename__ = "nodes"

    name: Mapped[str] = mapped_column(unique=True)
    mode: Mapped[str]
    version: Mapped[str]
    started_at: Mapped[datetime]
    beats: Mapped[int] = mapped_column(default=0, server_default=text("0"))
    """Grows as long as the node lives: the others watch it, each by its own clock."""
    capacity: Mapped[dict[str, Any] | None]
    """The fields of `sandbox_ssh.capacity.Capacity`; None until it is known."""
    nested: Mapped[dict[str, int] | None]
    """Kind -> namespaces that tenants have made in their sandboxes here, when they were last counted."""


class Quotas(Model):
    """What is set for a tenant, a user, or (with neither) for all; NULL inherits."""

    __tablename__ = "quotas"
    __table_args__ = (
        CheckConstraint("tenant_id IS NULL OR user_id IS NULL", name="owner"),
        UniqueConstraint("tenant_id"),
        UniqueConstraint("user_id"),
    )

    tenant_id: Mapped[int | None] = mapped_column(ForeignKey("tenants.id", ondelete="CASCADE"))
    user_id: Mapped[int | None] = mapped_column(ForeignKey("users.id", ondelete="CASCADE"))
    changed_at: Mapped[datetime] = mapped_column(default=now)
    revision: Mapped[int] = mapped_column(default=0)
    """How many changes there had been, this one included. The row of all, which the migration makes and every change
    locks first, has the latest."""


for _key in QUOTAS:
    setattr(Quotas, _key, mapped_column(_key, BigInteger, nullable=True))


_OPEN = text("ended_at IS NULL")


class Session(Model):
    __tablename__ = "sessions"
    __table_args__ = (
        _one_of("state", State),
        # For the gateway, which asks twice a second: holds nothing but the requests that are still open.
        Index(
            "ix_sessions_kill_requests",
            "node",
            "worker",
            sqlite_where=text("kill_requested_at IS NOT NULL AND ended_at IS NULL"),
            postgresql_where=text("kill_requested_at IS NOT NULL AND ended_at IS NULL"),
        ),
        # For `session list`: each filter with the order of the list.
        Index(None, "started_at"),
        Index(None, "user_name", "started_at"),
        Index(None, "tenant_name", "started_at"),
        Index(None, "client_address", "started_at"),
        Index(None, "node", "started_at"),
        Index(None, "state", "started_at"),
        # For admission: logins of the last hour, and live sessions, whatever the number of past ones; with all that is
        # asked for, so that the rows are left alone.
        Index(None, "user_id", "started_at", "state"),
        Index(None, "tenant_id", "started_at", "state"),
        *(
            Index(f"ix_sessions_live_{columns[0]}", *columns, sqlite_where=_OPEN, postgresql_where=_OPEN)
            for columns in (("user_id",), ("tenant_id",), ("node", "user_id"))
        ),
    )

    tenant_id: Mapped[int | None] = mapped_column(ForeignKey("tenants.id", ondelete="SET NULL"))
    tenant_name: Mapped[str]
    user_id: Mapped[int | None] = mapped_column(ForeignKey("users.id", ondelete="SET NULL"))
    user_name: Mapped[str]
    node: Mapped[str] = mapped_column(ForeignKey("nodes.name"))
    worker: Mapped[int]
    state: Mapped[str]
    end_reason: Mapped[str | None] = mapped_column(CleanText(1024))
    client_address: Mapped[str]
    client_port: Mapped[int]
    client_version: Mapped[str]
    auth_method: Mapped[str]
    key_fingerprint: Mapped[str | None]
    image: Mapped[str]
    started_at: Mapped[datetime] = mapped_column(default=now)
    ended_at: Mapped[datetime | None]
    exit_status: Mapped[int | None]
    bytes_in: Mapped[int] = mapped_column(default=0)
    bytes_out: Mapped[int] = mapped_column(default=0)
    refused_by: Mapped[str | None]
    """The quota that did not let it in, or `capacity`."""
    cpu_seconds: Mapped[float | None]
    memory_peak_bytes: Mapped[int | None]
    processes_peak: Mapped[int | None]
    disk_peak_bytes: Mapped[int | None]
    namespaces_peak: Mapped[dict[str, int] | None]
    """Kind -> the most that were seen at a time, its own included."""
    network_in: Mapped[int | None]
    """Bytes that came through the uplink, and below, went."""
    network_out: Mapped[int | None]
    use: Mapped[dict[str, Any] | None]
    """What was in use when it was last looked at, by the quota's name."""
    seconds: Mapped[float | None]
    """How long it had lasted, by a clock that nobody sets, when `usage` was last told of it; None: never."""
    namespaces: Mapped[dict[str, int] | None]
    """Kind (`user`, `mnt`, ...) -> inode number, as `readlink /proc/PID/ns/*` shows it on the node."""
    init_pid: Mapped[int | None]
    """PID 1 of the sandbox, as the node's host numbers it."""
    kill_requested_at: Mapped[datetime | None]
    kill_requested_by: Mapped[str | None]

    channels: Mapped[list[Channel]] = relationship(lazy="raise", order_by="Channel.number")


class Channel(Model):
    __tablename__ = "channels"
    __table_args__ = (UniqueConstraint("session_id", "number"),)

    session_id: Mapped[int] = mapped_column(ForeignKey("sessions.id", ondelete="CASCADE"))
    number: Mapped[int]
    kind: Mapped[str]
    """`shell`, `exec` or `subsystem`."""
    command: Mapped[str | None] = mapped_column(CleanText(65536))
    pty: Mapped[bool]
    opened_at: Mapped[datetime] = mapped_column(default=now)
    closed_at: Mapped[datetime | None]
    exit_status: Mapped[int | None]
    exit_signal: Mapped[str | None]


class Usage(Model):
    """What a user's sessions used on a day, in UTC. Kept when the user is gone."""

    __tablename__ = "usage"
    __table_args__ = (
        UniqueConstraint("day", "user_name", "tenant_name"),
        Index(None, "tenant_id", "day"),
        Index(None, "user_id", "day"),
    )

    day: Mapped[date]
    tenant_id: Mapped[int | None] = mapped_column(ForeignKey("tenants.id", ondelete="SET NULL"))
    tenant_name: Mapped[str]
    user_id: Mapped[int | None] = mapped_column(ForeignKey("users.id", ondelete="SET NULL"))
    user_name: Mapped[str]
    sessions: Mapped[int] = mapped_column(default=0)
    """Begun on this day."""
    refused: Mapped[int] = mapped_column(default=0)
    seconds: Mapped[float] = mapped_column(default=0)
    cpu_seconds: Mapped[float] = mapped_column(default=0)
    memory_peak_bytes: Mapped[int] = mapped_column(default=0)
    bytes_in: Mapped[int] = mapped_column(default=0)
    bytes_out: Mapped[int] = mapped_column(default=0)
    network_in: Mapped[int] = mapped_column(default=0)
    network_out: Mapped[int] = mapped_column(default=0)


class AuditEvent(Model):
    __tablename__ = "audit_events"
    __table_args__ = (
        Index(None, "at"),
        Index(None, "kind", "at"),
        Index(None, "user_name", "at"),
        Index(None, "tenant_name", "at"),
        Index(None, "address", "at"),
    )

    at: Mapped[datetime] = mapped_column(default=now)
    kind: Mapped[str]
    node: Mapped[str | None]
    """Where it happened; none for what an administrator did to the database."""
    tenant_name: Mapped[str | None]
    user_name: Mapped[str | None]
    """For a failed authentication the name that was tried, which need not be a user's."""
    session_id: Mapped[int | None] = mapped_column(ForeignKey("sessions.id", ondelete="SET NULL"), index=True)
    address: Mapped[str | None]
    detail: Mapped[dict[str, Any]]
