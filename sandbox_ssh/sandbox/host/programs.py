"""Programs and libraries of the distribution that sandboxes are made with."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess

from sandbox_ssh.sandbox.host.finding import PROGRAMS, Finding, Needs, bad, good, install, weak

# Before 4.6 libslirp had overflows that a guest can reach (CVE-2021-3592 to 3595); 4.7 is what the options need.
_OLDEST_LIBSLIRP = (4, 7)
_OPTIONS = ("--ready-fd", "--exit-fd", "--enable-sandbox", "--enable-seccomp", "--disable-host-loopback")
_PT_INTERP = 3


def slirp4netns(needs: Needs) -> list[Finding]:
    program = shutil.which("slirp4netns", path=PROGRAMS)
    meaning = "It is the network of every sandbox."
    if program is None:
        return bad("slirp4netns", "not installed", meaning, install("slirp4netns"))
    version = _output([program, "--version"])
    library = re.search(r"libslirp: *(\d+)\.(\d+)", version)
    first_line = (version.splitlines() or ["no version"])[0]
    found = f"{program}: {first_line}, {library.group(0) if library else 'libslirp of unknown version'}"
    missing = [option for option in _OPTIONS if option not in _output([program, "--help"])]
    if missing:
        return bad("slirp4netns", found, f"It does not know {', '.join(missing)}.", install("slirp4netns"))
    if library is None or (int(library.group(1)), int(library.group(2))) < _OLDEST_LIBSLIRP:
        return bad(
            "slirp4netns",
            found,
            "libslirp before 4.7 has memory errors that a sandbox can reach.",
            install("--only-upgrade libslirp0 slirp4netns"),
        )
    return good("slirp4netns", found, meaning)


def _output(command: list[str]) -> str:
    result = subprocess.run(
        command, capture_output=True, text=True, check=False, env={"PATH": "/usr/bin:/bin", "LC_ALL": "C"}
    )
    return result.stdout + result.stderr


def static_init(needs: Needs) -> list[Finding]:
    """PID 1 is executed inside an image that may have no libraries of the host's."""
    program = shutil.which("catatonit", path=PROGRAMS)
    if program is None:
        return bad("init", "catatonit is not installed", "It is PID 1 of every sandbox.", install("catatonit"))
    if not _is_static(program):
        return bad(
            "init",
            f"{program} is linked dynamically",
            "PID 1 runs where the host's libraries are not: it must be static.",
            install("--reinstall catatonit"),
        )
    return good("init", f"{program}, static", "PID 1 of every sandbox.")


def _is_static(path: str) -> bool:
    """Whether an ELF file names no interpreter (elf(5): no program header of type PT_INTERP)."""
    with open(path, "rb") as file:
        header = file.read(64)
        if header[:4] != b"\x7fELF" or header[4] != 2:  # 64 bits; the only kind this project runs on
            return False
        offset, size, count = (
            int.from_bytes(header[start:end], "little") for start, end in ((32, 40), (54, 56), (56, 58))
        )
        file.seek(offset)
        return all(int.from_bytes(file.read(size)[:4], "little") != _PT_INTERP for _ in range(count))


def libseccomp(needs: Needs) -> list[Finding]:
    try:
        ctypes.CDLL("libseccomp.so.2")
    except OSError:
        return weak(
            "seccomp",
            "libseccomp.so.2 is not installed",
            "System calls that sandboxes have no use for cannot be filtered.",
            install("libseccomp2"),
        )
    return good("seccomp", "libseccomp.so.2", "System calls that sandboxes have no use for can be filtered.")
