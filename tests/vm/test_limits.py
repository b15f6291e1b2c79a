"""What cgroup v2 holds: memory, processes, CPU; and what it counts."""

from __future__ import annotations

import time
from typing import Any

import pytest

from tests.e2e.conftest import wait_until
from tests.vm.machine import Machine

pytestmark = pytest.mark.host

MB = 2**20


def latest(machine: Machine, user: str) -> dict[str, Any]:
    row: dict[str, Any] = machine.json("session", "list", "--user", user)[-1]
    return row


def cgroup(machine: Machine, user: str) -> str:
    """The directory of the user's latest session, t<tenant>/u<user>/s<session>."""
    path = machine.run(f"cat /proc/{latest(machine, user)['init_pid']}/cgroup").strip().removeprefix("0::")
    return f"/sys/fs/cgroup{path}"


def user_level(machine: Machine, user: str) -> str:
    return cgroup(machine, user).rpartition("/")[0]


def read(machine: Machine, *files: str) -> list[str]:
    return machine.run(f"cat {' '.join(files)}").splitlines()


def hold(megabytes: int, seconds: int = 600) -> str:
    """A command that has so much memory: tail(1) keeps a line in full, and this one does not end before."""
    return f"{{ head -c {megabytes}M /dev/zero; echo held >&2; sleep {seconds}; }} | tail >/dev/null"


def test_who_takes_too_much_memory_ends_alone_and_hears_why(machine: Machine) -> None:
    machine.add_user("brian", "memory=64M")
    with machine.client("ada", "cat") as neighbour:
        bomb = machine.ssh("brian", "sleep 600 & head -c 200M /dev/zero | tail; echo survived")
        assert bomb.status != 0 and "survived" not in bomb.stdout
        assert bomb.stderr == "sandbox-ssh: the sandbox has ended: it used more memory than quota `memory` allows\n"
        row = latest(machine, "brian")
        assert (row["state"], row["end_reason"]) == ("closed", "out-of-memory")
        assert neighbour.communicate("here\n", timeout=30)[0] == "here\n"
    assert machine.ssh("brian", "echo again").stdout == "again\n"


def test_files_count_as_memory(machine: Machine) -> None:
    machine.add_user("dora", "memory=64M", "disk=unlimited")
    filled = machine.ssh("dora", "dd if=/dev/zero of=/tmp/file bs=1M count=200; echo survived")
    assert filled.status != 0 and "survived" not in filled.stdout and "quota `memory`" in filled.stderr
    assert latest(machine, "dora")["end_reason"] == "out-of-memory"


def test_sessions_of_a_user_share_what_the_user_may_have(machine: Machine) -> None:
    machine.add_user("carl", "memory=64M")
    with machine.client("carl", hold(40)) as first:
        assert first.stderr is not None and first.stderr.readline() == "held\n"
        level = user_level(machine, "carl")
        assert read(machine, f"{level}/memory.max", f"{level}/memory.swap.max") == [str(64 * MB), "0"]
        with machine.client("carl", hold(40)) as second:
            wait_until(lambda: first.poll() is not None or second.poll() is not None, "one of the two to end", 60)
    ends = {row["end_reason"] for row in machine.json("session", "list", "--user", "carl")}
    assert "out-of-memory" in ends


def test_a_changed_quota_binds_the_living(machine: Machine) -> None:
    machine.cli("tenant", "add", "physics")
    machine.cli("quota", "set", "--tenant", "physics", "memory=256M", "processes=300")
    machine.add_user("emmy", tenant="physics")
    with machine.client("emmy", "echo; cat") as client:
        assert client.stdout is not None and client.stdout.readline() == "\n"
        level = user_level(machine, "emmy")
        tenant = level.rpartition("/")[0]
        assert read(machine, f"{tenant}/memory.max", f"{tenant}/pids.max") == [str(256 * MB), "301"]  # with slirp4netns
        assert read(machine, f"{level}/memory.max") == [str(256 * MB)]
        machine.cli("quota", "set", "--user", "emmy", "memory=32M", "processes=30", "cpu=0.5", "cpu_weight=250")
        wait_until(lambda: read(machine, f"{level}/memory.max") == [str(32 * MB)], "the user's memory.max", 5)
        assert read(machine, f"{level}/pids.max", f"{level}/cpu.max", f"{level}/cpu.weight") == [
            "31", "50000 100000", "250"
        ]  # fmt: skip
        machine.cli("quota", "set", "--tenant", "physics", "memory=128M")
        wait_until(lambda: read(machine, f"{tenant}/memory.max") == [str(128 * MB)], "the tenant's memory.max", 5)


def test_a_fork_bomb_is_its_own_problem(machine: Machine) -> None:
    machine.add_user("fred", "processes=40")
    with machine.client("fred", "bomb() { bomb | bomb & }; bomb; sleep 600"):
        wait_until(lambda: latest(machine, "fred")["init_pid"], "the sandbox")
        level = user_level(machine, "fred")
        assert read(machine, f"{level}/pids.max") == ["41"]  # with slirp4netns
        wait_until(lambda: int(read(machine, f"{level}/pids.current")[0]) >= 35, "the bomb to go off")
        assert machine.ssh("ada", "echo in").stdout == "in\n"
        assert int(read(machine, f"{level}/pids.current")[0]) <= 41
    wait_until(lambda: latest(machine, "fred")["state"] == "closed", "the end of the bomb", 60)
    assert machine.try_(f"ls -d {level}").status != 0
    assert machine.ssh("fred", "echo again").stdout == "again\n"


def test_a_quarter_of_a_core(machine: Machine) -> None:
    machine.add_user("gina", "cpu=0.25")
    start = time.monotonic()
    with machine.client("gina", "echo; timeout 8 sh -c 'while :; do :; done'") as client:
        assert client.stdout is not None and client.stdout.readline() == "\n"
        level = user_level(machine, "gina")
        assert read(machine, f"{level}/cpu.max") == ["25000 100000"]
        client.communicate(timeout=60)
    wall = time.monotonic() - start
    row = latest(machine, "gina")
    assert 0.1 * wall < row["cpu_seconds"] < 0.25 * wall * 1.3 + 0.5


def test_no_process_of_a_sandbox_is_outside_its_cgroup(machine: Machine) -> None:
    """Not the shell, not what left its session, not what is in namespaces of its own, and not by the tenant's will."""
    script = """
        cat /proc/self/cgroup
        mkdir /tmp/cgroup && mount -t cgroup2 none /tmp/cgroup
        for file in pids.max memory.max cgroup.procs; do
            (echo 1 >/tmp/cgroup/$file) 2>/dev/null && echo "wrote $file"
        done
        mkdir /tmp/cgroup/mine 2>/dev/null && echo made a cgroup
        setsid sleep 600 & unshare -mipfunUrC --mount-proc sleep 600 & (sleep 600 &)
        until [ "$(ps -e | grep -c sleep)" -ge 3 ]; do sleep 0.1; done
        echo ready; sleep 600
    """
    with machine.client("ada", script) as client:
        assert client.stdout is not None
        lines = [client.stdout.readline().strip() for _ in range(2)]
        assert lines == ["0::/", "ready"]
        inside = cgroup(machine, "ada").removeprefix("/sys/fs/cgroup")
        assert [part[0] for part in inside.split("/")[-3:]] == ["t", "u", "s"]
        init = latest(machine, "ada")["init_pid"]
        # The sandbox's processes have a number in its pid namespace: in a nested one, one number more.
        of_sandbox = machine.run(f"""
            depth=$(grep NSpid /proc/{init}/status | wc -w)
            for directory in /proc/[0-9]*; do
                test "$(grep NSpid $directory/status | wc -w)" -ge "$depth" || continue
                echo "$(cat $directory/comm) $(cat $directory/cgroup)"
            done
        """).splitlines()
        assert len(of_sandbox) >= 6
        assert [line for line in of_sandbox if not line.endswith(f" 0::{inside}")] == []


def test_what_a_session_used_is_what_its_cgroup_says(machine: Machine) -> None:
    """CPU of processes that nobody waited for counts too. `processes_peak` is of the samples, one in ten seconds."""
    script = f"""
        for i in $(seq 20); do sleep 12 & done
        (ulimit -t 2; while :; do :; done) &
        {hold(40, 10)} &
        wait
    """
    assert machine.ssh("ada", script, timeout=90).status == 0
    used = machine.json("session", "show", str(latest(machine, "ada")["id"]))
    assert 2 <= used["cpu_seconds"] < 6
    assert 40 * MB <= used["memory_peak_bytes"] < 80 * MB
    assert 20 <= used["processes_peak"] < 40
