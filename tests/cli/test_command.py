"""What holds for every command: options, exit statuses, the database that it finds, whose files it makes."""

from __future__ import annotations

import itertools
import os
import pwd
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import text

from sandbox_ssh.cli import COMMANDS, output, ownership
from sandbox_ssh.store.database import connect
from sandbox_ssh.store.models import SCHEMA
from tests.cli.conftest import Command

ROOT = Path(__file__).parents[2]


def test_help_of_every_command_shows_options_examples_and_statuses(command: Command) -> None:
    assert all(name in command("--help").out for name in COMMANDS)
    for path in _commands():
        shown = command(*path, "--help")
        assert shown.status == 0, path
        for word in ("--config", "--state-dir", "--database-url", "Exit status"):
            assert word in shown.out, path


def _commands(prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    groups = {"user": ("add", "list", "show", "set", "remove", "passwd"), "session": ("list", "show", "kill"),
              "tenant": ("add", "list", "show", "set", "remove"), "db": ("upgrade", "status"),
              "quota": ("set", "unset", "show")}  # fmt: skip
    for group, names in groups.items():
        yield (group,)
        yield from ((group, name) for name in names)
    yield from (("user", "key", name) for name in ("add", "list", "remove"))
    yield ("usage",)


def test_help_loads_no_sqlalchemy() -> None:
    code = (
        "import sys; from sandbox_ssh.__main__ import main; sys.argv = ['sandbox-ssh', 'user', '--help']\n"
        "try: main()\nexcept SystemExit: pass\n"
        "print({'sqlalchemy', 'pydantic_settings', 'asyncssh', 'alembic'} & sys.modules.keys(), file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stderr == "set()\n"


def test_options_stand_at_any_level(command: Command, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/one.db"
    assert command("--database-url", url, "user", "add", "alice").status == 0
    words = ["user", "list", "--json"]
    for place in range(3):
        arguments = [*words[:place], "--database-url", url, *words[place:]]
        assert [user["name"] for user in command(*arguments).json] == ["alice"], arguments
    other = f"sqlite:///{tmp_path}/two.db"
    assert command("db", "upgrade", "--database-url", other).status == 0
    assert command("--database-url", url, "user", "list", "--json", "--database-url", other).json == []


def test_a_full_disk_is_a_sentence(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "sandbox_ssh", "--state-dir", str(tmp_path)]
    subprocess.run([*words, "db", "upgrade"], check=True, env={**os.environ, "SANDBOX_SSH_SERVER__MODE": "rootless"})
    with open("/dev/full", "w") as full:
        done = subprocess.run([*words, "session", "list", "--json"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1 and done.stderr == "sandbox-ssh: No space left on device: standard output\n"


def test_a_mistyped_directory_is_no_server_without_users(command: Command, tmp_path: Path) -> None:
    refused = command("--state-dir", tmp_path / "typo", "user", "list")
    assert refused.status == 1 and f"there is no database {tmp_path}/typo/sandbox-ssh.db" in refused.sentence
    assert refused.out == "" and not (tmp_path / "typo").exists()


def test_options_from_the_environment(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for first, second in itertools.permutations(("one", "two")):
        monkeypatch.setenv("SANDBOX_SSH_STATE_DIR", str(tmp_path / first))
        assert (
            command("db", "status", "--json", "--state-dir", tmp_path / second)
            .json["database"]
            .startswith(str(tmp_path / second))
        )
        assert command("db", "status", "--json").json["database"].startswith(str(tmp_path / first))
    file = tmp_path / "server.toml"
    file.write_text(f"[database]\nurl = 'sqlite:///{tmp_path}/of-file.db'\n")
    monkeypatch.delenv("SANDBOX_SSH_STATE_DIR")
    monkeypatch.setenv("SANDBOX_SSH_CONFIG", str(file))
    assert command("db", "status", "--json").json["database"] == f"{tmp_path}/of-file.db"
    assert command("db", "--config", file, "status", "--json").json["database"] == f"{tmp_path}/of-file.db"


def test_configuration_errors_are_one_line(command: Command, tmp_path: Path) -> None:
    file = tmp_path / "server.toml"
    file.write_text("[server]\nlistenn = 1\n")
    result = command("--config", file, "user", "list")
    assert (result.status, result.out, result.err.count("\n")) == (1, "", 1)
    assert f"{file}: server.listenn" in result.err
    assert command("--config", tmp_path / "none.toml", "user", "list").status == 1


def test_empty_database_is_made_by_what_needs_it(command: Command, empty_url: str) -> None:
    assert command("--database-url", empty_url, "db", "status", "--json").json["current"] is None
    assert command("--database-url", empty_url, "user", "add", "alice").status == 0
    status = command("--database-url", empty_url, "db", "status", "--json")
    assert (status.status, status.json["current"], status.json["needed"]) == (0, SCHEMA, SCHEMA)
    assert "already" in command("--database-url", empty_url, "db", "upgrade").err


def test_upgrade_of_nothing(command: Command, empty_url: str) -> None:
    assert command("--database-url", empty_url, "db", "status").status == 1
    assert command("--database-url", empty_url, "db", "upgrade").err.endswith(f"from nothing to {SCHEMA}\n")


def test_other_schema_is_refused_with_the_remedy(command: Command, database_url: str) -> None:
    for revision, remedy in (("0000", "run `sandbox-ssh db upgrade`"), ("9999", "newer sandbox-ssh")):
        with connect(database_url, writes=True) as connection:
            connection.execute(text("UPDATE alembic_version SET version_num = :r"), {"r": revision})
        result = command("--database-url", database_url, "user", "list")
        assert (result.status, result.out) == (1, "") and remedy in result.err
    assert command("--database-url", database_url, "db", "upgrade").status == 1, "there is no way back"


def test_status_and_streams_of_the_real_command(tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "-m", "sandbox_ssh", "--state-dir", str(tmp_path / "state"), *arguments]
        return subprocess.run(words, capture_output=True, text=True, check=False, cwd=ROOT)

    assert run("user", "add", "alice").returncode == 0
    again = run("user", "add", "alice")
    assert (again.returncode, again.stdout, again.stderr) == (1, "", "sandbox-ssh: there is a user alice already\n")
    assert run("user", "add").returncode == 2
    assert run("tenant", "list", "--json").stdout.startswith("[")


def test_a_reader_that_goes_away_is_no_error(tmp_path: Path) -> None:
    state = str(tmp_path / "state")
    shell = f"{sys.executable} -m sandbox_ssh --state-dir {state} user list --json | true"
    result = subprocess.run(["sh", "-c", shell], capture_output=True, text=True, check=True, cwd=ROOT)
    assert "Traceback" not in result.stderr


def test_migrations_work_from_an_installed_package(tmp_path: Path) -> None:
    """A wheel carries them inside the package (pyproject.toml, force-include)."""
    shutil.copytree(ROOT / "sandbox_ssh", tmp_path / "site" / "sandbox_ssh")
    shutil.copytree(ROOT / "migrations", tmp_path / "site" / "sandbox_ssh" / "migrations")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    words = [sys.executable, "-P", "-m", "sandbox_ssh", "--state-dir", str(tmp_path / "state"), "db", "upgrade"]
    subprocess.run(words, env=environment, check=True, cwd="/", capture_output=True)
    where = "import sandbox_ssh.store.migrate as m; print(m.location())"
    found = subprocess.run(
        [sys.executable, "-P", "-c", where], env=environment, check=True, cwd="/", capture_output=True, text=True
    )
    assert found.stdout.strip() == str(tmp_path / "site" / "sandbox_ssh" / "migrations")


def test_printable() -> None:
    assert output.printable("plain, ünï, 日本") == "plain, ünï, 日本"
    assert output.printable("a\x1b[2J\r\n\t\x7f\x9b\udcff\u202e\u200b") == (
        "a\\x1b[2J\\r\\n\\t\\x7f\\x9b\\udcff\\u202e\\u200b"
    )


# Under root, files belong to whom they should.

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user: run this as root")


@pytest.fixture
def gateway(monkeypatch: pytest.MonkeyPatch) -> pwd.struct_passwd:
    """A system user that every Debian has, in the place of the gateway's."""
    monkeypatch.setenv("SANDBOX_SSH_SERVER__MODE", "service")
    monkeypatch.setenv("SANDBOX_SSH_SERVER__USER", "nobody")
    return pwd.getpwnam("nobody")


@needs_root
def test_root_makes_the_database_for_the_gateway(command: Command, tmp_path: Path, gateway: pwd.struct_passwd) -> None:
    state = tmp_path / "closed" / "state"
    state.parent.mkdir(mode=0o700)  # the gateway's user cannot pass here, as below /root
    for arguments in (("user", "add", "alice"), ("user", "list"), ("db", "upgrade")):
        assert command("--state-dir", state, *arguments).status == 0
        for file in state.iterdir():
            entry = file.stat()
            assert (entry.st_uid, stat.S_IMODE(entry.st_mode)) == (gateway.pw_uid, 0o600), file
    entry = state.stat()
    assert (entry.st_uid, entry.st_gid, stat.S_IMODE(entry.st_mode)) == (0, gateway.pw_gid, 0o1771)
    assert (os.geteuid(), os.getegid()) == (0, 0)


@needs_root
def test_root_acts_as_the_owner_of_a_database(command: Command, tmp_path: Path, gateway: pwd.struct_passwd) -> None:
    directory = tmp_path / "theirs"
    directory.mkdir()
    os.chown(directory, gateway.pw_uid, gateway.pw_gid)
    url = f"sqlite:///{directory}/x.db"
    assert command("--database-url", url, "user", "add", "alice").status == 0
    assert {file.stat().st_uid for file in directory.iterdir()} == {gateway.pw_uid}
    secret = tmp_path / "secret"
    secret.write_text("root's")
    secret.chmod(0o600)
    for suffix in ("-wal", "-shm"):
        (directory / f"x.db{suffix}").unlink(missing_ok=True)
        (directory / f"x.db{suffix}").symlink_to(secret)
    command("--database-url", url, "user", "add", "bob")
    assert secret.read_text() == "root's", "a link in the place of SQLite's own file leads root nowhere"


@needs_root
def test_root_is_told_whose_directory_it_must_be(command: Command, tmp_path: Path, gateway: pwd.struct_passwd) -> None:
    refused = command("--database-url", f"sqlite:///{tmp_path}/x.db", "user", "add", "ada")
    assert refused.status == 1 and "user nobody" in refused.err and f"{tmp_path}" in refused.err


@needs_root
def test_acting_as_another_user_reads_but_does_not_write(tmp_path: Path, gateway: pwd.struct_passwd) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    file.chmod(0o600)
    with ownership.acting_as(ownership.Owner(gateway.pw_uid, gateway.pw_gid)):
        assert file.read_text() == "x"
        with pytest.raises(PermissionError):
            file.write_text("y")
        with pytest.raises(PermissionError):
            (tmp_path / "new").touch()
    file.write_text("y")
