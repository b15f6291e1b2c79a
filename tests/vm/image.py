"""The disk of the test machine: the host's own Debian with systemd and a kernel, and this checkout in /opt/sandbox-ssh.

Debian's part takes most of a minute and changes with Debian only, so it is kept for a week. The checkout is copied in
anew for each run.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sandbox_ssh.cli import image as images

CHECKOUT = Path(__file__).resolve().parents[2]
INSTALLED = "opt/sandbox-ssh"
_CACHE = Path("/var/cache/sandbox-ssh-test-vm")
_KEPT = 7 * 86400.0  # then Debian may have newer packages
# What a server with systemd has anyway, and openssh-server for the tests' own way in.
_PACKAGES = ("systemd", "systemd-sysv", "dbus", "linux-image-cloud-amd64", "openssh-server", "iproute2", "procps")
_ADDRESS = "192.0.2.15"  # qemu's first, in the network of `machine`; not one that sandboxes have
_FILES = {
    "etc/fstab": "/dev/vda / ext4 defaults 0 1\n",
    "etc/hostname": "vm\n",
    "etc/hosts": "127.0.0.1 localhost\n127.0.1.1 vm\n",
    # Else the first boot sets all units to what their presets say, and generates an id.
    "etc/machine-id": "5ab5ab5ab5ab5ab5ab5ab5ab5ab5ab5a\n",
    "etc/systemd/network/vm.network": f"[Match]\nType=ether\n\n[Network]\nAddress={_ADDRESS}/24\nGateway=192.0.2.2\n",
    "etc/ssh/sshd_config.d/vm.conf": "MaxSessions 100\n",
}  # fmt: skip
_MASKED = ("apt-daily.timer", "apt-daily-upgrade.timer", "e2scrub_all.timer", "e2scrub_reap.service", "fstrim.timer")


def require() -> None:
    """Skip where there is no such machine to be had, and say what would give one."""
    if os.getuid() != 0:
        pytest.skip("the image of a virtual machine is made by root: run ./script/test as root")
    if platform.machine() != "x86_64":
        pytest.skip(f"the virtual machine is x86_64, and this is {platform.machine()}")
    if "ID=debian" not in Path("/etc/os-release").read_text().splitlines():
        pytest.skip("the virtual machine has the libraries of this checkout's .venv, so the host must be a Debian")
    programs = {"mmdebstrap": "mmdebstrap", "qemu-system-x86_64": "qemu-system-x86", "mke2fs": "e2fsprogs"}
    missing = [package for program, package in programs.items() if shutil.which(program) is None]
    if missing:
        pytest.skip(f"a virtual machine needs more programs: apt-get install {' '.join(missing)}")


def make(directory: Path, key: str) -> tuple[Path, Path, Path]:
    """Disk, kernel and initrd of a machine that lets `key` in as root, made in `directory`."""
    root = directory / "root"
    with _debian() as debian:
        _run("cp", "--archive", debian, root)
    _install(root / INSTALLED)
    authorized = root / "root/.ssh/authorized_keys"
    authorized.parent.mkdir(mode=0o700, exist_ok=True)
    authorized.write_text(key)
    disk = directory / "disk"
    _run("mke2fs", "-q", "-t", "ext4", "-E", "lazy_itable_init=0", "-d", root, disk, "3G")
    kernel, initrd = (
        next((root / "boot").glob(f"{name}-*")).rename(directory / name) for name in ("vmlinuz", "initrd.img")
    )
    shutil.rmtree(root)
    return disk, kernel, initrd


@contextlib.contextmanager
def _debian() -> Iterator[Path]:
    """A tree of Debian with what the server needs, from the cache or into it; locked while it is read."""
    suite = images._host_suite()
    packages = sorted({*_PACKAGES, *_needed()})
    recipe = hashlib.sha256(repr((suite, packages, _FILES, _MASKED)).encode()).hexdigest()[:16]
    _CACHE.mkdir(mode=0o700, exist_ok=True)
    lock = os.open(_CACHE, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        tree = _CACHE / recipe
        for other in _CACHE.iterdir():  # also one that was interrupted while it was made
            if other != tree or time.time() - other.stat().st_mtime > _KEPT:
                shutil.rmtree(other)
        if not tree.exists():
            new = _CACHE / "new"
            _build(new, suite, packages)
            new.rename(tree)
        yield tree
    finally:
        os.close(lock)


def _needed() -> list[str]:
    """What script/bootstrap installs to run the server."""
    script = (CHECKOUT / "script/bootstrap").read_text()
    listed = re.search(r"^packages='(.*?)'$", script, re.MULTILINE | re.DOTALL)
    assert listed is not None, "script/bootstrap has no list of packages"
    return [line.split()[0] for line in listed[1].splitlines()]


def _build(root: Path, suite: str, packages: list[str]) -> None:
    _run(
        "mmdebstrap", "--quiet", "--variant=apt", "--mode=root", f"--include={','.join(packages)}",
        suite, root, *images._host_sources(suite),
    )  # fmt: skip
    for name, text in _FILES.items():
        (root / name).write_text(text)
    _run("chroot", root, "systemctl", "--quiet", "enable", "systemd-networkd.service")
    _run("chroot", root, "systemctl", "--quiet", "mask", *_MASKED)
    os.utime(root)


def _install(target: Path) -> None:
    """What `git clone` and script/bootstrap leave there: the files as they are now, and a .venv with its libraries."""
    listed = subprocess.run(
        ["git", "-C", CHECKOUT, "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        check=True, capture_output=True,
    ).stdout.decode()  # fmt: skip
    for name in filter(None, listed.split("\0")):
        if (CHECKOUT / name).is_file():  # not deleted since
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(CHECKOUT / name, target / name)
    environment, root = target / ".venv", target.parents[1]
    inside = f"/{target.relative_to(root)}"
    _run("chroot", root, "python3", "-m", "venv", "--without-pip", f"{inside}/.venv")
    libraries = f"lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
    _run("cp", "--archive", "--no-target-directory", Path(sys.prefix) / libraries, environment / libraries)
    (environment / libraries / "_editable_impl_sandbox_ssh.pth").write_text(inside)
    command = (Path(sys.prefix) / "bin/sandbox-ssh").read_text()
    (environment / "bin/sandbox-ssh").write_text(command.replace(sys.prefix, f"{inside}/.venv"))
    (environment / "bin/sandbox-ssh").chmod(0o755)
    _run("chroot", root, "python3", "-m", "compileall", "-q", f"{inside}/sandbox_ssh", f"{inside}/migrations")


def _run(*command: str | Path) -> None:
    """Run a program that cleans up on SIGTERM; a failing one fails the tests with its words."""
    words = ["setpriv", "--pdeathsig", "TERM", *map(str, command)]
    process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        output = process.communicate()[0]
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
    if process.returncode:
        pytest.fail(f"{' '.join(words[3:])}: exit {process.returncode}\n{output.decode(errors='replace')}")
