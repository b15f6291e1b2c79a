"""One user does everything bad at once, and another one does not notice."""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.e2e.conftest import wait_until
from tests.vm import image
from tests.vm.machine import Machine
from tests.vm.test_limits import latest, read, user_level

pytestmark = pytest.mark.host

ROUNDS = 15
LINES = 20
SLOWER = 1.25
PATIENCE = 100.0  # seconds
UNDISTURBED = 0.2  # cores, with the clients themselves
PROCESSES = 200
# Memory again and again, for each time the session ends. Processes last: they leave none to the others.
LASTING = ("disk", "inodes", "descriptors", "inotify", "namespaces")
MEMORY = tuple(f"memory {seconds}" for seconds in range(2, 62, 6))


def login(machine: Machine) -> float:
    """Seconds of `ssh host true`."""
    start = time.perf_counter()
    assert machine.ssh("ada", "true", timeout=120).status == 0
    return time.perf_counter() - start


def line(shell: subprocess.Popen[str], number: int) -> float:
    """Seconds until a shell has answered a line."""
    assert shell.stdin is not None and shell.stdout is not None
    start = time.perf_counter()
    shell.stdin.write(f"echo {number}\n")
    shell.stdin.flush()
    assert shell.stdout.readline().strip() == str(number)
    return time.perf_counter() - start


@contextlib.contextmanager
def attack(machine: Machine) -> Iterator[dict[str, subprocess.Popen[str]]]:
    program = (image.CHECKOUT / "tests/vm/attacks.py").read_text()
    clients = {}
    with contextlib.ExitStack() as stack:
        for name in (*LASTING, *MEMORY, "processes"):
            command = f"cat >attacks.py; echo; exec python3 attacks.py {name}"
            client = clients[name] = stack.enter_context(machine.client("mallory", command))
            assert client.stdin is not None and client.stdout is not None
            client.stdin.write(program)
            client.stdin.close()
            assert client.stdout.readline() == "\n"
        yield clients


@dataclass
class Times:
    """Seconds of what another user does, and the cores that others than the machine had of the host meanwhile."""

    logins: list[float]
    lines: list[float]
    disturbed: float


def measure(machine: Machine, shell: subprocess.Popen[str]) -> Times:
    before, start = _others(machine), time.monotonic()
    logins, lines = [login(machine)], [line(shell, number) for number in range(LINES)]
    return Times(logins, lines, (_others(machine) - before) / (time.monotonic() - start))


def _others(machine: Machine) -> float:
    """CPU seconds of all the host but the machine (proc(5), /proc/stat)."""
    user, nice, system, _, _, *interrupts = map(int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9])
    return (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK") - machine.cpu_seconds()


def in_turns(machine: Machine, shell: subprocess.Popen[str], level: str) -> tuple[Times, Times, int]:
    """With the attack paused, and going on; whatever else the machine suffers from meets both alike.

    A round during which the host had something else to do is not counted, if there are better ones.
    """
    rounds: list[tuple[Times, Times]] = []
    quiet: list[tuple[Times, Times]] = []
    end = time.monotonic() + PATIENCE
    while len(rounds) < ROUNDS or (len(quiet) < ROUNDS and time.monotonic() < end):
        found = []
        for frozen in ("1", "0"):
            machine.run(f"echo {frozen} >{level}/cgroup.freeze")
            time.sleep(0.3)
            found.append(measure(machine, shell))
        rounds.append((found[0], found[1]))
        if max(times.disturbed for times in found) < UNDISTURBED:
            quiet.append(rounds[-1])
    counted = sorted(rounds, key=lambda pair: max(times.disturbed for times in pair))[:ROUNDS]
    calm, hit = (
        Times(
            [seconds for one in times for seconds in one.logins],
            [seconds for one in times for seconds in one.lines],
            max(one.disturbed for one in times),
        )
        for times in zip(*counted, strict=True)
    )
    return calm, hit, len(rounds)


def test_nobody_notices_an_attack(machine: Machine) -> None:
    """One of the two processors is the attacker's quota. With both, a login was measured to take 1.17 times as long."""
    machine.add_user("mallory", f"processes={PROCESSES}", "memory=300M", "disk=50M", "inodes=5000", "ptys=8", "cpu=1")
    with (
        machine.client("ada", "stty -echo; echo ready; PS1= exec sh", options=("-tt",)) as shell,
        attack(machine) as clients,
    ):
        assert shell.stdout is not None and shell.stdout.readline() == "ready\n"
        level = user_level(machine, "mallory")
        full = f"{level}/pids.current"
        wait_until(lambda: int(read(machine, full)[0]) >= 0.9 * PROCESSES, "as many processes as allowed", 60)
        calm, hit, rounds = in_turns(machine, shell, level)
        ended = [name for name in LASTING if clients[name].poll() is not None]
    wait_until(lambda: latest(machine, "mallory")["state"] == "closed", "the end of the attack", 60)
    ends = [row["end_reason"] for row in machine.json("session", "list", "--user", "mallory")]
    assert not ended and "out-of-memory" in ends, (ended, ends)
    medians = {
        what: [statistics.median(values) * 1000 for values in pair]
        for what, pair in {"a login": (calm.logins, hit.logins), "a line": (calm.lines, hit.lines)}.items()
    }
    said = ", ".join(f"{what} {before:.1f} -> {during:.1f} ms" for what, (before, during) in medians.items())
    said += (
        f"; of {rounds} rounds {ROUNDS} counted, with up to {max(calm.disturbed, hit.disturbed):.2f} cores of others"
    )
    print(said)
    assert all(during <= SLOWER * before for before, during in medians.values()), said
