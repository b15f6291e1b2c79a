"""What Alembic runs to migrate. `sandbox_ssh.store.migrate` brings the connection.

A developer makes a new revision against a database of the newest one:

    sandbox-ssh --database-url sqlite:////tmp/new.db db upgrade
    SANDBOX_SSH_DATABASE_URL=sqlite:////tmp/new.db alembic revision --autogenerate --rev-id 0002 -m "what it does"

then reads what came out, writes what Alembic cannot see (checks, moved data), and raises `store.models.SCHEMA`.
"""

from __future__ import annotations

import os

from alembic import context
from sqlalchemy import Connection

from sandbox_ssh.store import migrate
from sandbox_ssh.store.models import Model


def run(connection: Connection) -> None:
    # SQLite cannot alter a column: Alembic then copies the table ("batch").
    context.configure(
        connection=connection,
        target_metadata=Model.metadata,
        render_as_batch=connection.dialect.name == "sqlite",
    )
    with context.begin_transaction():
        context.run_migrations()


given = context.config.attributes.get("connection")
if given is not None:
    run(given)
else:
    with migrate.connect(os.environ["SANDBOX_SSH_DATABASE_URL"], writes=True) as own:
        run(own)
