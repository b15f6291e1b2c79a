"""`sandbox-ssh doctor` on this host, and on this host with one thing taken away.

What is missing is really missing: a mount namespace of the test's own hides the program, device or file, a user
namespace of its own has the limit. So these tests need root, and neither the host nor another test notices.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import socket
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from sandbox_ssh.sandbox.host import CHECKS, Finding, Needs, Status, answer, finding

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="hides programs in a mount namespace: run as root")
NEEDS = Needs(mode="rootless", sessions=10, terminals=10, first_id=2_000_000_000, id_blocks=2)


class Doctor:
    """Runs the command on a state directory of its own, after shell commands in namespaces of its own."""

    def __init__(self, state_dir: Path) -> None:
        self.state_dir = state_dir
        self.environment = {
            **os.environ,
            "SANDBOX_SSH_STATE_DIR": str(state_dir),
            "SANDBOX_SSH_SERVER__USER": "nobody",
            "SANDBOX_SSH_SERVER__LISTEN": "127.0.0.1:0",
        }

    def run(self, *arguments: str, within: str = "", first: str = "") -> subprocess.CompletedProcess[str]:
        command = shlex.join([sys.executable, "-m", "sandbox_ssh", "doctor", *arguments])
        words = [*shlex.split(within), "sh", "-ec", f"{first or ':'}\nexec {command}"]
        return subprocess.run(words, env=self.environment, capture_output=True, text=True, timeout=60, check=False)

    def findings(self, *arguments: str, within: str = "", first: str = "") -> dict[str, dict[str, Any]]:
        result = self.run("--json", *arguments, within=within, first=first)
        rows = json.loads(result.stdout)
        assert result.returncode == any(row["status"] == "FAIL" for row in rows), result.stderr
        assert not [row for row in rows if row["meaning"].startswith("This could not be checked")]
        return {row["check"]: row for row in rows}


@pytest.fixture
def doctor(tmp_path: Path) -> Doctor:
    return Doctor(tmp_path / "state")


@pytest.mark.parametrize("mode", ["service", "rootless"])
def test_every_finding_says_what_it_means_and_what_mends_it(doctor: Doctor, mode: str) -> None:
    found = doctor.findings("--mode", mode)
    for row in found.values():
        assert set(row) == {"check", "status", "found", "meaning", "remedy"}
        assert row["status"] in ("OK", "WARN", "FAIL")
        assert row["found"] and row["meaning"]
        assert (row["remedy"] is None) == (row["status"] == "OK"), row
    kernel_limits = {f"user.{path.name}" for path in Path("/proc/sys/user").glob("max_*")}
    assert kernel_limits <= set(found)
    assert {"kernel", "overlayfs", "tun", "slirp4netns", "nftables", "bridge", "database", "port"} <= set(found)
    assert ("gateway-user" in found) == (mode == "service")


def test_lines_for_people_tell_the_same_as_json(doctor: Doctor) -> None:
    result = doctor.run()
    rows = json.loads(doctor.run("--json").stdout)
    lines = result.stdout.splitlines()
    assert [line.split()[:2] for line in lines if not line.startswith(" ")] == [
        [row["status"], row["check"]] for row in rows
    ]
    assert [line.partition("mend it: ")[2] for line in lines if line.startswith(" ")] == [
        row["remedy"] for row in rows if row["remedy"]
    ]


def test_nothing_is_left_behind(doctor: Doctor) -> None:
    before = Path("/proc/self/mountinfo").read_text()
    doctor.run("--mode", "service")
    doctor.run("--mode", "rootless")
    assert Path("/proc/self/mountinfo").read_text() == before
    assert not doctor.state_dir.exists()


def test_a_bad_option_is_wrong_usage(doctor: Doctor) -> None:
    assert doctor.run("--mode", "both").returncode == 2


PRIVATE_MOUNTS = "unshare --mount --propagation private"


@needs_root
@pytest.mark.parametrize(
    ("program", "check"), [("slirp4netns", "slirp4netns"), ("catatonit", "init"), ("nft", "nftables")]
)
def test_a_missing_program_fails_and_names_its_package(doctor: Doctor, program: str, check: str) -> None:
    path = shutil.which(program, path=finding.PROGRAMS)
    assert path is not None
    found = doctor.findings(within=PRIVATE_MOUNTS, first=f"mount --bind /dev/null {path}")
    assert found[check]["status"] == "FAIL"
    assert "apt-get install" in found[check]["remedy"]


@needs_root
def test_an_init_that_needs_libraries_fails(doctor: Doctor) -> None:
    path = shutil.which("catatonit", path=finding.PROGRAMS)
    found = doctor.findings(within=PRIVATE_MOUNTS, first=f"mount --bind /usr/bin/sleep {path}")
    assert found["init"]["status"] == "FAIL"
    assert "dynamically" in found["init"]["found"]


@needs_root
def test_a_program_that_is_not_slirp4netns_fails(doctor: Doctor) -> None:
    path = shutil.which("slirp4netns", path=finding.PROGRAMS)
    found = doctor.findings(within=PRIVATE_MOUNTS, first=f"mount --bind /usr/bin/true {path}")
    assert found["slirp4netns"]["status"] == "FAIL"


@needs_root
def test_no_tun_device_fails(doctor: Doctor) -> None:
    found = doctor.findings(within=PRIVATE_MOUNTS, first="mount -t tmpfs none /dev/net")
    assert found["tun"]["status"] == "FAIL"
    assert "modprobe tun" in found["tun"]["remedy"]


@needs_root
@pytest.mark.parametrize("mode", ["service", "rootless"])
def test_a_tun_device_for_root_only_fails(doctor: Doctor, mode: str) -> None:
    closed = "mount -t tmpfs none /dev/net\nmknod -m 0600 /dev/net/tun c 10 200"
    found = doctor.findings("--mode", mode, within=PRIVATE_MOUNTS, first=closed)
    assert found["tun"]["status"] == "FAIL"
    assert found["tun"]["remedy"] == "chmod 0666 /dev/net/tun"


@needs_root
def test_no_range_in_subuid_warns_of_the_single_id_map(doctor: Doctor) -> None:
    empty = "mount --bind /dev/null /etc/subuid\nmount --bind /dev/null /etc/subgid"
    found = doctor.findings("--mode", "rootless", within=PRIVATE_MOUNTS, first=empty)
    assert found["id-ranges"]["status"] == "WARN"
    assert "Single-id map" in found["id-ranges"]["meaning"]
    assert "usermod --add-subuids" in found["id-ranges"]["remedy"]


def _with_range(tmp_path: Path, count: int) -> str:
    file = tmp_path / "subid"
    file.write_text(f"root:1000000000:{count}\n")
    return "\n".join(f"mount --bind {file} /etc/sub{kind}" for kind in ("uid", "gid"))


@needs_root
@pytest.mark.parametrize(("count", "status"), [(65536, "OK"), (16384, "WARN")])
def test_a_range_is_mapped(doctor: Doctor, tmp_path: Path, count: int, status: str) -> None:
    found = doctor.findings("--mode", "rootless", within=PRIVATE_MOUNTS, first=_with_range(tmp_path, count))
    assert found["id-ranges"]["status"] == status
    assert found["newuidmap"]["status"] == "OK"
    assert found["id-map"]["status"] == "OK"


@needs_root
def test_newuidmap_without_its_setuid_bit_warns(doctor: Doctor, tmp_path: Path) -> None:
    program = tmp_path / "newuidmap"
    shutil.copyfile("/usr/bin/newuidmap", program)
    program.chmod(0o755)
    hide = f"{_with_range(tmp_path, 65536)}\nmount --bind {program} /usr/bin/newuidmap"
    found = doctor.findings("--mode", "rootless", within=PRIVATE_MOUNTS, first=hide)
    assert found["newuidmap"]["status"] == "WARN"
    assert "chmod u+s" in found["newuidmap"]["remedy"]


@needs_root
def test_a_subuid_range_inside_the_configured_one_warns(doctor: Doctor, tmp_path: Path) -> None:
    doctor.environment["SANDBOX_SSH_SANDBOX__ID_FIRST"] = "1000000000"
    found = doctor.findings("--mode", "service", within=PRIVATE_MOUNTS, first=_with_range(tmp_path, 65536))
    assert found["id-ranges"]["status"] == "WARN"


OWN_LIMITS = "unshare --user --map-root-user"


@needs_root
def test_forbidden_user_namespaces_fail(doctor: Doctor) -> None:
    found = doctor.findings("--mode", "rootless", within=OWN_LIMITS, first="echo 0 >/proc/sys/user/max_user_namespaces")
    assert found["user-namespaces"]["status"] == "FAIL"
    assert "user.max_user_namespaces" in found["user-namespaces"]["remedy"]


@needs_root
@pytest.mark.parametrize("kind", ["user", "mnt", "net", "pid", "ipc", "uts", "cgroup"])
def test_a_limit_on_namespaces_is_held_against_what_sandboxes_need(doctor: Doctor, kind: str) -> None:
    name = f"max_{kind}_namespaces"
    for value, status in ((20, "FAIL"), (200, "WARN"), (2000, "OK")):
        found = doctor.findings("--mode", "rootless", within=OWN_LIMITS, first=f"echo {value} >/proc/sys/user/{name}")
        assert found[f"user.{name}"]["status"] == status, value
        assert found[f"user.{name}"]["found"] == str(value)


@needs_root
def test_no_mount_namespaces_means_no_overlay(doctor: Doctor) -> None:
    found = doctor.findings("--mode", "rootless", within=OWN_LIMITS, first="echo 0 >/proc/sys/user/max_mnt_namespaces")
    assert found["overlayfs"]["status"] == "FAIL"


@needs_root
def test_no_net_namespaces_means_no_network(doctor: Doctor) -> None:
    found = doctor.findings("--mode", "rootless", within=OWN_LIMITS, first="echo 0 >/proc/sys/user/max_net_namespaces")
    assert [found[check]["status"] for check in ("tun", "nftables", "bridge")] == ["FAIL"] * 3


@needs_root
def test_a_file_system_that_cannot_be_mapped_warns(doctor: Doctor) -> None:
    """An overlay as /usr, as in many containers: the kernel maps no ids of one that a user namespace mounted."""
    overlay = (
        "mount -t tmpfs none /mnt\nmkdir /mnt/upper /mnt/work\n"
        "mount -t overlay -o lowerdir=/usr,upperdir=/mnt/upper,workdir=/mnt/work overlay /usr"
    )
    found = doctor.findings("--mode", "service", within=PRIVATE_MOUNTS, first=overlay)
    assert found["idmapped-mounts"]["status"] == "WARN"


@needs_root
def test_few_open_files_warn(doctor: Doctor) -> None:
    found = doctor.findings(within="prlimit --nofile=1024:1024")
    assert found["open-files"]["status"] == "WARN"


@needs_root
@pytest.mark.parametrize("user", ["no-such-user", "root"])
def test_a_gateway_user_that_is_missing_or_root_fails(doctor: Doctor, user: str) -> None:
    doctor.environment["SANDBOX_SSH_SERVER__USER"] = user
    found = doctor.findings("--mode", "service")
    assert found["gateway-user"]["status"] == "FAIL"


def test_a_state_directory_that_is_a_file_fails(doctor: Doctor) -> None:
    doctor.state_dir.write_text("")
    assert doctor.findings()["state-directory"]["status"] == "FAIL"


def test_a_state_directory_that_everyone_may_write_fails(doctor: Doctor) -> None:
    doctor.state_dir.mkdir()
    doctor.state_dir.chmod(0o777)
    found = doctor.findings()["state-directory"]
    assert found["status"] == "FAIL"
    assert "chmod o-w" in found["remedy"]


def test_a_database_that_is_not_there_yet_is_no_fault(doctor: Doctor) -> None:
    assert doctor.findings()["database"]["status"] == "OK"


def test_a_file_that_is_no_database_fails(doctor: Doctor, tmp_path: Path) -> None:
    file = tmp_path / "broken.db"
    file.write_bytes(b"not a database, but long enough to be mistaken for one" * 100)
    assert doctor.findings("--database-url", f"sqlite:///{file}")["database"]["status"] == "FAIL"


def test_a_database_of_another_version_fails(doctor: Doctor, tmp_path: Path) -> None:
    file = tmp_path / "other.db"
    connection = sqlite3.connect(file)
    connection.execute("CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL)")
    connection.execute("INSERT INTO alembic_version VALUES ('0000')")
    connection.commit()
    connection.close()
    found = doctor.findings("--database-url", f"sqlite:///{file}")["database"]
    assert found["status"] == "FAIL"
    assert "sandbox-ssh db upgrade" in found["remedy"]


def test_a_database_server_that_is_not_there_fails_without_telling_the_password(doctor: Doctor) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    result = doctor.run("--json", "--database-url", f"postgresql://ada:S3CR3T@127.0.0.1:{port}/records")
    found = {row["check"]: row for row in json.loads(result.stdout)}
    assert found["database"]["status"] == "FAIL"
    assert "S3CR3T" not in result.stdout + result.stderr


def test_a_port_that_another_program_has_fails_and_names_it(doctor: Doctor) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        doctor.environment["SANDBOX_SSH_SERVER__LISTEN"] = f"127.0.0.1:{server.getsockname()[1]}"
        found = doctor.findings()["port"]
    assert found["status"] == "FAIL"
    assert f"process {os.getpid()}" in found["found"]


def test_a_port_of_this_server_is_ours(doctor: Doctor) -> None:
    """What tells a server is that it holds its state directory open."""
    doctor.state_dir.mkdir(mode=0o700)
    directory = os.open(doctor.state_dir, os.O_PATH)
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            doctor.environment["SANDBOX_SSH_SERVER__LISTEN"] = f"127.0.0.1:{server.getsockname()[1]}"
            assert doctor.findings()["port"]["status"] == "OK"
    finally:
        os.close(directory)


def test_an_address_of_another_host_fails(doctor: Doctor) -> None:
    doctor.environment["SANDBOX_SSH_SERVER__LISTEN"] = "192.0.2.1:2222"
    assert doctor.findings()["port"]["status"] == "FAIL"


def test_a_probe_that_raises_is_a_finding() -> None:
    def broken(needs: Needs) -> list[Finding]:
        raise RuntimeError("it broke")

    (found,) = answer("broken", broken, NEEDS)
    assert found.status is Status.FAIL
    assert "it broke" in found.found


def test_a_probe_that_dies_is_a_finding() -> None:
    (found,) = answer("dead", lambda _: os._exit(3), NEEDS)
    assert (found.check, found.status) == ("dead", Status.FAIL)


def test_a_probe_that_hangs_is_ended_with_all_that_it_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hangs(needs: Needs) -> list[Finding]:
        child = subprocess.Popen(["sleep", "1000"])
        (tmp_path / "pid").write_text(str(child.pid))
        child.wait()
        return []

    monkeypatch.setattr(finding, "TIMEOUT_SECONDS", 2.0)
    (found,) = answer("hung", hangs, NEEDS)
    assert found.status is Status.FAIL
    pid = int((tmp_path / "pid").read_text())
    while Path(f"/proc/{pid}").exists() and "(sleep) Z" not in Path(f"/proc/{pid}/stat").read_text():
        time.sleep(0.01)


def test_every_check_can_be_run_by_itself() -> None:
    for name, check in CHECKS.items():
        assert isinstance(answer(name, check, NEEDS), list)
