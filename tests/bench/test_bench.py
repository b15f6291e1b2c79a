"""The benchmarks run and write what bench/README.md promises. How fast is for people to judge."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.host
RUN = Path(__file__).parents[2] / "bench" / "run.py"


def test_a_quick_run_writes_figures_for_every_target(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- figures -->\nold\n<!-- end of figures -->\nafter\n")
    command = [sys.executable, str(RUN), "--quick", "--only", "login", "--only", "create", "--only", "admission"]
    command += ["--json", str(tmp_path / "figures.json"), "--markdown", str(readme)]
    subprocess.run(command, check=True, capture_output=True, timeout=200)
    login, create, *admission = json.loads((tmp_path / "figures.json").read_text())["figures"]
    assert login["values"].keys() == {"sshd", "sshd+bwrap", "sandbox-ssh", "bare asyncssh"}
    assert create["values"].keys() == {"sandbox-ssh"}
    assert all(value > 0 for value in login["values"].values()) and login["ratio"] > 0
    assert [row["figure"].partition(":")[0] for row in admission[::2]] == [
        "one admission, SQLite, 2,000 past sessions",
        "one admission, PostgreSQL, 2,000 past sessions",
        "8 KiB written and synced there",
    ]
    assert all(row["values"]["sandbox-ssh"] > 0 for row in admission)
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("after\n")
    assert "old" not in text and "`ssh host true`" in text
