"""`sandbox-ssh quota`: what users and tenants may use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from sandbox_ssh import quotas
from sandbox_ssh.cli import context, output
from sandbox_ssh.cli.context import Context, examples, invoker
from sandbox_ssh.errors import QuotaError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sandbox_ssh.store.database import Database
    from sandbox_ssh.store.quotas import Effective, Owner

app = context.group("Quotas of users, tenants and everyone.")

User = Annotated[str | None, typer.Option("--user", metavar="NAME", help="Of this user.")]
Tenant = Annotated[
    str | None, typer.Option("--tenant", metavar="NAME", help="Of this tenant: its users' and their sum.")
]
Default = Annotated[bool, typer.Option("--default", help="Of everyone who has nothing nearer.")]


def _pairs(incomplete: str) -> list[str]:
    return [f"{key}=" for key in quotas.QUOTAS if key.startswith(incomplete)]


def _keys(incomplete: str) -> list[str]:
    return [key for key in quotas.QUOTAS if key.startswith(incomplete)]


@app.command(
    "set",
    epilog=examples(
        "sandbox-ssh quota set --user ada sessions=3 memory=512M session_time=2h",
        "sandbox-ssh quota set --tenant physics processes=2000 network_per_day=50G",
        "sandbox-ssh quota set --default idle_time=30m cpu=0.5 logins_per_hour=unlimited",
    ),
)
@context.command
def set_(
    here: Context,
    pairs: Annotated[
        list[str],
        typer.Argument(metavar="KEY=VALUE...", help="As `quota show` lists them.", autocompletion=_pairs),
    ],
    user: User = None,
    tenant: Tenant = None,
    default: Default = False,
) -> None:
    """Set quotas. Live sessions are held to them from now on, for what is created from now on."""
    from sandbox_ssh.store import quotas as store

    owner = _owner(user, tenant, default)
    values: dict[str, int | None] = {}
    for pair in pairs:
        key, separator, text = pair.partition("=")
        if not separator:
            raise typer.BadParameter(f"{pair!r} is not KEY=VALUE")
        try:
            values[key] = quotas.parse(key, text)
        except QuotaError as error:
            raise typer.BadParameter(str(error)) from None
    here.run(lambda database: store.change(database, owner, values, by=invoker()))
    for key, value in values.items():
        assert value is not None
        output.message(f"{key} of {owner} is {quotas.render(key, value)}")


@app.command("unset", epilog=examples("sandbox-ssh quota unset --user ada memory"))
@context.command
def unset(
    here: Context,
    keys: Annotated[
        list[str], typer.Argument(metavar="KEY...", help="As `quota show` lists them.", autocompletion=_keys)
    ],
    user: User = None,
    tenant: Tenant = None,
    default: Default = False,
) -> None:
    """Let quotas be inherited again."""
    from sandbox_ssh.store import quotas as store

    owner = _owner(user, tenant, default)
    for key in keys:
        try:
            quotas.get(key)
        except QuotaError as error:
            raise typer.BadParameter(str(error)) from None
    here.run(lambda database: store.change(database, owner, dict.fromkeys(keys), by=invoker()))
    output.message(f"inherited by {owner}: {', '.join(keys)}")


@app.command(
    "show", epilog=examples("sandbox-ssh quota show --user ada", "sandbox-ssh quota show --tenant physics --json")
)
@context.command
def show(
    here: Context,
    user: User = None,
    tenant: Tenant = None,
    default: Default = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON; amounts in bytes, seconds and thousandths of a core.")
    ] = False,
) -> None:
    """Show what counts, where each value comes from, and what is in use now.

    Of a tenant: what its users inherit; and in the column SUM what binds all of them together.
    """
    owner = _owner(user, tenant, default)
    profile = here.config().sandbox.quotas
    effective, used = here.run(lambda database: _find(database, owner, profile))
    if as_json:
        output.print_json(
            {
                key: {"value": _number(value), "source": effective.sources[key], "in_use": used.get(key),
                      "tenant": effective.tenant.get(key)}
                for key, value in effective.values.items()
            }
        )  # fmt: skip
        return
    columns = ("QUOTA", "VALUE", "FROM", "IN USE", "SUM OF TENANT", "MEANING")
    output.print_table(
        columns,
        (
            (
                key,
                quotas.render(key, value),
                effective.sources[key],
                quotas.render(key, used[key]) if key in used else None,
                quotas.render(key, effective.tenant[key]) if key in effective.tenant else None,
                quotas.QUOTAS[key].meaning,
            )
            for key, value in effective.values.items()
        ),
    )


async def _find(database: Database, owner: Owner, profile: Mapping[str, int]) -> tuple[Effective, Mapping[str, int]]:
    from sandbox_ssh.store import quotas as store
    from sandbox_ssh.store import usage

    effective = await store.of_owner(database, owner, profile)
    if owner.kind == "default":
        return effective, {}
    return effective, await usage.in_use(database, **{owner.kind: owner.name})


def _number(value: int) -> int | None:
    return None if value == quotas.UNLIMITED else value


def _owner(user: str | None, tenant: str | None, default: bool) -> Any:
    from sandbox_ssh.store.quotas import Owner

    if [user is not None, tenant is not None, default].count(True) != 1:
        raise typer.BadParameter("say whose quotas: --user NAME, --tenant NAME or --default")
    if user is not None:
        return Owner("user", user)
    return Owner("tenant", tenant) if tenant is not None else Owner("default")
