"""What a person gets from `ssh user@host`, in service mode, in rootless mode, and with the single-id map."""

from __future__ import annotations

import fcntl
import hashlib
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time

import pytest

from tests.e2e.conftest import Server, descendants, end, processes, wait_until

pytestmark = pytest.mark.host


def test_commands_are_bytes_and_have_an_end(server: Server) -> None:
    assert server.ssh("printf 'a\udcff' | od -An -tx1").stdout.split() == [b"61", b"ff"]
    assert server.ssh("echo " + "x" * 30000).stdout == b"x" * 30000 + b"\n"
    refused = server.ssh("echo " + "x" * 40000)
    assert refused.returncode == 254 and b"a command may have 32768 characters" in refused.stderr


class Terminal:
    """`ssh -tt` on a terminal of ours, read and typed at like a person does."""

    def __init__(
        self, server: Server, *words: str, rows: int = 24, columns: int = 80, options: tuple[str, ...] = ()
    ) -> None:
        self.master, slave = pty.openpty()
        self.resize(rows, columns)
        environment = {"PATH": os.environ["PATH"], "HOME": str(server.directory), "TERM": "xterm-256color"}
        self.process = subprocess.Popen(
            server.ssh_command("-tt", *words, options=options) if not words else
            [*server.ssh_command(options=("-tt", *options)), *words],
            stdin=slave, stdout=slave, stderr=slave, env=environment, start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip
        os.close(slave)
        self.seen = b""

    def resize(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, columns * 8, rows * 16))

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def read(self, seconds: float) -> bytes:
        ready, _, _ = select.select([self.master], [], [], seconds)
        if not ready:
            return b""
        try:
            data = os.read(self.master, 65536)
        except OSError:
            return b""
        self.seen += data
        return data

    def expect(self, pattern: str, seconds: float = 20) -> re.Match[bytes]:
        deadline = time.monotonic() + seconds
        while not (match := re.search(pattern.encode(), self.seen, re.DOTALL)):
            self.read(0.2)
            if time.monotonic() > deadline:
                pytest.fail(f"waited for {pattern!r}, saw {self.seen!r}")
        self.seen = self.seen[match.end() :]
        return match

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)


@pytest.fixture
def terminal(server: Server):  # type: ignore[no-untyped-def]
    made = Terminal(server)
    yield made
    made.close()


def test_the_sandbox_is_a_machine_of_its_own(server: Server) -> None:
    out = server.run("id -u; cat /proc/1/comm; hostname; ps -e -o pid= | wc -l; whoami")
    uid, init, hostname, count, name = out.split()
    assert uid == "0" and name == "root"
    assert init not in ("sh", "bash"), "PID 1 is not the shell"
    assert hostname == "sandbox"
    assert int(count) <= 6, "only the sandbox's own processes are seen"


def test_every_namespace_is_another_than_the_hosts(server: Server) -> None:
    out = server.run("for n in user mnt pid ipc uts net cgroup; do readlink /proc/self/ns/$n; done")
    inside = set(out.split())
    outside = {os.readlink(f"/proc/self/ns/{kind}") for kind in ("user", "mnt", "pid", "ipc", "uts", "net", "cgroup")}
    assert len(inside) == 7 and not inside & outside
    row = server.latest()
    assert {f"{kind}:[{inode}]" for kind, inode in row["namespaces"].items()} == inside


def test_network_interfaces_are_the_tutorials(server: Server) -> None:
    out = server.run("ip -4 -o addr; ip route")
    assert re.search(r"lo\s+inet 127\.0\.0\.1/8", out)
    assert re.search(r"tap0\s+inet 10\.0\.2\.100/24", out)
    assert "default via 10.0.2.2 dev tap0" in out
    assert server.run("cat /etc/resolv.conf") == "nameserver 10.0.2.3\n"


def test_file_systems_are_fresh(server: Server) -> None:
    out = server.run("ls -A /tmp /dev/shm /dev/mqueue /run; awk '{print $5, $9}' /proc/self/mountinfo; ls /dev/pts")
    for point in ("/proc", "/sys", "/dev", "/dev/pts", "/tmp", "/dev/shm"):
        assert f"\n{point} " in out
    assert server.run("touch /tmp/a /dev/shm/b /etc/c /root/d; ls /tmp /dev/shm").split()
    assert server.ssh("ls /tmp/a /etc/c").returncode != 0, "another session sees none of it"


@pytest.mark.parametrize("path", ["/home", "/root", "/var", "/run"])
def test_nothing_of_the_hosts_is_visible(server: Server, path: str) -> None:
    marker = f"host-secret-{os.getpid()}"
    file = f"{path}/{marker}"
    with open(file, "w") as secret:
        secret.write("secret")
    try:
        assert marker not in server.run(f"ls -aR {path} 2>/dev/null; cat {file} 2>/dev/null; true")
    finally:
        os.unlink(file)


def test_secrets_of_etc_are_not_the_hosts(server: Server) -> None:
    shadow = server.run("cat /etc/shadow 2>/dev/null || true")
    assert not re.search(r"\$(y|6|1|2b)\$", shadow)
    for name in ("ssh", "sudoers", "machine-id", "ssl/private", "apt/auth.conf", "cron.d"):
        assert server.ssh(f"test -e /etc/{name}").returncode == 1


def test_usr_is_read_only_for_the_host_and_an_overlay_inside(service: Server) -> None:
    before = os.stat("/usr/bin/env").st_mtime_ns, os.path.getsize("/usr/bin/env")
    assert service.run(
        "echo changed > /usr/bin/env; rm /usr/bin/true; cat /usr/bin/env; ls -l /usr/bin/true 2>&1 || true"
    ).startswith("changed")
    assert (os.stat("/usr/bin/env").st_mtime_ns, os.path.getsize("/usr/bin/env")) == before
    assert os.path.exists("/usr/bin/true")
    assert service.run("stat -c %U:%G /usr/bin/env /etc/passwd /").split() == ["root:root"] * 3


def test_no_path_of_the_host_in_mountinfo(server: Server) -> None:
    mountinfo = server.run("cat /proc/self/mountinfo")
    for secret in (str(server.state), str(server.directory), os.getcwd(), "/var/lib"):
        assert secret not in mountinfo


def test_stdout_and_stderr_are_apart_and_the_status_is_told(server: Server) -> None:
    done = server.ssh("echo out; echo err >&2; exit 7")
    assert (done.stdout, done.stderr, done.returncode) == (b"out\n", b"err\n", 7)
    assert server.ssh("echo to-a-path > /dev/stderr").stderr == b"to-a-path\n"


def test_stdin_is_binary_clean(server: Server) -> None:
    data = bytes(range(256)) * 4096
    done = server.ssh("cat", input=data)
    assert hashlib.sha256(done.stdout).digest() == hashlib.sha256(data).digest()


def test_a_command_of_any_bytes(server: Server) -> None:
    assert server.run("printf %s 'grün \"$HOME\" `x`' | od -An -tx1").split() == [
        f"{byte:02x}" for byte in 'grün "$HOME" `x`'.encode()
    ]


def test_death_by_signal_is_told_as_ssh_tells_it(server: Server) -> None:
    done = server.ssh("kill -TERM $$", options=("-v",))
    assert done.returncode == 255
    assert b"exit-signal" in done.stderr
    row = server.latest()
    assert row["channels"][0]["exit_signal"] == "TERM"


def test_terminal_size_and_changes(server: Server, terminal: Terminal) -> None:
    terminal.type("stty size; tput cols\n")
    terminal.expect(r"24 80\r\n80\r\n")
    terminal.resize(50, 132)
    terminal.process.send_signal(signal.SIGWINCH)
    terminal.type("sleep 0.3; stty size\n")
    terminal.expect(r"50 132")


def test_terminal_is_a_terminal(server: Server, terminal: Terminal) -> None:
    terminal.type("tty; echo $SSH_TTY; echo T=$TERM; echo $0\n")
    terminal.expect(r"/dev/pts/(\d+)\r\n/dev/pts/\1\r\nT=xterm-256color\r\n-\w*sh")
    terminal.type("cat\n")
    time.sleep(0.5)
    terminal.type("\x03")
    terminal.expect(r"\^C.*# ")  # a line typed before the prompt is thrown away with the interrupt (termios(3), NOFLSH)
    terminal.type("echo after-$?\n")
    terminal.expect(r"after-130")
    terminal.type("exit 3\n")
    terminal.expect(r"logout|exit|closed|$")
    wait_until(lambda: terminal.read(0.1) == b"" and terminal.process.poll() is not None, "the client to leave")
    assert terminal.process.returncode == 3


def test_terminal_modes_are_applied(server: Server) -> None:
    master, slave = pty.openpty()
    attributes = termios.tcgetattr(slave)
    attributes[6][termios.VINTR] = b"\x07"
    attributes[3] &= ~termios.ECHOE
    termios.tcsetattr(slave, termios.TCSANOW, attributes)
    done = subprocess.run(
        server.ssh_command("stty -a", options=("-tt",)), stdin=slave, capture_output=True, timeout=60,
        env={"PATH": os.environ["PATH"], "HOME": str(server.directory), "TERM": "vt100"},
    )  # fmt: skip
    os.close(master)
    os.close(slave)
    assert b"intr = ^G" in done.stdout and b"-echoe" in done.stdout.replace(b"-echok", b"")


def test_environment(server: Server) -> None:
    out = server.run(
        "env",
        options=(
            "-o",
            "SetEnv=LC_PAPER=de_DE COLORTERM=truecolor LD_PRELOAD=/x PATH=/evil HOME=/evil",
            "-o",
            "SendEnv=LANG",
        ),
    )
    environment = dict(line.split("=", 1) for line in out.splitlines() if "=" in line)
    assert environment["LANG"] == "C.UTF-8"
    assert (environment["LC_PAPER"], environment["COLORTERM"]) == ("de_DE", "truecolor")
    assert "LD_PRELOAD" not in environment
    assert environment["PATH"].startswith("/usr/local/sbin:") and environment["HOME"] == "/root"
    assert environment["SSH_CONNECTION"].startswith("127.0.0.1 ")
    assert not [name for name in environment if name.startswith(("SANDBOX_", "PYTHON", "NOTIFY"))]


def test_several_channels_share_one_sandbox(server: Server) -> None:
    control = server.directory / "control"
    options = ("-o", f"ControlPath={control}")
    master = server.popen("sleep 60", options=("-o", "ControlMaster=yes", *options))
    try:
        wait_until(control.exists, "the control socket")
        server.run("echo shared > /tmp/shared; readlink /proc/self/ns/pid", options=options)
        assert server.run("cat /tmp/shared", options=options) == "shared\n"
        assert "sleep 60" in server.run("ps -e -o args", options=options)
        rows = [row for row in server.sessions() if row["state"] == "running"]
        assert len(rows) == 1 and len(rows[0]["channels"]) == 4
    finally:
        end(master)


def test_signal_requests_and_eof(server: Server) -> None:
    """OpenSSH's client sends no signal requests; asyncssh's does."""
    script = """
import asyncio, asyncssh, sys
async def main():
    async with asyncssh.connect(sys.argv[1], int(sys.argv[2]), username='ada', client_keys=[sys.argv[3]], known_hosts=None) as c:
        p = await c.create_process("trap 'echo got-usr1' USR1; echo ready; while :; do sleep 0.1; done")
        await p.stdout.readline(); p.send_signal('USR1')
        print((await p.stdout.readline()).strip()); p.send_signal('KILL')
        await p.wait(); print(p.exit_signal[0])
        p = await c.create_process('cat; echo eof-seen')
        p.stdin.write('x\\n'); p.stdin.write_eof()
        print((await p.stdout.read()).split()); await p.wait()
        p = await c.create_process('cat', term_type='xterm'); p.send_break(100); p.stdin.write('alive\\n')
        print((await p.stdout.readline()).strip()); p.close()
asyncio.run(main())
"""
    done = subprocess.run(
        [sys.executable, "-c", script, server.host, str(server.port), str(server.key)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.split("\n")[:4] == ["got-usr1", "KILL", "['x', 'eof-seen']", "alive"], done.stderr


def left_of(server: Server, before: set[int]) -> set[int]:
    assert server.process is not None
    lasting = {"sandbox-ssh", "sandbox-spawner", "sandbox-uplink", "sandbox-gateway"}
    table = processes()
    used = {pid for pid in descendants(server.process.pid) - before if table.get(pid, (0, ""))[1] not in lasting}
    return {pid for pid in used if table.get(pid, (0, ""))[1] != "slirp4netns"}


@pytest.mark.parametrize("how", ["exit", "client killed", "connection dropped"])
def test_all_of_it_goes_with_the_connection(server: Server, how: str) -> None:
    assert server.process is not None
    before = descendants(server.process.pid)
    client = server.popen("setsid sleep 1000 & setsid sleep 1000 & echo started; read x")
    assert client.stdout is not None and client.stdin is not None
    assert client.stdout.readline() == b"started\n"
    row = next(row for row in server.sessions("--state", "running"))
    assert os.path.exists(f"/proc/{row['init_pid']}")
    assert left_of(server, before)
    if how == "exit":
        client.stdin.write(b"\n")
        client.stdin.flush()
        end(client, signal.SIGTERM)
    elif how == "client killed":
        end(client)
    else:
        subprocess.run(["ss", "-K", "dport", "=", str(server.port)], capture_output=True, check=False)
        end(client)
    wait_until(lambda: not left_of(server, before), "the sandbox's processes to end")
    wait_until(lambda: server.json("session", "show", str(row["id"]))["state"] == "closed", "the row to be closed")
    assert server.json("session", "show", str(row["id"]))["ended_at"]


def test_nothing_accumulates(server: Server) -> None:
    server.run("true")
    wait_until(lambda: not server.sessions("--state", "running"), "no session")
    before = wait_until(lambda: server.descriptors(), "descriptors")
    for _ in range(10):
        server.run("true")
    wait_until(lambda: not server.sessions("--state", "running"), "no session")
    wait_until(
        lambda: all(abs(count - before[pid]) <= 6 for pid, count in server.descriptors().items()),
        f"descriptors as before: {before}",
    )


def test_nested_namespaces_work(server: Server) -> None:
    """The tutorial's `unshare -mipfunUr`, with its mounts, from inside."""
    out = server.run(
        "unshare -mipfunUr sh -c 'mount -t proc proc /proc && mount -t tmpfs none /tmp && mount -t sysfs none /sys"
        " && hostname inner && hostname && ps -e -o pid= | wc -l && ls /sys/class/net && cat /proc/self/uid_map'; hostname"
    )
    lines = out.split()
    assert lines[0] == "inner" and int(lines[1]) <= 4 and lines[2] == "lo" and lines[-1] == "sandbox"


def test_what_lies_below_proc_and_sys_shows_nothing_of_the_host(server: Server) -> None:
    out = server.run(
        "umount /proc; umount -l /proc; ls -d /proc/[0-9]* 2>/dev/null; umount /sys; ls /sys/class/net;"
        "umount /proc 2>&1; true"
    )
    assert not re.search(r"/proc/\d+", out)
    assert not [line for line in out.split() if re.match(r"(eth|ens|docker|veth)\d", line)]


def test_locked_mounts_cannot_be_undone(server: Server) -> None:
    for attempt in (
        "mount -o remount,bind,rw /dev",
        "umount /usr",
        "umount -l /dev",
        "mknod /tmp/sda b 8 0",
        "touch /dev/x",
    ):
        assert server.ssh(attempt).returncode != 0, attempt


def test_pid_1_holds_nothing(server: Server) -> None:
    out = server.run("cat /proc/1/environ | wc -c; ls -l /proc/1/fd; tr '\\0' ' ' < /proc/1/cmdline")
    assert out.startswith("0\n")
    assert not re.search(r"socket:|/dev/pts|memfd|pipe:", out)
    assert "/" not in out.splitlines()[-1]
