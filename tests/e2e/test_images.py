"""Sandboxes of an image that `sandbox-ssh image build debian` made: a whole Debian, whose root is root."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.e2e import internet
from tests.e2e.conftest import Server, end, make_server, wait_until
from tests.e2e.internet import PUBLIC, StandIn

pytestmark = pytest.mark.host

CONTROL = """\
Package: hello
Version: 1.0
Architecture: all
Maintainer: Nobody <nobody@packages.example>
Description: says hello
"""
# What packages do that needs a root who may do it: a directory of another user's, and a setuid program.
POSTINST = """\
#!/bin/sh
set -e
install -d -o games -g games -m 2755 /var/lib/hello
install -o games -m 4755 /usr/bin/id /usr/bin/id-of-games
"""


TAR = ("tar", "--xattrs", "--xattrs-include=security.capability", "-C")
# Which groups may do it without, a namespace starts with none; so this shows the capability of the file `ping`.
PING = (
    "sysctl -qw net.ipv4.ping_group_range='1 0'; su -s /bin/sh nobody -c 'ping -qc1 127.0.0.1' | grep -c '1 received'"
)


@pytest.fixture(scope="module")
def network() -> Iterator[internet.Internet]:
    with internet.internet() as made:
        yield made


@pytest.fixture(scope="module")
def debian(network: internet.Internet) -> Iterator[Server]:
    """A server in service mode, in the little internet, whose sandboxes are of the image that it built."""
    if shutil.which("mmdebstrap") is None:
        pytest.skip("mmdebstrap is not installed")
    with make_server("service", client=network.prefix) as made:
        built = made.cli("image", "build", "debian")  # from the host's own mirror, before it is cut off from it
        assert "added image debian" in built.stderr
        made.prefix = network.prefix
        made.config["SANDBOX_SSH_SANDBOX__IMAGE"] = "debian"
        made.add_user()
        yield made.start()


@pytest.fixture(scope="module")
def packages(network: internet.Internet, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A line of sources.list(5) for a repository in the little internet, which has the package `hello`."""
    directory = tmp_path_factory.mktemp("packages")
    tree = directory / "tree"
    for name, text in (
        ("DEBIAN/control", CONTROL),
        ("DEBIAN/postinst", POSTINST),
        ("usr/bin/hello", "#!/bin/sh\necho Hello, world!\n"),
    ):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(text)
    for path in (tree, *tree.rglob("*")):
        path.chmod(0o755)
    repository = directory / "repository"
    repository.mkdir()
    package = repository / "hello.deb"
    subprocess.run(["dpkg-deb", "--root-owner-group", "--build", tree, package], check=True, capture_output=True)
    data = package.read_bytes()
    (repository / "Packages").write_text(
        f"{CONTROL}Filename: ./hello.deb\nSize: {len(data)}\nSHA256: {hashlib.sha256(data).hexdigest()}\n\n"
    )
    resolver = StandIn(network.there, PUBLIC)
    server = subprocess.Popen(
        ["ip", "netns", "exec", network.there, sys.executable, "-u", "-m", "http.server", "80", "--bind", PUBLIC],
        cwd=repository, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    assert server.stdout is not None and server.stdout.readline().startswith(b"Serving HTTP")
    yield "deb [trusted=yes] http://packages.example/ ./"
    end(server)
    resolver.stop()


def install_hello(server: Server, packages: str) -> None:
    script = f"""
        set -e
        echo '{packages}' > /etc/apt/sources.list
        apt-get -qq update
        DEBIAN_FRONTEND=noninteractive apt-get -qq install -y hello >&2
        hello
        stat -c %U:%G:%a /var/lib/hello /usr/bin/id-of-games
        su -s /bin/sh nobody -c '/usr/bin/id-of-games' | grep -o 'euid=[^ ]*'
        apt-get -qq purge -y hello >&2
        test ! -e /usr/bin/hello
    """
    assert server.run(script).splitlines() == [
        "Hello, world!", "games:games:2755", "games:root:4755", "euid=5(games)"
    ]  # fmt: skip


def test_files_are_roots(debian: Server) -> None:
    assert debian.run("stat -c %U:%G:%a /etc/passwd /etc/shadow /bin/su /usr").split() == [
        "root:root:644", "root:shadow:640", "root:root:4755", "root:root:755",
    ]  # fmt: skip
    assert debian.run("cat /etc/hostname; id -u").split() == ["sandbox", "0"]


def test_other_users(debian: Server) -> None:
    assert debian.run("su -s /bin/sh nobody -c id").startswith("uid=65534(nobody) gid=65534(nogroup)")
    assert debian.run("sudo -u nobody id -un") == "nobody\n"
    assert debian.run("useradd -m eve && su eve -c 'id -un; touch ~/x; ls -l ~/x'").split()[0] == "eve"


def test_setuid_programs_work_from_an_ordinary_user(debian: Server) -> None:
    script = (
        "useradd -m eve; echo 'eve ALL=(ALL) NOPASSWD: ALL' > /etc/sudoers.d/eve;"
        "su eve -c 'id -u; sudo id -u; passwd --status | cut -d\" \" -f1; cat /etc/shadow || echo closed'"
    )
    assert debian.run(script).split() == ["1000", "0", "eve", "closed"]
    assert debian.run(PING) == "1\n"


def test_every_session_starts_with_a_fresh_copy(debian: Server) -> None:
    change = "echo mine > /etc/motd; rm -r /usr/bin/less /etc/apt; chown nobody /usr/bin/nano; ls /usr/bin/less"
    first = debian.popen(f"{change}; echo done; cat")
    assert first.stdout is not None
    assert first.stdout.readline() == b"done\n"
    assert debian.run("cat /etc/motd; ls /usr/bin/less; stat -c %U /usr/bin/nano; ls /etc/apt/sources.list").split()[
        -3:
    ] == ["/usr/bin/less", "root", "/etc/apt/sources.list"]
    end(first)
    lower = debian.state / "images/debian/rootfs"
    assert (lower / "usr/bin/less").exists() and (lower / "usr/bin/nano").lstat().st_uid == 0


def test_apt_installs_a_package(debian: Server, packages: str) -> None:
    install_hello(debian, packages)


def test_a_live_image_is_not_removed(debian: Server) -> None:
    session = debian.popen("echo in; cat")
    assert session.stdout is not None
    assert session.stdout.readline() == b"in\n"
    number = debian.latest()["id"]
    refused = debian.cli("image", "remove", "debian", check=False)
    assert refused.returncode == 1 and str(number) in refused.stderr
    end(session)
    wait_until(lambda: debian.latest()["state"] == "closed", "the session to end")
    assert [row["name"] for row in debian.json("image", "list")] == ["host", "debian"]


def test_a_build_that_fails_leaves_nothing(debian: Server) -> None:
    before = sorted(path.name for path in (debian.state / "images").iterdir())
    failed = debian.cli("image", "build", "debian", "--name", "other", "--mirror", "http://127.0.0.1:1/", check=False)
    assert failed.returncode == 1 and "mmdebstrap failed" in failed.stderr
    assert sorted(path.name for path in (debian.state / "images").iterdir()) == before


def test_an_ordinary_users_server_has_the_image_too(
    debian: Server, network: internet.Internet, packages: str, visible: tuple[str, ...]
) -> None:
    with make_server("rootless", (*network.prefix, *visible), network.prefix) as made:
        archive = made.directory / "debian.tar"
        subprocess.run([*TAR, debian.state / "images/debian/rootfs", "-cf", archive, "."], check=True)
        archive.chmod(0o644)
        made.cli("image", "add", "debian", archive)
        made.config["SANDBOX_SSH_SANDBOX__IMAGE"] = "debian"
        made.add_user()
        made.start()
        assert made.run("id -un; stat -c %U /etc/passwd /bin/su").split() == ["root", "root", "root"]
        assert made.run("su -s /bin/sh nobody -c id").startswith("uid=65534(nobody)")
        script = "useradd -m eve; echo 'eve ALL=(ALL) NOPASSWD: ALL' > /etc/sudoers.d/eve; su eve -c 'sudo id -u'"
        assert made.run(script) == "0\n"
        assert made.run(PING) == "1\n"
        assert made.run("rm /usr/bin/less; chown nobody /usr/bin/nano; stat -c %U /usr/bin/nano") == "nobody\n"
        assert made.run("ls /usr/bin/less; stat -c %U /usr/bin/nano").split() == ["/usr/bin/less", "root"]
        install_hello(made, packages)
        made.stop()
        made.cli("image", "remove", "debian")  # its files are of other ids than the user's


def test_a_single_id_is_everybody(debian: Server, visible: tuple[str, ...]) -> None:
    with make_server("single", visible) as made:
        archive = made.directory / "debian.tar"
        subprocess.run([*TAR, debian.state / "images/debian/rootfs", "-cf", archive, "."], check=True)
        archive.chmod(0o644)
        made.cli("image", "add", "debian", archive)
        made.config["SANDBOX_SSH_SANDBOX__IMAGE"] = "debian"
        made.add_user()
        made.start()
        assert made.run("id -un; stat -c %U /etc/passwd /etc/shadow; echo mine > /etc/motd").split() == ["root"] * 3
        made.stop()
        made.cli("image", "remove", "debian")
