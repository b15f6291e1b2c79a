"""Speed and memory, side by side with what one would use instead: run with `script/bench`, as root.

Every figure is measured for all targets in one run, in turns, so that a noisy machine is noisy for each of them alike;
what counts is the ratio. Medians throughout.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from admission import measure as measure_admissions
from targets import (
    BareAsyncssh,
    SandboxSSH,
    Sshd,
    SshdBwrap,
    Target,
    clean_environment,
    pss,
    running,
)

from sandbox_ssh.quotas import QUOTAS, kernel_limits
from sandbox_ssh.spawner import protocol
from sandbox_ssh.spawner.client import SpawnerClient

GIB = 1 << 30


@dataclass
class Row:
    """One figure: a value for each target by its name, and which way is better."""

    figure: str
    unit: str
    values: dict[str, float]
    more_is_better: bool = False

    @property
    def ratio(self) -> float | None:
        ours, theirs = self.values.get("sandbox-ssh"), self.values.get("sshd")
        return ours / theirs if ours is not None and theirs else None


def login(targets: list[Target], quick: bool) -> list[Row]:
    runs = 5 if quick else 60
    times: dict[str, list[float]] = {target.name: [] for target in targets}
    for _ in range(runs):
        for target in targets:
            started = time.perf_counter()
            subprocess.run(target.ssh("true"), check=True, stdin=subprocess.DEVNULL, env=clean_environment())
            times[target.name].append(1e3 * (time.perf_counter() - started))
    return [Row("`ssh host true`", "ms", {name: statistics.median(values) for name, values in times.items()})]


def create(targets: list[Target], quick: bool) -> list[Row]:
    (target,) = [target for target in targets if isinstance(target, SandboxSSH)]
    return [
        Row("sandbox created, network ready", "ms", {target.name: asyncio.run(_create(target, 5 if quick else 100))})
    ]


async def _create(target: SandboxSSH, runs: int) -> float:
    events: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    client = SpawnerClient(events.put_nowait, lambda: None)
    await client.connect(target.state / "run" / "spawner.sock")
    times = []
    for number in range(runs):
        name = f"bench-{number}"
        started = time.perf_counter()
        await client.request(_sandbox(name))
        times.append(1e3 * (time.perf_counter() - started))
        await client.request(protocol.Destroy(name))
        while (await events.get())["event"] != "ended":
            pass
        await asyncio.sleep(0.05)
    client.close()
    return statistics.median(times)


def _sandbox(name: str) -> protocol.Create:
    """As a gateway asks for it when nobody has set a quota."""
    values = {key: quota.default for key, quota in QUOTAS.items()}
    return protocol.Create(
        sandbox=name,
        user=2**40,
        user_limits=kernel_limits(values),
        tenant=2**40,
        tenant_limits={},
        image="host",
        hostname="sandbox",
        network="uplink",
        disk=values["disk"],
        inodes=values["inodes"],
        ptys=values["ptys"],
        open_files=values["open_files"],
        notes="",
    )


def transfer(targets: list[Target], quick: bool) -> list[Row]:
    size = GIB // 16 if quick else GIB
    rows = []
    for cipher in ("", "aes128-gcm@openssh.com"):
        options = ("-c", cipher) if cipher else ()
        label = cipher.partition("@")[0] or "the client's default cipher"
        for down in (True, False):
            speeds: dict[str, list[float]] = {target.name: [] for target in targets}
            for _ in range(1 if quick else 5):
                for target in targets:
                    speeds[target.name].append(_move(target, size, down, options))
            values = {name: statistics.median(values) for name, values in speeds.items()}
            rows.append(Row(f"1 GB {'down' if down else 'up'}, {label}", "MB/s", values, more_is_better=True))
    return rows


def _move(target: Target, size: int, down: bool, options: tuple[str, ...]) -> float:
    started = time.perf_counter()
    if down:
        command = target.ssh(f"head -c {size} /dev/zero", options=options)
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    else:
        with subprocess.Popen(["head", "-c", str(size), "/dev/zero"], stdout=subprocess.PIPE) as source:
            subprocess.run(target.ssh("cat > /dev/null", options=options), check=True, stdin=source.stdout)
    return size / (time.perf_counter() - started) / 1e6


def memory(targets: list[Target], quick: bool) -> list[Row]:
    count = 5 if quick else 100
    each: dict[str, float] = {}
    fixed: dict[str, float] = {}
    for target in targets:
        assert target.process is not None
        fixed[target.name] = pss(target.process.pid) / 1024
        clients = []
        for _ in range(count):
            client = subprocess.Popen(
                target.ssh("echo in; exec sh"), stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=clean_environment()
            )
            clients.append(client)
            assert client.stdout is not None
            if client.stdout.readline() != b"in\n":
                sys.exit(f"{target.name} refused a session")
        time.sleep(1)
        each[target.name] = pss(target.process.pid) / 1024 / count
        for client in clients:
            client.kill()
            client.communicate()
    return [
        Row(f"PSS of one idle session with its share of the server, at {count}", "MB", each),
        Row("PSS of the server with no session", "MB", fixed),
    ]


def rate(targets: list[Target], quick: bool) -> list[Row]:
    seconds, clients = (2.0, 2) if quick else (15.0, 4)
    return [
        Row(f"logins a second, {clients} clients", "1/s", {t.name: _rate(t, seconds, clients) for t in targets}, True)
    ]


def _rate(target: Target, seconds: float, clients: int) -> float:
    counts = [0] * clients
    end = time.monotonic() + seconds

    def loop(number: int) -> None:
        while time.monotonic() < end:
            subprocess.run(target.ssh("true"), check=True, stdin=subprocess.DEVNULL, env=clean_environment())
            counts[number] += 1

    threads = [threading.Thread(target=loop, args=(number,)) for number in range(clients)]
    started = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / (time.monotonic() - started)


def admission(_: list[Target], quick: bool) -> list[Row]:
    past, runs = (2_000, 20) if quick else (1_000_000, 320)
    rows = []
    for name, times in asyncio.run(measure_admissions(past, runs)).items():
        figure = (
            "8 KiB written and synced there" if name == "disk" else f"one admission, {name}, {past:,} past sessions"
        )
        rows.append(Row(figure, "ms", {"sandbox-ssh": statistics.median(times)}))
        rows.append(Row(f"{figure}: 95th percentile", "ms", {"sandbox-ssh": statistics.quantiles(times, n=20)[-1]}))
    return rows


FIGURES: dict[str, tuple[Callable[[list[Target], bool], list[Row]], list[type[Target]]]] = {
    "login": (login, [Sshd, SshdBwrap, SandboxSSH, BareAsyncssh]),
    "create": (create, [SandboxSSH]),
    "transfer": (transfer, [Sshd, SshdBwrap, SandboxSSH]),
    "memory": (memory, [Sshd, SshdBwrap, SandboxSSH]),
    "rate": (rate, [Sshd, SshdBwrap, SandboxSSH, BareAsyncssh]),
    "admission": (admission, []),
}
COLUMNS = ("sshd", "sshd+bwrap", "sandbox-ssh", "bare asyncssh")


def table(rows: list[Row]) -> str:
    lines = [f"| | unit | {' | '.join(COLUMNS)} | ours / sshd |", f"| --- | --- |{' ---: |' * (len(COLUMNS) + 1)}"]
    for row in rows:
        cells = [f"{row.values[name]:.3g}" if name in row.values else "" for name in COLUMNS]
        ratio = f"{row.ratio:.2f}" if row.ratio is not None else ""
        lines.append(f"| {row.figure} | {row.unit} | {' | '.join(cells)} | {ratio} |")
    return "\n".join(lines)


def machine() -> str:
    model = next(
        (line.partition(": ")[2] for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        "?",
    )
    ssh = subprocess.run(["ssh", "-V"], capture_output=True, text=True, check=False).stderr.strip()
    memory_gib = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB
    return (
        f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores of {model}, {memory_gib:.0f} GiB, "
        f"Linux {platform.release().partition('-')[0]}, "
        f"Python {platform.python_version()}, {ssh.partition(',')[0]}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="script/bench", description=__doc__)
    parser.add_argument("--only", metavar="FIGURE", action="append", choices=list(FIGURES), help="may be repeated")
    parser.add_argument("--quick", action="store_true", help="a few runs each: to see that it works, not how fast")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="put the table between that file's markers")
    arguments = parser.parse_args()
    if os.getuid() != 0:
        sys.exit("script/bench: run it as root: it starts an sshd and a server in service mode")
    rows: list[Row] = []
    for name in arguments.only or FIGURES:
        measure, kinds = FIGURES[name]
        with (
            tempfile.TemporaryDirectory(prefix="sandbox-ssh-bench-") as directory,
            running(kinds, Path(directory)) as targets,
        ):
            for target in targets:
                subprocess.run(target.ssh("true"), check=True, stdin=subprocess.DEVNULL)  # nobody is cold
            rows += measure(targets, arguments.quick)
        print(f"{name} done", file=sys.stderr)
    print(machine(), table(rows), sep="\n\n")
    if arguments.json:
        figures = [{"figure": r.figure, "unit": r.unit, "values": r.values, "ratio": r.ratio} for r in rows]
        arguments.json.write_text(json.dumps({"machine": machine(), "figures": figures}, indent=2) + "\n")
    if arguments.markdown:
        before, _, rest = arguments.markdown.read_text().partition("<!-- figures -->\n")
        _, marker, after = rest.partition("<!-- end of figures -->")
        text = f"{before}<!-- figures -->\n{machine()}\n\n{table(rows)}\n\n{marker}{after}"
        arguments.markdown.write_text(text)


if __name__ == "__main__":
    main()
