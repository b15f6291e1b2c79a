"""`sandbox-ssh doctor`: what this host offers to the configured server, and the command that mends what it lacks.

What is about the kernel and the distribution is in `sandbox.host`; here is what is about the server itself. All of it
only looks: a doctor that makes the state directory or migrates the database would hide what `serve` will meet.
"""

from __future__ import annotations

import errno
import os
import pwd
import socket
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from sandbox_ssh import capacity
from sandbox_ssh.cli import context, output, ownership
from sandbox_ssh.cli.context import Context
from sandbox_ssh.cli.serve import Mode, addresses
from sandbox_ssh.config import Address, Config
from sandbox_ssh.errors import StoreError
from sandbox_ssh.quotas import QUOTAS, bounded
from sandbox_ssh.sandbox import host
from sandbox_ssh.sandbox.host.finding import Finding, Needs, Status, as_root, bad, good, set_sysctl
from sandbox_ssh.sandbox.rootfs import HOST_IMAGE

# What a host should have room for: no setting bounds the number of sandboxes, and this many are tested.
_SANDBOXES = 300
_COLORS = {Status.OK: "green", Status.WARN: "yellow", Status.FAIL: "red"}


@context.command
def doctor(
    here: Context,
    mode: Annotated[
        Mode | None, typer.Option(help="Which mode to check this host for. \\[default: as configured]")
    ] = None,
    listen: Annotated[
        list[str] | None, typer.Option(metavar="ADDR:PORT", help="Where the server is to listen, as for serve.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="An array of check, status, found, meaning, remedy.")] = False,
) -> None:
    """Check what this host offers to sandboxes, and say how to mend what it lacks.

    Run it as the user that the server runs as. Exit status: 0 no FAIL, 1 a FAIL, 2 wrong usage.
    """
    config = here.config(server__listen=addresses(listen), server__mode=mode.value if mode else None)
    findings = examine(config)
    if as_json:
        output.print_json([asdict(finding) for finding in findings])
    else:
        _print(findings)
    if any(finding.status is Status.FAIL for finding in findings):
        raise typer.Exit(1)


def examine(config: Config) -> list[Finding]:
    needs = Needs(
        mode=config.mode,
        sessions=_SANDBOXES,
        terminals=config.sandbox.quotas.get("ptys", QUOTAS["ptys"].default),
        first_id=config.sandbox.id_first,
        id_blocks=config.sandbox.id_blocks,
    )
    findings = list(host.inspect(needs))
    for name, check in (
        ("capacity", room),
        ("gateway-user", gateway_user),
        ("state-directory", state_directory),
        ("database", database),
        ("image", image),
        ("port", ports),
    ):
        findings += host.answer(name, lambda _, check=check: check(config), needs)  # type: ignore[misc]
    return findings


def room(config: Config) -> list[Finding]:
    """What admission goes by (`sandbox_ssh.capacity`)."""
    users = config.sandbox.id_blocks - 1
    if config.mode == "rootless":
        users = host.ids.users(host.ids.subordinate("uid")[1])
    values = {key: quota.default for key, quota in QUOTAS.items()} | config.sandbox.quotas
    found = capacity.read(users, capacity.own_rlimits(), bounded(values))
    ids = "one id for all users" if users == host.ids.SHARED else f"ids for {users} users at once"
    text = (
        f"{found.sandboxes} sessions at once, bound by {found.bound}; {ids}; "
        f"{found.full} users that each use all that {found.full_bound} allows"
    )
    if not found.sandboxes:
        return bad("capacity", text, "No session would be let in.", f"Raise {found.bound}.")
    return good("capacity", text, "More are refused at login, in a sentence that says so.")


def gateway_user(config: Config) -> list[Finding]:
    if config.mode == "rootless":
        return []
    name = config.server.user
    try:
        uid = pwd.getpwnam(name).pw_uid
    except KeyError:
        return bad(
            "gateway-user",
            f"there is no user {name}",
            "The part of the server that faces the network runs as it.",
            as_root(f"useradd --system --user-group --home-dir /nonexistent --shell /usr/sbin/nologin {name}"),
        )
    if uid == 0:
        return bad(
            "gateway-user",
            f"{name} is root",
            "The part of the server that faces the network would have all rights.",
            "Set server.user in the configuration to a system user of its own.",
        )
    return good("gateway-user", f"{name}, uid {uid}", "The part of the server that faces the network runs as it.")


def state_directory(config: Config) -> list[Finding]:
    directory = config.server.state_dir
    if not directory.exists():
        return _absent(directory)
    if not directory.is_dir():
        return bad(
            "state-directory",
            f"{directory} is not a directory",
            "The server keeps its host key, database and images there.",
            "Name another with --state-dir or SANDBOX_SSH_STATE_DIR.",
        )
    entry = directory.stat()
    found = f"{directory}, of {_user_name(entry.st_uid)}, mode {entry.st_mode & 0o7777:04o}"
    if not os.access(directory, os.R_OK | os.W_OK | os.X_OK):
        owner = as_root(f"chown -R {_user_name(os.geteuid())} {directory}")
        return bad("state-directory", found, f"{_user_name(os.geteuid())} cannot write there.", owner)
    if entry.st_mode & 0o002:
        return bad(
            "state-directory",
            found,
            "Everyone on this host could replace the host key and the database.",
            as_root(f"chmod o-w {directory}"),
        )
    return good("state-directory", found, "The server can keep its host key, database and images there.")


def image(config: Config) -> list[Finding]:
    name = config.sandbox.image
    if name == HOST_IMAGE:
        return []
    if (config.server.state_dir / "images" / name / "rootfs").is_dir():
        return good("image", name, "Sandboxes start with it (sandbox.image).")
    remedy = f"sandbox-ssh image add {name} PATH, or set sandbox.image to one of `sandbox-ssh image list`"
    return bad("image", f"there is no image {name}", "The server does not start without it (sandbox.image).", remedy)


def _absent(directory: Path) -> list[Finding]:
    parent = next(path for path in directory.parents if path.exists())
    if parent.is_dir() and os.access(parent, os.W_OK | os.X_OK):
        return good("state-directory", f"{directory} is not there yet", "`sandbox-ssh serve` makes it.")
    return bad(
        "state-directory",
        f"{directory} is not there, and {parent} is not {_user_name(os.geteuid())}'s to write",
        "The server cannot make it.",
        as_root(f"install -d -m 0700 -o {_user_name(os.geteuid())} {directory}"),
    )


def database(config: Config) -> list[Finding]:
    url = config.database.url
    file = ownership.sqlite_file(url)
    found = str(file) if file else _without_password(url)
    if file is not None and not file.exists():
        return good("database", f"{found} is not there yet", "`sandbox-ssh serve` makes it.")
    # As the gateway's user: SQLite may leave files beside the database, and PostgreSQL may go by the user's name.
    with ownership.acting_as(ownership.database_owner(config)):
        return _schema(url, found)


def _schema(url: str, found: str) -> list[Finding]:
    from sandbox_ssh.store import migrate
    from sandbox_ssh.store.database import parse_url, require_schema

    try:
        revision = migrate.current(url)
    except StoreError as error:
        remedy = "Start the database's server, or correct database.url in the configuration."
        return bad("database", str(error), "Without it nobody can log in.", remedy)
    if revision is None:
        return good("database", f"{found}: empty", "`sandbox-ssh serve` makes its tables.")
    try:
        require_schema(parse_url(url), revision)
    except StoreError as error:
        newer = revision > migrate.head()
        remedy = "Install the version that made it." if newer else "sandbox-ssh db upgrade"
        return bad("database", str(error), "The server does not start on tables of another version.", remedy)
    return good("database", found, "Reachable, and its tables are those of this version.")


def _without_password(url: str) -> str:
    scheme, _, rest = url.partition("://")
    authority, slash, path = rest.partition("/")
    return f"{scheme}://{authority.rpartition('@')[2]}{slash}{path.partition('?')[0]}"


def ports(config: Config) -> list[Finding]:
    return [finding for address in config.server.listen for finding in _port(address, config.server.state_dir)]


def _port(address: Address, state_dir: Path) -> list[Finding]:
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
            listener.listen(1)
        except OSError as error:
            return _unusable(address, error, state_dir)
    return good("port", f"{address} is free", "The server can listen there.")


def _unusable(address: Address, error: OSError, state_dir: Path) -> list[Finding]:
    found = f"{address}: {error.strerror}"
    if error.errno == errno.EACCES:
        return bad(
            "port",
            found,
            "Ports below net.ipv4.ip_unprivileged_port_start are root's.",
            set_sysctl("net.ipv4.ip_unprivileged_port_start", address.port),
        )
    if error.errno != errno.EADDRINUSE:
        return bad("port", found, "The server cannot listen there.", "Set server.listen to an address of this host.")
    pid = _listener(address.port)
    if pid is None:
        return bad("port", found, "Another user's program listens there.", as_root(f"ss -ltnp sport = :{address.port}"))
    if str(state_dir) in _open_files(pid):
        return good("port", f"{address}, process {pid}", "This server is running and listens there.")
    command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    return bad(
        "port",
        f"{address} is taken by process {pid}: {command}",
        "The server cannot listen there.",
        "Set server.listen, or --listen, to another port, or stop that process.",
    )


def _listener(port: int) -> int | None:
    """The process that listens on a TCP port, as far as this user may see it (proc(5): /proc/net/tcp, /proc/PID/fd)."""
    inodes = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and int(fields[1].rpartition(":")[2], 16) == port:
                inodes.add(f"socket:[{fields[9]}]")
    for directory in Path("/proc").iterdir():
        if directory.name.isdigit() and inodes & _open_files(int(directory.name)):
            return int(directory.name)
    return None


def _open_files(pid: int) -> set[str]:
    links = set()
    try:
        for entry in os.scandir(f"/proc/{pid}/fd"):
            links.add(os.readlink(entry.path))
    except OSError:  # another user's, or it has just ended
        pass
    return links


def _user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _print(findings: list[Finding]) -> None:
    width = max(len(finding.check) for finding in findings)
    for finding in findings:
        status = typer.style(f"{finding.status:<4}", fg=_COLORS[finding.status], bold=finding.status is not Status.OK)
        line = output.printable(f"{finding.check:<{width}}  {finding.found}. {finding.meaning}")
        typer.echo(f"{status}  {line}")
        if finding.remedy is not None:
            typer.echo(f"      {'':<{width}}  mend it: {output.printable(finding.remedy)}")
    counts = Counter(finding.status for finding in findings)
    output.message(f"{counts[Status.OK]} OK, {counts[Status.WARN]} WARN, {counts[Status.FAIL]} FAIL")
