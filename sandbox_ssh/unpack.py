"""Unpacking a tar stream beneath one directory, whatever the stream says.

An archive is a list of names chosen by a stranger, some of them symbolic links that later names pass through. Every
name here is looked up by the kernel with that directory as its root (openat2(2), RESOLVE_IN_ROOT): `bin/x` after
`bin -> usr/bin` arrives in usr/bin as it would inside the sandbox, and `x -> /etc` leads to the image's own /etc. The
last component is never followed at all. Nothing is ever looked up by a path of the host's.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import lzma
import os
import stat
import struct
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO

from sandbox_ssh.errors import SandboxSSHError

CAPABILITY = "security.capability"
CAPABILITY_HEADER = f"SCHILY.xattr.{CAPABILITY}"

_NR_OPENAT2 = 437  # the same on every architecture
_RESOLVE_NO_XDEV, _RESOLVE_NO_MAGICLINKS, _RESOLVE_IN_ROOT = 0x01, 0x02, 0x10
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_COPY = 1 << 20
# Of a header that describes the next entry: tarfile reads it into memory, whatever length it claims.
_LONGEST_HEADER = 1 << 20
_DESCRIPTIONS = (
    tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK
)  # fmt: skip

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


class UnpackError(SandboxSSHError):
    """An archive that is damaged, too large, or that asks for what no image may have."""


@dataclass(frozen=True, slots=True)
class Limits:
    bytes: int = 20 << 30
    entries: int = 2_000_000
    ids: int | None = 65536
    """How many user and group ids the image may use; None gives everything to the user that unpacks it."""


@dataclass(slots=True)
class Counts:
    bytes: int = 0
    entries: int = 0
    skipped: int = 0
    """Device nodes and fifos: a sandbox has its own /dev, and no other devices."""


class _Header(tarfile.TarInfo):
    """tarfile takes a damaged header, and an end without the two blocks of zeros, for the end of the archive."""

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> _Header:
        try:
            return super().fromtarfile(tarfile_)
        except tarfile.HeaderError as error:
            if type(error).__name__ == "EOFHeaderError":  # a block of zeros; the class has no public name
                raise
            raise tarfile.ReadError(str(error)) from None

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Header:
        header = super().frombuf(buf, encoding, errors)
        if header.size < 0:
            raise tarfile.ReadError("a negative length")
        if header.type in _DESCRIPTIONS and header.size > _LONGEST_HEADER:
            raise tarfile.ReadError("a header of unreasonable length")
        return header


def unpack(stream: IO[bytes], root: int, limits: Limits, progress: Callable[[Counts], None]) -> Counts:
    """Unpack a tar archive, compressed or not, beneath the open directory `root`. Raises `UnpackError`."""
    tree = _Tree(root, limits)
    try:
        with tarfile.open(
            fileobj=stream, mode="r|*", tarinfo=_Header, encoding="utf-8", errors="surrogateescape"
        ) as archive:
            while (entry := archive.next()) is not None:
                archive.members.clear()  # type: ignore[attr-defined]  # else it keeps every entry until the end
                tree.add(entry, archive)
                progress(tree.counts)
    except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, ValueError) as error:
        if not tree.counts.entries:
            raise UnpackError(f"this is no tar archive, plain or of gzip, bzip2 or xz ({error})") from error
        raise UnpackError(f"the archive is damaged or cut short after {tree.counts.entries} entries") from error
    if not tree.counts.entries:
        raise UnpackError("the archive is empty")
    tree.finish()
    return tree.counts


class _Tree:
    def __init__(self, root: int, limits: Limits) -> None:
        self.counts = Counts()
        self._root = root
        self._limits = limits
        self._skipped: set[str] = set()
        self._directories: dict[str, tarfile.TarInfo] = {}
        """To be given their modes and times last: until then entries go into them."""

    def add(self, entry: tarfile.TarInfo, archive: tarfile.TarFile) -> None:
        self._count(entry)
        path = _plain(entry.name)
        try:
            if not path:
                if not entry.isdir():
                    raise UnpackError("the archive has something else than a directory in the place of its root")
                self._directories[path] = entry
            elif entry.isdir():
                self._directory(path, entry)
            elif entry.ischr() or entry.isblk() or entry.isfifo():
                self.counts.skipped += 1
                self._skipped.add(path)
            else:
                self._other(path, entry, archive)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS):
                raise UnpackError(f"the image cannot be written: {error.strerror}") from error
            raise UnpackError(f"the archive's entry {entry.name!r} cannot be made: {error.strerror}") from error

    def finish(self) -> None:
        # The deepest first: a mode may close the way to what is below.
        for path, entry in sorted(self._directories.items(), reverse=True):
            try:
                parent, name = self._parent(path, make=False) if path else (os.dup(self._root), ".")
                try:
                    fd = os.open(name, _DIRECTORY | os.O_NOFOLLOW, dir_fd=parent)
                finally:
                    os.close(parent)
                try:
                    self._describe(fd, entry, 0o755 if not path else stat.S_IMODE(entry.mode))
                finally:
                    os.close(fd)
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):  # a later entry has replaced it
                    raise UnpackError(f"the directory {entry.name!r} cannot be made: {error.strerror}") from error

    def _count(self, entry: tarfile.TarInfo) -> None:
        counts, limits = self.counts, self._limits
        _check_extents(entry)
        counts.entries += 1
        counts.bytes += entry.size if entry.isreg() else 0
        if counts.entries > limits.entries:
            raise UnpackError(f"the image has more than {limits.entries} entries")
        if counts.bytes > limits.bytes:
            raise UnpackError(f"the image is larger than {limits.bytes} bytes")
        if limits.ids is not None and not (0 <= entry.uid < limits.ids and 0 <= entry.gid < limits.ids):
            raise UnpackError(
                f"{entry.name!r} belongs to user {entry.uid}, group {entry.gid}: here ids go up to {limits.ids - 1}"
            )

    def _directory(self, path: str, entry: tarfile.TarInfo) -> None:
        parent, name = self._parent(path)
        try:
            try:
                os.mkdir(name, 0o700, dir_fd=parent)
            except FileExistsError:
                mode = os.lstat(name, dir_fd=parent).st_mode
                if stat.S_ISLNK(mode) and self._leads_to_directory(path):
                    return  # `lib/` in an archive whose /lib is a link to usr/lib: the link stays, as with dpkg
                if not stat.S_ISDIR(mode):
                    os.unlink(name, dir_fd=parent)
                    os.mkdir(name, 0o700, dir_fd=parent)
        finally:
            os.close(parent)
        self._directories[path] = entry

    def _leads_to_directory(self, path: str) -> bool:
        try:
            os.close(open_in_root(self._root, path))
        except OSError:
            return False
        return True

    def _other(self, path: str, entry: tarfile.TarInfo, archive: tarfile.TarFile) -> None:
        target = _plain(entry.linkname) if entry.islnk() else ""
        if entry.islnk() and target in self._skipped:
            self.counts.skipped += 1
            return
        parent, name = self._parent(path)
        try:
            if entry.islnk():
                self._hard_link(target, parent, name, entry)
                return
            _make_room(parent, name)
            if entry.issym():
                os.symlink(entry.linkname, name, dir_fd=parent)
                if self._limits.ids is not None:
                    os.chown(name, entry.uid, entry.gid, dir_fd=parent, follow_symlinks=False)
                os.utime(name, ns=_times(entry), dir_fd=parent, follow_symlinks=False)
            elif entry.isreg():
                self._file(parent, name, entry, archive)
            else:
                raise UnpackError(f"the archive's entry {entry.name!r} is of an unknown type")
        finally:
            os.close(parent)

    def _hard_link(self, target: str, parent: int, name: str, entry: tarfile.TarInfo) -> None:
        try:
            source, last = self._parent(target, make=False)
        except FileNotFoundError:
            raise self._no_target(entry) from None
        try:
            found, there = os.lstat(last, dir_fd=source), None
            with contextlib.suppress(FileNotFoundError):
                there = os.lstat(name, dir_fd=parent)
            if there is not None and (there.st_dev, there.st_ino) == (found.st_dev, found.st_ino):
                return  # a link to itself: nothing must be removed to make room for it
            if stat.S_ISDIR(found.st_mode):
                raise UnpackError(f"the archive's entry {entry.name!r} is a hard link to a directory")
            _make_room(parent, name)
            os.link(last, name, src_dir_fd=source, dst_dir_fd=parent, follow_symlinks=False)
        except FileNotFoundError:
            raise self._no_target(entry) from None
        finally:
            os.close(source)

    def _no_target(self, entry: tarfile.TarInfo) -> UnpackError:
        return UnpackError(
            f"the archive's entry {entry.name!r} is a hard link to {entry.linkname!r}, which it does not have"
        )

    def _file(self, parent: int, name: str, entry: tarfile.TarInfo, archive: tarfile.TarFile) -> None:
        source = archive.extractfile(entry)
        assert source is not None  # of a regular file it never is
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with os.fdopen(os.open(name, flags, 0o600, dir_fd=parent), "wb", buffering=0) as file:
            left = entry.size
            while left:
                data = source.read(min(left, _COPY))
                if not data:
                    raise tarfile.ReadError("unexpected end of data")
                _write_all(file.fileno(), data)
                left -= len(data)
            self._describe(file.fileno(), entry, stat.S_IMODE(entry.mode))

    def _describe(self, fd: int, entry: tarfile.TarInfo, mode: int) -> None:
        if self._limits.ids is not None:
            os.fchown(fd, entry.uid, entry.gid)
        os.fchmod(fd, mode)  # after fchown(2), which takes setuid bits and capabilities away
        if self._limits.ids is not None and (capability := entry.pax_headers.get(CAPABILITY_HEADER)):
            # Not every file system has it; without it `ping` wants another way, and the rest works.
            with contextlib.suppress(OSError):
                os.setxattr(fd, CAPABILITY, capability.encode("utf-8", "surrogateescape"))
        os.utime(fd, ns=_times(entry))

    def _parent(self, path: str, make: bool = True) -> tuple[int, str]:
        """A descriptor of the directory that a path's last component is in, for the caller to close."""
        directory, _, name = path.rpartition("/")
        if not directory:
            if not name:
                raise UnpackError("the archive has a link to its own root")
            return os.dup(self._root), name
        try:
            return open_in_root(self._root, directory), name
        except FileNotFoundError:
            if not make:
                raise
        missing = [directory]
        while True:
            above = missing[-1].rpartition("/")[0]
            if not above:
                break
            try:
                os.close(open_in_root(self._root, above))
                break
            except FileNotFoundError:
                missing.append(above)
        for step in reversed(missing):
            above, _, last = step.rpartition("/")
            fd = open_in_root(self._root, above) if above else os.dup(self._root)
            try:
                os.mkdir(last, 0o755, dir_fd=fd)
            finally:
                os.close(fd)
        return open_in_root(self._root, directory), name


def _plain(name: str) -> str:
    """A name of the archive without `.` and doubled slashes; "" is the root. Raises `UnpackError`."""
    if name.startswith("/"):
        raise UnpackError(f"the archive's entry {name!r} is an absolute path")
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise UnpackError(f"the archive's entry {name!r} leads upwards")
    if "\0" in name:
        raise UnpackError(f"the archive's entry {name!r} has a NUL in its name")
    return "/".join(parts)


def _check_extents(entry: tarfile.TarInfo) -> None:
    """A length below zero (pax headers may say so) would count as room; a sparse file's parts out of order make
    tarfile look for one of them forever."""
    end = 0
    for offset, length in getattr(entry, "sparse", None) or ():
        if not length:
            continue  # what fills up a header's table
        if offset < end or length < 0:
            end = entry.size + 1
            break
        end = offset + length
    if entry.size < 0 or end > entry.size:
        raise tarfile.ReadError("lengths that cannot be")


def _make_room(parent: int, name: str) -> None:
    """The last entry of a name counts, as with tar(1); a directory gives way only when it is empty."""
    try:
        os.unlink(name, dir_fd=parent)
    except FileNotFoundError:
        pass
    except IsADirectoryError:
        os.rmdir(name, dir_fd=parent)


def _times(entry: tarfile.TarInfo) -> tuple[int, int]:
    # Beyond what a file system can hold, the kernel takes the nearest; beyond 64 bits, Python fails.
    time = int(max(min(float(entry.mtime), 2**33), 0) * 1_000_000_000)
    return time, time


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def open_in_root(root: int, path: str) -> int:
    """openat2(2) of a directory: no component leads out of `root`, into another file system or through /proc."""
    resolve = _RESOLVE_IN_ROOT | _RESOLVE_NO_MAGICLINKS | _RESOLVE_NO_XDEV
    how = struct.pack("=QQQ", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, 0, resolve)
    while True:
        result = _libc.syscall(
            ctypes.c_long(_NR_OPENAT2), ctypes.c_int(root), os.fsencode(path), how, ctypes.c_size_t(len(how))
        )
        if result >= 0:
            return int(result)
        number = ctypes.get_errno()
        if number not in (errno.EAGAIN, errno.EINTR):  # EAGAIN: something was renamed somewhere meanwhile
            raise OSError(number, os.strerror(number), path)
