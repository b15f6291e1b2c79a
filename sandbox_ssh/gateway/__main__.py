"""`python -m sandbox_ssh.gateway`: a worker, started by the supervisor with its listening sockets."""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
import sys
from functools import partial
from pathlib import Path

from sandbox_ssh import config
from sandbox_ssh.errors import SandboxSSHError
from sandbox_ssh.gateway import hardening, log
from sandbox_ssh.gateway.worker import Worker


def main() -> int:
    hardening.harden()
    hardening.raise_descriptor_limit()
    arguments = _parser().parse_args()
    load = partial(config.load, arguments.config, arguments.state_dir, arguments.database_url)
    try:
        settings = load()
        log.configure(settings.log.level, settings.log.format)
        asyncio.run(_serve(arguments, settings, load))
    except SandboxSSHError as error:
        print(f"sandbox-ssh gateway: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m sandbox_ssh.gateway", description=__doc__)
    parser.add_argument("--worker", type=int, required=True)
    parser.add_argument("--listen-fd", type=int, required=True, action="append")
    parser.add_argument("--ready-fd", type=int, required=True)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--state-dir", type=Path)
    parser.add_argument("--database-url")
    return parser


async def _serve(arguments: argparse.Namespace, settings: config.Config, load: partial[config.Config]) -> None:
    def ready() -> None:
        os.write(arguments.ready_fd, b"\0")
        os.close(arguments.ready_fd)

    worker = Worker(settings, arguments.worker, load)
    await worker.run([socket.socket(fileno=fd) for fd in arguments.listen_fd], ready)


if __name__ == "__main__":
    sys.exit(main())
