"""What a quota may be, and what a host can carry."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox_ssh import capacity, quotas
from sandbox_ssh.errors import QuotaError
from sandbox_ssh.quotas import QUOTAS, UNLIMITED, parse, render
from sandbox_ssh.sandbox import limits
from sandbox_ssh.spawner import protocol


def test_the_keys_are_those_that_administrators_were_promised() -> None:
    assert list(QUOTAS) == [
        "sessions",
        "user_namespaces",
        "mnt_namespaces",
        "pid_namespaces",
        "ipc_namespaces",
        "uts_namespaces",
        "net_namespaces",
        "cgroup_namespaces",
        "time_namespaces",
        "inotify_instances",
        "inotify_watches",
        "fanotify_groups",
        "fanotify_marks",
        "processes",
        "memory",
        "cpu",
        "cpu_weight",
        "open_files",
        "disk",
        "inodes",
        "ptys",
        "session_time",
        "idle_time",
        "logins_per_hour",
        "session_time_per_day",
        "network_per_day",
        "locked_memory",
        "message_queues",
        "pending_signals",
    ]


def test_both_sides_of_the_wall_know_the_same_limits() -> None:
    assert set(quotas.OF_A_HOLDER) == protocol.LIMITS == set(limits.KEYS)


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("sessions", "3", 3),
        ("memory", "512M", 512 * 2**20),
        ("memory", "1.5GiB", 1536 * 2**20),
        ("disk", "8388608", 2**23),
        ("session_time", "2h", 7200),
        ("session_time_per_day", "1.5d", 129600),
        ("session_time", "1h 30m", 5400),
        ("session_time", "2h30m", 9000),
        ("cpu", "0.5", 500),
        ("cpu", 2, 2000),
        ("network_per_day", "unlimited", UNLIMITED),
        ("processes", " UNLIMITED ", UNLIMITED),
        ("time_namespaces", "0", 0),
    ],
)
def test_values_as_people_write_them(key: str, text: object, value: int) -> None:
    assert parse(key, text) == value


@pytest.mark.parametrize(
    ("key", "text", "sentence"),
    [
        ("sessions", "0", "sessions: 0 is less than a session needs, 1"),
        ("sessions", "-1", "sessions: -1 is negative; no bound is written `unlimited`"),
        ("sessions", "three", "sessions: 'three' is not a whole number, or `unlimited`"),
        ("sessions", "1.5", "sessions: '1.5' is not a whole number"),
        ("sessions", True, "sessions: True is not a whole number"),
        ("memory", "1K", "memory: 1K is less than a session needs, 16M"),
        ("memory", "-5M", "memory: -5M is negative"),
        ("session_time", "99999999d", "session_time: 99999999d is more than there can be, 3650d"),
        ("session_time", "1h 30", "session_time: '1h 30' is not a duration"),
        ("session_time", "90", "session_time: '90' is not a duration"),
        ("cpu", "0", "cpu: 0 is less than a session needs, 0.01"),
        ("cpu", "nan", "cpu: 'nan' is not a number of cores"),
        ("cpu", "inf", "cpu: 'inf' is not a number of cores"),
        ("cpu_weight", "20000", "cpu_weight: 20000 is more than there can be, 10000"),
        ("cpu_weight", "unlimited", "cpu_weight: a share is a number from 1 to 10000"),
        ("ptys", "5000", "ptys: 5000 is more than there can be, 4096"),
        ("processes", "9" * 40, "is more than there can be"),
        ("memroy", "1G", "there is no quota 'memroy'; did you mean memory?"),
    ],
)
def test_values_that_make_no_sense(key: str, text: object, sentence: str) -> None:
    with pytest.raises(QuotaError) as caught:
        parse(key, text)
    assert sentence in str(caught.value)


@given(st.sampled_from(list(QUOTAS)), st.one_of(st.text(), st.integers(), st.floats(), st.none(), st.lists(st.text())))
def test_whatever_is_given_is_a_value_or_a_sentence(key: str, text: object) -> None:
    with contextlib.suppress(QuotaError):
        value = parse(key, text)
        assert value == UNLIMITED or QUOTAS[key].least <= value <= QUOTAS[key].most


@given(st.sampled_from([key for key in QUOTAS if QUOTAS[key].unit == "count"]), st.integers(0, 10_000))
def test_what_is_shown_can_be_given_again(key: str, value: int) -> None:
    value = min(max(value, QUOTAS[key].least), QUOTAS[key].most)
    assert parse(key, render(key, value)) == value


def test_values_over_the_hosts_are_refused_with_the_hosts() -> None:
    quotas.check_host({"memory": 2**30, "sessions": 100, "disk": UNLIMITED}, {"memory": 2**30})
    with pytest.raises(QuotaError, match=r"memory: 2G is over the limit of the host, 1G"):
        quotas.check_host({"memory": 2**31}, {"memory": 2**30})


def test_this_host_has_room() -> None:
    found = capacity.read(
        14, {"open_files": 20_000, "message_queues": 819_200}, {"memory": 2**30, "net_namespaces": 100}
    )
    assert found.sandboxes > 0 and found.users == 14
    assert found.limits["net_namespaces"] == int(Path("/proc/sys/user/max_net_namespaces").read_text())
    assert found.limits["memory"] == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert found.full == min(found.limits["memory"] // 2**30, found.limits["net_namespaces"] // 100)
    assert found.limits["message_queues"] == 819_200 and capacity.own_rlimits()["open_files"] > 0
    assert found.full_bound in ("memory", "net_namespaces")
    assert capacity.read(14, {"open_files": 1000}, {}).bound == "the hard limit of open files"
    assert capacity.read(14, {"open_files": 100}, {}).sandboxes == 0
    assert capacity.shortage() is None


IN_A_SMALL_HOST = """
import json, os, sys
from pathlib import Path
from sandbox_ssh import capacity
from sandbox_ssh.sandbox import syscalls
syscalls.unshare(syscalls.CLONE_NEWUSER)
Path('/proc/sys/user/max_net_namespaces').write_text('72')
found = capacity.read(10, {'open_files': 100000}, {})
print(json.dumps([found.sandboxes, found.bound, capacity.nested_left(found.limits, 19, {}),
    capacity.nested_left(found.limits, 20, {}), capacity.nested_left(found.limits, 10, {'net_namespaces': 19})]))
"""


def test_a_host_with_few_namespaces_says_which_and_counts_what_is_nested() -> None:
    """In a user namespace of its own, whose limits it may set: 72 are 32 to spare and 20 sandboxes with 2 each."""
    done = subprocess.run([sys.executable, "-c", IN_A_SMALL_HOST], capture_output=True, text=True, check=True)
    name = "user.max_net_namespaces"
    assert json.loads(done.stdout) == [20, name, None, f"{name} (72)", f"{name} (72)"]
