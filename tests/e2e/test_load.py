"""Many at once: fifty clients in one instant, three hundred sandboxes side by side."""

from __future__ import annotations

import os
import subprocess

import pytest

from tests.e2e.conftest import Server, wait_until

pytestmark = pytest.mark.host

PROVE = "ip -4 -o addr show tap0 | grep -q 10.0.2.100 && readlink /proc/self/ns/net && exec sleep 600"


def test_fifty_clients_in_one_instant_all_get_in(own_server: Server) -> None:
    own_server.cli("quota", "set", "--user", "ada", "sessions=unlimited")
    own_server.start()
    clients = [own_server.popen("readlink /proc/self/ns/net; read x") for _ in range(50)]
    seen = set()
    for client in clients:  # all of them live: the number of a namespace that has ended is the next one's
        assert client.stdout is not None
        seen.add(client.stdout.readline())
    assert len(seen) == 50 and b"" not in seen
    for client in clients:
        _, err = client.communicate(b"\n", timeout=120)
        assert client.returncode == 0, err
    wait_until(lambda: [row["exit_status"] for row in own_server.sessions("--state", "closed")] == [0] * 50, "the rows")


def test_three_hundred_sandboxes_at_once(own_server: Server) -> None:
    own_server.cli("quota", "set", "--user", "ada", "sessions=unlimited")
    own_server.start()
    clients: list[subprocess.Popen[bytes]] = []
    try:
        for batch in range(0, 300, 25):
            more = [own_server.popen(PROVE) for _ in range(25)]
            clients += more
            for client in more:
                assert client.stdout is not None
                assert client.stdout.readline().startswith(b"net:["), (batch, client.poll())
        rows = own_server.sessions("--state", "running")
        assert len(rows) == 300
        assert len({row["namespaces"]["net"] for row in rows}) == 300
        assert all(os.path.exists(f"/proc/{row['init_pid']}") for row in rows)
    finally:
        for client in clients:
            client.kill()
        for client in clients:
            client.communicate()
    wait_until(lambda: not own_server.sessions("--state", "running"), "all sessions to be closed", 60)
    wait_until(lambda: len(own_server.pids("slirp4netns")) <= 8, "their uplinks to be gone", 60)
