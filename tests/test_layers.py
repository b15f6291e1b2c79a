"""Imports run one way. What may know what is the architecture; this keeps it so."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import sandbox_ssh

PACKAGE = Path(sandbox_ssh.__file__).parent

# Module or package -> what of the project it may import. The most specific entry counts; a package may import itself.
PROJECT = {
    "errors": set(),
    "units": set(),
    "quotas": {"errors", "units"},
    "capacity": set(),
    "config": {"errors", "quotas", "units"},
    "sandbox": {"errors"},
    "sandbox.host": {"capacity", "errors", "sandbox"},
    "store": {"capacity", "errors", "quotas"},
    # The gateway's side of the socket: both sides read the protocol, neither the other's code.
    "spawner.client": {"errors", "spawner.protocol"},
    "spawner.protocol": {"errors"},
    "spawner": {"capacity", "errors", "sandbox"},
    "supervisor": {"errors", "sandbox"},
    "unpack": {"errors"},
    "images": {"errors", "sandbox", "unpack"},
    "gateway": {"errors", "capacity", "config", "quotas", "units", "spawner.client", "spawner.protocol", "store"},
    "cli": {
        "errors",
        "capacity",
        "config",
        "quotas",
        "units",
        "gateway",
        "images",
        "sandbox",
        "spawner.client",
        "store",
        "supervisor",
    },
    "__main__": {"cli", "errors"},
}

# Where privileges are, and what starts all else: the standard library, and netlink messages.
PRIVILEGED = ("images", "sandbox", "spawner", "supervisor", "unpack")
ALLOWED_THERE = {"pyroute2"}

FORBIDDEN = {
    "store": {"asyncssh"},
    "gateway": {"sqlalchemy", "alembic", "aiosqlite", "psycopg", "typer", "rich"},
}


def modules() -> dict[str, Path]:
    found = {}
    for file in PACKAGE.rglob("*.py"):
        relative = file.relative_to(PACKAGE)
        parts = relative.parent.parts if file.name == "__init__.py" else relative.with_suffix("").parts
        if parts and parts[0] != "migrations":
            found[".".join(parts)] = file
    return found


def imports(file: Path) -> Iterator[str]:
    """Every module that a file imports, in functions and under TYPE_CHECKING too, by its full name."""
    for node in ast.walk(ast.parse(file.read_text(), file)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            assert node.module is not None
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def entry(module: str, table: dict[str, set[str]]) -> str | None:
    """The most specific key of `table` that `module` is in."""
    return max((key for key in table if is_in(module, key)), key=len, default=None)


def is_in(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def test_there_is_something_to_check() -> None:
    assert {"errors", "config", "store.users", "spawner.server", "gateway.session"} <= modules().keys()


@pytest.mark.parametrize("module", sorted(modules()))
def test_project_imports_run_one_way(module: str) -> None:
    key = entry(module, PROJECT)
    assert key is not None, f"{module} has no place in the table of layers"
    allowed = PROJECT[key] | {key}
    for name in imports(modules()[module]):
        if name.startswith("sandbox_ssh."):
            imported = name.removeprefix("sandbox_ssh.")
            assert any(is_in(imported, target) or is_in(target, imported) for target in allowed), (
                f"{module} imports {name}; it may import {', '.join(sorted(allowed))}"
            )


@pytest.mark.parametrize("module", sorted(modules()))
def test_libraries_stay_where_they_belong(module: str) -> None:
    for name in imports(modules()[module]):
        top = name.partition(".")[0]
        if any(is_in(module, package) for package in PRIVILEGED):
            assert top in sys.stdlib_module_names | ALLOWED_THERE | {"sandbox_ssh"}, f"{module} imports {name}"
        for package, forbidden in FORBIDDEN.items():
            assert not (is_in(module, package) and top in forbidden), f"{module} imports {name}"
