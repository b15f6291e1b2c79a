"""Tenants, users and their keys; nodes; sessions and their channels; audit events."""

from __future__ import annotations

from datetime import UTC, datetime

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0001"
down_revision = None

# Written out, and not taken from store.columns: a migration stays what it was when the models move on.
ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
DOCUMENT = sa.JSON().with_variant(JSONB(), "postgresql")
TIME = sa.DateTime(timezone=True)


def upgrade() -> None:
    create_accounts()
    create_sessions()
    create_audit()


def create_accounts() -> None:
    tenants = op.create_table(
        "tenants",
        sa.Column("id", ID, nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("description", sa.Text(), nullable=False),
        sa.Column("enabled", sa.Boolean(), nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_tenants"),
        sa.UniqueConstraint("name", name="uq_tenants_name"),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "users",
        sa.Column("id", ID, nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("tenant_id", ID, nullable=False),
        sa.Column("role", sa.Text(), nullable=False),
        sa.Column("enabled", sa.Boolean(), nullable=False),
        sa.Column("password_hash", sa.Text()),
        sa.Column("created_at", TIME, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_users"),
        sa.UniqueConstraint("name", name="uq_users_name"),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name="fk_users_tenant_id", ondelete="RESTRICT"),
        sa.CheckConstraint("role IN ('user', 'instructor', 'admin')", name=op.f("ck_users_role")),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_users_tenant_id", "users", ["tenant_id"])
    op.create_table(
        "public_keys",
        sa.Column("id", ID, nullable=False),
        sa.Column("user_id", ID, nullable=False),
        sa.Column("algorithm", sa.Text(), nullable=False),
        sa.Column("blob", sa.Text(), nullable=False),
        sa.Column("fingerprint", sa.Text(), nullable=False),
        sa.Column("comment", sa.Text(), nullable=False),
        sa.Column("added_at", TIME, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_public_keys"),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], name="fk_public_keys_user_id", ondelete="CASCADE"),
        sa.UniqueConstraint("user_id", "fingerprint", name="uq_public_keys_user_id_fingerprint"),
    )
    op.bulk_insert(
        tenants,
        [{"name": "default", "description": "Users of no other tenant", "enabled": True, "created_at": _now()}],
    )


def create_sessions() -> None:
    op.create_table(
        "nodes",
        sa.Column("id", ID, nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("mode", sa.Text(), nullable=False),
        sa.Column("version", sa.Text(), nullable=False),
        sa.Column("started_at", TIME, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_nodes"),
        sa.UniqueConstraint("name", name="uq_nodes_name"),
    )
    op.create_table(
        "sessions",
        sa.Column("id", ID, nullable=False),
        sa.Column("tenant_id", ID),
        sa.Column("tenant_name", sa.Text(), nullable=False),
        sa.Column("user_id", ID),
        sa.Column("user_name", sa.Text(), nullable=False),
        sa.Column("node", sa.Text(), nullable=False),
        sa.Column("worker", ID, nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("end_reason", sa.Text()),
        sa.Column("client_address", sa.Text(), nullable=False),
        sa.Column("client_port", ID, nullable=False),
        sa.Column("client_version", sa.Text(), nullable=False),
        sa.Column("auth_method", sa.Text(), nullable=False),
        sa.Column("key_fingerprint", sa.Text()),
        sa.Column("image", sa.Text(), nullable=False),
        sa.Column("started_at", TIME, nullable=False),
        sa.Column("ended_at", TIME),
        sa.Column("exit_status", ID),
        sa.Column("bytes_in", ID, nullable=False),
        sa.Column("bytes_out", ID, nullable=False),
        sa.Column("cpu_seconds", sa.Double()),
        sa.Column("memory_peak_bytes", ID),
        sa.Column("namespaces", DOCUMENT),
        sa.Column("init_pid", ID),
        sa.Column("kill_requested_at", TIME),
        sa.Column("kill_requested_by", sa.Text()),
        sa.PrimaryKeyConstraint("id", name="pk_sessions"),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name="fk_sessions_tenant_id", ondelete="SET NULL"),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], name="fk_sessions_user_id", ondelete="SET NULL"),
        sa.ForeignKeyConstraint(["node"], ["nodes.name"], name="fk_sessions_node"),
        sa.CheckConstraint(
            "state IN ('starting', 'running', 'closing', 'closed', 'refused', 'lost')", name=op.f("ck_sessions_state")
        ),
    )
    for column in ("tenant_id", "user_id", "started_at"):
        op.create_index(f"ix_sessions_{column}", "sessions", [column])
    for column in ("user_name", "tenant_name", "client_address", "node", "state"):
        op.create_index(f"ix_sessions_{column}_started_at", "sessions", [column, "started_at"])
    wanted = sa.text("kill_requested_at IS NOT NULL AND ended_at IS NULL")
    op.create_index(
        "ix_sessions_kill_requests", "sessions", ["node", "worker"], sqlite_where=wanted, postgresql_where=wanted
    )
    op.create_table(
        "channels",
        sa.Column("id", ID, nullable=False),
        sa.Column("session_id", ID, nullable=False),
        sa.Column("number", ID, nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("command", sa.Text()),
        sa.Column("pty", sa.Boolean(), nullable=False),
        sa.Column("opened_at", TIME, nullable=False),
        sa.Column("closed_at", TIME),
        sa.Column("exit_status", ID),
        sa.Column("exit_signal", sa.Text()),
        sa.PrimaryKeyConstraint("id", name="pk_channels"),
        sa.ForeignKeyConstraint(["session_id"], ["sessions.id"], name="fk_channels_session_id", ondelete="CASCADE"),
        sa.UniqueConstraint("session_id", "number", name="uq_channels_session_id_number"),
    )


def create_audit() -> None:
    op.create_table(
        "audit_events",
        sa.Column("id", ID, nullable=False),
        sa.Column("at", TIME, nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("node", sa.Text()),
        sa.Column("tenant_name", sa.Text()),
        sa.Column("user_name", sa.Text()),
        sa.Column("session_id", ID),
        sa.Column("address", sa.Text()),
        sa.Column("detail", DOCUMENT, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_audit_events"),
        sa.ForeignKeyConstraint(
            ["session_id"], ["sessions.id"], name="fk_audit_events_session_id", ondelete="SET NULL"
        ),
    )
    for column in ("at", "session_id"):
        op.create_index(f"ix_audit_events_{column}", "audit_events", [column])
    for column in ("kind", "user_name", "tenant_name", "address"):
        op.create_index(f"ix_audit_events_{column}_at", "audit_events", [column, "at"])


def _now() -> datetime:
    now = datetime.now(UTC)
    return now.replace(tzinfo=None) if op.get_bind().dialect.name == "sqlite" else now


def downgrade() -> None:
    for table in ("audit_events", "channels", "sessions", "nodes", "public_keys", "users", "tenants"):
        op.drop_table(table)
