"""The limits that the gateway keeps itself: time, and what a user may use in a day. And what `quota` shows inside."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from typing import TYPE_CHECKING

from sandbox_ssh import units
from sandbox_ssh.quotas import QUOTAS, UNLIMITED, render
from sandbox_ssh.store.usage import Together

if TYPE_CHECKING:
    from sandbox_ssh.store.quotas import Effective

WARNINGS = (300.0, 60.0)
"""Seconds before the end of a session at which its terminals are told."""

NEAR = 0.9
"""Of a day's quota: from here on the user is told."""


@dataclass(frozen=True, slots=True)
class End:
    """What ends a session at last, and in how many seconds."""

    quota: str
    seconds: float
    value: int
    of_tenant: bool = False

    def __str__(self) -> str:
        whose = " of your tenant" if self.of_tenant else ""
        return f"quota {self.quota}{whose} ({render(self.quota, self.value)})"


@dataclass(slots=True)
class Clock:
    """A session's time. Seconds of the monotonic clock: nobody gains an hour when the host's clock is set."""

    quotas: Effective
    started: float = field(default_factory=time.monotonic)
    active: float = field(default_factory=time.monotonic)
    """When a byte last went in or out."""
    sampled: float = field(default_factory=time.monotonic)
    """When the next three were looked up."""
    day: date = field(default_factory=lambda: datetime.now(UTC).date())
    user: Together = field(default_factory=Together)
    tenant: Together = field(default_factory=Together)
    _bytes: int = 0
    _warned: dict[tuple[str, bool], float] = field(default_factory=dict)
    _near: set[tuple[str, bool]] = field(default_factory=set)

    def moved(self, total: int) -> None:
        """The bytes of the session so far: new ones are activity."""
        if total != self._bytes:
            self._bytes, self.active = total, time.monotonic()

    def end(self) -> End | None:
        """The nearest end that comes whatever the user does."""
        return min((end for end in self.ends() if end.quota != "idle_time"), key=lambda end: end.seconds, default=None)

    def ends(self) -> Iterator[End]:
        now, values = time.monotonic(), self.quotas.values
        for quota, since in (("session_time", self.started), ("idle_time", self.active)):
            if values[quota] != UNLIMITED:
                yield End(quota, since + values[quota] - now, values[quota])
        for quota, value, together, of_tenant in self._daily():
            if quota == "session_time_per_day":
                # As many seconds pass in a second as there are sessions; and at midnight there are all of them again.
                left = (value - together.seconds) / max(1, together.sessions) - (now - self.sampled)
                if left < _until_midnight():
                    yield End(quota, left, value, of_tenant)
            elif together.network >= value:
                yield End(quota, 0, value, of_tenant)

    def _daily(self) -> Iterator[tuple[str, int, Together, bool]]:
        """The quotas of a day: name, value, what is used of it, whether it is the tenant's."""
        for values, together, of_tenant in (
            (self.quotas.values, self.user, False),
            (self.quotas.tenant, self.tenant, True),
        ):
            if self.day != datetime.now(UTC).date():
                together = Together(sessions=together.sessions)  # of yesterday, until the next sample
            for quota in ("session_time_per_day", "network_per_day"):
                if values.get(quota, UNLIMITED) != UNLIMITED:
                    yield quota, values[quota], together, of_tenant

    def warning(self, end: End) -> str | None:
        """What is to be said of an end that comes nearer, once at each of `WARNINGS`."""
        which = (end.quota, end.of_tenant)
        moments = [seconds for seconds in WARNINGS if seconds < end.value]
        if not moments and end.quota != "idle_time":
            moments = [end.value]  # of a session that short, its beginning
        passed = [seconds for seconds in moments if end.seconds <= seconds]
        told = self._warned.pop(which, math.inf)
        if not passed:
            return None  # the quota was raised, or a key was pressed
        self._warned[which] = passed[-1]
        if told <= passed[-1]:
            return None
        return f"this session ends in {units.duration(end.seconds)}: {end}"

    def near(self) -> list[str]:
        """Daily quotas of which most is used, each told once."""
        found = []
        for quota, value, together, of_tenant in self._daily():
            used = int(together.seconds if quota == "session_time_per_day" else together.network)
            if used >= NEAR * value and (quota, of_tenant) not in self._near:
                self._near.add((quota, of_tenant))
                found.append(f"{render(quota, used)} of today are used: {End(quota, 0, value, of_tenant)}")
        return found


def _until_midnight() -> float:
    now = datetime.now(UTC)
    return 86400 - (now - now.replace(hour=0, minute=0, second=0, microsecond=0)).total_seconds()


def notes(clock: Clock, use: Mapping[str, int]) -> str:
    """The text of /run/sandbox-ssh/quota: what this user may use, uses, and how long it may last."""
    effective, end = clock.quotas, clock.end()
    lines = [("QUOTA", "LIMIT", "IN USE")]
    for key in QUOTAS:
        bounds = [values[key] for values in (effective.values, effective.tenant) if values.get(key, -1) != UNLIMITED]
        used = render(key, use[key]) if key in use else "-"
        lines.append((key, render(key, min(bounds, default=UNLIMITED)), used))
    width = max(len(line[0]) for line in lines)
    middle = max(len(line[1]) for line in lines)
    table = [f"{name:<{width}}  {limit:>{middle}}  {used:>8}" for name, limit, used in lines]
    if end is None:
        last = "time left: unlimited"
    else:
        moment = datetime.now(UTC) + timedelta(seconds=max(0, end.seconds))
        last = f"time left: {units.duration(end.seconds)}, until {moment:%Y-%m-%d %H:%M:%SZ}: {end}"
    idle = effective.values["idle_time"]
    if idle != UNLIMITED:
        last += f"; or {render('idle_time', idle)} without a key pressed or a byte of output"
    return "\n".join([*table, last, ""])
