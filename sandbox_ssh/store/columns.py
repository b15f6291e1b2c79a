"""Column types that hold the same values on SQLite and PostgreSQL.

All text goes through `clean` on its way into the database, stored or compared, and nowhere else: what a client
chooses (its version, a command, a name that it tries) can hold what PostgreSQL refuses to store.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import JSON, BigInteger, DateTime, Integer, Text
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.engine.interfaces import Dialect
from sqlalchemy.types import TypeDecorator

BigId = BigInteger().with_variant(Integer(), "sqlite")
"""SQLite numbers rows by itself only where the column is `INTEGER PRIMARY KEY`, which holds 64 bits there."""

_UNSTORABLE = re.compile("[\0\ud800-\udfff]")


def clean(text: str, limit: int) -> str:
    """The text without what PostgreSQL cannot hold: NUL bytes and lone surrogates, and not longer than `limit`."""
    return _UNSTORABLE.sub("\ufffd", text[:limit])


class CleanText(TypeDecorator[str]):
    """Text of at most `limit` characters; more is cut off: PostgreSQL indexes no more than 2,704 bytes."""

    impl = Text
    cache_ok = True

    def __init__(self, limit: int = 255) -> None:
        super().__init__()
        self.limit = limit

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        return None if value is None else clean(value, self.limit)


class Document(TypeDecorator[dict[str, Any]]):
    """A JSON object."""

    impl = JSON().with_variant(JSONB(), "postgresql")
    cache_ok = True

    def process_bind_param(self, value: dict[str, Any] | None, dialect: Dialect) -> Any:
        return _clean_document(value)


def _clean_document(value: Any) -> Any:
    if isinstance(value, str):
        return clean(value, 65536)
    if isinstance(value, dict):
        return {clean(str(key), 255): _clean_document(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_clean_document(item) for item in value]
    return value


class Timestamp(TypeDecorator[datetime]):
    """A moment: aware and in UTC in Python; without a zone in SQLite, which has no type for one."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError("a time without a zone")
        value = value.astimezone(UTC)
        return value.replace(tzinfo=None) if dialect.name == "sqlite" else value

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


def now() -> datetime:
    return datetime.now(UTC)
