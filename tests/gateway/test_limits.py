"""The clock of a session: what ends it first, and when its terminal is told."""

from __future__ import annotations

import time
from datetime import timedelta

import pytest

from sandbox_ssh.gateway import limits
from sandbox_ssh.gateway.limits import Clock, notes
from sandbox_ssh.quotas import QUOTAS, UNLIMITED
from sandbox_ssh.store.quotas import Effective
from sandbox_ssh.store.usage import Together

TIMES = ("session_time", "idle_time", "session_time_per_day", "network_per_day")


def clock(tenant: dict[str, int] | None = None, **values: int) -> Clock:
    unlimited = dict.fromkeys(TIMES, UNLIMITED)
    built_in = {key: quota.default for key, quota in QUOTAS.items()}
    return Clock(Effective(built_in | unlimited | values, dict.fromkeys(QUOTAS, "built-in"), tenant or {}))


@pytest.fixture(autouse=True)
def midnight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Far enough away, whenever these tests run."""
    monkeypatch.setattr(limits, "_until_midnight", lambda: 20_000.0)


def left(of: Clock) -> tuple[str, int] | None:
    end = min(of.ends(), key=lambda end: end.seconds, default=None)
    return None if end is None else (end.quota, round(end.seconds))


def test_nothing_ends_what_has_no_end() -> None:
    assert clock().end() is None


def test_the_nearest_end_counts() -> None:
    one = clock(session_time=100, idle_time=60)
    assert left(one) == ("idle_time", 60)
    one.started -= 70
    assert left(one) == ("session_time", 30)


def test_bytes_are_activity() -> None:
    one = clock(idle_time=60)
    one.active -= 59
    one.moved(0)
    assert left(one) == ("idle_time", 1)
    one.moved(1)
    assert left(one) == ("idle_time", 60)


def test_a_day_passes_faster_with_more_sessions() -> None:
    one = clock(session_time_per_day=1000)
    one.user = Together(seconds=400, sessions=3)
    assert left(one) == ("session_time_per_day", 200)
    one.sampled -= 50
    assert left(one) == ("session_time_per_day", 150)


def test_the_tenants_day_counts_too() -> None:
    one = clock({"session_time_per_day": 500, "network_per_day": 1000}, session_time_per_day=1000)
    one.user, one.tenant = Together(seconds=100, sessions=1), Together(seconds=100, network=999, sessions=4)
    assert left(one) == ("session_time_per_day", 100)
    assert str(one.end()) == "quota session_time_per_day of your tenant (8m 20s)"
    one.tenant = Together(seconds=100, network=1000, sessions=4)
    assert left(one) == ("network_per_day", 0)


def test_warnings_come_five_minutes_and_one_minute_before_the_end_and_once() -> None:
    one = clock(session_time=3600)

    def after(seconds: float) -> str | None:
        one.started = time.monotonic() - seconds
        end = one.end()
        assert end is not None
        return one.warning(end)

    assert after(3200) is None
    assert after(3301) == "this session ends in 4m 59s: quota session_time (1h)"
    assert after(3400) is None
    assert after(3541) == "this session ends in 59s: quota session_time (1h)"
    assert after(3550) is None
    assert after(100) is None, "the quota was raised"
    assert after(3301) is not None


def test_idle_time_is_warned_of_each_time_that_it_nears() -> None:
    one = clock(idle_time=300, session_time=3600)

    def warnings() -> list[str]:
        return [text for end in one.ends() if (text := one.warning(end)) is not None]

    assert warnings() == [], "no session is greeted with its idle time"
    for _ in range(2):
        one.active -= 250
        assert warnings() == ["this session ends in 50s: quota idle_time (5m)"]
        assert warnings() == []
        one.active = time.monotonic()
        assert warnings() == []
    one.started -= 3400
    assert warnings() == ["this session ends in 3m 20s: quota session_time (1h)"]
    assert one.end() is not None and one.end().quota == "session_time"  # type: ignore[union-attr]


def test_at_midnight_there_is_another_day(monkeypatch: pytest.MonkeyPatch) -> None:
    one = clock(session_time_per_day=1000, network_per_day=1000)
    one.user = Together(seconds=400, network=1000, sessions=1)
    assert left(one) == ("network_per_day", 0)
    one.day -= timedelta(days=1)
    assert left(one) == ("session_time_per_day", 1000)
    monkeypatch.setattr(limits, "_until_midnight", lambda: 500.0)
    assert left(one) is None


def test_a_short_session_is_warned_once() -> None:
    one = clock(session_time=30)
    end = one.end()
    assert end is not None
    assert one.warning(end) == "this session ends in 30s: quota session_time (30s)"
    assert one.warning(end) is None


def test_a_day_that_is_nearly_used_up_is_told_once() -> None:
    one = clock(session_time_per_day=1000, network_per_day=2**20)
    one.user = Together(seconds=899, network=2**19)
    assert one.near() == []
    one.user = Together(seconds=901, network=2**20 - 1)
    assert one.near() == [
        "15m 1s of today are used: quota session_time_per_day (16m 40s)",
        "1024K of today are used: quota network_per_day (1M)",
    ]
    assert one.near() == []


def test_what_quota_shows_inside() -> None:
    one = clock(session_time=7200, memory=2**29)
    text = notes(one, {"memory": 3 * 2**20, "sessions": 1})
    lines = {line.split()[0]: line.split()[1:] for line in text.splitlines()}
    assert lines["memory"] == ["512M", "3M"] and lines["sessions"][1] == "1" and lines["ptys"][1] == "-"
    assert text.splitlines()[-1].startswith("time left: 2h, until 20")
    assert text.splitlines()[-1].endswith("Z: quota session_time (2h)")
    assert notes(clock(), {}).splitlines()[-1] == "time left: unlimited"
    idle = notes(clock({"memory": 2**28}, idle_time=1800, session_time=7200), {}).splitlines()
    assert idle[-1].endswith("; or 30m without a key pressed or a byte of output")
    assert ["memory", "256M", "-"] in [line.split() for line in idle], "the tenant has less"
    assert set(QUOTAS) <= lines.keys()
    assert len(text) < 8192, "what the protocol carries"
