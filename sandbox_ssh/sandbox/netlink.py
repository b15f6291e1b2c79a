"""rtnetlink(7) messages for an uplink and for a sandbox's own end of it, encoded once by pyroute2.

Importing pyroute2 brings asyncio, threads and 24 MB, which every later fork would pay for (0.5 ms from a small
process, 7 ms from one of 200 MiB). So a child encodes the messages at the start and dies; what remains is bytes
in which one number is left to be filled in.
"""

from __future__ import annotations

import json
import os
import struct
from dataclasses import dataclass

from sandbox_ssh.errors import SandboxError

ADDRESS, PREFIX, GATEWAY, RESOLVER = "10.0.2.100", 24, "10.0.2.2", "10.0.2.3"
MTU = 65520
MAC = "52:55:0a:00:02:64"
BRIDGE, TAP_IN_SANDBOX = 16, 2  # interface indexes, ours to choose; slirp4netns's tap takes the lowest free
_PLACE = 0x7EADBEEF  # stands where the descriptor of N goes


@dataclass(frozen=True, slots=True)
class Messages:
    bridge: bytes
    """In E: the bridge."""
    attach_tap: bytes
    """In E: slirp4netns's tap into the bridge, with the MTU that all have: a bridge drops what a port cannot take."""
    veth: bytes
    """In E: the pair, its far end born in the sandbox's net namespace as `tap0`."""
    lo_up: bytes
    """In N."""
    tap_up: bytes
    """In N: lo and tap0 up, the address and the route."""
    tap_counters: bytes
    """In E: what has crossed slirp4netns's tap."""

    def veth_to(self, netns: int) -> bytes:
        return self.veth.replace(struct.pack("=I", _PLACE), struct.pack("=I", netns))


def encode() -> Messages:
    """Have a child encode the messages. Raises `SandboxError`."""
    read, write = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        try:
            os.close(read)
            with os.fdopen(write, "w") as pipe:
                json.dump({name: data.hex() for name, data in _encode().items()}, pipe)
        except Exception as error:
            os.write(2, f"sandbox-ssh[spawner]: {error!r}\n".encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        data = pipe.read()
    os.waitpid(pid, 0)
    if not data:
        raise SandboxError("netlink messages could not be encoded: is pyroute2 installed in this environment?")
    return Messages(**{name: bytes.fromhex(text) for name, text in json.loads(data).items()})


def _encode() -> dict[str, bytes]:
    from pyroute2.netlink import NLM_F_ACK, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REQUEST
    from pyroute2.netlink.rtnl import RTM_GETLINK, RTM_NEWADDR, RTM_NEWLINK, RTM_NEWROUTE
    from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg
    from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg
    from pyroute2.netlink.rtnl.rtmsg import rtmsg

    create = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL

    def message(kind: type, number: int, how: int, attributes: list[tuple[str, object]], **fields: object) -> bytes:
        result = kind()
        for name, value in fields.items():
            result[name] = value
        result["attrs"] = attributes
        result["header"]["type"] = number
        result["header"]["flags"] = how
        result["header"]["sequence_number"] = 1
        result.encode()
        return bytes(result.data)

    def link(how: int, attributes: list[tuple[str, object]], index: int = 0) -> bytes:
        # flags 1, change 1: IFF_UP
        return message(ifinfmsg, RTM_NEWLINK, how, attributes, index=index, flags=1, change=1)

    change = NLM_F_REQUEST | NLM_F_ACK
    peer = {
        "index": TAP_IN_SANDBOX,
        "attrs": [("IFLA_IFNAME", "tap0"), ("IFLA_NET_NS_FD", _PLACE), ("IFLA_ADDRESS", MAC), ("IFLA_MTU", MTU)],
    }
    pair = [
        ("IFLA_INFO_KIND", "veth"),
        ("IFLA_INFO_DATA", {"attrs": [("VETH_INFO_PEER", peer)]}),
    ]
    lo_up = link(change, [], index=1)
    address = message(
        ifaddrmsg, RTM_NEWADDR, create,
        [("IFA_LOCAL", ADDRESS), ("IFA_ADDRESS", ADDRESS), ("IFA_BROADCAST", "10.0.2.255")],
        family=2, prefixlen=PREFIX, index=TAP_IN_SANDBOX,
    )  # fmt: skip
    # table main, protocol boot, scope universe, type unicast (rtnetlink(7))
    route = message(
        rtmsg, RTM_NEWROUTE, create, [("RTA_GATEWAY", GATEWAY), ("RTA_OIF", TAP_IN_SANDBOX)],
        family=2, table=254, proto=3, scope=0, type=1,
    )  # fmt: skip
    return {
        "bridge": link(
            create,
            [("IFLA_IFNAME", "br0"), ("IFLA_MTU", MTU), ("IFLA_LINKINFO", {"attrs": [("IFLA_INFO_KIND", "bridge")]})],
            index=BRIDGE,
        ),
        "attach_tap": link(change, [("IFLA_IFNAME", "tap0"), ("IFLA_MASTER", BRIDGE), ("IFLA_MTU", MTU)]),
        "veth": link(
            create,
            [("IFLA_IFNAME", "veth0"), ("IFLA_MTU", MTU), ("IFLA_MASTER", BRIDGE), ("IFLA_LINKINFO", {"attrs": pair})],
        ),
        "lo_up": lo_up,
        "tap_counters": message(ifinfmsg, RTM_GETLINK, NLM_F_REQUEST, [("IFLA_IFNAME", "tap0")]),
        "tap_up": lo_up + link(change, [], index=TAP_IN_SANDBOX) + address + route,
    }


_IFLA_STATS64 = 23


def parse_counters(reply: bytes) -> tuple[int, int]:
    """(bytes that came in, bytes that went out) of the reply to `tap_counters`, from the sandbox's side.

    Header of 16 bytes, struct ifinfomsg of 16, attributes; struct rtnl_link_stats64 begins with packets in and out,
    then bytes in and out (linux/if_link.h). What slirp4netns writes into its tap comes in.
    """
    position = 32
    while position + 4 <= len(reply):
        length, kind = struct.unpack_from("=HH", reply, position)
        if kind == _IFLA_STATS64:
            _, _, received, sent = struct.unpack_from("=4Q", reply, position + 4)
            return received, sent
        position += max(4, (length + 3) & ~3)
    return 0, 0
