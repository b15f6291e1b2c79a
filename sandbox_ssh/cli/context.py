"""What every command shares: the three options that say which server is meant, its configuration and its database.

    app = context.group("Users and their keys.")

    @app.command("list")
    @context.command
    def list_users(here: Context, as_json: ...) -> None:
        rows = here.run(lambda database: users.list_users(database))

`--config`, `--state-dir` and `--database-url` are accepted at every level, `sandbox-ssh --config F user list` as well
as `sandbox-ssh user list --config F`; the one nearest to the end counts.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import os
import pwd
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Concatenate, ParamSpec, TypeVar

import typer
from typer.core import TyperGroup

from sandbox_ssh.cli.ownership import acting_as, database_owner, prepare_state_dir, sqlite_file

if TYPE_CHECKING:
    from sandbox_ssh.config import Config
    from sandbox_ssh.store.database import Database

P = ParamSpec("P")
T = TypeVar("T")

STATUSES = "Exit status: 0 done, 1 failed, 2 wrong usage."


def examples(*lines: str) -> str:
    """The end of a command's help."""
    return "\n\n".join((*(f"Example: {line}" for line in lines), STATUSES))


_PANEL = "Which server"
_GLOBAL_OPTIONS: dict[str, Any] = {
    "config": Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Configuration file. \\[env: SANDBOX_SSH_CONFIG]", rich_help_panel=_PANEL),
    ],
    "state_dir": Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Where the server keeps its state. \\[env: SANDBOX_SSH_STATE_DIR]",
            rich_help_panel=_PANEL,
        ),
    ],
    "database_url": Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="sqlite:////path/file.db or postgresql://user@host/name. \\[env: SANDBOX_SSH_DATABASE_URL]",
            rich_help_panel=_PANEL,
        ),
    ],
}


@dataclass
class Context:
    """The server that a command is about."""

    config_file: Path | None = None
    state_dir: Path | None = None
    database_url: str | None = None

    def config(self, **overrides: Any) -> Config:
        """The configuration; `overrides` are a command's own options, `server__mode="rootless"`.

        Raises `ConfigError`.
        """
        from sandbox_ssh import config

        return config.load(self.config_file, self.state_dir, self.database_url, **overrides)

    def run(self, work: Callable[[Database], Awaitable[T]], *, create: bool = False) -> T:
        """Do `work` with the database, as the user it belongs to; with `create`, one that is absent is made first.

        Raises `StoreError`, for an absent one too: a mistyped directory must not look like a server without users.
        """
        config = self.config()
        prepare_database(config, create=create)
        with as_database_owner(config):
            return asyncio.run(_with_database(config.database.url, work))


async def _with_database(url: str, work: Callable[[Database], Awaitable[T]]) -> T:
    from sandbox_ssh.store.database import Database

    database = Database(url)
    try:
        return await work(database)
    finally:
        await database.dispose()


def prepare_database(config: Config, *, create: bool) -> None:
    """Create and migrate an empty or absent database, or refuse it, and refuse one of another schema.

    Raises `StoreError`, which names the remedy.
    """
    from sandbox_ssh.store import database

    url = config.database.url
    file = sqlite_file(url)
    if not create and file is not None and not _may_be_there(file):
        raise database.absent(url)
    with as_database_owner(config):
        revision = database.current(url)
        if revision is not None:
            # An administrator decides when a schema changes that is in use.
            database.require_schema(database.parse_url(url), revision)
            return
        if not create:
            raise database.absent(url)
        from sandbox_ssh.store import migrate  # takes as long to import as all the rest

        migrate.upgrade(url)


def _may_be_there(file: Path) -> bool:
    try:
        return file.exists()
    except OSError:  # that it cannot be looked at is said by who opens it
        return True


@contextlib.contextmanager
def as_database_owner(config: Config) -> Iterator[None]:
    """Open the database within this: under root, its files then belong to the user whose they should be."""
    file = sqlite_file(config.database.url)
    if file is not None and file.is_relative_to(config.server.state_dir):
        prepare_state_dir(config)
    with acting_as(database_owner(config)):
        yield


def invoker() -> str:
    """Who typed the command, for the audit: the one who called sudo(8), not root."""
    if os.getuid() == 0 and (name := os.environ.get("SUDO_USER")):
        return name
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())


def group(help: str, cls: type[TyperGroup] = TyperGroup, *, completion: bool = False) -> typer.Typer:
    """An app of sub-commands that takes the options of every command before them too."""
    app = typer.Typer(
        cls=cls,
        help=help,
        epilog=STATUSES,
        no_args_is_help=True,
        add_completion=completion,
        pretty_exceptions_enable=False,
    )
    app.callback()(command(_only_options))
    return app


def _only_options(here: Context) -> None:
    """The options of `command` are all that a group takes."""


def command(function: Callable[Concatenate[Context, P], None]) -> Callable[..., None]:
    """Give a command the options of every command; it gets their values as its first argument, a `Context`."""
    signature = inspect.signature(function, eval_str=True)
    own = list(signature.parameters.values())[1:]
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        for name, annotation in _GLOBAL_OPTIONS.items()
    ]
    caller = inspect.Parameter("typer_context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
    # typer takes them by name, so their kind says nothing here but must come in Python's order.
    own = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own]

    @functools.wraps(function)
    def wrapper(
        typer_context: typer.Context, config: Path | None, state_dir: Path | None, database_url: str | None, **rest: Any
    ) -> None:
        # A sub-command's context starts with the object of its parent's (the options that stood before it).
        here = typer_context.ensure_object(Context)
        here.config_file = config or here.config_file
        here.state_dir = state_dir or here.state_dir
        here.database_url = database_url or here.database_url
        function(here, **rest)  # type: ignore[call-arg]

    parameters = [caller, *own, *added]
    wrapper.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return wrapper
