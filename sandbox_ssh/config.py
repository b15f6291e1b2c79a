"""The configuration: one TOML file, overridden key by key from the environment, then by a command's options.

Every process that needs a key reads it here and gets the same frozen object. Values that people write with a unit
(`"30s"`, `"512M"`) arrive as numbers; paths arrive absolute; what has no fixed default (the state directory, the
database in it, the node's name) is filled in by `load`.

The file is read twice with different rights: by the command line, often as root, and again by each gateway process,
as the user that it runs as. What depends on who reads it is therefore decided once, by the first: `Config.environment`
is what a parent hands to its children so that they come to the same answers.
"""

from __future__ import annotations

import difflib
import ipaddress
import os
import pwd
import re
import socket
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, cast

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, InitSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

from sandbox_ssh import quotas
from sandbox_ssh.errors import ConfigError, QuotaError
from sandbox_ssh.units import parse_duration

PREFIX = "SANDBOX_SSH_"
DATABASE_FILE = "sandbox-ssh.db"
HOST_KEY = "host_keys/ssh_host_ed25519_key"

_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,252})", re.ASCII)


class Address(NamedTuple):
    """Where to listen."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_address(text: object) -> Address:
    """`ADDRESS:PORT`; an IPv6 address in brackets; port 0 takes a free one.

    Raises `ValueError` for anything else.
    """
    if isinstance(text, Address):
        return text
    host, _, port = text.strip().rpartition(":") if isinstance(text, str) else ("", "", "")
    if host.startswith("[") and host.endswith("]"):
        host = str(ipaddress.IPv6Address(host[1:-1]))
    elif _HOST.fullmatch(host) is None:
        raise ValueError('an address is HOST:PORT, such as "127.0.0.1:2222" or "[::]:2222"')
    if not (port.isascii() and port.isdigit() and int(port) <= 65535):
        raise ValueError("a port is a number from 0 to 65535, such as 127.0.0.1:2222")
    return Address(host, int(port))


def _words(value: object) -> object:
    """In the environment a list is written with commas."""
    return [word.strip() for word in value.split(",") if word.strip()] if isinstance(value, str) else value


def _quotas(value: object) -> object:
    """`[sandbox.quotas]`: keys and values as `quota set` takes them; in the environment KEY=VALUE with commas."""
    if isinstance(value, str):
        pairs = [word.partition("=") for word in cast("list[str]", _words(value))]
        value = {key: text for key, _, text in pairs}
    if not isinstance(value, dict):
        raise ValueError("quotas are KEY = VALUE")
    try:
        return {key: quotas.parse(str(key), text) for key, text in value.items()}
    except QuotaError as error:
        raise ValueError(str(error)) from None


def _absolute(path: Path) -> Path:
    if not path.is_absolute():
        raise ValueError("a path must be absolute, as several processes with different directories read it")
    return path


Duration = Annotated[float, BeforeValidator(parse_duration)]
Words = Annotated[tuple[str, ...], BeforeValidator(_words)]
Addresses = Annotated[
    tuple[Annotated[Address, BeforeValidator(parse_address)], ...], BeforeValidator(_words), Field(min_length=1)
]
AbsolutePath = Annotated[Path, AfterValidator(_absolute)]
Count = Annotated[int, Field(ge=1)]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")]


def default_state_dir() -> Path:
    if os.geteuid() == 0:
        return Path("/var/lib/sandbox-ssh")
    return _xdg("XDG_STATE_HOME", ".local/state") / "sandbox-ssh"


def default_file() -> Path | None:
    """The file that is read when none is named, if it is there."""
    directory = Path("/etc") if os.geteuid() == 0 else _xdg("XDG_CONFIG_HOME", ".config")
    file = directory / "sandbox-ssh" / "sandbox-ssh.toml"
    return file if file.is_file() else None


def runtime_dir() -> Path:
    """A directory of this user's that all of their processes find."""
    return _xdg("XDG_RUNTIME_DIR", ".cache")


def _xdg(variable: str, below_home: str) -> Path:
    """A base directory of the XDG specification, which tells to ignore relative values."""
    value = Path(os.environ.get(variable, ""))
    if value.is_absolute():
        return value
    try:
        return Path.home() / below_home
    except RuntimeError as error:
        raise ConfigError(f"user {os.geteuid()} has no home directory: name one with --state-dir") from error


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


class Server(Section):
    listen: Addresses = (Address("127.0.0.1", 2222),)
    state_dir: AbsolutePath = Field(default_factory=default_state_dir)
    mode: Literal["auto", "service", "rootless"] = "auto"
    node: Annotated[str, Field(min_length=1, max_length=253)] = Field(default_factory=socket.gethostname)
    user: str = "sandbox-ssh"
    workers: Count = 1
    shutdown_timeout: Duration = 10.0


class Database(Section):
    # With a password in it, perhaps: kept out of what is printed or logged.
    url: str = Field(default="", repr=False)

    @field_validator("url")
    @classmethod
    def _known(cls, url: str) -> str:
        scheme, _, rest = url.partition("://")
        if scheme.partition("+")[0] not in ("", "sqlite", "postgresql", "postgres"):
            raise ValueError('a database is "sqlite:////absolute/path" or "postgresql://user@host/name"')
        if scheme.startswith("sqlite") and not rest.startswith("//"):
            raise ValueError("a SQLite database is named by an absolute path: sqlite:////absolute/path")
        return url


class SSH(Section):
    host_keys: Annotated[tuple[AbsolutePath, ...], BeforeValidator(_words)] = ()
    login_grace_time: Duration = 30.0
    max_auth_tries: Count = 6
    max_startups: Count = 100
    max_sessions: Count = 10
    password_authentication: bool = True
    accept_env: Words = ("LANG", "LANGUAGE", "LC_*", "COLORTERM", "NO_COLOR", "TZ")
    ciphers: Annotated[Words, Field(min_length=1)] = (
        "aes128-gcm@openssh.com",
        "aes256-gcm@openssh.com",
        "chacha20-poly1305@openssh.com",
        "aes128-ctr",
        "aes256-ctr",
    )
    client_alive_interval: Duration = 30.0
    client_alive_count_max: Count = 3


class Sandbox(Section):
    image: Name = "host"
    hostname: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9-]{0,62}$")] = "sandbox"
    network: Literal["uplink", "none"] = "uplink"
    quotas: Annotated[dict[str, int], BeforeValidator(_quotas)] = {}
    # Above the ids that systemd gives to containers (up to 0x6fffffff), that useradd gives to /etc/subuid (up to
    # 600100000) and that SSSD gives to a directory's users (up to 2000200000); 1024 blocks end below systemd's
    # next reserved range (0x7ffe0000).
    id_first: Annotated[int, Field(ge=65536, le=2**32 - 2)] = 0x7800_0000
    id_blocks: Annotated[int, Field(ge=2)] = 1024
    uplinks_ready: Annotated[int, Field(ge=0)] = 4


class Log(Section):
    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["text", "json"] = "text"


class Config(BaseSettings):
    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        hide_input_in_errors=True,
        env_prefix=PREFIX,
        env_nested_delimiter="__",
        enable_decoding=False,  # lists come with commas, not as JSON
    )

    server: Server = Server()
    database: Database = Database()
    ssh: SSH = SSH()
    sandbox: Sandbox = Sandbox()
    log: Log = Log()

    @property
    def mode(self) -> Literal["service", "rootless"]:
        """Privileges apart under root, or everything as one ordinary user."""
        if self.server.mode != "auto":
            return self.server.mode
        return "service" if os.geteuid() == 0 else "rootless"

    def environment(self, file: Path | None) -> dict[str, str]:
        """What a child process of another user needs in its environment to load this configuration from `file`."""
        return {
            # Empty means none: not the file of the user that the child runs as.
            f"{PREFIX}CONFIG": str(file.absolute()) if file else "",
            f"{PREFIX}STATE_DIR": str(self.server.state_dir),
            f"{PREFIX}DATABASE_URL": self.database.url,
            f"{PREFIX}SERVER__LISTEN": ",".join(map(str, self.server.listen)),
            f"{PREFIX}SERVER__MODE": self.mode,
            f"{PREFIX}SERVER__NODE": self.server.node,
        }


def load(
    config_file: Path | None = None, state_dir: Path | None = None, database_url: str | None = None, **overrides: Any
) -> Config:
    """Read the configuration.

    `overrides` are a command's options by the names of the environment, `server__mode="rootless"`; None means that
    the option was not given. A file, directory or database that is not given is taken from `SANDBOX_SSH_CONFIG`,
    `SANDBOX_SSH_STATE_DIR` and `SANDBOX_SSH_DATABASE_URL`.

    Raises `ConfigError` naming the file or variable, and the key.
    """
    file = find_file(config_file)
    options: dict[str, dict[str, Any]] = {}
    for name, value in overrides.items():
        if value is not None:
            section, _, key = name.partition("__")
            options.setdefault(section, {})[key] = value
    if directory := state_dir or os.environ.get(f"{PREFIX}STATE_DIR"):
        options.setdefault("server", {})["state_dir"] = Path(directory).absolute()
    if url := database_url or os.environ.get(f"{PREFIX}DATABASE_URL"):
        options.setdefault("database", {})["url"] = _absolute_url(url)
    _check_environment()
    try:
        return _complete(_validate(_read(file) if file else {}, options))
    except ValidationError as error:
        raise ConfigError(_sentence(error.errors(include_url=False)[0], file, options)) from None


def find_file(config_file: Path | None) -> Path | None:
    """The file that `load` reads: the one given, or of the environment, or the default one if it is there."""
    if config_file is not None:
        return config_file
    named = os.environ.get(f"{PREFIX}CONFIG")
    if named is not None:
        return Path(named) if named else None
    return default_file()


def _validate(content: Mapping[str, Any], options: Mapping[str, Any]) -> Config:
    class Sourced(Config):
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return init_settings, env_settings, InitSettingsSource(settings_cls, dict(content))

    return Sourced(**options)


def _read(file: Path) -> dict[str, Any]:
    try:
        with file.open("rb") as stream:
            return tomllib.load(stream)
    except PermissionError as error:
        user = _user_name(os.geteuid())
        raise ConfigError(
            f"{file} cannot be read by {user}: give it the group of that user and mode 640 (chgrp {user} {file})"
        ) from error
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not TOML: {error}") from error


def _user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _absolute_url(url: str) -> str:
    """An option's `sqlite:///file` is meant from where the command was typed."""
    scheme, separator, path = url.partition(":///")
    if scheme.startswith("sqlite") and separator and path and not path.startswith("/"):
        return f"{scheme}:///{Path(path).absolute()}"
    return url


def _check_environment() -> None:
    """pydantic-settings passes over a variable whose section does not exist; a typing error must not pass."""
    for variable in os.environ:
        name = variable.upper()
        if name.startswith(PREFIX) and "__" in name:
            section = name.removeprefix(PREFIX).partition("__")[0].lower()
            if section not in Config.model_fields:
                raise ConfigError(f"{variable} in the environment: there is no section {section!r}")


def _complete(config: Config) -> Config:
    state_dir = config.server.state_dir
    found: dict[str, Any] = {name: getattr(config, name) for name in Config.model_fields}
    if not config.database.url:
        found["database"] = config.database.model_copy(update={"url": f"sqlite:///{state_dir / DATABASE_FILE}"})
    if not config.ssh.host_keys:
        found["ssh"] = config.ssh.model_copy(update={"host_keys": (state_dir / HOST_KEY,)})
    return Config.model_construct(**found)


def _sentence(error: ErrorDetails, file: Path | None, options: Mapping[str, Mapping[str, Any]]) -> str:
    """An error of pydantic's, as one sentence that names where the value came from."""
    section, key = ([*map(str, error["loc"]), "", ""])[:2]
    dotted = f"{section}.{key}" if key else section
    variable = f"{PREFIX}{section}__{key}".upper()
    if key in options.get(section, {}):
        where = f"the value given for {dotted}"
    elif variable in (name.upper() for name in os.environ):
        where = f"{variable} in the environment"
    else:
        where = f"{file}: {dotted}"
    if error["type"] == "extra_forbidden":
        return f"{where} is not a key of the configuration{_suggestion(section, key)}"
    message = error["msg"].removeprefix("Value error, ")
    return f"{where}: {message[0].lower()}{message[1:]}"


def _suggestion(section: str, key: str) -> str:
    sections = {name: field.annotation for name, field in Config.model_fields.items()}
    model = sections.get(section)
    if not key or not isinstance(model, type) or not issubclass(model, Section):
        matches = difflib.get_close_matches(section, sections)
        return f"; did you mean [{matches[0]}]?" if matches else ""
    if section == "sandbox" and key in quotas.QUOTAS:
        return "; it is a quota: write it below [sandbox.quotas]"
    matches = difflib.get_close_matches(key, model.model_fields)
    return f"; did you mean {section}.{matches[0]}?" if matches else ""
