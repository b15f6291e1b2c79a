"""Sizes, durations and fractions as people write and read them."""

from __future__ import annotations

import re

_SECONDS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400}
_BYTES = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_PART = r"([0-9]+(?:\.[0-9]+)?)\s*(ms|[smhd])"
_DURATION = re.compile(rf"{_PART}(?:\s*{_PART})*", re.ASCII)
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?)(?:i?B)?", re.ASCII)


def parse_duration(text: object) -> float:
    """Seconds of `"500ms"`, `"30s"`, `"10m"`, `"1h 30m"` or `"7d"`.

    Raises `ValueError` for anything else; a bare number too, as nobody can see its unit.
    """
    if not isinstance(text, str) or _DURATION.fullmatch(text.strip()) is None:
        raise ValueError('a duration is a number and a unit, such as "30s", "10m" or "2h"')
    return sum(float(number) * _SECONDS[unit] for number, unit in re.findall(_PART, text, re.ASCII))


def parse_size(text: object) -> int:
    """Bytes of `"64K"`, `"512M"`, `"1.5G"`, `"1T"` (units of 1024) or of a whole number.

    Raises `ValueError` for anything else.
    """
    if type(text) is int and text >= 0:
        return text
    match = _SIZE.fullmatch(text.strip()) if isinstance(text, str) else None
    if match is None:
        raise ValueError('a size is a number and a unit, such as "64K", "512M" or "1G"')
    return int(float(match[1]) * _BYTES[match[2]])


def size(count: int | None) -> str | None:
    """Bytes as people read them: 512, 1.5K, 20M."""
    if count is None:
        return None
    value = float(count)
    for unit in ("", "K", "M", "G"):
        if value < 1024:
            return f"{value:.1f}".removesuffix(".0") + unit if value < 10 else f"{value:.0f}{unit}"
        value /= 1024
    return f"{value:.1f}".removesuffix(".0") + "T"


def duration(seconds: float) -> str:
    """Seconds as people read them, in the two largest units: 45s, 5m, 1h 30m, 2d 3h."""
    left = max(0, round(seconds))
    parts = []
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60), ("s", 1)):
        count, left = divmod(left, length)
        if count:
            parts.append(f"{count}{unit}")
        elif parts:
            break
    return " ".join(parts[:2]) or "0s"
