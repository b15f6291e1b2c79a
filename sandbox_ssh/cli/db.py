"""`sandbox-ssh db`: the schema of the database."""

from __future__ import annotations

from typing import Annotated

import typer

from sandbox_ssh.cli import context, output
from sandbox_ssh.cli.context import Context, examples

app = context.group("The database's schema.")


@app.command("upgrade", epilog=examples("sandbox-ssh db upgrade"))
@context.command
def upgrade(here: Context) -> None:
    """Bring the database to the schema that this version needs, making it if it is not there.

    Stop the servers that use it first, and make a copy: there is no way back but the copy.
    """
    from sandbox_ssh.store import database, migrate

    config = here.config()
    with context.as_database_owner(config):
        before = migrate.upgrade(config.database.url)
    newest = migrate.head()
    name = database.describe(database.parse_url(config.database.url))
    output.message(
        f"{name} has schema {newest} already" if before == newest else f"{name}: from {before or 'nothing'} to {newest}"
    )


@app.command("status", epilog=examples("sandbox-ssh db status --json"))
@context.command
def status(here: Context, as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Show which schema the database has and which one this version needs; fails if they differ."""
    from sandbox_ssh.store import database, migrate

    config = here.config()
    with context.as_database_owner(config):
        current = database.current(config.database.url)
    newest = migrate.head()
    name = database.describe(database.parse_url(config.database.url))
    if as_json:
        output.print_json({"database": name, "current": current, "needed": newest})
    else:
        output.print_details([("database", name), ("current", current or "empty"), ("needed", newest)])
    if current != newest:
        output.message("run `sandbox-ssh db upgrade`")
        raise typer.Exit(1)
