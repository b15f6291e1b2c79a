"""What a sandbox reaches, and what its root, with raw frames and routes of its own, does not."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest

from tests.e2e import internet
from tests.e2e.conftest import Server, end, make_server, wait_until
from tests.e2e.internet import HERE_LAN, HERE_PUBLIC, LAN, METADATA, PORT, PUBLIC, StandIn

pytestmark = pytest.mark.host

REACH = """
import socket, sys
def tcp(address):
    try:
        with socket.create_connection((address, 7000), 2) as s: return s.recv(9).decode().strip() or 'nothing'
    except OSError as e: return 'no'
def udp(address):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.settimeout(2)
        try: s.sendto(b'echo', (address, 7000)); return s.recv(9).decode()
        except OSError: return 'no'
for address in sys.argv[1:]: print(tcp(address), udp(address))
"""

# A SYN and a datagram in raw frames to each address, tagged and not; every source and destination MAC that could do.
RAW = """
import socket, struct, sys, fcntl
s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0800)); s.bind(('tap0', 0))
mac = fcntl.ioctl(s, 0x8927, struct.pack('256s', b'tap0'))[18:24]
def csum(x):
    x += b'\\0' * (len(x) % 2); q = sum(struct.unpack(f'!{len(x)//2}H', x))
    q = (q >> 16) + (q & 0xffff); return ~(q + (q >> 16)) & 0xffff
ip = socket.inet_aton
def header(source, to, proto, payload):
    h = struct.pack('!BBHHHBBH4s4s', 0x45, 0, 20 + len(payload), 1, 0, 64, proto, 0, ip(source), ip(to))
    return h[:10] + struct.pack('!H', csum(h)) + h[12:] + payload
for n, to in enumerate(sys.argv[1:]):
  for source in ('10.0.2.100', '127.0.0.1', '10.0.2.2', to):
    syn = struct.pack('!HHIIBBHHH', 41000 + n, 7000, 1000, 0, 5 << 4, 2, 65535, 0, 0)
    syn = syn[:16] + struct.pack('!H', csum(ip(source) + ip(to) + struct.pack('!BBH', 0, 6, 20) + syn)) + syn[18:]
    dgram = struct.pack('!HHHH', 42000 + n, 7000, 12, 0) + b'echo'
    for gateway in ('52550a000202', '52550a000203', 'ffffffffffff'):
      for tag in (b'', b'\\x81\\x00\\x00\\x05', b'\\x81\\x00\\x00\\x05\\x81\\x00\\x00\\x05', b'\\x88\\xa8\\x00\\x05'):
        for proto, payload in ((6, syn), (17, dgram)):
          s.send(bytes.fromhex(gateway) + mac + tag + b'\\x08\\x00' + header(source, to, proto, payload))
print('sent')
"""

ROUTE_LOCALNET = """
echo 1 > /proc/sys/net/ipv4/conf/all/route_localnet; echo 1 > /proc/sys/net/ipv4/conf/tap0/route_localnet
ip route del local 127.0.0.0/8 table local; ip route del local 127.0.0.1 table local
ip addr del 127.0.0.1/8 dev lo; ip route add 127.0.0.0/8 via 10.0.2.2 dev tap0 src 10.0.2.100
"""


@pytest.fixture(scope="module")
def network() -> Iterator[internet.Internet]:
    with internet.internet() as made:
        yield made


@pytest.fixture(scope="module", params=["service", "rootless"])
def online(request: pytest.FixtureRequest, network: internet.Internet) -> Iterator[Server]:
    """A server whose host is in the little internet."""
    visible = request.getfixturevalue("visible") if request.param == "rootless" else ()
    with make_server(request.param, (*network.prefix, *visible), network.prefix) as made:
        made.add_user()
        yield made.start()


@pytest.fixture(scope="module")
def there(network: internet.Internet) -> Iterator[StandIn]:
    made = StandIn(network.there, PUBLIC, LAN, METADATA)
    yield made
    made.stop()


@pytest.fixture(scope="module")
def here(network: internet.Internet) -> Iterator[StandIn]:
    made = StandIn(network.here, "127.0.0.1", "127.0.0.53", HERE_PUBLIC, HERE_LAN)
    yield made
    made.stop()


def python(server: Server, script: str, *arguments: str, before: str = "true") -> str:
    done = server.ssh(f"{before}\npython3 - {' '.join(arguments)}", input=script.encode(), timeout=180)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()


def test_the_outside_is_reached(online: Server, there: StandIn) -> None:
    assert python(online, REACH, PUBLIC).split() == ["hello", "echo"]
    assert online.run("getent ahostsv4 example.test").split()[0] == PUBLIC
    assert "1 received" in online.run(f"ping -c 1 -W 5 {PUBLIC}")


def test_large_datagrams_and_segments_pass(online: Server, there: StandIn) -> None:
    """Every interface on the way has the MTU that the sandbox's has."""
    script = """
import socket, sys
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.settimeout(5)
for size in (1000, 8000, 30000):
    s.sendto(b"x" * size, (sys.argv[1], 7000)); print(len(s.recv(65536)))
"""
    assert python(online, script, PUBLIC).split() == ["1000", "8000", "30000"]


ECHOES = """
import socket, sys
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.settimeout(5)
while True:
    for _ in range(100): s.sendto(b"x" * 10000, (sys.argv[1], 7000)); s.recv(65536)
    if len(sys.argv) == 2: break
"""


def test_bytes_through_the_uplink_are_counted_and_cannot_be_hidden(online: Server, there: StandIn) -> None:
    """At the tap, where the tenant has no right: not even without interface and address of its own."""
    python(online, ECHOES, PUBLIC)
    row = wait_until(lambda: (last := online.latest())["state"] == "closed" and last, "the row")
    for key in ("network_in", "network_out"):
        assert 1_000_000 < row[key] < 1_200_000, row
    command = f"python3 - {PUBLIC}; ip link del tap0; true"
    assert online.ssh(command, input=ECHOES.encode()).returncode == 0
    row = wait_until(lambda: (last := online.latest())["state"] == "closed" and last, "the row")
    assert row["network_in"] > 1_000_000 and row["network_out"] > 1_000_000


def test_a_days_network_ends_the_session_and_keeps_the_next_out(online: Server, there: StandIn) -> None:
    online.cli("user", "add", "grace", "--key", online.directory / "key.pub")
    online.cli("quota", "set", "--user", "grace", "network_per_day=5M")
    done = online.ssh(f"python3 - {PUBLIC} on", input=ECHOES.encode(), user="grace")
    assert done.returncode != 0
    assert b"this session has ended: quota network_per_day (5M) is used up" in done.stderr
    wait_until(lambda: online.latest()["end_reason"] == "quota network_per_day", "the row")
    refused = online.ssh("true", user="grace")
    assert refused.returncode == 253
    assert b"refused: quota network_per_day of user grace:" in refused.stderr and b"00:00:00Z" in refused.stderr
    online.cli("quota", "set", "--user", "grace", "network_per_day=10G")
    assert b"today are used" not in online.ssh("true", user="grace", options=("-tt",)).stdout
    used = online.json("quota", "show", "--user", "grace")["network_per_day"]["in_use"]
    online.cli("quota", "set", "--user", "grace", f"network_per_day={used * 105 // 100}")
    warned = online.ssh("sleep 2", user="grace", options=("-tt",)).stdout
    assert b"of today are used: quota network_per_day" in warned


def test_what_must_not_be_reached_is_not(online: Server, there: StandIn, here: StandIn) -> None:
    seen, seen_here = len(there.contacts), len(here.contacts)
    private = (LAN, METADATA, HERE_LAN, HERE_PUBLIC, "10.0.2.2", "127.0.0.1")
    assert set(python(online, REACH, *private).split()) == {"no"}
    assert [line for line in there.contacts[seen:] if PUBLIC not in line] == [] and here.contacts[seen_here:] == []


def test_raw_frames_reach_nothing(online: Server, there: StandIn, here: StandIn) -> None:
    seen, seen_here = len(there.contacts), len(here.contacts)
    targets = ("127.0.0.1", "127.0.0.53", "0.0.0.0", HERE_LAN, HERE_PUBLIC, LAN, METADATA, "10.0.2.2")
    assert python(online, RAW, *targets) == "sent\n"
    assert python(online, REACH, PUBLIC).split() == ["hello", "echo"], "the stand-ins still count"
    assert [line for line in there.contacts[seen:] if PUBLIC not in line.split()[1]] == []
    assert here.contacts[seen_here:] == []


def test_route_localnet_reaches_nothing(online: Server, here: StandIn) -> None:
    seen = len(here.contacts)
    assert set(python(online, REACH, "127.0.0.1", "127.0.0.53", before=ROUTE_LOCALNET).split()) == {"no"}
    assert here.contacts[seen:] == []


def test_a_device_bound_socket_reaches_nothing(online: Server, here: StandIn) -> None:
    seen = len(here.contacts)
    script = """
import socket
for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
    s = socket.socket(socket.AF_INET, kind); s.settimeout(1)
    s.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b'tap0')
    try: s.connect(('127.0.0.1', 7000)); s.send(b'x')
    except OSError: pass
"""
    for _ in range(6):  # each session has an uplink of its own, and each must have its filter
        python(online, script)
    assert here.contacts[seen:] == []


def test_the_stand_ins_would_hear_it(network: internet.Internet, here: StandIn) -> None:
    """The attacks' target is alive: what stays silent above answers from the host itself."""
    seen = len(here.contacts)
    script = f"import socket; print(socket.create_connection(('127.0.0.1', {PORT}), 2).recv(9))"
    subprocess.run(["ip", "netns", "exec", network.here, "python3", "-c", script], check=True, capture_output=True)
    wait_until(lambda: here.contacts[seen:], "the contact to be counted")


def test_sandboxes_do_not_reach_each_other(online: Server) -> None:
    other = online.popen("nc -l -p 7000 2>/dev/null || python3 -m http.server 7000; true")
    try:
        assert python(online, REACH, "10.0.2.100").split() == ["no", "no"]
    finally:
        end(other)
