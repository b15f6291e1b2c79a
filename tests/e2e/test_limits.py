"""Limits that the kernel enforces, of real sessions: at the limit it says so, and nobody else notices."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import signal
import sqlite3
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from sandbox_ssh.quotas import QUOTAS
from tests.e2e.conftest import SINGLE_USER, Server, descendants, end, make_server, wait_until

pytestmark = pytest.mark.host

_numbers = itertools.count(1)
PUT_INTO_FORCE = 3.0  # seconds: a gateway looks twice a second

# Namespaces of one kind, made one after the other until that fails; then waits for a line: another try, or the end.
MAKE = """
i=0
try() {{ unshare {flag} sh -c 'echo made; exec sleep 100' & }}
while [ $i -lt {tries} ]; do i=$((i+1)); try; done
sleep 1; echo done
while read line; do try; sleep 0.5; echo done; done
"""
FLAGS = {
    "user": "-U", "mnt": "-m", "pid": "-pf", "ipc": "-i", "uts": "-u", "net": "-n", "cgroup": "-C", "time": "-T",
}  # fmt: skip


def new_user(server: Server, *quotas: str, tenant: str = "default") -> str:
    """A user of this test alone, with these quotas."""
    name = f"user{next(_numbers)}"
    server.cli("user", "add", name, "--key", server.directory / "key.pub", "--tenant", tenant)
    if quotas:
        server.cli("quota", "set", "--user", name, *quotas)
    return name


def until(client: subprocess.Popen[bytes], word: bytes = b"done") -> list[bytes]:
    """Lines of output up to one that is `word`."""
    assert client.stdout is not None
    lines: list[bytes] = []
    for line in iter(client.stdout.readline, b""):
        if line.strip() == word:
            return lines
        lines.append(line.strip())
    assert client.stderr is not None
    pytest.fail(f"the client ended: {lines} {client.stderr.read()!r}")


@contextlib.contextmanager
def client(server: Server, script: str, user: str) -> Iterator[subprocess.Popen[bytes]]:
    running = server.popen(script, user=user)
    try:
        yield running
    finally:
        end(running)


def rows_of(server: Server, user: str, *filters: str) -> list[dict[str, Any]]:
    return server.sessions("--user", user, *filters)


# Namespaces.


@pytest.mark.parametrize("kind", FLAGS)
def test_a_namespace_quota_counts_what_the_tenant_has(server: Server, kind: str) -> None:
    """Four, the session's own included; there is none of the kind `time` until the tenant makes one."""
    user = new_user(server, f"{kind}_namespaces=4")
    own = 0 if kind == "time" else 1
    with client(server, MAKE.format(flag=FLAGS[kind], tries=6), user) as one:
        assert until(one).count(b"made") == 4 - own
    done = server.ssh(f"for i in 1 2 3 4 5; do unshare {FLAGS[kind]} sleep 5 & done; wait", user=user)
    assert b"No space left on device" in done.stderr


def test_two_sessions_share_what_their_user_has_and_a_change_counts_at_once(server: Server) -> None:
    user = new_user(server, "pid_namespaces=6")
    script = MAKE.format(flag="-pf", tries=5)
    with client(server, script, user) as one, client(server, script, user) as other:
        assert until(one).count(b"made") + until(other).count(b"made") == 4
        server.cli("quota", "set", "--user", user, "pid_namespaces=8")
        time.sleep(PUT_INTO_FORCE)
        made = 0
        for side in (one, other, one, other):
            assert side.stdin is not None
            side.stdin.write(b"\n")
            side.stdin.flush()
            made += until(side).count(b"made")
        assert made == 2
        server.cli("quota", "set", "--user", user, "pid_namespaces=1")
        time.sleep(PUT_INTO_FORCE)
        assert one.stdin is not None
        one.stdin.write(b"\n")
        one.stdin.flush()
        assert until(one).count(b"made") == 0
    wait_until(lambda: not rows_of(server, user, "--state", "running"), "both sessions to end")
    assert server.ssh("echo in", user=user).stdout == b"in\n", "the last session's holder is gone with its limits"


def test_no_way_around_the_quota(server: Server) -> None:
    """Spread over nested user namespaces, and after raising every limit that one may write oneself."""
    user = new_user(server, "pid_namespaces=5")
    raise_all = "for f in /proc/sys/user/max_*; do echo 2147483647 >$f; done;"
    script = f"""
    {raise_all}
    for i in 1 2 3; do unshare -Ur sh -c '{raise_all} unshare -pf sh -c "echo made; exec sleep 100"' & done
    for i in 1 2 3; do unshare -Ur --map-root-user unshare -Ur unshare -pf sh -c 'echo made; exec sleep 100' & done
    sleep 2; echo done; read x
    """
    with client(server, script, user) as one:
        assert until(one).count(b"made") == 4


def test_a_tenants_quota_binds_the_sum_of_its_users(server: Server) -> None:
    tenant = f"tenant{next(_numbers)}"
    server.cli("tenant", "add", tenant)
    server.cli("quota", "set", "--tenant", tenant, "net_namespaces=5", "processes=60")
    users = [new_user(server, "net_namespaces=100", "processes=1000", tenant=tenant) for _ in range(2)]
    outsider = new_user(server)
    script = MAKE.format(flag="-n", tries=5)
    with client(server, script, users[0]) as one, client(server, script, users[1]) as other:
        assert until(one).count(b"made") + until(other).count(b"made") == 3
        assert server.ssh("unshare -n true && echo ok", user=outsider).stdout == b"ok\n"
        server.cli("quota", "set", "--tenant", tenant, "net_namespaces=6")
        time.sleep(PUT_INTO_FORCE)
        assert one.stdin is not None
        one.stdin.write(b"\n")
        one.stdin.flush()
        assert until(one).count(b"made") == 1


def test_a_tenants_processes_are_bound_together(server: Server) -> None:
    tenant = f"tenant{next(_numbers)}"
    server.cli("tenant", "add", tenant)
    server.cli("quota", "set", "--tenant", tenant, "processes=60")
    users = [new_user(server, "processes=1000", tenant=tenant) for _ in range(2)]
    with client(server, FORK_BOMB + "; echo done; while :; do read x; done", users[0]) as one:
        first = int(until(one)[0])
        assert 40 < first < 60
        end(one)
    with client(
        server, "for i in $(seq 30); do sleep 100 & done; echo done; while :; do read x; done", users[1]
    ) as one:
        until(one)
        forks = server.ssh(FORK_BOMB, user=users[0])
        assert forks.returncode == 0 and 10 < int(forks.stdout) < 30, forks


def test_a_tenants_user_namespaces_do_not_pay_for_its_users_holders(server: Server) -> None:
    tenant = f"tenant{next(_numbers)}"
    server.cli("tenant", "add", tenant)
    server.cli("quota", "set", "--tenant", tenant, "user_namespaces=6")
    users = [new_user(server, tenant=tenant) for _ in range(2)]
    with client(server, MAKE.format(flag="-U", tries=9), users[0]) as one:
        assert until(one).count(b"made") == 5
    wait_until(lambda: not rows_of(server, users[0], "--state", "running"), "the first to leave")
    with client(server, "echo done; read x", users[0]) as one:
        until(one)
        with client(server, MAKE.format(flag="-U", tries=9), users[1]) as other:
            assert until(other).count(b"made") == 4


KEEP = "import sys; sys.stdout.flush(); print('done', flush=True); sys.stdin.readline()\n"


def keep(program: str) -> str:
    """A command that runs a program, says what came of it, and keeps what it has."""
    return f"exec python3 -c {quoted(program + KEEP)}"


@pytest.mark.parametrize(
    ("quota", "program", "most"),
    [
        ("inotify_instances=9", "INOTIFY", 9),
        ("message_queues=60000", "QUEUES", 5),
        ("pending_signals=30", "SIGNALS", 30),
    ],
)
def test_two_sessions_of_a_user_share_a_limit_and_other_tenants_have_their_own(
    server: Server, quota: str, program: str, most: int
) -> None:
    """Also the host's: what the server as a whole may have is no pool that one tenant can empty."""
    tenant = f"tenant{next(_numbers)}"
    server.cli("tenant", "add", tenant)
    user, stranger = new_user(server, quota), new_user(server, quota, tenant=tenant)
    script = keep(globals()[program])
    with client(server, script, user) as one:
        mine = int(until(one)[-1].split()[0])
        assert 0 < mine <= most
        assert int(server.ssh(script, user=user, input=b"\n").stdout.split()[0]) == 0
        assert int(server.ssh(script, user=stranger, input=b"\n").stdout.split()[0]) == mine


def test_the_least_of_everything_still_lets_a_session_in(server: Server) -> None:
    user = new_user(server, *(f"{key}={_least(key)}" for key in QUOTAS))
    done = server.ssh("echo in", user=user)
    assert done.stdout == b"in\n", done.stderr


def _least(key: str) -> str:
    quota = QUOTAS[key]
    value = quota.least / 1000 if quota.unit == "cores" else quota.least
    if quota.unit == "seconds":
        return f"{max(20, value)}s"  # a session of a second is one, but too short for a test on a busy machine
    return f"{value:g}" if quota.unit == "cores" else str(max(value, 2) if key.endswith("per_day") else value)


# What else the kernel counts.

PYTHON = """
import ctypes, errno, fcntl, os, resource, signal, sys, time
libc = ctypes.CDLL(None, use_errno=True)
def many(call, most=5000):
    for count in range(most):
        result = call(count)
        if result == -1: return count, errno.errorcode[ctypes.get_errno()]
    return most, 'none'
"""
INOTIFY = (
    PYTHON
    + """
print(*many(lambda _: libc.inotify_init()))
"""
)
WATCHES = (
    PYTHON
    + """
fd = libc.inotify_init()
def watch(n):
    os.makedirs(f'/tmp/w/{n}', exist_ok=True)
    return libc.inotify_add_watch(fd, f'/tmp/w/{n}'.encode(), 0x100)
print(*many(watch))
"""
)
FANOTIFY = (
    PYTHON
    + """
FAN_CLASS_NOTIF, FAN_REPORT_FID = 0, 0x200
print(*many(lambda _: libc.fanotify_init(FAN_CLASS_NOTIF | FAN_REPORT_FID, 0)))
"""
)
MARKS = (
    PYTHON
    + """
fd = libc.fanotify_init(0x200, 0)
def mark(n):
    os.makedirs(f'/tmp/m/{n}', exist_ok=True)
    return libc.fanotify_mark(fd, 1, ctypes.c_uint64(0x100), -100, f'/tmp/m/{n}'.encode())
print(*many(mark))
"""
)
LOCKED = (
    PYTHON
    + """
import mmap
page = 4096
area = mmap.mmap(-1, 64 * 2**20)
address = ctypes.addressof(ctypes.c_char.from_buffer(area))
print(*many(lambda n: libc.mlock(ctypes.c_void_p(address + n * page), page), 16000))
"""
)
QUEUES = (
    PYTHON
    + """
rt = ctypes.CDLL('librt.so.1', use_errno=True)
class Attributes(ctypes.Structure): _fields_ = [(n, ctypes.c_long) for n in ('flags', 'most', 'size', 'now', 'a', 'b', 'c', 'd')]
print(*many(lambda n: rt.mq_open(f'/q{n}'.encode(), 0o102, 0o600, ctypes.byref(Attributes(0, 10, 1024)))))
"""
)
SIGNALS = (
    PYTHON
    + """
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGRTMIN])
print(*many(lambda _: libc.sigqueue(os.getpid(), signal.SIGRTMIN, None)))
"""
)
FILES = (
    PYTHON
    + """
resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
print(*many(lambda _: libc.dup(0), 200000))
"""
)
TERMINALS = (
    PYTHON
    + """
print(*many(lambda _: libc.open(b'/dev/ptmx', os.O_RDWR)))
"""
)
DATA = """
import os, resource
try: bytearray(200 * 2**20); print('got it')
except MemoryError: print('MemoryError')
"""
FORKS = (
    PYTHON
    + """
count = 0
while True:
    try: pid = os.fork()
    except OSError as error: print(count, errno.errorcode[error.errno]); break
    if pid == 0:
        for fd in (0, 1, 2): os.close(fd)
        signal.pause()
    count += 1
"""
)
FORK_BOMB = """python3 -c '
import os, signal
count = 0
while count < 5000:
    try: pid = os.fork()
    except OSError: break
    if pid == 0:
        for fd in (0, 1, 2): os.close(fd)
        signal.pause()
    count += 1
print(count)'
""".strip()


def probe(server: Server, user: str, program: str) -> list[str]:
    done = server.ssh("exec python3 -", user=user, input=program.encode())
    assert done.returncode == 0, done.stderr
    return done.stdout.decode().split()


@pytest.mark.parametrize(
    ("quota", "program", "most", "error"),
    [
        ("inotify_instances=7", INOTIFY, (7, 7), "EMFILE"),
        ("inotify_watches=11", WATCHES, (11, 11), "ENOSPC"),
        ("fanotify_groups=5", FANOTIFY, (5, 5), "EMFILE"),
        ("fanotify_marks=9", MARKS, (9, 9), "ENOSPC"),
        ("locked_memory=256K", LOCKED, (64, 64), "ENOMEM"),
        ("message_queues=60000", QUEUES, (1, 5), "EMFILE"),
        ("pending_signals=30", SIGNALS, (25, 30), "EAGAIN"),
        ("open_files=100", FILES, (90, 100), "EMFILE"),
        ("ptys=5", TERMINALS, (5, 5), "ENOSPC"),
        ("processes=50", FORKS, (40, 50), "EAGAIN"),
    ],
    ids=lambda value: value.partition("=")[0] if isinstance(value, str) and "=" in value else "",
)
def test_at_the_limit_the_kernel_says_so(
    server: Server, quota: str, program: str, most: tuple[int, int], error: str
) -> None:
    user = new_user(server, quota)
    count, said = probe(server, user, program)
    assert most[0] <= int(count) <= most[1] and said == error


def test_fork_bombs_over_many_ids_and_user_namespaces_stop_too(server: Server) -> None:
    user = new_user(server, "processes=80")
    ids = "0" if server.user == SINGLE_USER else "1 2 3 4"  # that mode has no other
    script = f"""
    for id in {ids}; do
        setpriv --reuid=$id --regid=$id --keep-groups sh -c 'for i in $(seq 60); do sleep 100 & done' >/dev/null 2>&1 &
    done
    unshare -Ur sh -c 'for i in $(seq 60); do sleep 100 & done' >/dev/null 2>&1
    while :; do read x; done
    """
    with client(server, script, user):
        row = wait_until(lambda: rows_of(server, user, "--state", "running"), "the session")[0]
        # Counted from the host: in the sandbox there is no room for a process that would.
        wait_until(lambda: len(descendants(row["init_pid"])) >= 70, "the bomb to have spread")
        time.sleep(1)
        assert len(descendants(row["init_pid"])) <= 81
        assert server.ssh("echo in").stdout == b"in\n", "another user"


def test_the_disk_is_one_for_all_that_is_written(server: Server) -> None:
    user = new_user(server, "disk=20M", "inodes=5000")
    out = server.ssh(
        "for d in /tmp /dev/shm /root /var/tmp /run; do head -c 6M /dev/zero >$d/x || echo full $d; done;"
        "rm -f /tmp/x /dev/shm/x /root/x /var/tmp/x /run/x; i=0;"
        "while : >/tmp/f$i; do i=$((i+1)); [ $i -gt 6000 ] && break; done; echo $i; quota | grep -E '^(disk|inodes)'",
        user=user,
    )
    lines = out.stdout.decode().split("\n")
    assert lines[:2] == ["full /var/tmp", "full /run"], out
    assert 3000 < int(lines[2]) < 5000
    assert out.stderr.count(b"No space left on device") >= 3
    assert lines[3].split()[:2] == ["disk", "20M"]


def test_one_process_has_no_more_memory_than_the_quota_where_no_cgroup_holds_it(server: Server) -> None:
    """RLIMIT_DATA. That the sum is bound takes cgroup v2: tests/vm."""
    user = new_user(server, "memory=100M")
    assert probe(server, user, DATA) == ["MemoryError"]
    assert probe(server, new_user(server, "memory=unlimited"), DATA) == ["got", "it"]


# Sessions, and what a client is told.


def test_who_is_refused_reads_why_and_scripts_can_tell(server: Server) -> None:
    user = new_user(server, "sessions=1", "session_time=1h")
    with client(server, "echo done; read x", user) as one:
        until(one)
        for words in (["true"], []):
            done = server.ssh(*words, user=user)
            assert done.returncode == 253
            assert re.fullmatch(
                rb"sandbox-ssh: refused: quota sessions of user \w+: 1 of 1 in use, "
                rb"until one of them ends, \d{4}-\d\d-\d\d \d\d:\d\d:\d\dZ at the latest\r?\n",
                done.stderr,
            ), done.stderr
            assert done.stdout == b""
        row = rows_of(server, user)[-1]
        assert (row["state"], row["refused_by"]) == ("refused", "sessions")
        assert row["end_reason"].startswith("quota sessions of user")
        on_terminal = server.ssh(user=user, options=("-tt",))
        assert b"sandbox-ssh: refused: quota sessions" in on_terminal.stdout and on_terminal.returncode == 253
    wait_until(lambda: server.ssh("true", user=user).returncode == 0, "room for another")
    (line,) = server.json("usage", "--user", user)
    assert (line["refused"], line["sessions"]) == (3, 2)


def test_no_room_in_the_kernel_is_the_same_sentence(server: Server) -> None:
    """The first session has taken all; the second would need one more of each."""
    user = new_user(server, "net_namespaces=2")
    with client(server, MAKE.format(flag="-n", tries=2), user) as one:
        assert until(one).count(b"made") == 1
        done = server.ssh("true", user=user)
        assert done.returncode == 253
        expected = (
            f"sandbox-ssh: refused: quota net_namespaces of user {user}: 2 of 2 in use, until one of them is gone"
        )
        assert done.stderr.decode().strip() == expected
        wait_until(lambda: rows_of(server, user)[-1]["state"] == "refused", "the row to say so")
        assert rows_of(server, user)[-1]["refused_by"] == "kernel"


def test_a_session_ends_when_its_time_is_up(server: Server) -> None:
    user = new_user(server, "session_time=10s")
    done = server.ssh("sleep 600", user=user, options=("-tt",))
    assert done.returncode != 0
    assert re.search(rb"this session ends in \d+s: quota session_time \(10s\)", done.stdout)
    assert b"this session has ended: quota session_time (10s) is used up" in done.stdout
    wait_until(lambda: rows_of(server, user)[-1]["state"] == "closed", "the row")
    assert rows_of(server, user)[-1]["end_reason"] == "quota session_time"
    done = server.ssh("sleep 600", user=user)
    assert b"ends in" not in done.stderr, "programs that read standard error are not warned"
    assert b"this session has ended" in done.stderr


def test_an_idle_session_ends_and_a_busy_one_does_not(server: Server) -> None:
    user = new_user(server, "idle_time=5s")
    done = server.ssh("for i in 1 2 3 4 5 6 7 8 9; do sleep 1; echo $i; done; sleep 600", user=user)
    assert done.stdout.split()[-1] == b"9"
    assert b"quota idle_time (5s) is used up" in done.stderr


def test_a_days_time_ends_the_session_and_keeps_the_next_out(server: Server) -> None:
    user = new_user(server, "session_time_per_day=15s")
    if not 30 < time.time() % 86400 < 86400 - 90:
        time.sleep(120)  # at midnight there is another day
    done = server.ssh("sleep 600", user=user)
    assert b"this session has ended: quota session_time_per_day (15s) is used up" in done.stderr
    wait_until(lambda: rows_of(server, user)[-1]["end_reason"] == "quota session_time_per_day", "the row")
    refused = server.ssh("true", user=user)
    assert refused.returncode == 253 and b"15s of 15s in use, until 20" in refused.stderr
    (line,) = server.json("usage", "--user", user)
    assert 14.9 <= line["seconds"] < 20


def test_quota_inside_shows_ones_own_and_nothing_else(server: Server) -> None:
    user = new_user(server, "processes=77", "session_time=2h")
    script = (
        "sleep 3; quota; ls -lA /run/sandbox-ssh; ( echo x >/run/sandbox-ssh/quota || rm -f /run/sandbox-ssh/quota ) 2>&1;"
        "mount -o remount,rw /run/sandbox-ssh; umount /run/sandbox-ssh; echo done; read x; sleep 3; quota"
    )
    with client(server, script, user) as one:
        lines = [line.decode() for line in until(one)]
        shown = {line.split()[0]: line.split()[1:] for line in lines if line}
        assert shown["processes"][0] == "77" and 2 <= int(shown["processes"][1]) < 10
        assert shown["sessions"][1] == "1" and shown["net_namespaces"] == ["1024", "1"]
        assert re.match(
            r"time left: (1h 59m|2h), until \d{4}-", next(line for line in lines if line.startswith("time left"))
        )
        assert [line.split()[-1] for line in lines if line.startswith("-r")] == ["quota"]
        assert sum("Read-only file system" in line for line in lines) == 2
        server.cli("quota", "set", "--user", user, "processes=78", "session_time=unlimited")
        assert one.stdin is not None and one.stdout is not None
        one.stdin.write(b"\n")
        one.stdin.flush()
        after = one.stdout.read().decode()
        assert re.search(r"^processes +78 ", after, re.M) and "time left: unlimited" in after
        assert "ada" not in after and "tenant" not in after


# Accounting.


def test_what_a_session_used_is_in_its_row_and_in_usage(server: Server) -> None:
    user = new_user(server)
    script = (
        "head -c 30M /dev/zero >/tmp/x; for i in 1 2 3 4 5; do sleep 24 & done; unshare -n sleep 24 &"
        "python3 -c 'import time\nx = bytearray(50 * 2**20)\nend = time.process_time() + 1.5\nwhile time.process_time() < end: pass\ntime.sleep(20)'; wait"
    )
    with client(server, script, user) as one:
        # The first sample may have come before all of it was there.
        used = wait_until(
            lambda: (now := server.json("quota", "show", "--user", user))["net_namespaces"]["in_use"] == 2 and now,
            "a sample of both net namespaces", 40,
        )  # fmt: skip
        assert used["processes"]["in_use"] >= 7
        assert used["disk"]["in_use"] >= 30 * 2**20 and used["sessions"]["in_use"] == 1
        one.wait(60)
    wait_until(lambda: rows_of(server, user)[-1]["state"] == "closed", "the row")
    row = rows_of(server, user)[-1]
    assert row["cpu_seconds"] >= 1.4 and row["memory_peak_bytes"] >= 50 * 2**20
    assert row["disk_peak_bytes"] >= 30 * 2**20 and 7 <= row["processes_peak"] < 30
    assert row["namespaces_peak"]["net"] == 2 and row["namespaces_peak"]["user"] == 1
    (line,) = server.json("usage", "--user", user)
    assert (line["sessions"], line["cpu_seconds"]) == (1, row["cpu_seconds"])
    assert line["seconds"] >= 23 and line["memory_peak_bytes"] == row["memory_peak_bytes"]


def test_a_crash_of_the_gateway_loses_at_most_one_interval(own_server: Server) -> None:
    own_server.start()
    burn = "python3 -c 'import time\nend = time.process_time() + 2\nwhile time.process_time() < end: pass'; sleep 60"
    one = own_server.popen(burn)
    wait_until(lambda: own_server.sessions() and (own_server.latest()["cpu_seconds"] or 0) >= 1.9, "a sample", 40)
    (gateway,) = own_server.pids("sandbox-gateway")
    os.kill(gateway, signal.SIGKILL)
    one.communicate(timeout=30)
    wait_until(lambda: own_server.latest()["state"] == "lost", "the row to be closed")
    (line,) = own_server.json("usage")
    assert line["cpu_seconds"] >= 1.9 and line["sessions"] == 1 and line["seconds"] > 5
    wait_until(lambda: own_server.ssh("true").returncode == 0, "a login")
    assert own_server.json("usage")[0]["sessions"] == 2


def test_what_tenants_have_nested_is_counted_for_the_node_and_forgotten_with_them(own_server: Server) -> None:
    own_server.start()

    def nested() -> int:
        with contextlib.closing(sqlite3.connect(own_server.state / "sandbox-ssh.db")) as database:
            found = database.execute("SELECT nested FROM nodes").fetchone()[0]
        return int((json.loads(found or "null") or {}).get("net_namespaces", 0))

    with client(own_server, "unshare -n sleep 600 & unshare -n sleep 600", "ada"):
        wait_until(lambda: nested() == 2, "a sample", 30)
    wait_until(lambda: nested() == 0, "the next one", 30)


# The host.


def test_the_server_says_how_much_it_can_carry(own_server: Server) -> None:
    own_server.start()
    own_server.run("true")
    wait_until(lambda: "this host has room" in own_server.log.read_text(), "the line")
    assert re.search(r"this host has room +sessions=\d+ bound=", own_server.log.read_text())
    assert own_server.process is not None
    before = own_server.log.read_text().count("this host has room")
    own_server.process.send_signal(signal.SIGHUP)
    wait_until(lambda: own_server.log.read_text().count("this host has room") > before, "it to be said again")
    done = own_server.cli("quota", "set", "--default", "memory=512T", check=False)
    assert done.returncode == 1 and "memory: 512T is over the limit of the host" in done.stderr
    (found,) = [row for row in own_server.json("doctor", "--mode", "service") if row["check"] == "capacity"]
    assert "sessions at once" in found["found"]


def test_a_configuration_that_promises_more_than_the_host_has_does_not_start(own_server: Server) -> None:
    own_server.config["SANDBOX_SSH_SANDBOX__QUOTAS"] = "memory=512T"
    done = own_server.cli("serve", check=False)
    assert done.returncode == 1
    assert "sandbox.quotas: memory: 512T is over the limit of the host" in done.stderr


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_of_200_real_logins_at_once_7_get_in(kind: str, request: pytest.FixtureRequest) -> None:
    """Two nodes of one database with two workers each."""
    with make_server("service") as one, make_server("service") as two:
        if kind == "postgresql":
            url = request.getfixturevalue("postgres_url")
        else:
            one.cli("db", "upgrade")
            url = f"sqlite:///{one.state}/sandbox-ssh.db"
        two.key = one.key
        for number, server in enumerate((one, two)):
            server.config |= {
                "SANDBOX_SSH_DATABASE_URL": url, "SANDBOX_SSH_SERVER__NODE": f"node{number}",
                "SANDBOX_SSH_SERVER__WORKERS": "2", "SANDBOX_SSH_SSH__MAX_STARTUPS": "300",
                "SANDBOX_SSH_SSH__LOGIN_GRACE_TIME": "120s",
            }  # fmt: skip
        one.add_user()
        one.cli("quota", "set", "--user", "ada", "sessions=7")
        one.start()
        two.start()
        clients = [server.popen("echo in; read x") for _ in range(100) for server in (one, two)]
        wait_until(lambda: len(one.sessions("--state", "refused")) == 193, "193 refusals", 120)
        wait_until(lambda: len(one.sessions("--state", "running")) == 7, "the 7 to run")
        answers: Counter[tuple[int, bytes]] = Counter()
        for running in clients:
            out, err = running.communicate(b"\n", timeout=60)
            answers[running.returncode, out] += 1
            assert running.returncode == 0 or b"quota sessions of user ada: 7 of 7 in use" in err
        assert answers == {(0, b"in\n"): 7, (253, b""): 193}
        rows = one.sessions()
        assert {row["node"] for row in rows} == {"node0", "node1"}
        assert Counter(row["state"] for row in rows)["refused"] == 193


# All of it at once.

ATTACKS = {
    "fork bomb": "while :; do (while :; do sleep 100 & done) & done 2>/dev/null",
    "memory bomb": "while :; do python3 -c 'x = bytearray(10**12)' || python3 -c 'x = bytearray(90 * 2**20)'; done 2>/dev/null",
    "disk filler": "while :; do head -c 1G /dev/zero >/tmp/x; head -c 1G /dev/zero >/dev/shm/x; done 2>/dev/null",
    "inode filler": "i=0; while :; do : >/tmp/f$i; i=$((i+1)); done 2>/dev/null",
    "terminals and descriptors": "while :; do python3 -c 'import os\ntry:\n while True: os.open(\"/dev/ptmx\", os.O_RDWR); os.dup(0)\nexcept OSError: import time; time.sleep(1)'; done 2>/dev/null",
    "inotify": "python3 -c 'import ctypes, time\nc = ctypes.CDLL(None)\nwhile True: c.inotify_init() >= 0 or time.sleep(1)'",
    "namespaces": "while :; do unshare -Urmipnuf sleep 100 & done 2>/dev/null",
    "processors": "while :; do (while :; do :; done) & sleep 0.1; done 2>/dev/null",
}


def test_one_user_at_every_limit_at_once_stops_nobody_else(server: Server) -> None:
    """Without a cgroup the kernel does not share processors by user: that nobody is slowed down is shown in tests/vm."""
    mallory = new_user(
        server, "processes=120", "memory=100M", "disk=30M", "inodes=5000", "ptys=10", "open_files=128",
        "inotify_instances=10", "sessions=8", *(f"{kind}_namespaces=20" for kind in FLAGS),
    )  # fmt: skip
    other = new_user(server)
    clients = [
        server.popen(f"read x; exec timeout -s KILL 120 sh -c {quoted(script)}", user=mallory)
        for script in ATTACKS.values()
    ]
    try:
        wait_until(lambda: len(rows_of(server, mallory, "--state", "running")) == len(ATTACKS), "the attack to begin")
        for running in clients:
            assert running.stdin is not None
            running.stdin.write(b"\n")  # all at once, and only now that all are in
            running.stdin.flush()
        used = wait_until(
            lambda: (now := server.json("quota", "show", "--user", mallory))["processes"]["in_use"] >= 100 and now,
            "the attack to be at its limits", 60,
        )  # fmt: skip
        assert used["processes"]["in_use"] <= 130
        # Of the peaks: the filler begins again and again.
        wait_until(
            lambda: max(row["disk_peak_bytes"] or 0 for row in rows_of(server, mallory)) > 25 * 2**20,
            "the disk to have been full", 60,
        )  # fmt: skip
        for _ in range(3):
            done = server.ssh(
                "unshare -Urmipnuf true && head -c 50M /dev/zero >/tmp/x && tty; echo in", user=other, timeout=120
            )
            assert done.stdout.split()[-1:] == [b"in"] and not done.stderr, done
        with client(server, "echo done; cat", other) as shell:
            until(shell)
            assert shell.stdin is not None and shell.stdout is not None
            shell.stdin.write(b"hello\n")
            shell.stdin.flush()
            assert shell.stdout.readline() == b"hello\n"
    finally:
        for running in clients:
            end(running)
    wait_until(lambda: not rows_of(server, mallory, "--state", "running"), "the attacker's sessions to be gone", 60)
    wait_until(lambda: server.ssh("echo in", user=mallory).stdout == b"in\n", "even the attacker to get in again", 30)


def quoted(script: str) -> str:
    return "'" + script.replace("'", "'\\''") + "'"
