"""The unit, as systemd sees it."""

from __future__ import annotations

import json

import pytest

from tests.e2e.conftest import wait_until
from tests.vm.machine import Machine

pytestmark = pytest.mark.host

UNIT = "/etc/systemd/system/sandbox-ssh.service"
CGROUP = "/sys/fs/cgroup/system.slice/sandbox-ssh.service"


def state(machine: Machine) -> dict[str, str]:
    shown = machine.run("systemctl show sandbox-ssh -p Type,ActiveState,SubState,NRestarts,MainPID,ControlGroup")
    return dict(line.split("=", 1) for line in shown.splitlines())


def test_the_unit_is_active_once_the_server_accepts_connections(machine: Machine) -> None:
    now = state(machine)
    assert (now["Type"], now["ActiveState"], now["SubState"], now["NRestarts"]) == ("notify", "active", "running", "0")
    done = machine.ssh("ada", "id -u; hostname")
    assert done.status == 0 and done.stdout.split() == ["0", "sandbox"], done


def test_the_journal_says_how_many_sessions_the_host_has_room_for(machine: Machine) -> None:
    journal = machine.run("journalctl -u sandbox-ssh -o cat")
    assert "this host has room" in journal and "bound=memory" in journal


def test_doctor_finds_nothing_to_mend_where_the_unit_runs(machine: Machine) -> None:
    """As another unit with the same restrictions."""
    machine.run(
        "sed -e 's/^Type=.*/Type=oneshot/' -e '/^\\(Restart\\|RestartSec\\|ExecReload\\)=/d'"
        " -e 's|^ExecStart=.*|ExecStart=/usr/local/bin/sandbox-ssh doctor --json\\nStandardOutput=file:/run/doctor.json|'"
        f" {UNIT} > /run/systemd/system/doctor.service && systemctl daemon-reload && systemctl start doctor"
    )
    findings = {one["check"]: one for one in json.loads(machine.run("cat /run/doctor.json"))}
    assert findings["cgroup"]["status"] == "OK"
    assert all(controller in findings["cgroup"]["found"] for controller in ("memory", "cpu", "pids"))
    assert not [one for one in findings.values() if one["status"] == "FAIL"]


def test_reload_keeps_sessions(machine: Machine) -> None:
    with machine.client("ada", "read word && echo got $word") as client:
        assert client.stdin is not None and client.stdout is not None
        before = state(machine)["MainPID"]
        machine.run("systemctl reload sandbox-ssh")
        reloaded = "the configuration was reloaded for new connections"
        wait_until(lambda: reloaded in machine.run("journalctl -u sandbox-ssh -o cat"), "the reload")
        assert client.communicate("it\n", timeout=30)[0] == "got it\n"
        assert state(machine)["MainPID"] == before


def test_restart_and_stop(machine: Machine) -> None:
    """Stopped, nothing is left of the server; restarted, it is another one with the same users."""
    before = state(machine)["MainPID"]
    machine.run("systemctl restart sandbox-ssh")
    assert state(machine)["MainPID"] != before
    with machine.client("ada", "echo there; setsid sleep 600 & sleep 600") as client:
        assert client.stdout is not None and client.stdout.readline() == "there\n"
        machine.run("systemctl stop sandbox-ssh")
        _, said = client.communicate(timeout=30)
        assert client.returncode != 0 and "the server has shut down" in said
    assert state(machine)["ActiveState"] == "inactive"
    assert machine.json("session", "list", "--user", "ada")[-1]["end_reason"] == "shutdown"
    assert machine.try_(f"ls -d {CGROUP}").status != 0
    assert machine.run("ps -eo comm= | grep -E 'sandbox|slirp4netns|catatonit|^sleep' || true") == ""
    assert machine.run("grep sandbox-ssh /proc/self/mountinfo || true") == ""
    machine.run("systemctl start sandbox-ssh")
    assert machine.ssh("ada", "true").status == 0
