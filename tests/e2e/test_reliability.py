"""Whatever dies, nothing is left behind, the server goes on, and the database tells the truth."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from typing import Any

import pytest

from tests.e2e.conftest import Server, descendants, end, processes, wait_until

pytestmark = pytest.mark.host

BUSY = "while :; do head -c 100000 /dev/zero; sleep 0.01; done"
LASTING = {"sandbox-ssh", "sandbox-spawner", "sandbox-uplink", "sandbox-gateway"}


def inits(server: Server) -> list[int]:
    return [row["init_pid"] for row in server.sessions("--state", "running")]


def sandbox_processes(server: Server) -> set[int]:
    """Processes in sandboxes: below the server, in another pid namespace than ours."""
    assert server.process is not None
    own = os.readlink("/proc/self/ns/pid")
    found = set()
    for pid in descendants(server.process.pid):
        try:
            if os.readlink(f"/proc/{pid}/ns/pid") != own:
                found.add(pid)
        except OSError:
            continue
    return found


def busy_clients(server: Server, count: int) -> list[subprocess.Popen[bytes]]:
    clients = [
        subprocess.Popen(
            server.ssh_command(BUSY), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        for _ in range(count)
    ]
    wait_until(lambda: len(server.sessions("--state", "running")) == count, f"{count} sessions to run")
    return clients


def recovered(server: Server) -> None:
    """No row lies, nothing of a sandbox is left, and a login works."""

    def live() -> list[Any]:
        return [row for row in server.sessions() if row["state"] in ("starting", "running", "closing")]

    try:
        wait_until(lambda: not live(), "every row to be closed")
    except pytest.fail.Exception:
        print(*live(), sep="\n")
        raise
    wait_until(lambda: not sandbox_processes(server), "the sandboxes' processes to end")
    assert all(row["ended_at"] and row["end_reason"] for row in server.sessions())
    wait_until(lambda: server.ssh("true").returncode == 0, "a login to work")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("sandbox-gateway", "server-failure"),
        ("sandbox-spawner", "server-failure"),
        ("sandbox-uplink", "server-failure"),
    ],
)
def test_a_killed_part_of_the_server_is_started_again(own_server: Server, name: str, reason: str) -> None:
    own_server.start()
    clients = busy_clients(own_server, 4)
    (victim,) = own_server.pids(name)
    os.kill(victim, signal.SIGKILL)
    for client in clients:
        client.wait(20)
    recovered(own_server)
    assert own_server.pids(name) != [victim]
    ended = [row for row in own_server.sessions() if row["end_reason"] != "exit"]
    assert len(ended) == 4 and {row["end_reason"] for row in ended} == {reason}


@pytest.mark.parametrize("what", ["init", "slirp4netns"])
def test_a_killed_part_of_a_sandbox_ends_that_session_alone(own_server: Server, what: str) -> None:
    own_server.start()
    clients = busy_clients(own_server, 2)
    if what == "init":
        os.kill(inits(own_server)[0], signal.SIGKILL)
    else:
        # Some are ready for the next login and serve nobody: all of them, so one in use is among them.
        for pid in own_server.pids("slirp4netns"):
            os.kill(pid, signal.SIGKILL)
            time.sleep(0.2)
            if any(client.poll() is not None for client in clients):
                break
    wait_until(lambda: any(client.poll() is not None for client in clients), "one client to be told")
    ended = wait_until(
        lambda: [row for row in own_server.sessions() if row["state"] == "closed"], "one row to be closed"
    )
    assert [row["end_reason"] for row in ended] == ["sandbox-failure"]
    assert len(own_server.sessions("--state", "running")) == 1
    for client in clients:
        end(client)
    recovered(own_server)


def test_a_killed_supervisor_takes_everything_with_it(own_server: Server) -> None:
    own_server.start()
    assert own_server.process is not None
    clients = busy_clients(own_server, 3)
    tree = descendants(own_server.process.pid)
    own_server.process.kill()
    own_server.process.wait()

    def alive() -> list[int]:
        table = processes()
        # What a killed parent leaves is reaped by the host's init, in its own time.
        return [pid for pid in tree & table.keys() if not _is_zombie(pid)]

    wait_until(lambda: not alive(), "every process of the server to die")
    for client in clients:
        client.wait(20)
    own_server.start()
    assert [row["state"] for row in own_server.sessions()] == ["lost"] * 3
    recovered(own_server)


def _is_zombie(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_random_kills_under_load(own_server: Server) -> None:
    """Clients come and go while one part after the other is killed; then the books must balance."""
    own_server.start()
    assert own_server.process is not None
    seed = int.from_bytes(os.urandom(4), "little")
    print(f"seed {seed}")
    chance = random.Random(seed)
    clients: list[subprocess.Popen[bytes]] = []
    for _ in range(25):
        clients += [
            subprocess.Popen(
                own_server.ssh_command(chance.choice([BUSY, "true", "sleep 1", "head -c 3000000 /dev/zero"])),
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )
            for _ in range(3)
        ]  # fmt: skip
        time.sleep(chance.uniform(0.05, 0.5))
        kind = chance.choice(
            ["sandbox-gateway", "sandbox-spawner", "sandbox-uplink", "slirp4netns", "init", "client", "client"]
        )
        if kind == "client":
            chance.choice(clients).kill()
            continue
        table = processes()
        victims = [
            pid
            for pid in descendants(own_server.process.pid)
            if table.get(pid, (0, ""))[1] in (kind, "catatonit" if kind == "init" else kind)
        ]
        with contextlib.suppress(IndexError, ProcessLookupError):  # there is none, or it has just ended
            os.kill(chance.choice(victims), signal.SIGKILL)
    time.sleep(1)
    for client in clients:
        client.kill()
        client.wait()
    recovered(own_server)


def test_sigterm_tells_the_sessions_and_ends(own_server: Server) -> None:
    own_server.config["SANDBOX_SSH_SERVER__SHUTDOWN_TIMEOUT"] = "1s"
    own_server.start()
    assert own_server.process is not None
    client = own_server.popen("sleep 100", options=("-tt",))
    wait_until(lambda: own_server.sessions("--state", "running"), "the session")
    time.sleep(0.5)
    own_server.process.terminate()
    assert own_server.process.wait(30) == 0
    out, err = client.communicate(timeout=20)
    assert b"shut" in out + err
    own_server.process = None
    (row,) = own_server.sessions()
    assert (row["state"], row["end_reason"]) == ("closed", "shutdown")


def test_sighup_reloads_and_a_bad_file_changes_nothing(own_server: Server) -> None:
    file = own_server.directory / "sandbox-ssh.toml"
    file.write_text('[sandbox]\nhostname = "first"\n')
    own_server.config["SANDBOX_SSH_CONFIG"] = str(file)
    own_server.start()
    assert own_server.process is not None
    assert own_server.run("hostname") == "first\n"
    file.write_text('[sandbox]\nhostname = "second"\n')
    own_server.process.send_signal(signal.SIGHUP)
    wait_until(lambda: own_server.run("hostname") == "second\n", "the new host name")
    file.write_text('[sandbox]\nhostnam = "third"\n')
    own_server.process.send_signal(signal.SIGHUP)
    wait_until(lambda: "hostnam" in own_server.log.read_text(), "the error to be logged")
    assert own_server.run("hostname") == "second\n"


def test_a_second_server_on_the_same_state_is_refused(own_server: Server) -> None:
    own_server.start()
    done = own_server.cli("serve", "--listen", "127.0.0.1:0", check=False)
    assert done.returncode == 1 and "runs on" in done.stderr and done.stdout == ""


DIGEST = """
import hashlib, sys
h = hashlib.sha256(); n = 0
while data := sys.stdin.buffer.read1(1 << 20): h.update(data); n += len(data)
print(n, h.hexdigest())
"""
GIB = 1 << 30


def seeded(size: int) -> str:
    """A command of this host that writes `size` bytes that no buffer repeats."""
    return f"openssl enc -aes-128-ctr -nosalt -pass pass:sandbox -in /dev/zero 2>/dev/null | head -c {size}"


@pytest.mark.parametrize("tty", [False, True], ids=["exec", "pty"])
def test_a_gigabyte_down_is_whole(service: Server, tty: bool) -> None:
    expected = subprocess.run(
        ["sh", "-c", f"{seeded(GIB)} | sha256sum"], capture_output=True, check=True, text=True
    ).stdout.split()[0]
    command = f"stty raw -echo; {seeded(GIB)}" if tty else seeded(GIB)
    client = subprocess.Popen(
        service.ssh_command(command, options=("-tt",) if tty else ()), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
    )
    done = subprocess.run(
        [sys.executable, "-c", DIGEST], stdin=client.stdout, capture_output=True, text=True, timeout=300
    )
    assert client.wait(20) == 0
    assert done.stdout.split() == [str(GIB), expected]


@pytest.mark.parametrize("tty", [False, True], ids=["exec", "pty"])
def test_a_gigabyte_up_is_whole(service: Server, tty: bool) -> None:
    expected = subprocess.run(
        ["sh", "-c", f"{seeded(GIB)} | sha256sum"], capture_output=True, check=True, text=True
    ).stdout.split()[0]
    # A terminal has no end of file: the far side counts.
    command = f"stty raw -echo; echo ready; head -c {GIB} | sha256sum" if tty else "echo ready; sha256sum"
    client = subprocess.Popen(
        service.ssh_command(command, options=("-tt", "-e", "none") if tty else ()),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert client.stdin is not None and client.stdout is not None
    assert client.stdout.readline().strip() == b"ready"
    source = subprocess.Popen(["sh", "-c", seeded(GIB)], stdout=client.stdin)
    assert source.wait(300) == 0
    if not tty:
        client.stdin.close()
    assert client.stdout.read().split()[0].decode() == expected
    end(client)


@pytest.mark.parametrize("tty", [False, True], ids=["exec", "pty"])
def test_ten_megabytes_and_gone_at_once(server: Server, tty: bool) -> None:
    size = 10_000_000
    for _ in range(3):
        command = f"{'stty raw;' if tty else ''} exec head -c {size} /dev/zero"
        assert len(server.ssh(command, options=("-tt",) if tty else ()).stdout) == size


STALLED = """
import asyncio, asyncssh, sys
class Deaf(asyncssh.SSHClientSession):
    def connection_made(self, chan): chan.pause_reading()
async def main():
    async with asyncssh.connect(sys.argv[1], int(sys.argv[2]), username='ada', client_keys=[sys.argv[3]], known_hosts=None) as c:
        deaf, _ = await c.create_session(Deaf, 'exec cat /dev/zero')
        for n in range(5):
            await asyncio.sleep(0.5)
            done = await c.run(f'echo {n}; head -c 1000000 /dev/zero | wc -c', check=True)
            print(done.stdout.split(), flush=True)
        deaf.close()
asyncio.run(main())
"""


def test_a_client_that_stops_reading_stalls_its_own_channel_only(service: Server) -> None:
    (gateway,) = service.pids("sandbox-gateway")

    def memory() -> int:
        with open(f"/proc/{gateway}/statm") as file:
            return int(file.read().split()[1]) * 4096

    service.run("true")
    before = memory()
    done = subprocess.run(
        [sys.executable, "-c", STALLED, service.host, str(service.port), str(service.key)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.splitlines() == [f"['{n}', '1000000']" for n in range(5)], done.stderr
    assert memory() - before < 64 << 20


def test_a_hurried_chown_is_mended_at_the_next_start(own_server: Server) -> None:
    own_server.start()
    own_server.run("true")
    own_server.stop()
    subprocess.run(["chown", "-R", "root:root", own_server.state], check=True)
    own_server.start()
    own_server.run("true")
