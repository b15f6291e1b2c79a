"""The configuration: its documented file, its sources, and what is said about a mistake."""

from __future__ import annotations

import contextlib
import os
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from sandbox_ssh import config, quotas, units
from sandbox_ssh.config import Address, Config
from sandbox_ssh.errors import ConfigError

DOCUMENTED = Path(__file__).parents[1] / "config" / "sandbox-ssh.toml"

# Their defaults depend on who starts the server, and where.
FOUND_OUT = {
    ("server", "state_dir"), ("server", "node"), ("database", "url"), ("ssh", "host_keys"), ("sandbox", "quotas"),
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in list(os.environ):
        if name.startswith("SANDBOX_SSH_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("SANDBOX_SSH_CONFIG", "")  # none, also where this host has one


def write(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "server.toml"
    file.write_text(text)
    return file


def sections() -> dict[str, type[BaseModel]]:
    found = {name: field.annotation for name, field in Config.model_fields.items()}
    return {name: model for name, model in found.items() if isinstance(model, type) and issubclass(model, BaseModel)}


def test_the_file_says_the_default_of_every_quota() -> None:
    written = documented()["sandbox"]["quotas"]
    assert {key: quotas.parse(key, value) for key, value in written.items()} == {
        key: quota.default for key, quota in quotas.QUOTAS.items()
    }


def documented() -> dict[str, dict[str, Any]]:
    """The file with its commented keys taken as they stand."""
    return tomllib.loads(re.sub(r"^#(\w+ = )", r"\1", DOCUMENTED.read_text(), flags=re.MULTILINE))


def test_the_file_documents_every_key_and_no_other() -> None:
    assert {name: set(keys) for name, keys in documented().items()} == {
        name: set(model.model_fields) for name, model in sections().items()
    }


def test_the_file_says_every_default() -> None:
    defaults = Config()
    for name, model in sections().items():
        written = model.model_validate(documented()[name])
        for key in model.model_fields:
            if (name, key) not in FOUND_OUT:
                assert getattr(written, key) == getattr(getattr(defaults, name), key), f"{name}.{key}"


def test_the_file_changes_nothing_as_it_is() -> None:
    assert config.load(DOCUMENTED) == config.load()


def test_every_key_has_a_comment_above_it() -> None:
    lines = DOCUMENTED.read_text().splitlines()
    for number, line in enumerate(lines):
        if re.match(r"#\w+ = ", line):
            above = lines[number - 1]
            assert above.startswith("# ") or re.match(r"#\w+ = ", above), line


def test_values_with_units(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        """
        [server]
        listen = ["0.0.0.0:22", "[::1]:2222", "localhost:0"]
        shutdown_timeout = "1.5m"
        [ssh]
        login_grace_time = "500ms"
        [sandbox]
        [sandbox.quotas]
        disk = "1.5G"
        open_files = 4096
        memory = "64MiB"
        idle_time = "90m"
        cpu = 0.5
        sessions = "unlimited"
        """,
    )
    loaded = config.load(file)
    assert loaded.server.listen == (Address("0.0.0.0", 22), Address("::1", 2222), Address("localhost", 0))
    assert str(loaded.server.listen[1]) == "[::1]:2222"
    assert (loaded.server.shutdown_timeout, loaded.ssh.login_grace_time) == (90.0, 0.5)
    assert loaded.sandbox.quotas == {
        "disk": 1536 * 2**20, "open_files": 4096, "memory": 2**26, "idle_time": 5400, "cpu": 500, "sessions": -1,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[server]\nlistenn = []", "server.listenn is not a key of the configuration; did you mean server.listen?"),
        ("[servr]\nlisten = []", "servr is not a key of the configuration; did you mean [server]?"),
        ("listen = 5", "listen is not a key of the configuration"),
        ("server = 5", "server: "),
        ("[server]\nlisten = []", "server.listen: "),
        ("[server]\nlisten = ['22']", "server.listen: an address is HOST:PORT"),
        ("[server]\nlisten = ['0.0.0.0:99999']", "server.listen: a port is a number"),
        ("[server]\nlisten = ['[::g]:22']", "server.listen: "),
        ("[server]\nlisten = [22]", "server.listen: an address is HOST:PORT"),
        ("[server]\nworkers = 0", "server.workers: input should be greater than or equal to 1"),
        ("[server]\nworkers = 'two'", "server.workers: "),
        ("[server]\nmode = 'root'", "server.mode: input should be 'auto', 'service' or 'rootless'"),
        ("[server]\nstate_dir = 'here'", "server.state_dir: a path must be absolute"),
        ("[server]\nshutdown_timeout = 10", "server.shutdown_timeout: a duration is a number and a unit"),
        ("[server]\nshutdown_timeout = '10'", "server.shutdown_timeout: a duration is a number and a unit"),
        ("[server]\nshutdown_timeout = '-1s'", "server.shutdown_timeout: a duration is a number and a unit"),
        ("[sandbox]\ndisk = '1G'", "sandbox.disk is not a key of the configuration; it is a quota"),
        ("[sandbox.quotas]\ndisk = 'much'", "sandbox.quotas: disk: 'much' is not a size"),
        ("[sandbox.quotas]\ndisk = -1", "sandbox.quotas: disk: -1 is negative"),
        ("[sandbox.quotas]\nprocesses = 2", "sandbox.quotas: processes: 2 is less than a session needs, 8"),
        ("[sandbox.quotas]\nmemry = '1G'", "sandbox.quotas: there is no quota 'memry'; did you mean memory?"),
        ("[sandbox]\nquotas = 3", "sandbox.quotas: quotas are KEY = VALUE"),
        ("[sandbox]\nimage = '../etc'", "sandbox.image: "),
        ("[sandbox]\nhostname = 'a b'", "sandbox.hostname: "),
        ("[ssh]\nhost_keys = ['key']", "ssh.host_keys: a path must be absolute"),
        ("[database]\nurl = 'mysql://x'", "database.url: a database is"),
        ("[database]\nurl = 'sqlite:///here.db'", "database.url: a SQLite database is named by an absolute path"),
    ],
)
def test_a_mistake_is_one_sentence_with_file_and_key(tmp_path: Path, text: str, sentence: str) -> None:
    file = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        config.load(file)
    message = str(caught.value)
    assert message.startswith(f"{file}: {sentence}")
    assert "\n" not in message


def test_passwords_are_not_repeated(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        config.load(write(tmp_path, "[database]\nurl = 'mysql://alice:s3cret@host/x'"))
    assert "s3cret" not in str(caught.value)
    assert "s3cret" not in repr(config.load(write(tmp_path, "[database]\nurl = 'postgresql://alice:s3cret@host/x'")))


@pytest.mark.parametrize("content", [b"[server", b"\xff\xfe", b"a = 1\na = 2"])
def test_a_file_that_is_not_toml(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "server.toml"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"server\.toml is not TOML"):
        config.load(file)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml cannot be read: No such file"):
        config.load(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match="Is a directory"):
        config.load(tmp_path)


def test_sources_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path, "[server]\nworkers = 2\nnode = 'of-file'\nlisten = ['127.0.0.1:1']\n[log]\nlevel = 'debug'")
    monkeypatch.setenv("SANDBOX_SSH_CONFIG", str(file))
    monkeypatch.setenv("SANDBOX_SSH_SERVER__WORKERS", "3")
    monkeypatch.setenv("SANDBOX_SSH_SERVER__LISTEN", "127.0.0.1:2, [::1]:2")
    loaded = config.load(server__listen="127.0.0.1:3", server__mode=None)
    assert loaded.server.node == "of-file"
    assert loaded.server.workers == 3
    assert loaded.server.listen == (Address("127.0.0.1", 3),)
    assert config.load().server.listen == (Address("127.0.0.1", 2), Address("::1", 2))
    assert loaded.log.level == "debug"


def test_lists_and_switches_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SANDBOX_SSH_SSH__ACCEPT_ENV", "LANG, LC_*")
    monkeypatch.setenv("SANDBOX_SSH_SSH__PASSWORD_AUTHENTICATION", "false")
    monkeypatch.setenv("SANDBOX_SSH_SSH__HOST_KEYS", "/a,/b")
    ssh = config.load().ssh
    assert ssh.accept_env == ("LANG", "LC_*")
    assert ssh.password_authentication is False
    assert ssh.host_keys == (Path("/a"), Path("/b"))


@pytest.mark.parametrize(
    ("variable", "value", "sentence"),
    [
        ("SANDBOX_SSH_SERVER__WORKERS", "many", "SANDBOX_SSH_SERVER__WORKERS in the environment: "),
        ("SANDBOX_SSH_SERVER__WORKER", "2", "SANDBOX_SSH_SERVER__WORKER in the environment is not a key"),
        ("SANDBOX_SSH_SERVR__WORKERS", "2", "SANDBOX_SSH_SERVR__WORKERS in the environment: there is no section"),
    ],
)
def test_a_mistake_in_the_environment(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, sentence: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError) as caught:
        config.load()
    assert str(caught.value).startswith(sentence)


def test_a_mistake_in_an_option(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"the value given for server\.listen: an address is HOST:PORT"):
        config.load(write(tmp_path, ""), server__listen="22")


def test_state_directory_leads_to_all_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    loaded = config.load(state_dir=Path("state"))
    assert loaded.server.state_dir == tmp_path / "state"
    assert loaded.database.url == f"sqlite:///{tmp_path}/state/sandbox-ssh.db"
    assert loaded.ssh.host_keys == (tmp_path / "state/host_keys/ssh_host_ed25519_key",)
    assert config.load(database_url="sqlite:///here.db").database.url == f"sqlite:///{tmp_path}/here.db"
    monkeypatch.setenv("SANDBOX_SSH_STATE_DIR", "/from/environment")
    monkeypatch.setenv("SANDBOX_SSH_DATABASE_URL", "postgresql:///name")
    assert config.load().server.state_dir == Path("/from/environment")
    assert config.load(state_dir=Path("/given")).server.state_dir == Path("/given")
    assert config.load().database.url == "postgresql:///name"


def test_a_child_of_another_user_comes_to_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`environment` decides for the child: here it has another home, and would find another file and directory."""
    file = write(tmp_path, "[log]\nlevel = 'debug'")
    for given_file in (file, None):
        parent = config.load(given_file, tmp_path / "state", server__mode="service", server__listen="127.0.0.1:0")
        with monkeypatch.context() as child:
            child.delenv("SANDBOX_SSH_CONFIG", raising=False)
            child.setenv("XDG_CONFIG_HOME", str(tmp_path))
            child.setenv("XDG_STATE_HOME", str(tmp_path))
            for name, value in parent.environment(given_file).items():
                child.setenv(name, value)
            assert config.load().model_dump() == parent.model_dump()
            assert config.load().mode == "service"


def test_mode_goes_by_who_starts_the_server() -> None:
    assert config.load().mode == ("service" if os.geteuid() == 0 else "rootless")
    assert config.load(server__mode="rootless").mode == "rootless"


def test_frozen() -> None:
    loaded = config.load()
    with pytest.raises(ValueError, match="frozen"):
        loaded.server.workers = 2


@given(st.one_of(st.text(), st.integers(), st.floats(), st.none(), st.lists(st.text())))
def test_parsers_refuse_with_a_sentence_and_nothing_else(value: object) -> None:
    for parse in (units.parse_duration, units.parse_size, config.parse_address):
        with contextlib.suppress(ValueError):
            parse(value)


@given(st.integers(0, 2**50))
def test_sizes_are_exact(count: int) -> None:
    assert units.parse_size(str(count)) == units.parse_size(count) == count
