"""`sandbox-ssh user`: users, their keys and their passwords."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sandbox_ssh.cli import context, output
from sandbox_ssh.cli.context import Context, examples, invoker
from sandbox_ssh.errors import StoreError

if TYPE_CHECKING:
    from sandbox_ssh.store.models import PublicKey, User

# Not store.models.Role: the help of a command must not load SQLAlchemy. A test holds that they are the same.
ROLES = ("user", "instructor", "admin")

app = context.group("Users, their keys and their passwords.")
key_app = context.group("Public keys, with which users log in.")
app.add_typer(key_app, name="key")


def _role(value: str | None) -> str | None:
    if value is not None and value not in ROLES:
        raise typer.BadParameter(f"one of {', '.join(ROLES)}")
    return value


Name = Annotated[str, typer.Argument(metavar="NAME", show_default=False)]
Role = Annotated[str, typer.Option(metavar="|".join(ROLES), callback=_role)]
KeyFiles = Annotated[
    list[Path] | None,
    typer.Option("--key", metavar="FILE", help="File of public keys, as ~/.ssh/id_ed25519.pub; may be repeated."),
]
PasswordStdin = Annotated[
    bool, typer.Option("--password-stdin", help="Read the password from the first line of standard input.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command(
    "add",
    epilog=examples(
        "sandbox-ssh user add alice --key ~/.ssh/id_ed25519.pub",
        "pwgen 20 1 | sandbox-ssh user add bob --tenant physics --password-stdin",
    ),
)
@context.command
def add(
    here: Context,
    name: Name,
    tenant: Annotated[str, typer.Option(metavar="TENANT", help="The tenant, which must exist.")] = "default",
    role: Role = "user",
    key: KeyFiles = None,
    password_stdin: PasswordStdin = False,
) -> None:
    """Add a user."""
    from sandbox_ssh.cli import keys
    from sandbox_ssh.store import users
    from sandbox_ssh.store.models import Role

    parsed = keys.read(key or [])
    password = _password_from_stdin() if password_stdin else None
    here.run(
        lambda database: users.add(
            database, name, tenant=tenant, role=Role(role), keys=parsed, password=password, by=invoker()
        ),
        create=True,
    )
    output.message(f"added user {name} of tenant {tenant}")
    if not parsed and password is None:
        output.message(f"{name} cannot log in yet: `sandbox-ssh user key add {name} FILE`")


@app.command("list", epilog=examples("sandbox-ssh user list --tenant physics"))
@context.command
def list_(
    here: Context,
    tenant: Annotated[str | None, typer.Option(metavar="TENANT", help="Only users of this tenant.")] = None,
    as_json: Json = False,
) -> None:
    """List users."""
    from sandbox_ssh.store import users

    found = here.run(lambda database: users.list_users(database, tenant=tenant))
    if as_json:
        output.print_json([_as_json(user) for user in found])
    else:
        output.print_table(
            ("NAME", "TENANT", "ROLE", "ENABLED", "PASSWORD", "KEYS", "CREATED"),
            ((u.name, u.tenant.name, u.role, u.enabled, _has_password(u), len(u.keys), u.created_at) for u in found),
        )


@app.command("show", epilog=examples("sandbox-ssh user show alice --json"))
@context.command
def show(here: Context, name: Name, as_json: Json = False) -> None:
    """Show one user, with the keys."""
    from sandbox_ssh.store import users

    user = here.run(lambda database: users.get(database, name))
    if as_json:
        output.print_json(_as_json(user))
        return
    output.print_details(
        [
            ("name", user.name),
            ("tenant", user.tenant.name),
            ("role", user.role),
            ("enabled", user.enabled),
            ("password", _has_password(user)),
            ("created", user.created_at),
            *(("key", f"{key.algorithm} {key.fingerprint} {key.comment}") for key in user.keys),
        ]
    )


@app.command("set", epilog=examples("sandbox-ssh user set alice --disable", "sandbox-ssh user set alice --role admin"))
@context.command
def set_(
    here: Context,
    name: Name,
    tenant: Annotated[str | None, typer.Option(metavar="TENANT", help="Move to this tenant.")] = None,
    role: Annotated[str | None, typer.Option(metavar="|".join(ROLES), callback=_role)] = None,
    enabled: Annotated[
        bool | None, typer.Option("--enable/--disable", help="Whether the user may log in.", show_default=False)
    ] = None,
) -> None:
    """Change a user. Live sessions go on; `session kill` ends them."""
    from sandbox_ssh.store import users
    from sandbox_ssh.store.models import Role

    if tenant is None and role is None and enabled is None:
        raise typer.BadParameter("nothing to change: give --tenant, --role, --enable or --disable")
    wanted = None if role is None else Role(role)
    here.run(lambda database: users.change(database, name, tenant=tenant, role=wanted, enabled=enabled, by=invoker()))
    output.message(f"changed user {name}")


@app.command("remove", epilog=examples("sandbox-ssh user remove alice"))
@context.command
def remove(here: Context, name: Name) -> None:
    """Remove a user and the keys. The records of the user's sessions stay."""
    from sandbox_ssh.store import users

    here.run(lambda database: users.remove(database, name, by=invoker()))
    output.message(f"removed user {name}")


@app.command("passwd", epilog=examples("sandbox-ssh user passwd alice"))
@context.command
def passwd(here: Context, name: Name, password_stdin: PasswordStdin = False) -> None:
    """Set a user's password."""
    from sandbox_ssh.store import users

    password = _password_from_stdin() if password_stdin else _password_from_terminal()
    here.run(lambda database: users.set_password(database, name, password, by=invoker()))
    output.message(f"set the password of user {name}")


@key_app.command(
    "add",
    epilog=examples(
        "sandbox-ssh user key add alice ~/.ssh/id_ed25519.pub",
        "ssh-add -L | sandbox-ssh user key add alice -",
    ),
)
@context.command
def key_add(
    here: Context,
    name: Name,
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Files of public keys; - is standard input.")],
) -> None:
    """Add public keys to a user."""
    from sandbox_ssh.cli import keys
    from sandbox_ssh.store import users

    parsed = keys.read(files)
    new = here.run(lambda database: users.add_keys(database, name, parsed, by=invoker()))
    for key in parsed:
        output.message(f"{'added' if key in new else 'already there:'} {key.algorithm} {key.fingerprint}")


@key_app.command("list", epilog=examples("sandbox-ssh user key list alice"))
@context.command
def key_list(here: Context, name: Name, as_json: Json = False) -> None:
    """List a user's public keys."""
    from sandbox_ssh.store import users

    found = here.run(lambda database: users.get(database, name)).keys
    if as_json:
        output.print_json([_key_as_json(key) for key in found])
    else:
        output.print_table(
            ("FINGERPRINT", "ALGORITHM", "COMMENT", "ADDED"),
            ((key.fingerprint, key.algorithm, key.comment, key.added_at) for key in found),
        )


@key_app.command("remove", epilog=examples("sandbox-ssh user key remove alice SHA256:…"))
@context.command
def key_remove(
    here: Context,
    name: Name,
    fingerprint: Annotated[str, typer.Argument(metavar="FINGERPRINT", help="As `user key list` prints it.")],
) -> None:
    """Remove a public key from a user."""
    from sandbox_ssh.store import users

    here.run(lambda database: users.remove_key(database, name, fingerprint, by=invoker()))
    output.message(f"removed {fingerprint}")


def _has_password(user: User) -> bool:
    return user.password_hash is not None


def _as_json(user: User) -> dict[str, Any]:
    return {
        "name": user.name,
        "tenant": user.tenant.name,
        "role": user.role,
        "enabled": user.enabled,
        "password": _has_password(user),
        "created_at": user.created_at,
        "keys": [_key_as_json(key) for key in user.keys],
    }


def _key_as_json(key: PublicKey) -> dict[str, Any]:
    return {
        "fingerprint": key.fingerprint,
        "algorithm": key.algorithm,
        "blob": key.blob,
        "comment": key.comment,
        "added_at": key.added_at,
    }


def _password_from_stdin() -> str:
    try:
        line = sys.stdin.buffer.readline().decode()
    except UnicodeDecodeError:
        raise StoreError("the password is no UTF-8 and could never be typed: nothing was changed") from None
    return _prepared(line.removesuffix("\n").removesuffix("\r"))


def _password_from_terminal() -> str:
    if not output.is_terminal():
        raise typer.BadParameter("there is no terminal to ask for a password: use --password-stdin")
    return _prepared(typer.prompt("Password", hide_input=True, confirmation_prompt="Again", err=True))


def _prepared(password: str) -> str:
    """As the server will see it: RFC 4252 section 8 has it brought to one form (RFC 4013), and asyncssh does."""
    from asyncssh.saslprep import SASLPrepError, saslprep

    try:
        prepared = saslprep(password)
    except SASLPrepError as error:
        raise StoreError(f"the password cannot be used over SSH ({error}): nothing was changed") from None
    if not prepared:
        raise StoreError("an empty password is none: nothing was changed")
    return prepared
