"""Quotas of users, tenants and all; what sessions use, and usage by user and day; capacities of nodes."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0002"
down_revision = "0001"

ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
DOCUMENT = sa.JSON().with_variant(JSONB(), "postgresql")
TIME = sa.DateTime(timezone=True)

KEYS = (
    "sessions", "user_namespaces", "mnt_namespaces", "pid_namespaces", "ipc_namespaces", "uts_namespaces",
    "net_namespaces", "cgroup_namespaces", "time_namespaces", "inotify_instances", "inotify_watches",
    "fanotify_groups", "fanotify_marks", "processes", "memory", "cpu", "cpu_weight", "open_files", "disk", "inodes",
    "ptys", "session_time", "idle_time", "logins_per_hour", "session_time_per_day", "network_per_day",
    "locked_memory", "message_queues", "pending_signals",
)  # fmt: skip
OPEN = sa.text("ended_at IS NULL")


def upgrade() -> None:
    create_quotas()
    extend_sessions()
    create_usage()
    op.add_column("nodes", sa.Column("beats", ID, nullable=False, server_default="0"))
    op.add_column("nodes", sa.Column("capacity", DOCUMENT))
    op.add_column("nodes", sa.Column("nested", DOCUMENT))


def create_quotas() -> None:
    op.create_table(
        "quotas",
        sa.Column("id", ID, nullable=False),
        sa.Column("tenant_id", ID),
        sa.Column("user_id", ID),
        *(sa.Column(key, sa.BigInteger()) for key in KEYS),
        sa.Column("changed_at", TIME, nullable=False),
        sa.Column("revision", ID, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_quotas"),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name="fk_quotas_tenant_id", ondelete="CASCADE"),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], name="fk_quotas_user_id", ondelete="CASCADE"),
        sa.UniqueConstraint("tenant_id", name="uq_quotas_tenant_id"),
        sa.UniqueConstraint("user_id", name="uq_quotas_user_id"),
        sa.CheckConstraint("tenant_id IS NULL OR user_id IS NULL", name=op.f("ck_quotas_owner")),
    )
    # The row of all, which every change locks: there is always one, and never two.
    op.execute("INSERT INTO quotas (changed_at, revision) VALUES (CURRENT_TIMESTAMP, 0)")


def extend_sessions() -> None:
    op.add_column("sessions", sa.Column("refused_by", sa.Text()))
    for name in ("processes_peak", "disk_peak_bytes", "network_in", "network_out"):
        op.add_column("sessions", sa.Column(name, ID))
    op.add_column("sessions", sa.Column("namespaces_peak", DOCUMENT))
    op.add_column("sessions", sa.Column("use", DOCUMENT))
    op.add_column("sessions", sa.Column("seconds", sa.Double()))
    # What admission counts: the live sessions of a user, a tenant, a node, whatever the number of the past ones.
    for columns in (["user_id"], ["tenant_id"], ["node", "user_id"]):
        name = f"ix_sessions_live_{columns[0]}"
        op.create_index(name, "sessions", columns, sqlite_where=OPEN, postgresql_where=OPEN)
    # And logins of the last hour.
    for column in ("user_id", "tenant_id"):
        op.create_index(f"ix_sessions_{column}_started_at_state", "sessions", [column, "started_at", "state"])
    op.drop_index("ix_sessions_user_id", "sessions")
    op.drop_index("ix_sessions_tenant_id", "sessions")


def create_usage() -> None:
    op.create_table(
        "usage",
        sa.Column("id", ID, nullable=False),
        sa.Column("day", sa.Date(), nullable=False),
        sa.Column("tenant_id", ID),
        sa.Column("tenant_name", sa.Text(), nullable=False),
        sa.Column("user_id", ID),
        sa.Column("user_name", sa.Text(), nullable=False),
        sa.Column("sessions", ID, nullable=False),
        sa.Column("refused", ID, nullable=False),
        sa.Column("seconds", sa.Double(), nullable=False),
        sa.Column("cpu_seconds", sa.Double(), nullable=False),
        sa.Column("memory_peak_bytes", ID, nullable=False),
        sa.Column("bytes_in", ID, nullable=False),
        sa.Column("bytes_out", ID, nullable=False),
        sa.Column("network_in", ID, nullable=False),
        sa.Column("network_out", ID, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_usage"),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name="fk_usage_tenant_id", ondelete="SET NULL"),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], name="fk_usage_user_id", ondelete="SET NULL"),
        sa.UniqueConstraint("day", "user_name", "tenant_name", name="uq_usage_day_user_name_tenant_name"),
    )
    op.create_index("ix_usage_tenant_id_day", "usage", ["tenant_id", "day"])
    op.create_index("ix_usage_user_id_day", "usage", ["user_id", "day"])


def downgrade() -> None:
    op.drop_table("usage")
    op.drop_column("nodes", "beats")
    op.drop_column("nodes", "capacity")
    op.drop_column("nodes", "nested")
    op.create_index("ix_sessions_user_id", "sessions", ["user_id"])
    op.create_index("ix_sessions_tenant_id", "sessions", ["tenant_id"])
    for name in (
        "live_user_id",
        "live_tenant_id",
        "live_node",
        *(f"{owner}_id_started_at_state" for owner in ("user", "tenant")),
    ):
        op.drop_index(f"ix_sessions_{name}", "sessions")
    op.drop_column("sessions", "refused_by")
    for name in (
        "processes_peak",
        "disk_peak_bytes",
        "network_in",
        "network_out",
        "namespaces_peak",
        "use",
        "seconds",
    ):
        op.drop_column("sessions", name)
    op.drop_table("quotas")
