"""The `sandbox-ssh` command: one module a noun, imported when it is used.

A module here imports what it needs for its options at its top, and what it needs for its work in its functions:
`sandbox-ssh --help` should not wait for SQLAlchemy.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import typer
from typer.core import TyperGroup

from sandbox_ssh.cli import context

# Name -> module and what it exports: a function (a single command) or a Typer app (a group of commands).
COMMANDS = {
    "serve": "serve:serve",
    "doctor": "doctor:doctor",
    "user": "user:app",
    "tenant": "tenant:app",
    "quota": "quota:app",
    "session": "session:app",
    "usage": "usage:usage",
    "image": "image:app",
    "db": "db:app",
}

HELP = """Disposable Linux machines over SSH.

Every command takes --config, --state-dir and --database-url, which say which server is meant, before or after the
names of the command.
"""


class LazyGroup(TyperGroup):
    def list_commands(self, ctx: typer.Context) -> list[str]:  # type: ignore[override]
        return list(COMMANDS)

    def get_command(self, ctx: typer.Context, cmd_name: str) -> Any:  # type: ignore[override]
        if cmd_name not in self.commands and cmd_name in COMMANDS:
            self.add_command(_load(COMMANDS[cmd_name]), cmd_name)
            self.commands[cmd_name].name = cmd_name  # what --help calls it
        return self.commands.get(cmd_name)

    def resolve_command(self, ctx: typer.Context, args: list[str]) -> Any:  # type: ignore[override]
        if args[0] not in COMMANDS:
            for name in COMMANDS:  # typer suggests one of those it has loaded
                self.get_command(ctx, name)
        return super().resolve_command(ctx, args)


def _load(place: str) -> Any:
    module, _, name = place.partition(":")
    exported = getattr(import_module(f"sandbox_ssh.cli.{module}"), name)
    if isinstance(exported, typer.Typer):
        return typer.main.get_command(exported)
    single = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    single.command()(exported)
    return typer.main.get_command(single)


app = context.group(HELP, cls=LazyGroup, completion=True)
