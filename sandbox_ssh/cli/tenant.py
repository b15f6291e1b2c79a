"""`sandbox-ssh tenant`: organisations and classes, whose users learn nothing of each other's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from sandbox_ssh.cli import context, output
from sandbox_ssh.cli.context import Context, examples, invoker

if TYPE_CHECKING:
    from sandbox_ssh.store.models import Tenant

app = context.group("Tenants: organisations or classes. Every user is in exactly one.")

Name = Annotated[str, typer.Argument(metavar="NAME", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command("add", epilog=examples("sandbox-ssh tenant add physics --description 'Physics, second year'"))
@context.command
def add(
    here: Context,
    name: Name,
    description: Annotated[str, typer.Option(metavar="TEXT", help="What people call it.")] = "",
) -> None:
    """Add a tenant."""
    from sandbox_ssh.store import tenants

    here.run(lambda database: tenants.add(database, name, description=description, by=invoker()), create=True)
    output.message(f"added tenant {name}")


@app.command("list", epilog=examples("sandbox-ssh tenant list --json"))
@context.command
def list_(here: Context, as_json: Json = False) -> None:
    """List tenants."""
    from sandbox_ssh.store import tenants

    found = here.run(tenants.list_tenants)
    if as_json:
        output.print_json([_as_json(tenant, count) for tenant, count in found])
    else:
        output.print_table(
            ("NAME", "ENABLED", "USERS", "CREATED", "DESCRIPTION"),
            ((t.name, t.enabled, count, t.created_at, t.description) for t, count in found),
        )


@app.command("show", epilog=examples("sandbox-ssh tenant show physics"))
@context.command
def show(here: Context, name: Name, as_json: Json = False) -> None:
    """Show one tenant."""
    from sandbox_ssh.store import tenants

    tenant, count = here.run(lambda database: tenants.get(database, name))
    if as_json:
        output.print_json(_as_json(tenant, count))
    else:
        output.print_details(
            [
                ("name", tenant.name),
                ("description", tenant.description),
                ("enabled", tenant.enabled),
                ("users", count),
                ("created", tenant.created_at),
            ]
        )


@app.command("set", epilog=examples("sandbox-ssh tenant set physics --disable"))
@context.command
def set_(
    here: Context,
    name: Name,
    description: Annotated[str | None, typer.Option(metavar="TEXT", help="What people call it.")] = None,
    enabled: Annotated[
        bool | None, typer.Option("--enable/--disable", help="Whether its users may log in.", show_default=False)
    ] = None,
) -> None:
    """Change a tenant. Live sessions go on; `session kill` ends them."""
    from sandbox_ssh.store import tenants

    if description is None and enabled is None:
        raise typer.BadParameter("nothing to change: give --description, --enable or --disable")
    here.run(lambda database: tenants.change(database, name, description=description, enabled=enabled, by=invoker()))
    output.message(f"changed tenant {name}")


@app.command("remove", epilog=examples("sandbox-ssh tenant remove physics"))
@context.command
def remove(here: Context, name: Name) -> None:
    """Remove a tenant that has no users. The records of its sessions stay."""
    from sandbox_ssh.store import tenants

    here.run(lambda database: tenants.remove(database, name, by=invoker()))
    output.message(f"removed tenant {name}")


def _as_json(tenant: Tenant, users: int) -> dict[str, Any]:
    return {
        "name": tenant.name,
        "description": tenant.description,
        "enabled": tenant.enabled,
        "users": users,
        "created_at": tenant.created_at,
    }
