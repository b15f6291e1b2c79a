from __future__ import annotations

import json

import pytest
import structlog

from sandbox_ssh.gateway import log


@pytest.mark.parametrize("text", ["plain", "ünïcödé", "with spaces"])
def test_printable_text_stays_as_it_is(text: str) -> None:
    assert log.printable(text) == text


@pytest.mark.parametrize(
    ("text", "escaped"),
    [("a\nb", r"a\nb"), ("\x1b[2J", r"\x1b[2J"), ("\u202eevil", r"\u202eevil"), ("\x9b31m", r"\x9b31m")],
)
def test_what_could_forge_a_line_or_drive_a_terminal_is_escaped(text: str, escaped: str) -> None:
    assert log.printable(text) == escaped


@pytest.mark.parametrize("format", ["text", "json"])
def test_a_clients_words_stay_within_one_line(format: str, capsys: pytest.CaptureFixture[str]) -> None:
    log.configure("info", format)
    structlog.get_logger().warning("authentication failed", user='x" level=error\r\nfake', address="::1")
    lines = capsys.readouterr().err.splitlines()
    structlog.reset_defaults()
    assert len(lines) == 1 and lines[0].isprintable()
    if format == "json":
        assert json.loads(lines[0])["user"] == 'x" level=error\r\nfake'
