"""Adding, listing and removing images; archives that want to write elsewhere."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import pwd
import signal
import socket
import stat
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sandbox_ssh import images
from sandbox_ssh.errors import AlreadyExistsError, NotFoundError, SandboxSSHError
from sandbox_ssh.unpack import Limits, UnpackError

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: files get other owners")
VISIBLE = Path(__file__).parents[1] / "e2e" / "visible.py"


def entry(name: str, data: bytes | None = None, **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    """A regular file with `data`; else what `type` says."""
    info = tarfile.TarInfo(name)
    info.mode = 0o644
    for key, value in fields.items():
        setattr(info, key, value)
    info.size = len(data or b"")
    return info, data or b""


def directory(name: str, mode: int = 0o755, **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    return entry(name, type=tarfile.DIRTYPE, mode=mode, **fields)


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tuple[tarfile.TarInfo, bytes]:
    return entry(name, type=kind, linkname=target)


def archive(*entries: tuple[tarfile.TarInfo, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", errors="surrogateescape") as tar:
        for info, data in entries:
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def snapshot(top: Path, leave_out: Path) -> dict[str, tuple[int, int, int, int, bytes]]:
    """All that is in a directory but below `leave_out`, with what could have been changed of it."""
    found = {}
    for directory, directories, files in os.walk(top):
        directories[:] = [name for name in directories if Path(directory, name) != leave_out]
        for path in (Path(directory), *(Path(directory, name) for name in files)):
            status = path.lstat()
            data = path.read_bytes() if stat.S_ISREG(status.st_mode) else b""
            found[str(path)] = (status.st_mode, status.st_uid, status.st_nlink, status.st_ino, data)
    return found


class Place:
    """A state directory, and beside it what an archive must not reach."""

    def __init__(self, top: Path) -> None:
        self.top = top
        self.state = top / "state"
        self.state.mkdir()
        self.images = self.state / "images"
        self.images.mkdir(mode=0o711)
        self.outside = top / "outside"
        self.outside.mkdir()
        (self.outside / "secret").write_text("the host's\n")

    def add(self, *entries: tuple[tarfile.TarInfo, bytes], name: str = "x", limits: Limits | None = None) -> Path:
        return self.add_bytes(archive(*entries), name, limits)

    def add_bytes(self, data: bytes, name: str = "x", limits: Limits | None = None) -> Path:
        source = self.top / "archive"
        source.write_bytes(data)
        before = snapshot(self.top, self.images)
        try:
            images.add(self.state, name, source, lambda entries, size: None, limits)
        except SandboxSSHError:
            assert self.entries() == []
            raise
        finally:
            assert snapshot(self.top, self.images) == before
        return self.images / name / "rootfs"

    def refuse(self, *entries: tuple[tarfile.TarInfo, bytes], match: str, limits: Limits | None = None) -> None:
        with pytest.raises(UnpackError, match=match):
            self.add(*entries, limits=limits)

    def entries(self) -> list[str]:
        return os.listdir(self.images)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    made = Place(tmp_path)
    yield made
    if "x" in made.entries():  # its files may be of ids that pytest's own cleaning cannot delete
        images.remove(made.state, "x")


def test_a_tarball_becomes_an_image_and_goes_again(place: Place) -> None:
    rootfs = place.add(directory("./"), directory("./etc"), entry("./etc/motd", b"hello\n", mtime=1234))
    assert (rootfs / "etc/motd").read_text() == "hello\n"
    assert (rootfs / "etc/motd").stat().st_mtime == 1234
    assert stat.S_IMODE(rootfs.stat().st_mode) == 0o755
    assert stat.S_IMODE(rootfs.parent.stat().st_mode) & 0o007 == 0
    host, image = images.list_images(place.state)
    assert (host.name, host.kind) == ("host", "builtin")
    assert (image.name, image.kind, image.entries, image.bytes) == ("x", "tarball", 3, 6)
    assert image.added_at is not None and image.added_at.tzinfo is not None
    assert json.loads((rootfs.parent / "image.json").read_text())["source"] == str(place.top / "archive")
    with pytest.raises(AlreadyExistsError):
        images.add(place.state, "x", place.top / "archive", lambda entries, size: None)
    images.remove(place.state, "x")
    assert place.entries() == []
    assert [image.name for image in images.list_images(place.state)] == ["host"]


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress])
def test_compressed_tarballs(place: Place, compress: Any) -> None:
    assert (place.add_bytes(compress(archive(entry("a", b"1")))) / "a").read_bytes() == b"1"


def test_a_link_that_is_written_through_leads_within_the_image(place: Place) -> None:
    rootfs = place.add(
        directory(str(place.outside)[1:]),
        directory("outside"),
        link("absolute", str(place.outside)),
        entry("absolute/secret", b"mine"),
        link("up", "../../../../outside"),
        entry("up/secret", b"mine too"),
        directory("usr/bin"),
        link("bin", "usr/bin"),
        entry("bin/true", b"#!", mode=0o755),
    )
    assert (rootfs / place.outside.relative_to("/") / "secret").read_bytes() == b"mine"
    assert (rootfs / "outside/secret").read_bytes() == b"mine too"
    assert (rootfs / "usr/bin/true").read_bytes() == b"#!"
    assert (rootfs / "bin").is_symlink()


def test_a_link_to_what_only_the_host_has_is_not_written_through(place: Place) -> None:
    place.refuse(link("a", str(place.outside)), entry("a/secret", b"mine"), match="cannot be made: File exists")


def test_the_last_component_is_never_followed(place: Place) -> None:
    secret = str(place.outside / "secret")
    rootfs = place.add(link("x", secret), entry("x", b"mine"), link("y", secret), link("y", secret))
    assert not (rootfs / "x").is_symlink() and (rootfs / "x").read_bytes() == b"mine"
    assert os.readlink(rootfs / "y") == secret


def test_a_directory_in_the_place_of_a_link_to_one_leaves_the_link(place: Place) -> None:
    rootfs = place.add(
        directory("usr/lib"), link("lib", "usr/lib"), directory("lib"), entry("lib/a", b"1"),
        link("nowhere", "gone"), directory("nowhere"), entry("nowhere/b", b"2"),
    )  # fmt: skip
    assert (rootfs / "lib").is_symlink() and (rootfs / "usr/lib/a").exists()
    assert not (rootfs / "nowhere").is_symlink() and (rootfs / "nowhere/b").exists()


def test_hard_links(place: Place) -> None:
    secret = str(place.outside / "secret")
    rootfs = place.add(
        entry("a", b"1"), link("d/b", "./a", tarfile.LNKTYPE), link("a", "d/b", tarfile.LNKTYPE),
        link("s", secret), link("t", "s", tarfile.LNKTYPE),
    )  # fmt: skip
    assert (rootfs / "a").stat().st_ino == (rootfs / "d/b").stat().st_ino
    assert (rootfs / "t").is_symlink()


@pytest.mark.parametrize("through", ["out", "../outside"])
def test_a_hard_link_to_outside_is_refused(place: Place, through: str) -> None:
    place.refuse(
        link("out", str(place.outside)),
        link("x", f"{through}/secret", tarfile.LNKTYPE),
        match="hard link to .*which it does not have" if through == "out" else "leads upwards",
    )


def test_a_hard_link_to_an_absolute_path_or_a_directory_is_refused(place: Place) -> None:
    place.refuse(link("x", str(place.outside / "secret"), tarfile.LNKTYPE), match="absolute path")
    place.refuse(directory("d"), link("x", "d", tarfile.LNKTYPE), match="hard link to a directory")


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("/etc/passwd", "absolute path"),
        ("../outside/new", "leads upwards"),
        ("a/../../../outside/new", "leads upwards"),
        ("a/" * 3000 + "b", "cannot be made: File name too long"),
        ("x" * 300, "cannot be made: File name too long"),
    ],
)
def test_names_that_lead_nowhere_good(place: Place, name: str, match: str) -> None:
    place.refuse(entry("first", b""), entry(name, b"new"), match=match)


def test_a_name_with_a_nul_is_refused(place: Place) -> None:
    info, data = entry("x", b"new")
    info.pax_headers = {"path": "x\0y"}
    place.refuse((info, data), match="NUL")


def test_a_name_with_control_characters_is_a_name(place: Place) -> None:
    rootfs = place.add(entry("a\nb\x1b[2J", b"1"), entry("\udcff", b"2"))
    assert sorted(os.listdir(os.fsencode(rootfs))) == [b"a\nb\x1b[2J", b"\xff"]
    images.remove(place.state, "x")
    with pytest.raises(UnpackError) as refused:
        place.add(entry("/\x1b[2J\n", b""))
    assert str(refused.value).isprintable()


def test_loops_of_links_are_refused(place: Place) -> None:
    place.refuse(link("a", "b"), link("b", "a"), entry("a/x", b"1"), match="Too many levels of symbolic links")


def test_a_link_to_itself_and_a_parent_that_is_a_file(place: Place) -> None:
    place.refuse(link("a", "a"), entry("a/x", b"1"), match="symbolic links")
    place.refuse(entry("a", b"1"), entry("a/x", b"1"), match="Not a directory")
    place.refuse(link("a", "gone"), entry("a/x", b"1"), match="cannot be made")


@pytest.mark.parametrize("other", [entry(".", b"1"), link("./", "/etc"), link(".", "a", tarfile.LNKTYPE)])
def test_an_entry_in_the_place_of_the_root_is_refused(place: Place, other: tuple[tarfile.TarInfo, bytes]) -> None:
    place.refuse(entry("a", b"1"), other, match="in the place of its root")


def test_the_last_of_entries_with_one_name_counts(place: Place) -> None:
    rootfs = place.add(
        entry("a", b"1"), entry("b", b"old"), link("c", "b", tarfile.LNKTYPE), entry("b", b"new"), directory("a"),
        entry("a/x", b"2"), directory("e"), entry("e", b"3"),
    )  # fmt: skip
    assert (rootfs / "a/x").read_bytes() == b"2"
    assert (rootfs / "b").read_bytes() == b"new" and (rootfs / "c").read_bytes() == b"old"
    assert (rootfs / "e").read_bytes() == b"3"
    images.remove(place.state, "x")
    place.refuse(entry("d/x", b"1"), entry("d", b"2"), match="Directory not empty")


def test_devices_are_left_out_and_counted(place: Place) -> None:
    place.add(
        entry("dev/null", type=tarfile.CHRTYPE, devmajor=1, devminor=3), entry("f", type=tarfile.FIFOTYPE),
        entry("sda", type=tarfile.BLKTYPE), link("also", "sda", tarfile.LNKTYPE), entry("a", b"1"),
    )  # fmt: skip
    image = images.list_images(place.state)[1]
    assert (image.entries, image.skipped) == (5, 4)
    assert os.listdir(place.images / "x/rootfs") == ["a"]


def test_bounds(place: Place) -> None:
    limits = Limits(bytes=100, entries=3)
    place.refuse(entry("a", b"x" * 60), entry("b", b"x" * 60), match="larger than 100 bytes", limits=limits)
    place.refuse(*(entry(str(n), b"") for n in range(4)), match="more than 3 entries", limits=limits)


def test_a_sparse_file_counts_with_its_full_size(place: Place, tmp_path_factory: pytest.TempPathFactory) -> None:
    tmp_path = tmp_path_factory.mktemp("sparse")
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(1 << 40)
    subprocess.run(["tar", "-C", tmp_path, "-Scf", tmp_path / "sparse.tar", "huge"], check=True)
    with pytest.raises(UnpackError, match="larger than"):
        place.add_bytes((tmp_path / "sparse.tar").read_bytes())


def test_a_sparse_file_is_unpacked(place: Place, tmp_path_factory: pytest.TempPathFactory) -> None:
    tmp_path = tmp_path_factory.mktemp("sparse")
    with (tmp_path / "holes").open("wb") as file:
        for offset in (1 << 20, 3 << 20):
            file.seek(offset)
            file.write(b"data")
        file.truncate(5 << 20)
    for form in ("gnu", "posix"):
        subprocess.run(["tar", "-C", tmp_path, f"--format={form}", "-Scf", tmp_path / "t", "holes"], check=True)
        rootfs = place.add_bytes((tmp_path / "t").read_bytes())
        assert (rootfs / "holes").read_bytes() == (tmp_path / "holes").read_bytes()
        images.remove(place.state, "x")


@pytest.mark.parametrize(
    "headers",
    [
        {"size": "-5000"},
        {"GNU.sparse.size": "9", "GNU.sparse.numblocks": "2", "GNU.sparse.map": "5,2,0,2"},
        {"GNU.sparse.size": "9", "GNU.sparse.numblocks": "1", "GNU.sparse.map": "5,-2"},
        {"GNU.sparse.size": "9", "GNU.sparse.numblocks": "1", "GNU.sparse.map": "5,200"},
        {"mtime": "nan"},
    ],
)
def test_numbers_that_cannot_be_are_refused(place: Place, headers: dict[str, str]) -> None:
    info, data = entry("b", b"12345")
    info.pax_headers = headers
    place.refuse(entry("a", b"1"), (info, data), entry("c", b"1"), match="cut short after")


WHOLE = archive(entry("a", b"x" * 5000), directory("d"), entry("d/b", b"x" * 5000))


@pytest.mark.parametrize("length", [700, 512 + 5120, 512 + 5120 + 100, 512 + 5120 + 512, 12000])
@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_a_truncated_archive_is_refused(place: Place, length: int, compress: Any) -> None:
    with pytest.raises(UnpackError, match=r"damaged or cut short|no tar archive"):
        place.add_bytes(compress(WHOLE[:length]))


def test_a_damaged_archive_is_refused(place: Place) -> None:
    with pytest.raises(UnpackError, match="cut short"):
        place.add_bytes(WHOLE[: 512 + 5120] + b"\xff" * 512 + WHOLE[512 + 5120 + 512 :])
    packed = gzip.compress(WHOLE)
    with pytest.raises(UnpackError, match=r"cut short|no tar archive"):
        place.add_bytes(packed[: len(packed) // 2])
    with pytest.raises(UnpackError, match="no tar archive"):
        place.add_bytes(b"this is no archive" * 100)
    with pytest.raises(UnpackError):
        place.add_bytes(b"")


def test_a_header_of_a_gigabyte_is_not_read(place: Place) -> None:
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 1 << 30
    with pytest.raises(UnpackError, match="unreasonable length"):
        place.add_bytes(info.tobuf() + bytes(1024))


def test_depth_is_no_obstacle_to_removal(place: Place) -> None:
    deep = "a/" * 1500
    try:
        place.add(directory(deep), link("l", deep), directory(f"l/{deep}"), entry("l/b", b""))
        images.remove(place.state, "x")
        assert place.entries() == []
    finally:
        # Should it be there still, pytest's own cleaning would fail on it, days later.
        subprocess.run(["rm", "-rf", place.images], check=True)
        place.images.mkdir()


def test_modes_are_kept(place: Place) -> None:
    rootfs = place.add(
        directory("closed", mode=0o555), entry("closed/su", b"", mode=0o4755), entry("wall", b"", mode=0o2755),
        directory("tmp", mode=0o1777), directory("shut", mode=0), entry("shut/x", b"", mode=0),
    )  # fmt: skip
    modes = {path: stat.S_IMODE((rootfs / path).lstat().st_mode) for path in ("closed", "wall", "tmp", "shut")}
    assert modes == {"closed": 0o555, "wall": 0o2755, "tmp": 0o1777, "shut": 0}
    assert stat.S_IMODE((rootfs / "closed/su").stat().st_mode) == 0o4755
    images.remove(place.state, "x")
    assert place.entries() == []


@as_root
def test_owners_are_kept(place: Place) -> None:
    alias = link("l", "a")
    alias[0].uid = 7
    rootfs = place.add(
        entry("a", b"1", uid=65535, gid=42, mode=0o6755), directory("d", uid=33), alias, directory(".", uid=5, gid=6)
    )
    status = (rootfs / "a").stat()
    assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (65535, 42, 0o6755)
    assert (rootfs / "d").stat().st_uid == 33
    assert (rootfs / "l").lstat().st_uid == 7
    assert (rootfs.stat().st_uid, rootfs.stat().st_gid) == (5, 6)
    images.remove(place.state, "x")
    place.refuse(entry("a", b"", uid=65536), match="ids go up to 65535")


def test_a_directory_is_copied(place: Place) -> None:
    source = place.top / "tree"
    (source / "bin").mkdir(parents=True)
    (source / "bin/su").write_text("su")
    (source / "bin/su").chmod(0o4755)
    os.utime(source / "bin/su", (1234, 1234))
    os.link(source / "bin/su", source / "also")
    (source / "way out").symlink_to(place.outside)
    os.mkfifo(source / "fifo")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(source / "socket"))
    before = snapshot(place.top, place.images)
    image = images.add(place.state, "x", source, lambda entries, size: None)
    assert snapshot(place.top, place.images) == before
    rootfs = place.images / "x/rootfs"
    assert (image.kind, image.skipped) == ("directory", 2)
    assert sorted(os.listdir(rootfs)) == ["also", "bin", "way out"]
    assert os.readlink(rootfs / "way out") == str(place.outside)
    status = (rootfs / "bin/su").stat()
    assert (status.st_mtime, stat.S_IMODE(status.st_mode), status.st_nlink) == (1234, 0o4755, 2)
    assert (rootfs / "also").stat().st_ino == status.st_ino


def test_a_source_that_is_not_there(place: Place) -> None:
    with pytest.raises(images.ImageError, match="No such file"):
        images.add(place.state, "x", place.top / "gone", lambda entries, size: None)
    with pytest.raises(images.ImageError, match="neither a directory nor a tarball"):
        images.add(place.state, "x", Path("/dev/null"), lambda entries, size: None)
    assert place.entries() == []


def test_the_images_themselves_are_no_source(place: Place) -> None:
    with pytest.raises(images.ImageError, match="cannot have itself in it"):
        images.add(place.state, "x", place.top, lambda entries, size: None)


def test_a_directory_that_cannot_be_read_says_why(place: Place) -> None:
    (place.outside / "closed").mkdir(mode=0)
    script = f"""
from pathlib import Path
from sandbox_ssh import images
try:
    images.add(Path({str(place.state)!r}), "x", Path({str(place.outside)!r}), lambda entries, size: None)
except images.ImageError as error:
    print(error)
"""
    # Root reads everything by two capabilities, which it can be run without.
    less = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
    said = subprocess.run([*less, sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert "Permission denied" in said and "closed" in said


@pytest.mark.parametrize("name", ["", "host", "../x", ".x", "A", "x/y", "x\n", "x" * 64])
def test_names_of_images(place: Place, name: str) -> None:
    with pytest.raises(images.ImageError):
        images.add(place.state, name, place.outside, lambda entries, size: None)
    with pytest.raises(images.ImageError):
        images.remove(place.state, name)


def test_what_is_not_there_cannot_be_removed(place: Place) -> None:
    with pytest.raises(NotFoundError, match="there is no image x"):
        images.remove(place.state, "x")


def test_an_images_directory_that_is_a_link_is_refused(place: Place) -> None:
    place.images.rmdir()
    place.images.symlink_to(place.outside)
    (place.top / "tree").mkdir()
    with pytest.raises(images.ImageError, match="cannot be used"):
        images.add(place.state, "x", place.top / "tree", lambda entries, size: None)


def test_a_killed_add_leaves_nothing_that_counts(place: Place) -> None:
    source = place.top / "many.tar"
    with source.open("wb") as file:
        file.write(archive(*(entry(f"d/{n}", b"x") for n in range(2000)))[:-1024])
        file.truncate(1 << 32)
    # Of a length that it does not have, so that the add is busy with it until it is killed.
    slow = subprocess.Popen(
        [sys.executable, "-P", "-m", "sandbox_ssh", "image", "add", "x", source],
        env={**os.environ, "SANDBOX_SSH_STATE_DIR": str(place.state)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 30
        while not list(place.images.glob(".partial-*/rootfs/d/*")) and slow.poll() is None:
            assert time.monotonic() < deadline
    finally:
        slow.send_signal(signal.SIGKILL)
        slow.wait()
    assert [image.name for image in images.list_images(place.state)] == ["host"]
    while place.entries() != ["x"]:  # what the kernel is still killing keeps its lock for a moment
        assert time.monotonic() < deadline
        if "x" in place.entries():
            images.remove(place.state, "x")
        images.add(place.state, "x", place.outside, lambda entries, size: None)


def test_an_add_in_progress_is_left_alone(place: Place) -> None:
    with images.scratch(place.state) as other:
        images.add(place.state, "x", place.outside, lambda entries, size: None)
        assert other.is_dir()
    assert place.entries() == ["x"]


def _ordinary(name: str, ranges: bool) -> pwd.struct_passwd:
    if os.geteuid() != 0:
        pytest.skip("needs root, to become another user")
    try:
        user = pwd.getpwnam(name)
    except KeyError:
        pytest.skip(f"no user {name}: run ./script/test as root, which makes it")
    if any(line.startswith(f"{name}:") for line in Path("/etc/subuid").read_text().splitlines()) != ranges:
        pytest.skip(f"user {name} {'needs' if ranges else 'must not have'} a range in /etc/subuid")
    return user


@pytest.fixture
def public(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory that other users reach."""
    path = Path(f"/tmp/sandbox-ssh-images-{os.getpid()}")
    path.mkdir(mode=0o755)
    path.chmod(0o755)
    yield path
    subprocess.run(["rm", "-rf", path], check=True)


def run_as(user: pwd.struct_passwd, state: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable, "-P", str(VISIBLE), "setpriv", f"--reuid={user.pw_name}", f"--regid={user.pw_gid}",
        "--clear-groups", sys.executable, "-P", "-m", "sandbox_ssh", "image", *arguments,
    ]  # fmt: skip
    environment = {"PATH": os.environ["PATH"], "HOME": user.pw_dir, "SANDBOX_SSH_STATE_DIR": str(state)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.host
@pytest.mark.parametrize(("name", "ranges"), [("sandbox-ssh-test", True), ("sandbox-ssh-one", False)])
def test_owners_of_an_ordinary_users_image(public: Path, name: str, ranges: bool) -> None:
    user = _ordinary(name, ranges)
    state = public / "state"
    state.mkdir(mode=0o700)
    os.chown(state, user.pw_uid, user.pw_gid)
    source = public / "archive"
    source.write_bytes(
        archive(
            entry("a", b"1"),
            entry("su", b"1", mode=0o4755, uid=33, gid=42),
            entry("n", b"", uid=65534),
            directory("closed", mode=0o555, uid=33),
            entry("closed/x", b""),
        )
    )
    done = run_as(user, state, "add", "x", str(source))
    assert done.returncode == 0, done.stderr
    first = next(
        (int(line.split(":")[1]) for line in Path("/etc/subuid").read_text().splitlines() if line.startswith(name)), 0
    )

    def host_id(inside: int) -> int:
        return first + 1 + inside if ranges else user.pw_uid

    rootfs = state / "images/x/rootfs"
    for path, inside in ((".", 0), ("a", 0), ("su", 33), ("n", 65534), ("closed", 33), ("closed/x", 0)):
        assert (rootfs / path).stat().st_uid == host_id(inside)
    assert stat.S_IMODE((rootfs / "su").stat().st_mode) == 0o4755
    assert stat.S_IMODE(rootfs.parent.stat().st_mode) & 0o007 == 0
    assert [row["name"] for row in json.loads(run_as(user, state, "list", "--json").stdout)] == ["host", "x"]
    done = run_as(user, state, "remove", "x")
    assert done.returncode == 0, done.stderr
    assert os.listdir(state / "images") == []
