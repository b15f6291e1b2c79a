"""File systems: overlay, extended attributes on tmpfs, idmapped mounts. Each is tried, on this host's /usr."""

from __future__ import annotations

import os
from pathlib import Path

from sandbox_ssh.errors import SandboxError
from sandbox_ssh.sandbox import syscalls as sys
from sandbox_ssh.sandbox.holder import new_user_namespace
from sandbox_ssh.sandbox.host import scratch
from sandbox_ssh.sandbox.host.finding import Finding, Needs, as_root, bad, good, weak
from sandbox_ssh.sandbox.idmap import BLOCK, Map


def overlay(needs: Needs) -> list[Finding]:
    """As rootless sandboxes mount it, and as tenants in both modes may."""
    try:
        scratch.enter_user_namespace(sys.CLONE_NEWNS)
        scratch.mount_work()
        _mount_overlay("/usr", "userxattr")
    except OSError as error:
        report = bad if needs.mode == "rootless" else weak
        return report(
            "overlayfs",
            str(error),
            "An overlay cannot be mounted in a user namespace: no writable root file system without root."
            if needs.mode == "rootless"
            else "Sandboxes start, but people in them cannot mount an overlay.",
            f"{as_root('modprobe overlay')} (needs a kernel of 5.11 or later with CONFIG_OVERLAY_FS)",
        )
    return good("overlayfs", "mounted and written over /usr in a user namespace", "Sandboxes can write to their root.")


def _mount_overlay(lower: str, options: str) -> None:
    for name in ("upper", "work", "root"):
        os.mkdir(name)
    sys.mount(
        "overlay",
        "root",
        "overlay",
        0,
        ",".join(filter(None, (f"lowerdir={lower}", "upperdir=upper,workdir=work", options))),
    )
    Path("root/written").write_text("")


def tmpfs_xattrs(needs: Needs) -> list[Finding]:
    try:
        scratch.enter_user_namespace(sys.CLONE_NEWNS)
        scratch.mount_work()
        os.mkdir("file")
        os.setxattr("file", "user.overlay.opaque", b"y")
    except OSError as error:
        if needs.mode == "service":
            return good(
                "tmpfs-xattrs", f"none: {error}", "Needed in rootless mode only; root's overlays use trusted.* instead."
            )
        return weak(
            "tmpfs-xattrs",
            str(error),
            "In a sandbox a directory of the image cannot be removed and made again; some packages do that.",
            "Boot a kernel of 6.6 or later (Debian 12: linux-image-amd64 from bookworm-backports).",
        )
    return good("tmpfs-xattrs", "user.* attributes work on tmpfs", "Directories of an image can be replaced.")


def idmapped_mounts(needs: Needs) -> list[Finding]:
    """/usr as a sandbox sees it in service mode: root's files belong to a tenant's root, in an overlay."""
    if needs.mode == "rootless" or os.geteuid() != 0:
        return []
    try:
        owner = new_user_namespace(Map(((0, needs.first_id, BLOCK),)), groups=True)
        sys.unshare(sys.CLONE_NEWNS)
        scratch.mount_work()
        os.mkdir("mapped")
        tree = sys.open_tree(sys.AT_FDCWD, "/usr", sys.OPEN_TREE_CLONE)
        sys.mount_setattr(tree, set_flags=sys.MOUNT_ATTR_IDMAP, userns=owner)
        sys.move_mount(tree, "mapped")
        _mount_overlay("mapped", "")
        seen = os.stat("root/bin").st_uid
    except (OSError, SandboxError) as error:
        return _not_mapped(str(error))
    if seen != needs.first_id:
        return _not_mapped(f"root's file in /usr is {seen}'s in the mount, not {needs.first_id}'s")
    return good(
        "idmapped-mounts", "/usr mapped, under an overlay", "Files of an image are root's inside; setuid works."
    )


def _not_mapped(found: str) -> list[Finding]:
    return weak(
        "idmapped-mounts",
        found,
        "Files of the image belong to `nobody` inside: `apt-get install`, `su` and `sudo` do not work there.",
        "Keep / on ext4, xfs or btrfs (not overlayfs or NFS) and boot a kernel of 5.19 or later.",
    )
