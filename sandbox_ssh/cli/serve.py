"""`sandbox-ssh serve`: check the configuration, prepare the state directory, and become the supervisor."""

from __future__ import annotations

import fcntl
import grp
import json
import os
import pwd
import stat
import sys
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from sandbox_ssh import capacity
from sandbox_ssh.cli import context
from sandbox_ssh.cli.context import Context
from sandbox_ssh.cli.ownership import Owner, prepare_state_dir, sqlite_file
from sandbox_ssh.config import DATABASE_FILE, find_file, parse_address, runtime_dir
from sandbox_ssh.errors import ConfigError, QuotaError
from sandbox_ssh.quotas import check_host
from sandbox_ssh.sandbox.rootfs import HOST_IMAGE

if TYPE_CHECKING:
    from sandbox_ssh.config import Config
    from sandbox_ssh.store.database import Database


class Mode(StrEnum):
    auto = "auto"
    service = "service"
    rootless = "rootless"


@context.command
def serve(
    here: Context,
    listen: Annotated[
        list[str] | None,
        typer.Option(metavar="ADDR:PORT", help="Where to listen; may be repeated. Port 0 takes a free one."),
    ] = None,
    mode: Annotated[Mode | None, typer.Option(help="Privileges apart under root, or all as one ordinary user.")] = None,
) -> None:
    """Run the server until SIGTERM; SIGHUP reloads the configuration for new sessions.

    Prints `listening on ADDR:PORT` when it accepts connections. Exit status: 0 stopped, 1 failed, 2 wrong usage.

    Example: sandbox-ssh serve --listen 127.0.0.1:2222
    """
    config = here.config(server__listen=addresses(listen), server__mode=mode.value if mode else None)
    gateway = gateway_owner(config)
    check_readable(find_file(here.config_file), gateway)
    check_image(config)
    check_quotas(config)
    prepare_state_dir(config)
    prepare_directories(config, gateway)
    lock = take_lock(config)
    context.prepare_database(config, create=True)
    prepare_host_keys(config, gateway)
    here.run(lambda database: _close_lost_sessions(database, config.server.node))
    become_supervisor(config, here.config_file, gateway, lock)


def addresses(listen: list[str] | None) -> str | None:
    """The option as the configuration has it; a bad one is wrong usage."""
    for text in listen or ():
        try:
            parse_address(text)
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="--listen") from None
    return ",".join(listen) if listen else None


async def _close_lost_sessions(database: Database, node: str) -> None:
    """Nothing of this node runs now: the lock is ours. Whatever its last server left open is closed as lost."""
    from sandbox_ssh.store import sessions

    await sessions.recover(database, node, None)


def gateway_owner(config: Config) -> Owner:
    """The user and group that gateway workers run as. Raises `ConfigError`."""
    if config.mode == "rootless":
        if os.geteuid() == 0:
            raise ConfigError("rootless mode is for an ordinary user: run this as one, or use --mode service")
        return Owner(os.getuid(), os.getgid())
    if os.geteuid() != 0:
        raise ConfigError("service mode needs root: run this with sudo, or use --mode rootless")
    try:
        entry = pwd.getpwnam(config.server.user)
    except KeyError:
        raise ConfigError(
            f"the gateway's user {config.server.user!r} (server.user) does not exist: "
            f"useradd --system --user-group --no-create-home --shell /usr/sbin/nologin {config.server.user}"
        ) from None
    if entry.pw_uid == 0:
        raise ConfigError("server.user is root: the gateway must run as a user without privileges")
    return Owner(entry.pw_uid, entry.pw_gid)


def check_readable(file: Path | None, gateway: Owner) -> None:
    """The gateway reads the configuration too, again at each SIGHUP. Raises `ConfigError`."""
    if file is None or gateway.uid == os.geteuid():
        return
    entry = file.stat()
    shift = 6 if entry.st_uid == gateway.uid else 3 if entry.st_gid == gateway.gid else 0
    if not entry.st_mode >> shift & 4:
        group = grp.getgrgid(gateway.gid).gr_name
        raise ConfigError(f"{file} cannot be read by the gateway: chgrp {group} {file} && chmod 0640 {file}")


def check_image(config: Config) -> None:
    """Raises `ConfigError` where no session could start for want of its image."""
    name = config.sandbox.image
    if name != HOST_IMAGE and not (config.server.state_dir / "images" / name / "rootfs").is_dir():
        raise ConfigError(f"sandbox.image: there is no image {name}: add it, or see `sandbox-ssh image list`")


def check_quotas(config: Config) -> None:
    """Raises `ConfigError` for a quota of the configuration that this host could not keep."""
    values = config.sandbox.quotas
    room = capacity.read(1, capacity.own_rlimits(), values)
    try:
        check_host(values, room.limits)
    except QuotaError as error:
        raise ConfigError(f"sandbox.quotas: {error}") from None


def prepare_directories(config: Config, gateway: Owner) -> None:
    """Directories of root's, or of the one user: what the gateway may write is the database's alone."""
    state = config.server.state_dir
    for name, mode in (("run", 0o711), ("run/work", 0o700), ("images", 0o711), ("host_keys", 0o750)):
        directory = state / name
        try:
            directory.mkdir(exist_ok=True)
            directory.chmod(mode)
            if name == "host_keys":
                os.chown(directory, -1, gateway.gid)
        except OSError as error:
            raise ConfigError(f"{directory} cannot be prepared: {error.strerror}") from error
    if config.mode == "service":
        _give_to_gateway(state, gateway)
    else:
        # The spawner reaches images and its work as root of a namespace, which is another user to the host; the
        # directories above decide who else may.
        state.chmod(state.stat().st_mode | 0o011)


def _give_to_gateway(state: Path, gateway: Owner) -> None:
    """Owners as they should be, again at every start: a restored backup or a hurried `chown -R` made them root's."""
    if state.stat().st_uid == 0:
        os.chown(state, 0, gateway.gid)
        state.chmod(stat.S_ISVTX | 0o771)
    for file in state.glob(f"{DATABASE_FILE}*"):
        entry = file.lstat()
        # Another name of some file of root's would be given away with it.
        if entry.st_uid == 0 and stat.S_ISREG(entry.st_mode) and entry.st_nlink == 1:
            os.chown(file, gateway.uid, gateway.gid, follow_symlinks=False)


def prepare_id_locks(config: Config) -> Path:
    """A directory that all servers of this host, or of one user of it, share: which ids are in use (`idmap`)."""
    directory = Path("/run/sandbox-ssh") if config.mode == "service" else runtime_dir() / "sandbox-ssh"
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        entry = directory.lstat()
        if not stat.S_ISDIR(entry.st_mode) or entry.st_uid != os.geteuid():
            raise ConfigError(f"{directory} is not a directory of {config.mode} mode's user: remove it")
        directory.chmod(0o700)
    except OSError as error:
        raise ConfigError(f"{directory} cannot be prepared: {error.strerror}") from error
    return directory


def take_lock(config: Config) -> int:
    """A lock that the supervisor holds as long as it lives: one server for each state directory."""
    path = config.server.state_dir / "run" / "lock"
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        pid = os.read(fd, 32).decode().strip() or "?"
        raise ConfigError(
            f"a server runs on {config.server.state_dir} already (pid {pid}): stop it, or name another --state-dir"
        ) from None
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)  # the supervisor keeps this pid
    return fd


def prepare_host_keys(config: Config, gateway: Owner) -> None:
    """Make the first host key where none is there; readable by the gateway, writable by nobody but its owner."""
    default = config.server.state_dir / "host_keys" / "ssh_host_ed25519_key"
    for path in config.ssh.host_keys:
        if path == default and path.exists():
            os.chown(path, -1, gateway.gid, follow_symlinks=False)
        if path.exists():
            continue
        if path != default:
            raise ConfigError(f"the host key {path} (ssh.host_keys) does not exist: ssh-keygen -t ed25519 -f {path}")
        import asyncssh

        key = asyncssh.generate_private_key("ssh-ed25519", comment=config.server.node)
        partial = path.with_suffix(".new")
        fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "wb") as file:
            file.write(key.export_private_key())
            os.fchown(fd, -1, gateway.gid)
            os.fchmod(fd, 0o640 if config.mode == "service" else 0o600)
            os.fsync(fd)
        path.with_suffix(".pub").write_bytes(key.export_public_key())
        os.rename(partial, path)


def become_supervisor(config: Config, file: Path | None, gateway: Owner, lock: int) -> NoReturn:
    from sandbox_ssh.supervisor import Settings

    file = find_file(file)
    state = config.server.state_dir
    database = sqlite_file(config.database.url)
    settings = Settings(
        mode=config.mode,
        state_dir=str(state),
        listen=[str(address) for address in config.server.listen],
        workers=config.server.workers,
        gateway_uid=gateway.uid,
        gateway_gid=gateway.gid,
        gateway_arguments=[],
        shutdown_timeout=config.server.shutdown_timeout,
        visible=_visible(state, file, database, config.ssh.host_keys),
        spawner={
            "mode": config.mode,
            "gateway_uid": gateway.uid,
            "id_first": config.sandbox.id_first,
            "id_blocks": config.sandbox.id_blocks,
            "id_locks": str(prepare_id_locks(config)),
            "uplinks_ready": config.sandbox.uplinks_ready,
        },
        environment={
            **{name: os.environ[name] for name in ("LANG", "LC_ALL", "PATH", "TZ") if name in os.environ},
            # The configuration's own variables, SECTION__KEY, are read again by each worker, and on SIGHUP.
            **{name: value for name, value in os.environ.items() if name.startswith("SANDBOX_SSH_")},
            **config.environment(file),
        },
    )
    handover = os.memfd_create("settings", 0)
    os.write(handover, json.dumps(asdict(settings)).encode())
    os.lseek(handover, 0, os.SEEK_SET)
    os.set_inheritable(lock, True)
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-P", "-m", "sandbox_ssh.supervisor", str(handover)])


def _visible(state: Path, file: Path | None, database: Path | None, host_keys: tuple[Path, ...]) -> list[str]:
    """What a gateway worker reads: the program, its interpreter, the configuration, its state."""
    import sandbox_ssh

    paths = [Path(sys.prefix), Path(sys.base_prefix), Path(sandbox_ssh.__file__).parent, state, *host_keys]
    paths += [file.absolute()] if file else []
    paths += [database.parent] if database else []
    resolved = sorted({path.resolve() for path in paths}, key=lambda path: len(path.parts))
    kept: list[Path] = []
    for path in resolved:
        if not any(path.is_relative_to(other) for other in kept):
            kept.append(path)
    return [str(path) for path in kept]
