"""The file system that a sandbox starts with: what is prepared once for a node, and the recipe for each sandbox.

The recipe runs in a process of S (service mode: the host's root) with a mount namespace of its own, *before* the
tenant's user namespace exists. That is what makes it binding: mounts that were there when a mount namespace was
copied into a less privileged one are locked (mount_namespaces(7)); a mask or a read-only bind made inside the
tenant's own namespace could be undone by the tenant.

/proc and /sys: the kernel lets a user namespace mount a new procfs or sysfs only where a complete one is visible
already (fs/namespace.c, mount_too_revealing). The host's would show the host's processes to a tenant who unmounts
what lies above. So each sandbox gets, below the instances that PID 1 mounts for itself, those of a pid namespace
and a net namespace that died when they were made: complete, and empty of processes and interfaces.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import socket
import stat
from dataclasses import dataclass
from pathlib import Path

from sandbox_ssh.errors import SandboxError
from sandbox_ssh.sandbox import syscalls as sys
from sandbox_ssh.sandbox.holder import Holder

HOST_IMAGE = "host"
_NODES = ("null", "zero", "full", "random", "urandom", "tty")
_TMPFS = sys.MS_NOSUID | sys.MS_NODEV
_SPECIAL = sys.MS_NOSUID | sys.MS_NODEV | sys.MS_NOEXEC

# What a shell and common tools read of /etc, none of it secret on any distribution. Everything else is ours.
_ETC_FROM_HOST = (
    "alternatives", "bash.bashrc", "bindresvport.blacklist", "ca-certificates", "debian_version", "default/locale",
    "fonts", "gai.conf", "host.conf", "inputrc", "java-17-openjdk", "java-21-openjdk", "ld.so.cache", "ld.so.conf",
    "ld.so.conf.d", "locale.alias", "localtime", "login.defs", "lsb-release", "mime.types", "networks", "pam.d", "perl",
    "profile", "protocols", "python3", "rpc", "security", "services", "skel", "ssl/certs", "ssl/openssl.cnf",
    "terminfo", "timezone", "vim", "xattr.conf",
)  # fmt: skip

_PASSWD = """\
root:x:0:0:root:/root:/bin/bash
daemon:x:1:1:daemon:/usr/sbin:/usr/sbin/nologin
bin:x:2:2:bin:/bin:/usr/sbin/nologin
sys:x:3:3:sys:/dev:/usr/sbin/nologin
games:x:5:60:games:/usr/games:/usr/sbin/nologin
man:x:6:12:man:/var/cache/man:/usr/sbin/nologin
mail:x:8:8:mail:/var/mail:/usr/sbin/nologin
www-data:x:33:33:www-data:/var/www:/usr/sbin/nologin
_apt:x:42:65534::/nonexistent:/usr/sbin/nologin
user:x:1000:1000:user:/home/user:/bin/bash
nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin
"""
_GROUP = """\
root:x:0:
daemon:x:1:
bin:x:2:
sys:x:3:
adm:x:4:
tty:x:5:
disk:x:6:
man:x:12:
mail:x:8:
sudo:x:27:
www-data:x:33:
shadow:x:42:
utmp:x:43:
staff:x:50:
games:x:60:
user:x:1000:
nogroup:x:65534:
"""
_ETC = {
    "passwd": _PASSWD,
    "group": _GROUP,
    "shadow": "".join(f"{line.split(':')[0]}:*:19000:0:99999:7:::\n" for line in _PASSWD.splitlines()),
    "gshadow": "".join(f"{line.split(':')[0]}:*::\n" for line in _GROUP.splitlines()),
    "subuid": "",
    "subgid": "",
    "nsswitch.conf": "passwd: files\ngroup: files\nshadow: files\nhosts: files dns\n"
    "networks: files\nprotocols: files\nservices: files\n",
    "shells": "/bin/sh\n/bin/bash\n/usr/bin/sh\n/usr/bin/bash\n",
    "fstab": "",
    "motd": "",
}
_WRITABLE = (("tmp", 0o1777, "/tmp"), ("shm", 0o1777, "/dev/shm"), ("run", 0o755, "/run"))
NOTES = "/run/sandbox-ssh/quota"
_QUOTA_COMMAND = f"""\
#!/bin/sh
# quota: what you may use, what is in use, and how much time is left. The server keeps this file up to date.
exec cat {NOTES}
""".encode()
_DIRECTORIES = (
    ("etc", 0o755), ("home", 0o755), ("media", 0o755), ("mnt", 0o755), ("opt", 0o755), ("srv", 0o755),
    ("root", 0o700), ("usr", 0o755), ("proc", 0o555), ("sys", 0o555), ("dev", 0o755), ("run", 0o755),
    ("tmp", 0o1777), ("var", 0o755), ("var/cache", 0o755), ("var/lib", 0o755), ("var/local", 0o755),
    ("var/log", 0o755), ("var/mail", 0o755), ("var/opt", 0o755), ("var/spool", 0o755), ("var/tmp", 0o1777),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Layout:
    """What `build` needs of a sandbox's specification; sizes in bytes."""

    image: str
    hostname: str
    disk: int
    """Of all that is written, /tmp, /run and /dev/shm included; -1: as much as there is memory."""
    inodes: int
    ptys: int
    notes: str
    """What /run/sandbox-ssh/quota says at first."""


@dataclass(frozen=True, slots=True)
class Built:
    """Descriptors of a sandbox's file systems, opened before anything of the tenant's could be mounted over them."""

    pts: int
    """/dev/pts: PTYs are opened through it, never through a path (CVE-2025-52565)."""
    disk: int
    """The tmpfs that all is written to."""
    notes: int
    """The file /run/sandbox-ssh/quota, which the tenant sees read-only."""


class Base:
    """What all sandboxes of a node share, mounted once below the working directory of the process that makes it.

    The working directory, because it is the one place that the kernel moves along when a builder copies the mount
    namespace; a descriptor would still mean the mount of the old one, and open_tree(2) of a detached mount needs
    Linux 6.15. The caller is root of S in a private mount namespace; `work` and `images` are directories.
    """

    def __init__(self, work: str, images: str, init_user_namespace: bool) -> None:
        self._privileged = init_user_namespace
        tree = sys.open_tree(sys.AT_FDCWD, images, sys.OPEN_TREE_CLONE)
        sys.mount("tmpfs", work, "tmpfs", _TMPFS, "mode=0755,size=64m")
        os.chdir(work)
        for name in ("images", "proc", "sys", "usr", "dev", "skeleton", "upper"):
            os.mkdir(name, 0o755)
        sys.move_mount(tree, "images")
        os.close(tree)
        for name, donated in zip(("proc", "sys"), _donate(), strict=True):
            sys.move_mount(donated, name)
            os.close(donated)
        sys.mount("/usr", "usr", None, sys.MS_BIND)
        self._make_dev()
        self._make_skeleton()

    def _make_dev(self) -> None:
        """/dev: its nodes bound from the host's and checked to be what they are called (CVE-2025-31133)."""
        dev = "dev"
        sys.mount("tmpfs", dev, "tmpfs", sys.MS_NOSUID | sys.MS_NOEXEC, "mode=0755,size=64k,nr_inodes=64")
        for name in (*_NODES, "net/tun"):
            source = f"/dev/{name}"
            if not os.path.exists(source):
                continue
            if not stat.S_ISCHR(os.lstat(source).st_mode):
                raise SandboxError(f"{source} is not a character device: the host's /dev is not in order")
            os.makedirs(os.path.dirname(f"{dev}/{name}"), exist_ok=True)
            os.close(os.open(f"{dev}/{name}", os.O_CREAT | os.O_WRONLY | os.O_EXCL | os.O_CLOEXEC, 0o666))
            sys.mount(source, f"{dev}/{name}", None, sys.MS_BIND)
        for name, target in (
            ("fd", "/proc/self/fd"),
            ("stdin", "/proc/self/fd/0"),
            ("stdout", "/proc/self/fd/1"),
            ("stderr", "/proc/self/fd/2"),
            ("ptmx", "pts/ptmx"),
        ):
            os.symlink(target, f"{dev}/{name}")
        for name in ("pts", "shm", "mqueue"):
            os.mkdir(f"{dev}/{name}")
        sys.mount(None, dev, None, sys.MS_REMOUNT | sys.MS_BIND | sys.MS_RDONLY | sys.MS_NOSUID | sys.MS_NOEXEC)

    def _make_skeleton(self) -> None:
        """The image `host` without its /usr: an /etc of our own and the directories that programs expect."""
        root = "skeleton"
        sys.mount("tmpfs", root, "tmpfs", _TMPFS, "mode=0755,size=64m")
        for name, mode in _DIRECTORIES:
            os.mkdir(f"{root}/{name}")
            os.chmod(f"{root}/{name}", mode)
        os.symlink("/run", f"{root}/var/run")
        os.symlink("/run/lock", f"{root}/var/lock")
        for name in ("bin", "sbin", "lib", "lib32", "lib64", "libx32"):
            if os.path.islink(f"/{name}") and os.path.isdir(f"/usr/{name}"):
                os.symlink(f"usr/{name}", f"{root}/{name}")
        for name in _ETC_FROM_HOST:
            _copy_public(Path("/etc") / name, Path(root) / "etc" / name)
        for name, text in _ETC.items():
            path = f"{root}/etc/{name}"
            Path(path).write_text(text)
            os.chmod(path, 0o640 if name in ("shadow", "gshadow") else 0o644)
        if os.path.exists("/usr/lib/os-release"):
            os.symlink("../usr/lib/os-release", f"{root}/etc/os-release")
        os.symlink("/proc/self/mounts", f"{root}/etc/mtab")
        if Path(root, "etc/skel").is_dir():
            shutil.copytree(f"{root}/etc/skel", f"{root}/root", dirs_exist_ok=True, symlinks=True)
            shutil.copytree(f"{root}/etc/skel", f"{root}/home/user", symlinks=True)

    def has_image(self, name: str) -> bool:
        if name == HOST_IMAGE:
            return True
        try:
            os.stat(f"images/{name}/rootfs")
        except OSError:
            return False
        return True

    def build(self, layout: Layout, holder: Holder) -> Built:
        """Make the sandbox's root the root of the calling process, in a mount namespace of its own.

        Raises `OSError` for the step that failed.
        """
        unpacked = layout.image != HOST_IMAGE
        root = holder.ids.root_unpacked if unpacked else holder.ids.root
        sys.unshare(sys.CLONE_NEWNS)
        shared = [
            (sys.open_tree(sys.AT_FDCWD, name, sys.OPEN_TREE_CLONE | recursive), target)
            for name, target, recursive in (("dev", "/dev", sys.AT_RECURSIVE), ("proc", "/proc", 0), ("sys", "/sys", 0))
        ]
        # One tmpfs for all that the tenant writes; its size is the quota, and 0 stands for none (tmpfs(5)).
        sys.mount(
            "tmpfs", "upper", "tmpfs", _TMPFS & ~sys.MS_NOSUID,
            f"mode=0755,size={max(0, layout.disk)},nr_inodes={max(0, layout.inodes)}",
        )  # fmt: skip
        if unpacked:
            layers = [(f"images/{layout.image}/rootfs", "", "root")]
        else:
            layers = [("skeleton", "", "root"), ("usr", "usr-", "root/usr")]
        lowers = [sys.open_tree(sys.AT_FDCWD, lower, sys.OPEN_TREE_CLONE) for lower, _, _ in layers]
        os.chdir("upper")
        for name in ("root", "lower", "upper", "work", "usr-lower", "usr-upper", "usr-work"):
            os.mkdir(name, 0o755)
        disk = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        written = [(self._writable(name, mode, root), target) for name, mode, target in _WRITABLE]
        for tree, (lower, prefix, target) in zip(lowers, layers, strict=True):
            # An ordinary user's unpacked image has the owners of the one range that all such sandboxes share.
            mapped = self._map_owners(tree, holder) if self._privileged or not unpacked else True
            sys.move_mount(tree, f"{prefix}lower")
            os.close(tree)
            _give(f"{prefix}upper", root, os.stat(f"{prefix}lower"))
            if lower == "skeleton" and not mapped and root != 0:
                # Linux before 6.3 does not map the owners of a tmpfs. With a copy there is nothing to overlay.
                _copy_owned("lower", "upper", root)
                sys.mount("upper", target, None, sys.MS_BIND)
                self._make_room(layout, disk)
                continue
            if unpacked and not mapped:
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), "mapping the owners of the image's file system")
            if lower != "skeleton":
                _add_command(prefix, "usr/local/bin/quota" if unpacked else "local/bin/quota", root)
            self._overlay(prefix, target)
        # From here on every path is the sandbox's: an image's symbolic link leads nowhere else (CVE-2021-30465).
        os.chdir("root")
        sys.pivot_root(".", ".")
        sys.umount(".", sys.MNT_DETACH)
        os.chdir("/")
        for name, mode in (
            ("proc", 0o555),
            ("sys", 0o555),
            ("dev", 0o755),
            ("run", 0o755),
            ("tmp", 0o1777),
            ("etc", 0o755),
        ):
            with contextlib.suppress(FileExistsError):
                os.mkdir(name, mode)
                os.chown(name, root, root)
        for tree, target in (*shared, *written):
            sys.move_mount(tree, target)
            os.close(tree)
        tty = root + 5 if holder.ids.holder.extents[0][2] > 1 else root
        sys.mount(
            "devpts", "/dev/pts", "devpts", sys.MS_NOSUID | sys.MS_NOEXEC,
            f"newinstance,ptmxmode=0666,mode=0620,gid={tty}{f',max={layout.ptys}' if layout.ptys >= 0 else ''}",
        )  # fmt: skip
        _write_names(layout.hostname, root)
        return Built(
            os.open("/dev/pts", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC), disk, _post_notes(layout.notes, root)
        )

    @staticmethod
    def _make_room(layout: Layout, disk: int) -> None:
        """What is there before the tenant is not of the tenant's quota: the tmpfs becomes as much larger."""
        used = os.fstatvfs(disk)
        size = layout.disk + (used.f_blocks - used.f_bfree) * used.f_frsize if layout.disk > 0 else 0
        inodes = layout.inodes + used.f_files - used.f_ffree if layout.inodes > 0 else 0
        sys.mount(None, ".", None, sys.MS_REMOUNT | _TMPFS & ~sys.MS_NOSUID, f"size={size},nr_inodes={inodes}")

    @staticmethod
    def _writable(name: str, mode: int, root: int) -> int:
        """A directory of the tenant's on its one disk, as a detached mount without setuid programs."""
        os.mkdir(name)
        os.chmod(name, mode)
        os.chown(name, root, root)
        tree = sys.open_tree(sys.AT_FDCWD, name, sys.OPEN_TREE_CLONE)
        sys.mount_setattr(tree, set_flags=sys.MOUNT_ATTR_NOSUID | sys.MOUNT_ATTR_NODEV)
        return tree

    def _map_owners(self, tree: int, holder: Holder) -> bool:
        """Make the owners of a detached mount the tenant's, where its file system can do that (mount_setattr(2)).

        One that another user namespace mounted cannot be mapped by ours (EPERM), and some cannot at all (EINVAL).
        Files then belong to `nobody` inside: readable, not writable.
        """
        try:
            sys.mount_setattr(tree, set_flags=sys.MOUNT_ATTR_IDMAP, userns=holder.owner)
        except OSError:
            return False
        return True

    def _overlay(self, prefix: str, target: str) -> None:
        # trusted.* attributes are for the initial namespace's root; elsewhere overlayfs keeps its notes in user.*
        data = f"lowerdir={prefix}lower,upperdir={prefix}upper,workdir={prefix}work"
        sys.mount("overlay", target, "overlay", sys.MS_NODEV, data if self._privileged else f"{data},userxattr")


def _give(path: str, root: int, like: os.stat_result) -> None:
    os.chmod(path, stat.S_IMODE(like.st_mode))
    os.chown(path, root, root)


def _copy_owned(source: str, target: str, root: int) -> None:
    """Copy a tree of our own making, all of it the tenant's root's: a fraction of a megabyte, some milliseconds."""
    shutil.copytree(source, target, symlinks=True, dirs_exist_ok=True)
    for directory, directories, files in os.walk(target):
        for name in (*directories, *files):
            os.chown(os.path.join(directory, name), root, root, follow_symlinks=False)


def _donate() -> tuple[int, int]:
    """Detached mounts of the procfs and the sysfs of a pid and a net namespace that are gone when this returns."""
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        try:
            sys.unshare(sys.CLONE_NEWPID | sys.CLONE_NEWNET)
            if os.fork() == 0:
                fds = [sys.fsmount("proc", _SPECIAL), sys.fsmount("sysfs", _SPECIAL)]
                socket.send_fds(theirs, [b"+"], fds)
                os._exit(0)
            os.wait()
        except OSError as error:
            theirs.send(str(error).encode()[:512])
        finally:
            os._exit(0)
    theirs.close()
    message, fds, _, _ = socket.recv_fds(ours, 512, 2, socket.MSG_CMSG_CLOEXEC)
    os.waitpid(pid, 0)
    ours.close()
    if len(fds) != 2:
        raise SandboxError(f"a proc and a sysfs for sandboxes could not be made: {message.decode(errors='replace')}")
    return fds[0], fds[1]


def _copy_public(source: Path, target: Path) -> None:
    """Copy a file or tree of the host's /etc, world-readable parts only, links as links."""

    def readable(directory: str, names: list[str]) -> set[str]:
        return {name for name in names if not _public(Path(directory, name))}

    if not source.exists() or not _public(source):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, symlinks=True, ignore=readable)
    else:
        shutil.copy2(source, target, follow_symlinks=False)


def _public(path: Path) -> bool:
    mode = path.lstat().st_mode
    return (stat.S_ISLNK(mode) or stat.S_ISREG(mode) or stat.S_ISDIR(mode)) and bool(mode & stat.S_IROTH)


def _post_notes(text: str, root: int) -> int:
    """Put up /run/sandbox-ssh/quota; returns the descriptor to write the file by.

    A file system of its own: full disks do not stop it, and read-only from the tenant's side only.
    """
    directory = os.path.dirname(NOTES)
    os.mkdir(directory, 0o755)
    os.chown(directory, root, root)
    sys.mount("tmpfs", directory, "tmpfs", _TMPFS | sys.MS_NOEXEC, "mode=0755,size=64k,nr_inodes=4")
    notes = os.open(NOTES, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o444)
    write_notes(notes, text)
    # Another mount of it: what is open for writing keeps its own from becoming read-only.
    shown = sys.open_tree(sys.AT_FDCWD, directory, sys.OPEN_TREE_CLONE)
    sys.umount(directory, sys.MNT_DETACH)
    sys.mount_setattr(shown, set_flags=sys.MOUNT_ATTR_RDONLY)
    sys.move_mount(shown, directory)
    os.close(shown)
    return notes


def write_notes(fd: int, text: str) -> None:
    """One write, so that a reader sees the old text or the new one; then what was longer before is cut off."""
    data = text.encode()
    os.pwrite(fd, data, 0)
    os.ftruncate(fd, len(data))


def _add_command(prefix: str, path: str, root: int) -> None:
    """Put the command `quota` into an overlay's upper layer, unless the image has a file or another directory there.

    Before the overlay is mounted: in it, directories whose owner has no id here could not be written to.
    """
    directories = path.split("/")[:-1]
    here = ""
    for directory in directories:
        here = f"{here}/{directory}"
        try:
            below = os.lstat(f"{prefix}lower{here}")
        except FileNotFoundError:
            return
        if not stat.S_ISDIR(below.st_mode):  # a link would hide what it leads to
            return
    if os.path.lexists(f"{prefix}lower/{path}"):
        return
    here = ""
    for directory in directories:
        here = f"{here}/{directory}"
        os.mkdir(f"{prefix}upper{here}")
        _give(f"{prefix}upper{here}", root, os.lstat(f"{prefix}lower{here}"))
    fd = os.open(f"{prefix}upper/{path}", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC)
    os.write(fd, _QUOTA_COMMAND)
    os.fchown(fd, root, root)
    os.fchmod(fd, 0o755)
    os.close(fd)


def _write_names(hostname: str, root: int) -> None:
    """hostname, hosts and resolv.conf: ours, whatever an image has there (a link into /run, often)."""
    for name, text in (
        ("/etc/hostname", f"{hostname}\n"),
        ("/etc/hosts", f"127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n127.0.1.1 {hostname}\n"),
        ("/etc/resolv.conf", "nameserver 10.0.2.3\n"),
    ):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        os.fchown(fd, root, root)
        os.write(fd, text.encode())
        os.close(fd)
