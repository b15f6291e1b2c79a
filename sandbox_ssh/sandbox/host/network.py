"""What an uplink is made of: /dev/net/tun, nftables on a bridge, veth; and whether ping gets out."""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import struct
import subprocess
from pathlib import Path

from sandbox_ssh.errors import SandboxError
from sandbox_ssh.sandbox.host import scratch
from sandbox_ssh.sandbox.host.finding import PROGRAMS, Finding, Needs, as_root, bad, good, install, set_sysctl, weak
from sandbox_ssh.sandbox.host.ids import subordinate

_TUN = "/dev/net/tun"
_TUNSETIFF, _IFF_TAP, _IFF_NO_PI = 0x400454CA, 0x0002, 0x1000
_TABLE = """\
table bridge doctor {
    chain forward {
        type filter hook forward priority 0; policy drop
        iifname "tap0" meta l4proto tcp counter drop
    }
}
"""


def tun(needs: Needs) -> list[Finding]:
    """slirp4netns opens it as an id that is not root's; so does a nested slirp4netns in a sandbox."""
    try:
        mode = os.stat(_TUN).st_mode
    except FileNotFoundError:
        return bad(
            "tun",
            f"{_TUN} does not exist",
            "slirp4netns makes its interface through it: no sandbox has a network.",
            f"{as_root('modprobe tun')} (in a container: pass the device, Docker's `--device {_TUN}`)",
        )
    found = f"{_TUN}, mode {stat.S_IMODE(mode):04o}"
    if mode & 0o006 != 0o006:
        # udev's own rule gives it 0666 (systemd's 50-udev-default.rules): the device guards nothing by itself.
        return bad(
            "tun",
            found,
            "slirp4netns runs as an id that has no other rights, and cannot open it: no sandbox has a network.",
            as_root(f"chmod 0666 {_TUN}"),
        )
    try:
        scratch.enter_uplink(needs)
        with open(_TUN, "r+b", buffering=0) as device:
            fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH22x", b"tap0", _IFF_TAP | _IFF_NO_PI))
    except (OSError, SandboxError) as error:
        return bad("tun", f"{found}: {error}", "No tap device can be made.", as_root("modprobe tun"))
    return good("tun", found, "Sandboxes, and slirp4netns inside them, can make tap devices.")


def nftables(needs: Needs) -> list[Finding]:
    program = shutil.which("nft", path=PROGRAMS)
    meaning = "Without its filter a sandbox would reach the host's loopback, so it gets no network."
    if program is None:
        return bad("nftables", "nft is not installed", meaning, install("nftables"))
    try:
        scratch.enter_uplink(needs)
    except (OSError, SandboxError) as error:
        return bad("nftables", str(error), "No net namespace can be made to try it in.", _see("user-namespaces"))
    for step in (_TABLE, "delete table bridge doctor\n"):
        result = subprocess.run([program, "-f", "-"], input=step, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            return bad(
                "nftables",
                f"nft says: {(result.stderr.strip().splitlines() or ['nothing'])[0]}",
                meaning,
                as_root("modprobe -a nf_tables nf_tables_bridge nft_meta_bridge"),
            )
    return good("nftables", f"{program}: a bridge table made and deleted", "What a sandbox may reach is filtered.")


def bridge(needs: Needs) -> list[Finding]:
    from pyroute2 import IPRoute  # brings asyncio and 24 MB: not for those who import this module for another check
    from pyroute2.netlink.exceptions import NetlinkError

    try:
        scratch.enter_uplink(needs)
    except (OSError, SandboxError) as error:
        return bad("bridge", str(error), "No net namespace can be made to try it in.", _see("user-namespaces"))
    with IPRoute() as links:
        for kind, options in (("bridge", {}), ("veth", {"peer": "peer0"})):
            try:
                links.link("add", ifname=f"{kind}0", kind=kind, **options)
            except NetlinkError as error:
                return bad(
                    "bridge",
                    f"{kind}: {error}",
                    "An uplink is a bridge and a veth pair: no sandbox has a network.",
                    as_root("modprobe -a bridge veth"),
                )
    return good("bridge", "a bridge and a veth pair were made", "Uplinks can be made.")


def _see(check: str) -> str:
    return f"Mend `{check}` first."


def ping(needs: Needs) -> list[Finding]:
    """ICMP echo sockets are for the groups in this range (icmp(7)); slirp4netns sends a sandbox's ping through one."""
    lowest, highest = (int(word) for word in Path("/proc/sys/net/ipv4/ping_group_range").read_text().split())
    found = f"net.ipv4.ping_group_range = {lowest} {highest}"
    if lowest <= _group_of_slirp4netns(needs) <= highest:
        return good("ping", found, "ping to the outside works.")
    return weak(
        "ping",
        found,
        "ping from a sandbox to the outside gets no answer; TCP and UDP are not affected.",
        set_sysctl("net.ipv4.ping_group_range", "0 2147483647"),
    )


def _group_of_slirp4netns(needs: Needs) -> int:
    """The host's id of root in the uplinks' user namespace (`idmap.Plan.uplink`)."""
    if needs.mode == "service":
        return needs.first_id
    first, count = subordinate("gid")
    return first + 1 if count else os.getegid()
