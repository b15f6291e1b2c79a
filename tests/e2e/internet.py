"""A little internet of this test's own: two net namespaces, and stand-ins that count who reaches them.

    host namespace "here"  (the server, its clients, services on 127.0.0.1 and on its LAN address)
        | veth
    "there": 198.51.100.10 a public host and its resolver, 192.168.77.10 a machine of the LAN, 169.254.169.254 metadata

Run as a program it is a stand-in: `internet.py ADDRESS...` serves TCP (sends `hello`), UDP (echoes) on port 7000 and,
at the resolver, DNS (every name is 198.51.100.10); a line of stdout for each contact.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

PUBLIC, LAN, METADATA = "198.51.100.10", "192.168.77.10", "169.254.169.254"
HERE_PUBLIC, HERE_LAN = "198.51.100.2", "192.168.77.2"
PORT = 7000


class StandIn:
    """A process that serves on addresses in a net namespace, and what it saw."""

    def __init__(self, namespace: str, *addresses: str) -> None:
        self.contacts: list[str] = []
        self._process = subprocess.Popen(
            ["ip", "netns", "exec", namespace, sys.executable, __file__, *addresses], stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.contacts.append(line.strip())

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
        self._reader.join(5)


class Internet:
    def __init__(self, here: str, there: str, resolv_conf: Path) -> None:
        self.here, self.there = here, there
        self.prefix = (
            "ip", "netns", "exec", here, "unshare", "-m", "sh", "-c",
            f'mount --bind {resolv_conf} "$(readlink -f /etc/resolv.conf)" && exec "$@"', "sh",
        )  # fmt: skip


@contextlib.contextmanager
def internet() -> Iterator[Internet]:
    here, there = (f"sbx-{name}-{os.getpid()}" for name in ("here", "there"))
    directory = Path(tempfile.mkdtemp(prefix="sandbox-ssh-net-"))
    directory.chmod(0o755)
    resolv_conf = directory / "resolv.conf"
    resolv_conf.write_text(f"nameserver {PUBLIC}\n")

    def ip(*words: str, namespace: str | None = None) -> None:
        subprocess.run(["ip", *(("-n", namespace) if namespace else ()), *words], check=True)

    try:
        for name in (here, there):
            ip("netns", "add", name)
            ip("link", "set", "lo", "up", namespace=name)
        ip("link", "add", "eth0", "netns", here, "type", "veth", "peer", "name", "eth0", "netns", there)
        for name, addresses in ((here, (HERE_PUBLIC, HERE_LAN)), (there, (PUBLIC, LAN, METADATA))):
            ip("link", "set", "eth0", "up", namespace=name)
            for address in addresses:
                ip("addr", "add", f"{address}/24", "dev", "eth0", namespace=name)
        ip("route", "add", METADATA, "dev", "eth0", namespace=here)
        subprocess.run(
            ["ip", "netns", "exec", here, "sysctl", "-qw", "net.ipv4.ping_group_range=0 2147483647"], check=True
        )
        yield Internet(here, there, resolv_conf)
    finally:
        for name in (here, there):
            subprocess.run(["ip", "netns", "del", name], check=False)
        resolv_conf.unlink()
        directory.rmdir()


def answer(query: bytes) -> bytes:
    """A DNS answer: one A record, 198.51.100.10, to the question in `query` (RFC 1035 section 4)."""
    end = query.index(b"\0", 12) + 5
    question = query[12:end]
    if question[-4:-2] != b"\0\1":  # not for an A record: no answer, no error
        return query[:2] + b"\x81\x80\0\1\0\0\0\0\0\0" + question
    record = b"\xc0\x0c\0\1\0\1\0\0\0\x3c\0\4" + socket.inet_aton(PUBLIC)
    return query[:2] + b"\x81\x80\0\1\0\1\0\0\0\0" + question + record


def serve(addresses: list[str]) -> None:
    selector = selectors.DefaultSelector()
    for address in addresses:
        tcp = socket.socket()
        tcp.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        tcp.bind((address, PORT))
        tcp.listen()
        selector.register(tcp, selectors.EVENT_READ, "tcp")
        udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        udp.bind((address, PORT))
        selector.register(udp, selectors.EVENT_READ, "udp")
        if address == PUBLIC:
            resolver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            resolver.bind((address, 53))
            selector.register(resolver, selectors.EVENT_READ, "dns")
    print("ready", flush=True)
    end = time.monotonic() + 600
    while time.monotonic() < end:
        for key, _ in selector.select(1):
            listener = key.fileobj
            assert isinstance(listener, socket.socket)
            if key.data == "tcp":
                connection, peer = listener.accept()
                with connection, contextlib.suppress(OSError):
                    connection.sendall(b"hello\n")
            else:
                data, peer = listener.recvfrom(65536)
                listener.sendto(answer(data) if key.data == "dns" else data, peer)
            print(key.data, listener.getsockname()[0], peer[0], flush=True)


if __name__ == "__main__":
    serve(sys.argv[1:])
