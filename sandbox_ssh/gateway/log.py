"""Log lines on standard error: one line an event, and nothing in it that a client could forge."""

from __future__ import annotations

import logging
import sys

import structlog
from structlog.typing import EventDict, WrappedLogger


def configure(level: str, format: str) -> None:
    """Set up structlog for this process; `format` is `text` or `json`."""
    renderer = structlog.processors.JSONRenderer() if format == "json" else _text
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.PrintLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=True,
    )
    # asyncssh tells of every packet and every client that goes away; what matters of that is logged here.
    logging.getLogger("asyncssh").setLevel(logging.CRITICAL)


def printable(text: str) -> str:
    """Text from outside with every control and other unprintable character escaped (a log injection, CWE-117)."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _text(_logger: WrappedLogger, _name: str, event: EventDict) -> str:
    head = f"{event.pop('timestamp')} {event.pop('level'):<7} {printable(str(event.pop('event')))}"
    trace = event.pop("exception", None)
    pairs = "".join(f" {key}={_value(value)}" for key, value in event.items())
    return head + pairs if trace is None else f"{head}{pairs}\n{trace}"


def _value(value: object) -> str:
    text = printable(str(value))
    return f'"{text}"' if " " in text or '"' in text or not text else text
