"""The choice of a cipher, from what real clients say."""

from __future__ import annotations

import socket
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox_ssh.gateway.transport import ciphers_offered


@pytest.fixture(scope="module")
def greeting(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The version line and KEXINIT of the OpenSSH client that is installed here."""
    return _greeting_of(["-c", "chacha20-poly1305@openssh.com,aes128-gcm@openssh.com"])


def _greeting_of(arguments: list[str]) -> bytes:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        command = ["ssh", "-F", "none", "-o", "BatchMode=yes", "-p", port, *arguments, "nobody@127.0.0.1"]
        client = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        connection, _ = server.accept()
        with connection:
            connection.sendall(b"SSH-2.0-test\r\n")
            received = b""
            while ciphers_offered(received) is None:
                received += connection.recv(65536)
        client.kill()
        client.wait()
    return received


def test_the_ciphers_of_a_real_client_in_its_order(greeting: bytes) -> None:
    assert ciphers_offered(greeting) == [b"chacha20-poly1305@openssh.com", b"aes128-gcm@openssh.com"]


def test_a_greeting_is_judged_only_when_it_is_whole(greeting: bytes) -> None:
    whole = greeting.index(b"\n") + 1
    whole += 4 + int.from_bytes(greeting[whole : whole + 4], "big")
    assert all(ciphers_offered(greeting[:size]) is None for size in range(whole))
    assert ciphers_offered(greeting[:whole] + b"more") == ciphers_offered(greeting)


@given(st.binary(max_size=600), st.binary(max_size=600))
def test_no_bytes_make_it_fail(line: bytes, packet: bytes) -> None:
    ciphers_offered(packet)
    ciphers_offered(line + b"\r\n" + len(packet).to_bytes(4, "big") + packet)
    ciphers_offered(b"SSH-2.0-x\n" + len(packet).to_bytes(4, "big") + b"\x04\x14" + packet)


def test_only_ciphers_for_both_directions_count() -> None:
    def names(*words: bytes) -> bytes:
        joined = b",".join(words)
        return len(joined).to_bytes(4, "big") + joined

    payload = b"\x14" + bytes(16) + names(b"kex") + names(b"key") + names(b"a", b"b", b"c") + names(b"c", b"b")
    packet = b"\x04" + payload + bytes(4)
    assert ciphers_offered(b"SSH-2.0-x\r\n" + len(packet).to_bytes(4, "big") + packet) == [b"b", b"c"]


def test_a_client_that_is_not_ssh_offers_nothing() -> None:
    assert ciphers_offered(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" + Path(__file__).read_bytes()) is None
