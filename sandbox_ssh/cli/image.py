"""`sandbox-ssh image`: the root file systems that sandboxes start with."""

from __future__ import annotations

import csv
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sandbox_ssh import units
from sandbox_ssh.cli import context, output
from sandbox_ssh.cli.context import Context, examples
from sandbox_ssh.cli.ownership import prepare_state_dir
from sandbox_ssh.errors import AlreadyExistsError, ConfigError, SandboxSSHError

if TYPE_CHECKING:
    from rich.status import Status

    from sandbox_ssh.config import Config
    from sandbox_ssh.images import Image

app = context.group("Images, which sandboxes start with.")
build_app = context.group("Make an image from packages.")
app.add_typer(build_app, name="build")

# What a person expects of a machine, and no more: what else a class needs, --include adds.
_PACKAGES = (
    "passwd", "login", "sudo", "procps", "iproute2", "iputils-ping", "ca-certificates", "less", "nano",
    "bash-completion",
)  # fmt: skip
_BUILD_SECONDS = 30 * 60
_FALLBACK_SUITE = "bookworm"

Name = Annotated[str, typer.Argument(metavar="NAME", show_default=False)]


class BuildError(SandboxSSHError):
    """mmdebstrap is not there or failed."""


@app.command(
    "add",
    epilog=examples(
        "sandbox-ssh image add course ./rootfs.tar.xz",
        "sandbox-ssh image add course /srv/chroots/course",
    ),
)
@context.command
def add(
    here: Context,
    name: Name,
    path: Annotated[
        Path, typer.Argument(metavar="PATH", help="A directory, or a tarball: plain or of gzip, bzip2 or xz.")
    ],
) -> None:
    """Add an image from a root file system. Device nodes in it are left out: sandboxes have their own /dev."""
    _add(here, name, path, "")


@app.command("list", epilog=examples("sandbox-ssh image list --json"))
@context.command
def list_(here: Context, as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List images. `host` is always there: the host's own /usr, read-only, with an /etc of its own."""
    from sandbox_ssh import images

    found = images.list_images(here.config().server.state_dir)
    if as_json:
        output.print_json([asdict(image) for image in found])
    else:
        output.print_table(
            ("NAME", "KIND", "SIZE", "ENTRIES", "ADDED", "SOURCE"),
            ((i.name, i.kind, units.size(i.bytes), i.entries, i.added_at, i.source) for i in found),
        )


@app.command("remove", epilog=examples("sandbox-ssh image remove course"))
@context.command
def remove(here: Context, name: Name) -> None:
    """Remove an image that no live session uses."""
    from sandbox_ssh import images
    from sandbox_ssh.store import sessions
    from sandbox_ssh.store.models import LIVE

    images.check_name(name)
    config = _config(here)
    # Another node's image of that name is another one.
    live = here.run(
        lambda database: sessions.list_sessions(database, states=LIVE, node=config.server.node), create=True
    )
    using = [str(session.id) for session in live if session.image == name]
    if using:
        raise images.ImageError(
            f"{len(using)} live session(s) use the image {name}: wait for them or `sandbox-ssh session kill` "
            + " ".join(using)
        )
    images.remove(config.server.state_dir, name)
    output.message(f"removed image {name}")


@build_app.command(
    "debian",
    epilog=examples("sandbox-ssh image build debian --suite bookworm --include python3,gcc"),
)
@context.command
def build_debian(
    here: Context,
    name: Annotated[str, typer.Option(metavar="NAME", help="The image's name.")] = "debian",
    suite: Annotated[
        str | None, typer.Option(metavar="SUITE", help="As bookworm. Default: the host's.", show_default=False)
    ] = None,
    mirror: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Where to get it. Default: where the host's apt does.", show_default=False),
    ] = None,
    include: Annotated[
        str | None, typer.Option(metavar="PKG,...", help="Packages to add to the usual ones.", show_default=False)
    ] = None,
) -> None:
    """Build a Debian image with mmdebstrap(1), and add it."""
    from sandbox_ssh import images

    images.check_name(name)
    config = _config(here)
    prepare_state_dir(config)
    if any(image.name == name for image in images.list_images(config.server.state_dir)):
        raise AlreadyExistsError(f"there is an image {name} already: `sandbox-ssh image remove {name}`")
    program = shutil.which("mmdebstrap")
    if program is None:
        raise BuildError("mmdebstrap is not installed: `apt-get install mmdebstrap`")
    suite = suite or _host_suite()
    packages = ",".join((*_PACKAGES, *([include] if include else [])))
    with images.scratch(config.server.state_dir) as directory:
        tarball = directory / "rootfs.tar"
        sources = [mirror] if mirror else _host_sources(suite)
        mode = "root" if os.geteuid() == 0 else "unshare"
        _run([program, "--variant=apt", f"--mode={mode}", f"--include={packages}", "--", suite, str(tarball), *sources])
        _add(here, name, tarball, f"mmdebstrap {suite} {mirror or ''}".strip())


def _config(here: Context) -> Config:
    """The server's configuration, for whom its images may belong to. Raises `ConfigError`."""
    config = here.config()
    if config.mode == "service" and os.geteuid() != 0:
        raise ConfigError("images of a server in service mode are root's: run this with sudo")
    if config.mode != "service" and os.geteuid() == 0:
        raise ConfigError("images of a server in rootless mode are its user's: run this as that user")
    return config


def _add(here: Context, name: str, path: Path, origin: str) -> None:
    from sandbox_ssh import images

    images.check_name(name)
    config = _config(here)
    prepare_state_dir(config)
    with _progress(f"adding image {name}") as show:
        image = images.add(config.server.state_dir, name, path, show, origin=origin)
    output.message(_added(image))
    if not images.has_shell(config.server.state_dir, name):
        output.message(f"the image {name} has no /bin/sh: no session can start in it")


def _added(image: Image) -> str:
    skipped = f", {image.skipped} device nodes, fifos or sockets left out" if image.skipped else ""
    return f"added image {image.name}: {image.entries} entries, {units.size(image.bytes)}{skipped}"


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A spinner with counts on a terminal; into a file, one line when it begins."""
    if not sys.stderr.isatty():
        output.message(f"{what} …")
        yield lambda entries, size: None
        return
    from rich.console import Console
    from rich.status import Status

    status: Status | None = None

    def show(entries: int, size: int) -> None:
        nonlocal status
        text = f"{what}: {entries} entries, {units.size(size)}"
        if status is None:
            # Not before: the spinner has a thread, and processes are forked until the first count comes.
            status = Status(text, console=Console(stderr=True))
            status.start()
        status.update(text)

    try:
        yield show
    finally:
        if status is not None:
            status.stop()


def _host_suite() -> str:
    """The host's own suite where the host is a Debian."""
    try:
        lines = Path("/etc/os-release").read_text().splitlines()
    except OSError:
        return _FALLBACK_SUITE
    values = {key: next(csv.reader([value]), [""])[0] for key, _, value in (line.partition("=") for line in lines)}
    return values.get("VERSION_CODENAME") or _FALLBACK_SUITE if values.get("ID") == "debian" else _FALLBACK_SUITE


def _host_sources(suite: str) -> list[str]:
    """Lines of sources.list(5): where the host's apt gets Debian's `suite` and its updates. None: mmdebstrap knows.

    Not all of the host's sources: another vendor's packages are not wanted, and their keys would not be there.
    """
    template = "$(LABEL)|$(REPO_URI)|$(RELEASE)|$(COMPONENT)"
    command = ["apt-get", "indextargets", "--format", template, "Created-By: Packages"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return []
    found: dict[tuple[str, str], list[str]] = {}
    for line in done.stdout.splitlines():
        label, _, rest = line.partition("|")
        if label not in ("Debian", "Debian-Security") or rest.count("|") != 2:
            continue
        uri, release, component = rest.split("|")
        if re.fullmatch(re.escape(suite) + r"(-updates|-security)?", release):
            components = found.setdefault((uri, release), [])
            if component not in components:
                components.append(component)
    if not any(release == suite for _, release in found):
        return []
    return [f"deb {uri} {release} {' '.join(components)}" for (uri, release), components in found.items()]


def _run(command: list[str]) -> None:
    """Run mmdebstrap and pass on what it says. Raises `BuildError`."""
    # Not what this was started with: settings of the administrator's shell have no place in an image.
    kept = ("PATH", "HOME", "TMPDIR", "http_proxy", "https_proxy", "no_proxy", "SOURCE_DATE_EPOCH")
    environment = {"LC_ALL": "C.UTF-8", **{name: os.environ[name] for name in kept if name in os.environ}}
    said = "it said nothing"
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="backslashreplace", env=environment, umask=0o022,
    )  # fmt: skip
    late = threading.Timer(_BUILD_SECONDS, process.terminate)  # SIGTERM: it then unmounts and removes what it made
    late.start()
    try:
        assert process.stdout is not None
        for line in process.stdout:
            text = line.strip()
            if text.startswith(("I: ", "W: ", "E: ")) or text.startswith("Err:"):
                output.message(text)
            if text.startswith("E: ") or (text and not text.startswith("I: ") and not said.startswith("E: ")):
                said = text
        status = process.wait()
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
        timed_out = not late.is_alive()
        late.cancel()
    if timed_out:
        raise BuildError(f"mmdebstrap was stopped after {_BUILD_SECONDS // 60} minutes: try a nearer --mirror")
    if status:
        raise BuildError(f"mmdebstrap failed: {said}")
