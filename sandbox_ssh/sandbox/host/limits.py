"""Numbers that the host's administrator sets and that all sandboxes share."""

from __future__ import annotations

import resource
from pathlib import Path

from sandbox_ssh import capacity
from sandbox_ssh.sandbox.host.finding import Finding, Needs, as_root, bad, good, set_sysctl, weak


def namespaces(needs: Needs) -> list[Finding]:
    findings: list[Finding] = []
    for path in sorted(Path("/proc/sys/user").glob("max_*")):
        kind = path.name.removeprefix("max_")
        findings += _limit(f"user.{path.name}", int(path.read_text()), capacity.NAMESPACES.get(kind, 0), needs.sessions)
    return findings


def _limit(name: str, value: int, cost: int, sessions: int) -> list[Finding]:
    found = str(value)
    if cost == 0 and "inotify" in name and value < sessions:
        meaning = f"Fewer than one for each of {sessions} sandboxes: some users would take them from all others."
        return weak(name, found, meaning, set_sysctl(name, 4 * sessions))
    if cost == 0:
        return good(name, found, "Sandboxes need none; what their users make counts against it.")
    spare = capacity.SPARE_NAMESPACES if name.endswith("_namespaces") else 0
    wanted = cost * sessions + spare
    room = max(0, value - spare) // cost
    if value >= wanted:
        return good(name, found, f"Room for {room} sandboxes ({cost} each).")
    meaning = f"Room for {room} sandboxes ({cost} each), and {sessions} are asked for: the rest get ENOSPC."
    if room == 0 and spare:
        return bad(name, found, meaning, set_sysctl(name, wanted))
    return weak(name, found, meaning, set_sysctl(name, wanted))


def terminals(needs: Needs) -> list[Finding]:
    """/dev/pts: one pool of PTYs for the host and all sandboxes (Documentation/filesystems/devpts.rst)."""
    limit, reserve, used = (int(Path("/proc/sys/kernel/pty", name).read_text()) for name in ("max", "reserve", "nr"))
    free = limit - reserve - used
    found = f"kernel.pty.max = {limit}, {reserve} of them reserved for the host, {used} in use"
    wanted = needs.sessions + reserve + used
    if free <= 0:
        return bad("terminals", found, "No sandbox can get a terminal.", set_sysctl("kernel.pty.max", wanted))
    if free < needs.sessions:
        meaning = f"{free} terminals for {needs.sessions} sandboxes."
        return weak("terminals", found, meaning, set_sysctl("kernel.pty.max", wanted))
    return good("terminals", found, f"{free} terminals for sandboxes, at most {needs.terminals} in one.")


def processes(needs: Needs) -> list[Finding]:
    findings: list[Finding] = []
    wanted = needs.sessions * capacity.PROCESSES + capacity.SPARE_PROCESSES
    for name in ("threads-max", "pid_max"):
        value = int(Path("/proc/sys/kernel", name).read_text())
        sysctl = f"kernel.{name}"
        if value >= wanted:
            findings += good(sysctl, str(value), f"{needs.sessions} sandboxes with {capacity.PROCESSES} processes fit.")
            continue
        findings += weak(
            sysctl,
            str(value),
            f"{needs.sessions} sandboxes with {capacity.PROCESSES} processes each would fill the host.",
            set_sysctl(sysctl, wanted),
        )
    return findings


def open_files(needs: Needs) -> list[Finding]:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    wanted = needs.sessions * capacity.FILES + capacity.SPARE_FILES
    found = "unlimited" if hard == resource.RLIM_INFINITY else f"hard limit {hard}"
    if hard != resource.RLIM_INFINITY and hard < wanted:
        return weak(
            "open-files",
            found,
            f"{needs.sessions} sessions can need {wanted} descriptors; the last ones are refused.",
            f"In the unit: LimitNOFILE={wanted}; in a shell: {as_root(f'prlimit --pid $$ --nofile={wanted}')}",
        )
    return good("open-files", found, f"Enough for {needs.sessions} sessions.")
