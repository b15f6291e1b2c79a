"""Images: root file systems that sandboxes start with, unpacked once below the state directory.

    images/NAME/rootfs/     what a sandbox sees as /, below its own writable layer
    images/NAME/image.json  where it came from
    images/.partial-…       being added; locked (flock(2)) as long as a process of the add lives
    images/.removed-…       being deleted; locked likewise

An image appears by one rename(2) and goes by one. The owners of its files are those of the image: in service mode
the ids themselves, which mounts map to each tenant's; rootless with a range in /etc/subuid those that the range has
for them, so that unpacking and deleting happen in a user namespace; with a single id, everything is the one user's.

NAME is closed to all but the spawner: an image has setuid programs that are root's, some of them old, and no other
user of the host should be able to start one.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import re
import secrets
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, NoReturn

from sandbox_ssh.errors import AlreadyExistsError, NotFoundError, SandboxSSHError
from sandbox_ssh.sandbox import syscalls
from sandbox_ssh.sandbox.host.ids import subordinate
from sandbox_ssh.sandbox.idmap import BLOCK, SLICE
from sandbox_ssh.unpack import CAPABILITY, CAPABILITY_HEADER, Counts, Limits, UnpackError, open_in_root, unpack

HOST = "host"
_libc = ctypes.CDLL(None)
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}", re.ASCII)
_PARTIAL, _REMOVED = ".partial-", ".removed-"
_EVERY = 500
"""Entries between two words of progress."""
# In the namespace for unpacking, beyond all ids of an image: the server's user, whose the directory of images is, and
# the root of the spawner's namespace, whose group may enter an image.
_SELF, _SPAWNER = BLOCK, BLOCK + 1

Progress = Callable[[int, int], None]
"""Called with entries and bytes so far."""


class ImageError(SandboxSSHError):
    """An image cannot be added, listed or removed."""


@dataclass(frozen=True, slots=True)
class Image:
    name: str
    kind: str
    """`tarball`, `directory`, or `builtin` for the host's own /usr."""
    source: str | None
    added_at: datetime | None
    bytes: int | None
    entries: int | None
    skipped: int = 0
    """Device nodes, fifos and sockets that were left out."""


def add(
    state_dir: Path, name: str, source: Path, progress: Progress, limits: Limits | None = None, origin: str = ""
) -> Image:
    """Unpack a directory or a tarball as image `name`; `origin` is recorded in place of the source's path.

    Raises `ImageError`, `UnpackError`, `AlreadyExistsError`.
    """
    check_name(name)
    if (state_dir / "images").resolve().is_relative_to(source.resolve()):
        raise ImageError(f"the images are inside {source}: an image cannot have itself in it")
    images = _open_images(state_dir)
    try:
        if _exists(images, name):
            raise AlreadyExistsError(f"there is an image {name} already: `sandbox-ssh image remove {name}`")
        with _partial(images) as (directory, partial):
            try:
                with _open_source(source) as stream:
                    counts = _Worker(images).unpack(stream, directory, limits or Limits(), progress)
            except UnpackError as error:
                raise UnpackError(f"{source}: {error}") from error
            kind = "directory" if source.is_dir() else "tarball"
            image = Image(name, kind, origin or str(source.absolute()), datetime.now(UTC), **_fields(counts))
            _write_description(directory, image)
            # What has a name must be whole, after a crash too.
            _libc.syncfs(directory)
            try:
                os.rename(partial, name, src_dir_fd=images, dst_dir_fd=images)
            except OSError as error:
                raise AlreadyExistsError(f"an image {name} was added meanwhile") from error
            return image
    finally:
        os.close(images)


def has_shell(state_dir: Path, name: str) -> bool:
    """Whether an image has a /bin/sh, or a link by that name."""
    try:
        root = os.open(state_dir / "images" / name / "rootfs", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            directory = open_in_root(root, "bin")
        finally:
            os.close(root)
    except OSError:
        return False
    try:
        return _exists(directory, "sh")
    finally:
        os.close(directory)


def list_images(state_dir: Path) -> list[Image]:
    """All images by name, `host` first, which is always there. Raises `ImageError`."""
    found = [Image(HOST, "builtin", None, None, None, None)]
    try:
        names = sorted(entry.name for entry in (state_dir / "images").iterdir() if _NAME.fullmatch(entry.name))
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                values = json.loads((state_dir / "images" / name / "image.json").read_text())
                values["added_at"] = datetime.fromisoformat(values["added_at"])
                found.append(Image(**{**values, "name": name}))
    except FileNotFoundError:
        pass  # no image was ever added
    except PermissionError as error:
        raise ImageError(f"{error.filename} cannot be read: run this as the user that the server runs as") from error
    except (ValueError, TypeError, KeyError) as error:
        raise ImageError(f"{state_dir}/images/{name}/image.json is damaged: remove and add the image again") from error
    return found


def remove(state_dir: Path, name: str) -> None:
    """Remove an image at once, then delete its files. Raises `NotFoundError`, `ImageError`."""
    check_name(name)
    images = _open_images(state_dir)
    try:
        hidden = _REMOVED + secrets.token_hex(8)
        try:
            lock = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=images)
        except OSError:
            raise NotFoundError(f"there is no image {name}: see `sandbox-ssh image list`") from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            os.rename(name, hidden, src_dir_fd=images, dst_dir_fd=images)
            _Worker(images).delete(hidden)
        finally:
            os.close(lock)
    finally:
        os.close(images)


def check_name(name: str) -> None:
    if name == HOST:
        raise ImageError("the image `host` is the host's own /usr: it is always there and cannot be changed")
    if not _NAME.fullmatch(name):
        raise ImageError(f"{name!r} is no name of an image: a-z, 0-9, `.`, `_`, `-`, at most 63 characters")


@contextlib.contextmanager
def scratch(state_dir: Path) -> Iterator[Path]:
    """A directory among the images for what is being made, deleted at the end, or by the next add."""
    images = _open_images(state_dir)
    try:
        with _partial(images) as (_, name):
            yield state_dir / "images" / name
    finally:
        os.close(images)


def _open_images(state_dir: Path) -> int:
    path = state_dir / "images"
    try:
        path.mkdir(mode=0o711, exist_ok=True)
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        # The gateway can make entries in the state directory: one of its own is not to be written into by root.
        if os.fstat(fd).st_uid == os.geteuid():
            os.fchmod(fd, 0o711)
            return fd
        os.close(fd)
    except OSError as error:
        raise ImageError(f"{path} cannot be used: {error.strerror}") from error
    raise ImageError(f"{path} belongs to another user: run this as the user that the server runs as")


def _exists(images: int, name: str) -> bool:
    try:
        os.lstat(name, dir_fd=images)
    except FileNotFoundError:
        return False
    return True


@contextlib.contextmanager
def _partial(images: int) -> Iterator[tuple[int, str]]:
    """A new locked directory, as descriptor and name; deleted at the end if it still has that name."""
    fcntl.flock(images, fcntl.LOCK_EX)  # nobody takes the new one for abandoned before it is locked
    try:
        for stale in os.listdir(images):
            if stale.startswith((_PARTIAL, _REMOVED)):
                _delete_abandoned(images, stale)
        name = _PARTIAL + secrets.token_hex(8)
        os.mkdir(name, 0o700, dir_fd=images)
        directory = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=images)
        fcntl.flock(directory, fcntl.LOCK_EX)
    finally:
        fcntl.flock(images, fcntl.LOCK_UN)
    try:
        yield directory, name
    finally:
        os.close(directory)
        if _exists(images, name):
            _Worker(images).delete(name)


def _delete_abandoned(images: int, name: str) -> None:
    try:
        fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=images)
    except FileNotFoundError:
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _Worker(images).delete(name)
    except BlockingIOError:
        pass
    finally:
        os.close(fd)


def _write_description(directory: int, image: Image) -> None:
    fd = os.open("image.json", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644, dir_fd=directory)
    with os.fdopen(fd, "w") as file:
        json.dump({**asdict(image), "added_at": image.added_at and image.added_at.isoformat()}, file, indent=2)


def _fields(counts: Counts) -> dict[str, int]:
    return {"bytes": counts.bytes, "entries": counts.entries, "skipped": counts.skipped}


# --- the source


@contextlib.contextmanager
def _open_source(source: Path) -> Iterator[IO[bytes]]:
    """The source as a tar stream: a directory is packed by a process of its own, with the caller's rights.

    That process knows the host's ids, which are the image's; the one that unpacks sees other numbers for them.
    """
    try:
        fd = os.open(source, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a fifo without a writer is no source
        mode = os.fstat(fd).st_mode
    except OSError as error:
        raise ImageError(f"{source} cannot be read: {error.strerror}") from error
    if stat.S_ISREG(mode):
        with os.fdopen(fd, "rb") as file:
            yield file
        return
    try:
        if not stat.S_ISDIR(mode):
            raise ImageError(f"{source} is neither a directory nor a tarball")
        read, write = os.pipe2(os.O_CLOEXEC)
        errors, errors_write = os.pipe2(os.O_CLOEXEC)

        def pack() -> None:
            os.close(read)  # else its own end would keep it from noticing that nobody reads any more
            with contextlib.suppress(BrokenPipeError):
                _pack(fd, write)

        pid = _fork(pack, errors_write)
        os.close(write)
        os.close(errors_write)
    finally:
        os.close(fd)
    try:
        with os.fdopen(read, "rb") as stream:
            yield stream
    except UnpackError:
        # What it could not read is why the stream was cut short.
        if text := os.read(errors, 4096).decode():
            raise ImageError(f"{source}: {text}") from None
        raise
    finally:
        os.close(errors)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _pack(root: int, write: int) -> None:
    """A tar stream of a directory; never leaves it, whatever changes in it meanwhile."""
    first: dict[tuple[int, int], str] = {}
    with (
        os.fdopen(write, "wb") as stream,
        tarfile.open(
            fileobj=stream, mode="w|", format=tarfile.PAX_FORMAT, encoding="utf-8", errors="surrogateescape"
        ) as archive,
    ):
        _pack_entry(archive, root, ".", ".", first)
        for top, directories, files, fd in os.fwalk(".", dir_fd=root, onerror=_raise):
            for name in (*directories, *files):
                _pack_entry(archive, fd, name, f"{top}/{name}", first)
            archive.members.clear()  # type: ignore[attr-defined]


def _raise(error: OSError) -> NoReturn:
    raise error


def _pack_entry(
    archive: tarfile.TarFile, directory: int, name: str, path: str, first: dict[tuple[int, int], str]
) -> None:
    status = os.lstat(name, dir_fd=directory)
    entry = tarfile.TarInfo(path)
    entry.mode, entry.mtime = stat.S_IMODE(status.st_mode), status.st_mtime
    entry.uid, entry.gid = _image_ids(status)
    key = (status.st_dev, status.st_ino)
    if status.st_nlink > 1 and not stat.S_ISDIR(status.st_mode) and key in first:
        entry.type, entry.linkname = tarfile.LNKTYPE, first[key]
        archive.addfile(entry)
        return
    first.update({key: path} if status.st_nlink > 1 else {})
    if stat.S_ISDIR(status.st_mode):
        entry.type = tarfile.DIRTYPE
    elif stat.S_ISLNK(status.st_mode):
        entry.type, entry.linkname = tarfile.SYMTYPE, os.readlink(name, dir_fd=directory)
    elif not stat.S_ISREG(status.st_mode):
        entry.type = tarfile.FIFOTYPE  # or a device or a socket: all are left out, and counted
    else:
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
        with os.fdopen(fd, "rb") as file:
            entry.size = os.fstat(fd).st_size
            with contextlib.suppress(OSError):
                value = os.getxattr(fd, CAPABILITY)
                entry.pax_headers = {CAPABILITY_HEADER: value.decode("utf-8", "surrogateescape")}
            archive.addfile(entry, file)
        return
    archive.addfile(entry)


def _image_ids(status: os.stat_result) -> tuple[int, int]:
    """What an ordinary user unpacked is root's; all else belongs to whom it belongs to on the host."""
    uid, gid = os.geteuid(), os.getegid()
    return 0 if status.st_uid == uid else status.st_uid, 0 if status.st_gid == gid else status.st_gid


# --- the processes that write and delete


class _Worker:
    """Work in a child process that has the image's ids."""

    def __init__(self, images: int) -> None:
        self._images = images
        self._map: tuple[list[str], list[str]] | None = None
        self._owners = os.geteuid() == 0
        self.ids = BLOCK
        if not self._owners:
            (first_uid, uids), (first_gid, gids) = subordinate("uid"), subordinate("gid")
            count = min(uids, gids)
            # The same condition as the spawner's, whose namespace it must fit.
            if count >= 2 * SLICE + 1 and shutil.which("newuidmap") and shutil.which("newgidmap"):
                self.ids = min(BLOCK, count - 1)
                self._owners = True
                self._map = self._lines(first_uid, os.getuid()), self._lines(first_gid, os.getgid())

    def _lines(self, first: int, own: int) -> list[str]:
        # The image's root is the second id of the range: the first is the spawner's (idmap.Slices).
        extents = ((0, first + 1, self.ids), (_SELF, own, 1), (_SPAWNER, first, 1))
        return [str(number) for extent in extents for number in extent]

    def unpack(self, stream: IO[bytes], directory: int, limits: Limits, progress: Progress) -> Counts:
        limits = Limits(limits.bytes, limits.entries, self.ids if self._owners else None)
        counts = Counts()

        def work(report: int) -> None:
            def tell(counts: Counts) -> None:
                if counts.entries % _EVERY == 0:
                    os.write(report, (json.dumps(asdict(counts)) + "\n").encode())

            os.mkdir("rootfs", 0o755, dir_fd=directory)
            root = os.open("rootfs", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=directory)
            result = unpack(stream, root, limits, tell)
            if self._map is not None:
                os.chown(directory, -1, _SPAWNER)
                os.fchmod(directory, 0o710)
            os.write(report, (json.dumps(asdict(result)) + "\n").encode())

        for line in self._run(work):
            counts = Counts(**json.loads(line))
            progress(counts.entries, counts.bytes)
        return counts

    def delete(self, name: str) -> None:
        """With rm(1): it goes to any depth, which an archive of a stranger's may have."""

        def work(_: int) -> None:
            os.fchdir(self._images)
            commands = [["rm", "-rf", "--one-file-system", "--", name]]
            if not self._owners:
                commands.insert(0, ["chmod", "-R", "u+rwX", "--", name])  # an image has directories that are read-only
            for command in commands:
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    raise ImageError(f"images/{name} cannot be deleted: {done.stderr.strip().splitlines()[-1]}")

        for _ in self._run(work):
            pass

    def _run(self, work: Callable[[int], None]) -> Iterator[str]:
        """Do `work` in a child with a descriptor to write lines to, which this yields; its error is raised here."""
        lines, lines_write = os.pipe2(os.O_CLOEXEC)
        errors, errors_write = os.pipe2(os.O_CLOEXEC)
        ours, theirs = socket.socketpair()

        def child() -> None:
            syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)
            os.umask(0o022)
            if self._map is not None:
                syscalls.unshare(syscalls.CLONE_NEWUSER)
                theirs.send(b"+")
                if theirs.recv(1) != b"+":
                    return
                os.setgroups([])
                os.setresgid(0, 0, 0)
                os.setresuid(0, 0, 0)
                syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)  # a change of ids clears it
            work(lines_write)

        pid = _fork(child, errors_write)
        os.close(lines_write)
        os.close(errors_write)
        theirs.close()
        try:
            if self._map is not None and ours.recv(1) == b"+":
                for command, lines_of_map in zip(("newuidmap", "newgidmap"), self._map, strict=True):
                    done = subprocess.run([command, str(pid), *lines_of_map], capture_output=True, text=True)
                    if done.returncode:
                        raise ImageError(f"the ids of /etc/subuid could not be mapped: {done.stderr.strip()}")
                ours.send(b"+")
            with os.fdopen(lines) as reader:
                yield from reader
            with os.fdopen(errors) as failed:
                if text := failed.read():
                    raise UnpackError(text)
        finally:
            ours.close()
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
        if status:
            raise ImageError(f"the process that writes images ended with status {os.waitstatus_to_exitcode(status)}")


def _fork(work: Callable[[], None], errors: int) -> int:
    """A child that does `work` and exits; the sentence of what it raised goes to `errors`."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    try:
        work()
        os._exit(0)
    except SandboxSSHError as error:
        os.write(errors, str(error).encode(errors="backslashreplace"))
    except OSError as error:
        # tarfile raises some without a number, a file that shrank while it was read for example.
        text = f"{error.strerror}: {error.filename}" if error.strerror else str(error)
        os.write(errors, text.encode(errors="backslashreplace"))
    finally:
        os._exit(1)
