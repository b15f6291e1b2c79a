from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from sandbox_ssh.gateway.environment import MAX_BYTES, MAX_VARIABLES, accepted
from sandbox_ssh.spawner import protocol

DEFAULT = ("LANG", "LC_*")


def test_only_what_the_patterns_name_is_passed() -> None:
    offered = {"LANG": "C.UTF-8", "LC_ALL": "de_DE", "LD_PRELOAD": "/tmp/x.so", "LANGUAGE": "de", "lc_all": "x"}
    assert accepted(offered, DEFAULT) == {"LANG": "C.UTF-8", "LC_ALL": "de_DE"}


def test_a_question_mark_stands_for_one_character() -> None:
    assert accepted({"A1": "x", "A12": "y"}, ["A?"]) == {"A1": "x"}


def test_no_pattern_passes_nothing() -> None:
    assert accepted({"LANG": "C"}, []) == {}


def test_names_that_are_none_and_values_with_nul_are_left_out() -> None:
    offered = {"A-B": "x", "1A": "x", "": "x", "A\n": "x", "Ä": "x", "A=B": "x", "OK": "a\0b", "FINE": "x"}
    assert accepted(offered, ["*"]) == {"FINE": "x"}


def test_what_comes_after_the_bounds_is_left_out() -> None:
    assert len(accepted({f"V{n}": "" for n in range(1000)}, ["*"])) == MAX_VARIABLES
    assert accepted({"A": "x", "B": "x" * MAX_BYTES}, ["*"]) == {"A": "x"}


@given(st.dictionaries(st.text(), st.text()))
def test_whatever_a_client_sends_fits_the_spawners_protocol(offered: dict[str, str]) -> None:
    environment = accepted(offered, ["*"])
    assert protocol.Spawn.checks["environment"](environment)
    assert len(json.dumps(environment)) < protocol.MAX_MESSAGE
