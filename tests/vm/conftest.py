"""The machine that these tests run in, with the server installed as docs/operations.md says."""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator

import pytest

from tests.vm import image
from tests.vm.machine import Machine, boot


@pytest.fixture(scope="session")
def booted() -> Iterator[Machine]:
    with boot() as machine:
        yield machine


@pytest.fixture(scope="session")
def machine(booted: Machine) -> Machine:
    """A machine with the unit running, and a user `ada` whom no test limits."""
    for section in ("Install", "Settings", "systemd"):
        for command in _documented(section):
            if "git clone" not in command and "script/bootstrap" not in command:  # tests.vm.image has done these
                booted.run(command)
            if section == "Settings":
                # The machine's loopback is not the tests'; and what waits for a session to leave need not wait for 10 s.
                booted.run(
                    "sed -i -e 's/^#listen = .*/listen = [\"0.0.0.0:2222\"]/'"
                    " -e 's/^#shutdown_timeout = .*/shutdown_timeout = \"1s\"/' /etc/sandbox-ssh/sandbox-ssh.toml"
                )
    booted.add_user("ada")
    return booted


def _documented(section: str) -> list[str]:
    """The commands of root in a section of docs/operations.md."""
    text = (image.CHECKOUT / "docs/operations.md").read_text()
    found = re.search(rf"^## {section}\n(.*?)^## ", text, re.MULTILINE | re.DOTALL)
    assert found is not None, f"docs/operations.md has no section {section}"
    return re.findall(r"^\$ sudo (.*)$", found[1], re.MULTILINE)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.CallInfo[None], None]:
    """A test that fails shows what the machine has to say."""
    outcome = yield
    report = outcome.get_result()  # type: ignore[attr-defined]
    machine = getattr(item, "funcargs", {}).get("machine")
    if report.failed and machine is not None:
        report.sections.append(("journal", machine.try_("journalctl -u sandbox-ssh -n 60 --no-pager").stdout))
        report.sections.append(("console", machine.last_of_console()))
