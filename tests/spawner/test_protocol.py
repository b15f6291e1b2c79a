"""Nothing but the table gets through, whatever the bytes are."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox_ssh.errors import ProtocolError
from sandbox_ssh.spawner import protocol
from sandbox_ssh.spawner.protocol import Capacity, Create, Destroy, Limit, Measure, Note, Signal, Spawn

CREATE = Create(
    "w0-1", 7, {"processes": 100, "cpu": 500}, 3, {}, "host", "sandbox", "uplink", 1 << 30, 1000, 64, -1, "QUOTA\n"
)
SPAWN = Spawn("w0-1", 0, "echo $HOME", {"LANG": "C.UTF-8"}, None)
PTY = {"columns": 80, "rows": 24, "width": 0, "height": 0, "modes": [[53, 1], [128, 38400]]}
VALID = [
    CREATE, SPAWN, Spawn("w0-1", 1, None, {}, PTY), Signal("w0-1", 0, "TERM"), Destroy("w0-1"),
    Limit(7, {"net_namespaces": 0}, 3, {"memory": 1 << 40}), Note("w0-1", "QUOTA\n"), Measure("w0-1"), Capacity(),
]  # fmt: skip

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=80),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=20), inner, max_size=5),
    max_leaves=20,
)


@pytest.mark.parametrize("request_", VALID, ids=lambda request: request.type)
def test_a_request_survives_the_wire(request_: protocol.Request) -> None:
    assert protocol.decode_request(protocol.encode_request(3, request_)) == (3, request_)


@given(st.binary(max_size=2000))
def test_bytes_that_are_no_message_are_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        protocol.decode_request(data)


@given(json_values)
def test_json_that_is_no_message_is_refused(value: Any) -> None:
    with pytest.raises(ProtocolError):
        protocol.decode_request(json.dumps(value).encode())


@given(st.sampled_from(VALID), st.data())
def test_a_field_of_another_form_is_refused_or_valid(request_: protocol.Request, data: st.DataObject) -> None:
    """One field replaced by anything: an error, or a value that the table allows too."""
    message = {"request": 1, "type": request_.type, **asdict(request_)}
    field = data.draw(st.sampled_from(sorted(message)))
    message[field] = data.draw(json_values)
    try:
        _, decoded = protocol.decode_request(json.dumps(message).encode())
    except ProtocolError:
        return
    for name, check in type(decoded).checks.items():
        assert check(getattr(decoded, name))


@given(st.sampled_from(VALID), st.text(max_size=10), json_values)
def test_fields_may_be_neither_missing_nor_more(request_: protocol.Request, name: str, value: Any) -> None:
    message = {"request": 1, "type": request_.type, **asdict(request_)}
    for field in asdict(request_):
        with pytest.raises(ProtocolError):
            protocol.decode_request(json.dumps({key: message[key] for key in message if key != field}).encode())
    if name not in message:
        with pytest.raises(ProtocolError):
            protocol.decode_request(json.dumps({**message, name: value}).encode())


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../x", "a/b", "/etc", "A", "-x", "a\n", "a\0", "ä", "x" * 64, "a b", "a\u202e"],
)
def test_names_are_names(name: str) -> None:
    for field in ("sandbox", "image"):
        message = {"request": 1, "type": "create", **asdict(CREATE), field: name}
        with pytest.raises(ProtocolError):
            protocol.decode_request(json.dumps(message).encode())


@pytest.mark.parametrize(
    "environment",
    [
        {"A=B": "x"},
        {"": "x"},
        {"1A": "x"},
        {"A": "x\0y"},
        {"A": 1},
        {"A": "x" * 5000},
        {f"A{n}": "" for n in range(65)},
        ["A"],
    ],
)
def test_environments_are_environments(environment: Any) -> None:
    message = {"request": 1, "type": "spawn", **asdict(SPAWN), "environment": environment}
    with pytest.raises(ProtocolError):
        protocol.decode_request(json.dumps(message).encode())


@pytest.mark.parametrize("value", [True, -1, 2**70, 1.0, "1", None])
def test_numbers_are_numbers(value: Any) -> None:
    for request_, field in ((CREATE, "user"), (CREATE, "tenant"), (SPAWN, "channel")):
        message = {"request": 1, "type": request_.type, **asdict(request_), field: value}
        with pytest.raises(ProtocolError):
            protocol.decode_request(json.dumps(message).encode())


def test_nesting_without_end_is_refused() -> None:
    with pytest.raises(ProtocolError):
        protocol.decode_request(b"[" * 60000)


def test_an_oversized_message_is_refused_on_both_sides() -> None:
    with pytest.raises(ProtocolError):
        protocol.decode_request(b" " * (protocol.MAX_MESSAGE + 1))
    with pytest.raises(ProtocolError):
        protocol.encode({"x": "y" * protocol.MAX_MESSAGE})
